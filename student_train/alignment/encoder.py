"""Texts to the student's tokens, remembered: an epoch encodes the same texts as the one before."""

import threading

import numpy as np
import tokenizers
import xxhash
from numpy.typing import NDArray

from decant.student_train.alignment.token_bytes import HasTokenizer
from decant.student_train.alignment.words import Cuts, Words

REMEMBERED = 256 << 20
"""Bytes of tokens that are kept of what was encoded, 4 each: 67 million tokens."""


class Encoder:
    """Encodes lists of texts, word by word where that is the same. For several threads at once.

    What it returns is remembered until its room is full, and from then on what is in there: every
    epoch needs all of it once, so that making room for what came last would find nothing again.
    """

    def __init__(
        self, tokenizer: HasTokenizer, *, special_as_text: bool, remembered: int = REMEMBERED
    ) -> None:
        """Keep a copy of the tokenizer, without padding or truncation.

        With `special_as_text`, a special token that a text spells out is text.
        """
        self._backend = tokenizers.Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        self._backend.no_padding()
        self._backend.no_truncation()
        self._backend.encode_special_tokens = special_as_text
        cuts = Cuts.of(self._backend) if special_as_text else None
        self._words = Words(self._backend, cuts) if cuts else None
        self._room = remembered
        self.held = 0
        """Bytes of tokens that are kept of whole texts."""
        self._known: dict[bytes, tuple[NDArray[np.int32], list[int]]] = {}
        self._lock = threading.Lock()

    def __call__(self, texts: list[str]) -> list[NDArray[np.int64]]:
        """The ids of each text."""
        if not texts:
            return []
        data = [text.encode() for text in texts]
        digest = xxhash.xxh3_128()
        digest.update(np.array([len(text) for text in data], np.int64).tobytes())
        digest.update(b"".join(data))
        key = digest.digest()
        known = self._known.get(key)
        if known is None:
            known = self._whole(texts) if self._words is None else self._words(data)
            with self._lock:
                held = self.held + known[0].nbytes
                if held <= self._room and key not in self._known:
                    self.held = held
                    self._known[key] = known
        flat, borders = known
        return np.split(flat.astype(np.int64), borders)

    def _whole(self, texts: list[str]) -> tuple[NDArray[np.int32], list[int]]:
        """The ids of texts, joined, and where those of each text but the first begin."""
        found = self._backend.encode_batch_fast(texts, add_special_tokens=False)
        parts = [np.array(encoding.ids, np.int32) for encoding in found]
        return np.concatenate(parts), np.cumsum([len(part) for part in parts[:-1]]).tolist()
