"""The identity of a tokenizer, which teacher and student must share.

Works on any transformers tokenizer by what it offers (`get_vocab`, `special_tokens_map`,
`backend_tokenizer`), so this module needs none of that library.
"""

import hashlib
import json
from typing import Any

from decant.schemas.strict import FormatError, canonical


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """SHA-256 over vocabulary, merges and special tokens: equal when token ids mean the same.

    Chat templates, padding side and lengths do not count: they change texts, not ids.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    merges = json.loads(backend.to_str())["model"].get("merges") if backend is not None else None
    special = {
        name: value if isinstance(value, list) else str(value)
        for name, value in tokenizer.special_tokens_map.items()
        if name in ("bos_token", "eos_token", "unk_token")
    }
    identity = {"vocab": tokenizer.get_vocab(), "merges": merges, "special": special}
    return "sha256:" + hashlib.sha256(canonical(identity)).hexdigest()


def check_same_tokenizer(teacher: Any, student: Any, where: str) -> None:
    """Raise FormatError with the first differing tokens if the two tokenizers differ."""
    if tokenizer_fingerprint(teacher) == tokenizer_fingerprint(student):
        return
    theirs = {index: token for token, index in teacher.get_vocab().items()}
    ours = {index: token for token, index in student.get_vocab().items()}
    differing = [i for i in sorted(theirs.keys() | ours.keys()) if theirs.get(i) != ours.get(i)]
    if differing:
        shown = ", ".join(f"{i}: {theirs.get(i)!r} vs {ours.get(i)!r}" for i in differing[:5])
        detail = f"{len(differing)} ids differ, first (cache vs student): {shown}"
    else:
        detail = (
            "same vocabulary, but merges or special tokens differ: cache "
            f"{teacher.special_tokens_map}, student {student.special_tokens_map}"
        )
    raise FormatError(
        f"{where} was dumped with another tokenizer than the student's: {detail}. "
        "Use a student of the teacher's tokenizer, or dump again with the student's."
    )
