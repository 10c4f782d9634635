"""Texts to tokens word by word: each word is encoded once, however often it stands in the texts.

That is exact only where a tokenizer makes of two stretches of text what it makes of both together.
Which places are so follows from the pattern by which it splits text into words, so that this is
for the patterns known here; every other tokenizer encodes whole texts.
"""

import functools
import itertools
import json
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tokenizers
from numpy.typing import NDArray

from decant.student_train.alignment.token_bytes import ranges

NUM_WORDS = 1 << 18
"""So many words are remembered."""
LONGEST = 48
"""Bytes of a word that is remembered."""
MOST_ALONE = 64
"""Of a tokenizer with more added tokens that texts may spell out, whole texts are encoded."""

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
PATTERNS = (
    # Of cl100k, Llama 3 and Qwen 2, which differ in how many digits are a word.
    *(
        rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}|{_REST}"
        for digits in (r"\p{N}{1,3}", r"\p{N}")
    ),
    # Of o200k.
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTIONS}?|"
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTIONS}?|"
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)
"""Those of which a word with a letter may begin with a mark, and one of marks ends with its line.
The pattern of GPT-2, which `ByteLevel` has, does neither."""


def _is(characters: Iterable[str | int]) -> NDArray[np.bool_]:
    found = np.zeros(256, np.bool_)
    found[np.array([ord(c) if isinstance(c, str) else c for c in characters], np.int64)] = True
    return found


SPACE = 32
_LETTERS = _is("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz")
_MARKS = _is(range(33, 127)) & ~_LETTERS & ~_is("0123456789")
_UNQUOTED = _MARKS & ~_is("'")
"""Marks that begin no contraction."""
_WHITE = _is("\t\n\v\f\r ")
_NO_WHITE = _is(range(33, 127)) | _is(range(128, 256))
_NO_WHITE &= ~_is([*range(0x80, 0x8B), 0x9F, 0xA0, 0xA8, 0xA9, 0xAF])  # perhaps ends a white one
_BEGINS_WORD = _LETTERS | _MARKS
"""What a space before it belongs to, whatever white space is before both."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Cuts:
    """Where texts of a tokenizer may be cut."""

    pairs: NDArray[np.bool_]
    """[65536] between bytes a and b: at 256 a + b."""
    alone: tuple[bytes, ...]
    """A text with one of these is encoded whole."""

    @functools.cached_property
    def _between(self) -> list[bytes | None]:
        """[256] what has a cut before it wherever it stands, and one behind it before this byte."""
        pairs = self.pairs.reshape(256, 256)
        return [
            next((text for text in (b" x", b" .") if pairs[text[-1], byte]), None)
            for byte in range(256)
        ]

    @staticmethod
    def of(backend: tokenizers.Tokenizer) -> "Cuts | None":
        """Those of a tokenizer that takes special tokens for text; None where none are known.

        No match of a pattern goes over a cut, and what it matches on one side is the same without
        the other: a cut is behind a letter or a mark whose matches end before what follows, or
        before the last of some white space, which the pattern parts from the white space before it.
        """
        described = json.loads(backend.to_str())
        model, normalizer = described["model"], described["normalizer"]
        if model["type"] != "BPE" or model.get("dropout") or model.get("unk_token"):
            return None
        if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
            return None
        if normalizer not in (None, {"type": "NFC"}):
            return None
        words = _pattern(described["pre_tokenizer"])
        alone = [t["content"] for t in described["added_tokens"] if not t["special"]]
        if not words or len(alone) > MOST_ALONE or not all(text.isascii() for text in alone):
            return None
        pairs = _NO_WHITE[:, None] & _is(" ")
        pairs |= _LETTERS[:, None] & (_UNQUOTED | _WHITE)
        if words == "GPT-2":
            pairs |= _UNQUOTED[:, None] & (_LETTERS | _WHITE)
        return Cuts(pairs=pairs.ravel(), alone=tuple(text.encode() for text in alone))

    def is_alone(self, data: bytes) -> bool:
        """Whether a text is encoded whole."""
        return any(token in data for token in self.alone)

    def between(self, data: bytes, begins: NDArray[np.int64]) -> NDArray[np.bool_]:
        """[len(data)] whether texts may be cut before each byte; `begins` [n] are theirs."""
        raw = np.frombuffer(data, np.uint8)
        cut = np.zeros(len(raw), np.bool_)
        cut[:-1] = (raw[:-1] == SPACE) & _BEGINS_WORD[raw[1:]]
        cut[begins[begins > 0] - 1] = False  # whose second byte is of another text
        pair = raw[:-1].astype(np.uint16) << 8
        pair |= raw[1:]
        cut[1:] |= self.pairs[pair]
        cut[begins[begins < len(raw)]] = True
        return cut

    def before(self, word: bytes) -> bytes | None:
        """What goes before a word behind any other, so that there are cuts around it.

        None where nothing does.
        """
        if word[0] == SPACE and word[1:2] and _BEGINS_WORD[word[1]]:
            return b""
        return self._between[word[0]]


def _pattern(described: dict[str, Any] | None) -> str:
    """Which pattern splits texts into words, "" if none that is known."""
    parts = [described] if described else []
    if described and described["type"] == "Sequence":
        parts = described["pretokenizers"]
    if not parts or parts[-1]["type"] != "ByteLevel" or parts[-1]["add_prefix_space"]:
        return ""
    before, by_itself = parts[:-1], parts[-1].get("use_regex", True)
    if by_itself:
        return "GPT-2" if all(part["type"] == "Digits" for part in before) else ""
    if len(before) != 1 or before[0]["type"] != "Split":
        return ""
    (split,) = before
    pattern = split["pattern"].get("Regex", "")
    known = pattern in PATTERNS and split["behavior"] == "Isolated" and not split["invert"]
    return pattern if known else ""


class Words:
    """Encodes texts by their words, and remembers these. For several threads at once."""

    def __init__(
        self, backend: tokenizers.Tokenizer, cuts: Cuts, num_words: int = NUM_WORDS
    ) -> None:
        """Remember at most so many words."""
        self._backend, self._cuts, self._room = backend, cuts, num_words
        vocabulary = backend.get_vocab(with_added_tokens=False)
        added = backend.get_added_tokens_decoder()
        self._lengths = np.zeros(1 + max([*vocabulary.values(), *added]), np.int64)
        ids = np.fromiter(vocabulary.values(), np.int64, len(vocabulary))
        self._lengths[ids] = [len(token) for token in vocabulary]  # a character for each byte
        self._known: dict[bytes, int] = {}
        self._table = _Table(np.zeros(0, np.int32), np.zeros(1, np.int64))
        self._lock = threading.Lock()

    @property
    def held(self) -> int:
        """How many words are remembered."""
        return len(self._known)

    def __call__(self, texts: Sequence[bytes]) -> tuple[NDArray[np.int32], list[int]]:
        """The ids of texts, joined, and where those of each text but the first begin."""
        data = b"".join(texts)
        borders = np.cumsum([0, *map(len, texts)])
        cut = self._cuts.between(data, borders[:-1])
        if self._cuts.is_alone(data):
            for begin, text in zip(borders[:-1].tolist(), texts, strict=True):
                if self._cuts.is_alone(text):
                    cut[begin + 1 : begin + len(text)] = False
        begins = np.flatnonzero(cut)
        edges = [*begins.tolist(), len(data)]
        numbers, table = self._numbered([*map(data.__getitem__, map(slice, edges, edges[1:]))])
        sizes = np.diff(table.starts)[numbers]
        ids = table.flat[ranges(table.starts[numbers], sizes)]
        places = np.searchsorted(begins, borders[1:-1])
        return ids, np.append(0, np.cumsum(sizes))[places].tolist()

    def _numbered(self, words: list[bytes]) -> tuple[NDArray[np.int64], "_Table"]:
        """The number of each word in a table."""
        table = self._table  # which another thread may replace by a longer one
        size = len(table)
        numbers = np.array([*map(self._known.get, words, itertools.repeat(-1))], np.int64)
        missing = np.flatnonzero((numbers < 0) | (numbers >= size)).tolist()
        if not missing:
            return numbers, table
        new: dict[bytes, int] = {}
        between: list[bytes] = []
        others: list[int] = []
        for place in missing:
            word = words[place]
            number = new.get(word)
            if number is None:
                before = self._cuts.before(word) if len(word) <= LONGEST else None
                if before is None:
                    others.append(place)
                    continue
                number = new[word] = size + len(new)
                between.append(before)
            numbers[place] = number
        longer = table.with_more(*self._together(list(new), between))
        with self._lock:
            if self._table is table and len(longer) <= self._room:
                self._table = longer
                self._known.update(new)
        numbers[others] = np.arange(len(longer), len(longer) + len(others))
        return numbers, longer.with_more(*self._each([words[place] for place in others]))

    def _together(
        self, words: list[bytes], between: list[bytes]
    ) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """The ids of all words, joined, and how many each has: of one text, cut again."""
        segments = [part for pair in zip(between, words, strict=True) for part in pair]
        text = b"".join(segments)
        if self._cuts.is_alone(text):
            return self._each(words)
        (encoding,) = self._backend.encode_batch_fast([text.decode()], add_special_tokens=False)
        ids = np.array(encoding.ids, np.int32)
        ends = np.append(0, np.cumsum(self._lengths[ids]))
        wanted = np.cumsum([0, *map(len, segments)])
        if ends[-1] != len(text):  # a normaliser changes it, or the vocabulary lacks a byte
            return self._each(words)
        places = np.searchsorted(ends, wanted)
        assert (ends[places] == wanted).all(), "a token crosses a cut"
        sizes = np.diff(places)[1::2]
        return ids[ranges(places[1::2], sizes)], sizes

    def _each(self, words: list[bytes]) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """The same, of a text for each word."""
        texts = [word.decode() for word in words]
        found = self._backend.encode_batch_fast(texts, add_special_tokens=False)
        parts = [encoding.ids for encoding in found]
        ids = np.fromiter(itertools.chain.from_iterable(parts), np.int32)
        return ids, np.array([*map(len, parts)], np.int64)


@dataclass(frozen=True, slots=True, eq=False)
class _Table:
    """The ids of words by their numbers."""

    flat: NDArray[np.int32]
    starts: NDArray[np.int64]
    """[n+1] those of word n are flat[starts[n]:starts[n+1]]."""

    def __len__(self) -> int:
        return len(self.starts) - 1

    def with_more(self, ids: NDArray[np.int32], sizes: NDArray[np.int64]) -> "_Table":
        """The same with other words behind."""
        if not len(sizes):
            return self
        starts = np.append(self.starts, self.starts[-1] + np.cumsum(sizes))
        return _Table(np.append(self.flat, ids), starts)
