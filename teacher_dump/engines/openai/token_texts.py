"""Which id a token's text stands for, where a server names tokens by their text.

A text is taken for an id only if no other id of the tokenizer has it. Half a character has no text
of its own, so such tokens have none. Knows no server.
"""

import re
from typing import Any

from decant.storage.inspect.token_bytes import token_bytes

TOKEN_ID = re.compile(r"token_id:(\d+)")
"""What vLLM writes in place of a text with `return_tokens_as_token_ids`."""
META_SPACE = "\u2581"
"""What SentencePiece writes for a space."""
AMBIGUOUS = -1


class TokenTexts:
    """The texts of a tokenizer's ids, as servers write them."""

    def __init__(self, tokenizer: Any, vocab_size: int) -> None:
        """Write out every id. Raises ValueError if the tokenizer has no file of its own."""
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise ValueError(
                "teacher.tokenizer has no tokenizer.json, by which texts of tokens are told apart"
            )
        known = token_bytes(backend, range(vocab_size))
        self._bytes: list[bytes | None] = []
        for index, data in enumerate(known):
            if data is None:
                token = backend.id_to_token(index)
                data = None if token is None else token.replace(META_SPACE, " ").encode()
            self._bytes.append(data)
        self._ids: dict[str, int] = {}
        for index, data in enumerate(self._bytes):
            for text in _texts(data):
                other = self._ids.setdefault(text, index)
                if other != index:
                    self._ids[text] = AMBIGUOUS

    def id_of(self, text: str) -> int | None:
        """The one id of this text; None if there is none, or more than one."""
        if named := TOKEN_ID.fullmatch(text):
            return int(named[1])
        found = self._ids.get(text, AMBIGUOUS)
        return None if found == AMBIGUOUS else found

    def fits(self, text: str, index: int) -> bool:
        """Whether an id may be written so; a space before it may be left out."""
        if named := TOKEN_ID.fullmatch(text):
            return int(named[1]) == index
        texts = _texts(self._bytes[index])
        return text in texts or text in {one.removeprefix(" ") for one in texts}

    def text_of(self, ids: list[int]) -> str | None:
        """The text of which these ids may be the tokens; None if they end within a character."""
        parts = [self._bytes[index] for index in ids]
        if any(part is None for part in parts):
            return None
        try:
            return b"".join(part for part in parts if part is not None).decode()
        except UnicodeDecodeError:
            return None


def _texts(data: bytes | None) -> set[str]:
    """What servers write for a token's bytes: broken characters are left out, or replaced."""
    if data is None:
        return set()
    return {data.decode(errors="ignore"), data.decode(errors="replace")}
