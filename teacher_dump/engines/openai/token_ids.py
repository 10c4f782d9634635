"""Which id the bytes of a token stand for, where a chat API names tokens by their bytes.

A byte token of byte fallback stands for its byte only where no other token has it, for a tokenizer
writes it nowhere else. Bytes that two ids share stand for none. Knows no server.
"""

from collections.abc import Iterable
from typing import Any

from decant.storage.inspect.token_bytes import (
    BROKEN,
    BYTE_TOKEN,
    is_byte_level,
    token_bytes,
)
from decant.teacher_dump.engines.openai.token_texts import AMBIGUOUS, META_SPACE, TOKEN_ID


class TokenIds:
    """The bytes of a tokenizer's ids, and back."""

    def __init__(self, tokenizer: Any, vocab_size: int) -> None:
        """Write out every id. Raises ValueError if the tokenizer has no file of its own."""
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise ValueError(
                "teacher.tokenizer has no tokenizer.json, by which bytes of tokens are told apart"
            )
        self.vocab_size = vocab_size
        added = backend.get_added_tokens_decoder()
        self._special = {index for index, token in added.items() if token.special}
        in_bytes = is_byte_level(backend)
        self.keeps_spaces = in_bytes or _keeps_spaces(backend)
        """Whether each token alone is written with the space that it begins with."""
        ids = range(vocab_size)
        known = token_bytes(backend, ids) if in_bytes else (_piece(backend, i) for i in ids)
        self._bytes = list(known)
        self._ids: dict[bytes, int] = {}
        fallback = []
        for index, data in enumerate(self._bytes):
            if not data:
                continue
            if index not in added and BYTE_TOKEN.fullmatch(backend.id_to_token(index)):
                fallback.append((data, index))
            elif self._ids.setdefault(data, index) != index:
                self._ids[data] = AMBIGUOUS
        for data, index in fallback:
            self._ids.setdefault(data, index)

    def id_of(self, data: bytes) -> int | None:
        """The one id of these bytes; None if there is none, or more than one.

        What a server writes for half a character is the text of no id.
        """
        if BROKEN.encode() in data:
            return None
        found = self._ids.get(data, AMBIGUOUS)
        return None if found == AMBIGUOUS else found

    def named(self, text: Any) -> int | None:
        """The id that a server names by number; None if the text is no such name."""
        match = TOKEN_ID.fullmatch(text) if isinstance(text, str) else None
        if match is None or int(match[1]) >= self.vocab_size:
            return None
        return int(match[1])

    def text_of(self, ids: Iterable[int]) -> str:
        """What ids say, special ones left out; broken characters are replaced."""
        parts = (self._bytes[index] for index in ids if index not in self._special)
        return b"".join(part for part in parts if part).decode(errors="replace")


def _piece(backend: Any, index: int) -> bytes | None:
    """The bytes of a token that is written as text, spaces by a sign of their own."""
    token = backend.id_to_token(index)
    if token is None:
        return None
    if single := BYTE_TOKEN.fullmatch(token):
        return bytes.fromhex(single[1])
    data: bytes = token.replace(META_SPACE, " ").encode()
    return data


def _keeps_spaces(backend: Any) -> bool:
    """Whether the decoder of pieces writes a lone one with the space before it."""
    for token, index in backend.get_vocab().items():
        if token.startswith(META_SPACE) and token[1:].isalpha() and token[1:].isascii():
            text: str = backend.decode([index])
            return text.startswith(" ")
    return False
