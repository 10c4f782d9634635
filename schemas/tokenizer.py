"""The identity of a tokenizer, which teacher and student must share.

Works on any transformers tokenizer by what it offers (`get_vocab`, `special_tokens_map`,
`backend_tokenizer`), so this module needs none of that library.
"""

import hashlib
import json
from typing import Any

from decant.schemas.strict import canonical

SCHEME = "sha256:v2_"
"""Starts a fingerprint over all that turns a text into ids and back."""
OLDER_SCHEME = "sha256:"
"""Starts one over vocabulary, merges and special tokens alone, which older caches hold."""

PROBES = (
    "hello there what is two plus two",
    " leading, trailing ",
    "two  spaces,   three\tand a tab",
    "one line\nand another\n\n\nand a third\r\n",
    "0 12 345 6789 3.14159 1,000,000",
    "déjà vu, naïve façade; nai\u0308ve cafe\u0301 Ωμέγα ﬁ ²",
    "日本語のテキスト。中文文本，한국어 العربية हिन्दी",
    "😀 👩‍👩‍👧‍👦 🇫🇷 ✓ — … “quoted”",
    "def f(x):\n    return {'a': [x] * 2}  # comment\n\n\tif (a != b) && c_d->e: pass",
    "I'm don't WE'LL UPPER lower MixedCase snake_case",
    "<unlikely_tag> [brackets] {braces} \\backslash",
)
"""Texts that tokenizers of unlike normalisers, pre-tokenizers or post-processors encode unlike."""


def tokenizer_fingerprint(tokenizer: Any, *, like: str = "") -> str:
    """A hash that is equal when two tokenizers make the same ids of a text, and say the same.

    Covers vocabulary, model (merges, scores), normaliser, pre-tokenizer, post-processor, decoder,
    added tokens with their flags, and special tokens. Chat templates, padding side and lengths do
    not count: they change texts, not ids. `like` is a fingerprint to compare with: one of the older
    scheme gets its equal in that scheme.
    """
    if like and not like.startswith(SCHEME):
        return OLDER_SCHEME + hashlib.sha256(canonical(_older_identity(tokenizer))).hexdigest()
    backend = described_backend(tokenizer)
    for name in ("version", "truncation", "padding"):
        backend.pop(name, None)
    if isinstance(backend.get("model", {}).get("vocab"), dict):  # else a list, with scores
        del backend["model"]["vocab"]
    identity = {
        "vocab": tokenizer.get_vocab(),
        "backend": _without_defaults(backend),
        "special": _special(tokenizer),
    }
    return SCHEME + hashlib.sha256(canonical(identity)).hexdigest()


def has_fingerprint(tokenizer: Any, fingerprint: str) -> bool:
    """Whether this fingerprint, of whichever scheme, is the tokenizer's."""
    return tokenizer_fingerprint(tokenizer, like=fingerprint) == fingerprint


def are_comparable(one: str, other: str) -> bool:
    """Whether two fingerprints are of one scheme, so that they differ if the tokenizers do."""
    return one.startswith(SCHEME) == other.startswith(SCHEME)


def first_difference(
    one: Any, other: Any, texts: tuple[str, ...] = PROBES, *, only_bare: bool = False
) -> str:
    """The first text that two tokenizers encode or decode unlike, with what each gives; or "".

    `only_bare`: what they put around a text does not count.
    """
    for text in texts:
        for with_special in (False,) if only_bare else (False, True):
            ours, theirs = tried(one, text, with_special), tried(other, text, with_special)
            if ours != theirs:
                special = " with special tokens" if with_special else ""
                return (
                    f"{text!r:.40} gives {_shown(one, ours)} and {_shown(other, theirs)}{special}"
                )
        if isinstance(ours, list) and (said := decode(one, ours)) != (echo := decode(other, ours)):
            return f"{text!r:.40} comes back as {said!r:.60} and {echo!r:.60}"
    return ""


def encode(tokenizer: Any, text: str, with_special: bool) -> list[int]:
    """Ids of a text, with or without what the tokenizer puts around it."""
    if callable(tokenizer):
        encoded = tokenizer(text, add_special_tokens=with_special, verbose=False)
        return list(encoded["input_ids"])
    return list(tokenizer.backend_tokenizer.encode(text, add_special_tokens=with_special).ids)


def decode(tokenizer: Any, ids: list[int]) -> str:
    """The text of ids, special tokens included, with nothing tidied up."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        return str(backend.decode(ids, skip_special_tokens=False))
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _older_identity(tokenizer: Any) -> dict[str, Any]:
    merges = described_backend(tokenizer).get("model", {}).get("merges")
    return {"vocab": tokenizer.get_vocab(), "merges": merges, "special": _special(tokenizer)}


def _special(tokenizer: Any) -> dict[str, Any]:
    return {
        name: value if isinstance(value, list) else str(value)
        for name, value in tokenizer.special_tokens_map.items()
        if name in ("bos_token", "eos_token", "unk_token")
    }


def described_backend(tokenizer: Any) -> dict[str, Any]:
    """What `tokenizer.json` says of a tokenizer; nothing of one that has no such file."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return {}
    described: dict[str, Any] = json.loads(backend.to_str())
    return described


def _without_defaults(value: Any) -> Any:
    """The same without nulls and falses, which a newer library adds for what it newly knows."""
    if isinstance(value, dict):
        kept = {key: _without_defaults(item) for key, item in value.items()}
        return {key: item for key, item in kept.items() if item is not None and item is not False}
    if isinstance(value, list):
        return [_without_defaults(item) for item in value]
    return value


def tried(tokenizer: Any, text: str, with_special: bool) -> list[int] | str:
    """The ids of a text, or the error that stands for them."""
    try:
        return encode(tokenizer, text, with_special)
    except Exception as error:  # the tokenizers library raises plain Exception
        return f"an error ({error})"


def _shown(tokenizer: Any, ids: list[int] | str) -> str:
    if isinstance(ids, str):
        return ids
    start = ", ".join(map(str, ids[:6])) + (", ..." if len(ids) > 6 else "")
    return f"{len(ids)} ids [{start}], which read {decode(tokenizer, ids)!r:.60}"
