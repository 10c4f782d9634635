"""What a token is as bytes: characters are split over tokens, and half a one has no text."""

import codecs
import functools
import json
import re
from collections.abc import Iterable, Iterator
from typing import Any

import tokenizers

BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
"""A byte of tokenizers with byte fallback."""
BYTE_LEVEL, SPACES, PLAIN = "byte-level", "spaces", "plain"
"""How tokens are written: in the byte-level alphabet, with a mark for a space, or as they are."""
SPACE_MARK = "\u2581"
"""What sentencepiece writes for a space."""
BROKEN = "\ufffd"
"""What a decoder writes for bytes that are not a whole character."""


def _as_hex(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeDecodeError)
    found = error.object[error.start : error.end]
    return f"<{found.hex(' ').upper()}>", error.end


codecs.register_error("decant.hex", _as_hex)


def readable(data: bytes) -> str:
    """Bytes as text; those that are not part of a whole character as `<E3 81>`."""
    return data.decode("utf-8", errors="decant.hex")


def bytes_of(tokenizer: tokenizers.Tokenizer, ids: Iterable[int]) -> bytes | None:
    """The bytes that tokens stand for, joined; None where one of them is not known as bytes."""
    joined = b""
    for data in token_bytes(tokenizer, ids):
        if data is None:
            return None
        joined += data
    return joined


def token_bytes(tokenizer: tokenizers.Tokenizer, ids: Iterable[int]) -> Iterator[bytes | None]:
    """The bytes of each token; None where they are not known.

    Known are byte-level tokenizers, single bytes of byte fallback, and added tokens as they are.
    """
    added = {index: token.content for index, token in tokenizer.get_added_tokens_decoder().items()}
    level = _byte_level() if is_byte_level(tokenizer) else {}
    for index in ids:
        token = added.get(index) or tokenizer.id_to_token(index)
        if token is None:
            yield None
        elif index in added:
            yield token.encode()
        elif single := BYTE_TOKEN.fullmatch(token):
            yield bytes.fromhex(single[1])
        elif level and all(c in level for c in token):
            yield bytes(level[c] for c in token)
        else:
            yield None


def writing_of(tokenizer: tokenizers.Tokenizer) -> str:
    """How a tokenizer writes its tokens; "" where tokens alone do not say which bytes they are.

    So it is for those with marks inside of words (WordPiece), or of word ends.
    """
    described = json.loads(tokenizer.to_str())
    parts = [described.get(name) for name in ("normalizer", "pre_tokenizer", "decoder")]
    model = described.get("model") or {}
    if model.get("type") == "WordPiece" or model.get("end_of_word_suffix"):
        return ""
    if model.get("continuing_subword_prefix"):
        return ""
    kinds = {kind for part in parts for kind in _kinds(part)}
    if "ByteLevel" in kinds:
        return BYTE_LEVEL
    return (
        SPACES
        if "Metaspace" in kinds or SPACE_MARK in json.dumps(parts, ensure_ascii=False)
        else PLAIN
    )


def written_bytes(token: str, writing: str) -> bytes | None:
    """The bytes of one token of the model's vocabulary, written so; None where it has none."""
    if writing == BYTE_LEVEL:
        level = _byte_level()
        return bytes(level[c] for c in token) if all(c in level for c in token) else None
    if single := BYTE_TOKEN.fullmatch(token):
        return bytes.fromhex(single[1])
    return (token.replace(SPACE_MARK, " ") if writing == SPACES else token).encode()


def _kinds(part: Any) -> set[str]:
    """The types of a part of a tokenizer and of what is in it."""
    if isinstance(part, dict):
        inner = [_kinds(value) for value in part.values()]
        return {str(part.get("type", ""))}.union(*inner)
    if isinstance(part, list):
        return set().union(*(_kinds(value) for value in part))
    return set()


def is_byte_level(tokenizer: tokenizers.Tokenizer) -> bool:
    """Whether tokens are written in the byte-level alphabet, where a letter may be half a one."""
    return any("ByteLevel" in repr(step) for step in (tokenizer.decoder, tokenizer.pre_tokenizer))


@functools.cache
def _byte_level() -> dict[str, int]:
    """The byte of each character of the byte-level alphabet.

    Printable bytes of Latin-1 stand for themselves, the others for the characters from 256 on.
    """
    itself = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in itself]
    alphabet = {chr(byte): byte for byte in itself}
    return alphabet | {chr(256 + n): byte for n, byte in enumerate(others)}
