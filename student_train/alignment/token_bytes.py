"""The bytes of every token of a vocabulary as arrays, with hashes of all of their beginnings.

Hashes are polynomials over the bytes, modulo 2^64, so that the hash of what is left of a token, or
of two strings one after the other, is a product and a sum. That any two of the strings compared
here meet by chance has a probability of about 1e-12 for a million comparisons.
"""

import functools
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import tokenizers
from numpy.typing import NDArray

from decant.schemas.tokenizer import PROBES
from decant.storage.inspect.token_bytes import (
    BROKEN,
    BYTE_TOKEN,
    SPACES,
    writing_of,
    written_bytes,
)

Ids = NDArray[np.int64]
Hashes = NDArray[np.uint64]
TEXT, SPECIAL, NO_BYTES = 0, 1, 2
"""Kinds of tokens: text; special ones, which have a role and no bytes; and what is neither."""
BASE = np.uint64(0x9E3779B97F4A7C15)
"""Of the polynomial: odd, so that it has an inverse."""
RANK = np.uint64(0xD6E8FEB86659FD93)
"""Keeps tokens of equal bytes apart by their number among them."""


class HasTokenizer(Protocol):
    """A tokenizer of transformers, or `TokenizerFiles`."""

    @property
    def backend_tokenizer(self) -> tokenizers.Tokenizer:
        """What encodes."""

    @property
    def special_tokens_map(self) -> dict[str, Any]:
        """bos_token, eos_token, unk_token where there are any."""


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenTable:
    """What the tokens of one tokenizer are; V of them."""

    kind: NDArray[np.int8]
    """[V] TEXT, SPECIAL or NO_BYTES."""
    is_byte: NDArray[np.bool_]
    """[V] the bytes of byte fallback."""
    data: NDArray[np.uint8]
    """The bytes of all tokens, one after the other."""
    starts: Ids
    """[V+1] token v is data[starts[v]:starts[v+1]]."""
    bos: int
    """The token of this role, or -1."""
    eos: int
    """The token of this role, or -1."""
    unk: int
    """What stands for text that the vocabulary cannot say, unless it has another role; or -1."""
    puts_bos: bool
    """Whether it begins every text with bos by itself."""
    adds_space: bool
    """Whether it puts a space before a text."""
    puts_space: bool
    """Whether it does so, and decoding takes it away."""
    puts_space_again: bool
    """Whether both hold behind a special token too."""
    names: dict[int, str]
    """The special tokens as they are written."""
    swallows: Ids
    """Tokens that take the white space beside them along, without saying so; bos and eos, which
    stand around texts, are not among them."""

    @staticmethod
    def of(tokenizer: HasTokenizer, where: str, at_least: int = 0) -> "TokenTable":
        """The table of a tokenizer, of at least so many ids.

        Raises ValueError, naming `where`, if there can be none.
        """
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if not isinstance(backend, tokenizers.Tokenizer):
            raise ValueError(
                f"the tokenizer of {where} has no tokenizer.json that says which bytes a token is:"
                " save its fast version beside it (AutoTokenizer.from_pretrained(..., "
                "use_fast=True).save_pretrained(DIR)). One of a kind that has none, such as "
                "ByT5's, cannot be aligned"
            )
        writing = writing_of(backend)
        if not writing:
            raise ValueError(
                f"the tokens of {where} do not say which bytes they are (WordPiece and tokenizers "
                "that mark the ends of words): a student or a teacher of such a tokenizer cannot "
                "be aligned"
            )
        table = _table(tokenizer, backend, writing, at_least)
        for text in PROBES:
            ids = backend.encode(text, add_special_tokens=False).ids
            if (table.kind[ids] != TEXT).any():
                continue
            said = backend.decode(ids, skip_special_tokens=False)
            found = table.text_of(np.array(ids, np.int64)).decode(errors="replace")
            if BROKEN not in said and found not in (said, " " + said):
                raise ValueError(
                    f"the tokens of {where} do not join to the text they stand for: its decoder "
                    f"gives {said!r:.60}, their bytes {found!r:.60}; such a tokenizer cannot be "
                    "aligned"
                )
        return table

    def __len__(self) -> int:
        return len(self.kind)

    @functools.cached_property
    def lengths(self) -> Ids:
        """[V] bytes of each token, 0 for special ones."""
        return np.diff(self.starts)

    def text_of(self, ids: Ids) -> bytes:
        """The bytes of tokens, joined."""
        return self.data[ranges(self.starts[ids], self.lengths[ids])].tobytes()

    @functools.cached_property
    def powers(self) -> Hashes:
        """Powers of BASE up to the longest token's length."""
        powers = np.full(int(self.lengths.max(initial=0)) + 1, BASE)
        powers[0] = 1
        return np.multiply.accumulate(powers)

    @functools.cached_property
    def _beginnings(self) -> tuple[Hashes, Ids]:
        """The hashes of all beginnings of all tokens, and where those of each token start."""
        starts = self.starts[:-1] + np.arange(len(self))
        hashes = np.zeros(len(self.data) + len(self), np.uint64)
        data = self.data.astype(np.uint64) + np.uint64(1)
        active = np.flatnonzero(self.lengths > 0)
        step = 0
        while len(active):
            at = starts[active] + step
            hashes[at + 1] = hashes[at] * BASE + data[self.starts[active] + step]
            step += 1
            active = active[self.lengths[active] > step]
        return hashes, starts

    def beginnings(self, ids: Ids, lengths: Ids) -> Hashes:
        """The hash of the first so many bytes of each token."""
        hashes, starts = self._beginnings
        return hashes[starts[ids] + lengths]

    @functools.cached_property
    def hashes(self) -> Hashes:
        """[V] of each whole token."""
        return self.beginnings(np.arange(len(self)), self.lengths)

    @functools.cached_property
    def _ranked(self) -> tuple[Ids, Ids]:
        """Text tokens, ordinary ones first, and the number of each among those of equal bytes."""
        ids = np.flatnonzero((self.kind == TEXT) & (self.lengths > 0))
        ids = ids[np.lexsort((ids, self.is_byte[ids], self.hashes[ids]))]
        hashes = self.hashes[ids]
        is_first = np.ones(len(ids), bool)
        is_first[1:] = hashes[1:] != hashes[:-1]
        firsts = np.flatnonzero(is_first)
        return ids, np.arange(len(ids)) - np.repeat(firsts, np.diff([*firsts, len(ids)]))

    @functools.cached_property
    def has_repeats(self) -> bool:
        """Whether several tokens have the same bytes."""
        return bool(self._ranked[1].any())

    @functools.cached_property
    def _by_hash(self) -> tuple[Hashes, Ids]:
        """Sorted hashes of the text tokens, and the ordinary token of each."""
        ids, ranks = self._ranked
        ids = ids[ranks == 0]
        return self.hashes[ids], ids

    @functools.cached_property
    def _places(self) -> tuple[NDArray[np.int32], NDArray[np.bool_], np.uint64]:
        """By the first bits of a hash: its place among those of text tokens, or -1; if several.

        Also by how many other bits those are followed: so many are first that few strings which
        are no token have a place.
        """
        known, _ = self._by_hash
        behind = np.uint64(64 - (16 * len(known) + 16).bit_length())
        places = np.full(1 << (64 - int(behind)), -1, np.int32)
        bits = known >> behind
        places[bits] = np.arange(len(known))
        is_several = np.zeros(len(places), np.bool_)
        is_several[bits[1:][bits[1:] == bits[:-1]]] = True
        return places, is_several, behind

    def find(self, hashes: Hashes) -> Ids:
        """The token that has these bytes, or -1."""
        places, is_several, behind = self._places
        known, ids = self._by_hash
        found = np.full(len(hashes), -1)
        bits = hashes >> behind
        at = places[bits]
        near = np.flatnonzero(at >= 0)
        at = at[near]
        is_same = known[at] == hashes[near]
        found[near[is_same]] = ids[at[is_same]]
        others = near[~is_same]
        others = others[is_several[bits[others]]]
        found[others] = _found(hashes[others], known, ids)
        return found

    def paired_with(self, other: "TokenTable") -> NDArray[np.int32]:
        """[V] the other's token of equal bytes, or -1; of several the n-th with the n-th.

        Special tokens are paired by their role, begin or end of a text, the others by their names.
        """
        pairs = np.full(len(self), -1, np.int32)
        ids, ranks = self._ranked
        theirs, their_ranks = other._ranked
        keys = other.hashes[theirs] + their_ranks.astype(np.uint64) * RANK
        order = np.argsort(keys)
        mine = self.hashes[ids] + ranks.astype(np.uint64) * RANK
        pairs[ids] = _found(mine, keys[order], theirs[order])
        by_name = {name: index for index, name in other.names.items()}
        wanted = [(self.eos, other.eos), (self.bos, other.bos)]
        wanted += [(index, by_name.get(name, -1)) for index, name in self.names.items()]
        for index, theirs_ in wanted:
            if (
                index >= 0
                and theirs_ >= 0
                and pairs[index] < 0
                and theirs_ not in pairs[[*self.names]]
            ):
                pairs[index] = theirs_
        return pairs


def _found(keys: Hashes, known: Hashes, values: Ids) -> Ids:
    """The value of each key among sorted ones, or -1."""
    if not len(known):
        return np.full(len(keys), -1)
    at = np.minimum(np.searchsorted(known, keys), len(known) - 1)
    return np.where(known[at] == keys, values[at], -1)


def _table(
    tokenizer: HasTokenizer, backend: tokenizers.Tokenizer, writing: str, at_least: int
) -> TokenTable:
    added = backend.get_added_tokens_decoder()
    own = backend.get_vocab(with_added_tokens=False)
    vocabulary = backend.get_vocab(with_added_tokens=True)
    size = max(at_least, 1 + max(vocabulary.values(), default=-1))
    kind = np.full(size, NO_BYTES, np.int8)
    is_byte = np.zeros(size, np.bool_)
    parts = [b""] * size
    for token, index in vocabulary.items():
        extra = added.get(index)
        if extra is not None and extra.special:
            kind[index] = SPECIAL
            continue
        if extra is not None and not (writing == "spaces" and token in own):
            found: bytes | None = _added_bytes(backend, extra, writing)
        else:
            found = written_bytes(token, writing)
            is_byte[index] = writing != "byte-level" and bool(BYTE_TOKEN.fullmatch(token))
        if found:
            kind[index], parts[index] = TEXT, found
    special = {name: _special(tokenizer, name, vocabulary) for name in ("bos", "eos", "unk")}
    for index in special.values():
        if index >= 0:
            kind[index], parts[index] = SPECIAL, b""
    bare = backend.encode("a", add_special_tokens=False).ids
    framed = backend.encode("a", add_special_tokens=True).ids
    starts = np.concatenate([[0], np.cumsum([len(part) for part in parts], dtype=np.int64)])
    decoded = backend.decode(bare, skip_special_tokens=False)
    names = {index: token for token, index in vocabulary.items() if kind[index] == SPECIAL}
    a_name = next(iter(names.values()), "")
    behind = backend.encode(a_name + "a", add_special_tokens=False).ids

    def joined(ids: list[int]) -> bytes:
        return b"".join(parts[i] for i in ids)

    return TokenTable(
        kind=kind,
        is_byte=is_byte,
        data=np.frombuffer(b"".join(parts), np.uint8),
        starts=starts.astype(np.int64),
        bos=special["bos"],
        eos=special["eos"],
        unk=special["unk"] if special["unk"] not in (special["bos"], special["eos"]) else -1,
        puts_bos=special["bos"] >= 0 and framed[:1] == [special["bos"]],
        adds_space=joined(bare) == b" a",
        puts_space=decoded == "a" and joined(bare) == b" a",
        puts_space_again=decoded == "a" and joined(behind[1:]) == b" a",
        names=names,
        swallows=np.array(
            [
                index
                for index, token in added.items()
                if (token.lstrip or token.rstrip) and index not in (special["bos"], special["eos"])
            ],
            np.int64,
        ),
    )


def _added_bytes(
    backend: tokenizers.Tokenizer, token: tokenizers.AddedToken, writing: str
) -> bytes | None:
    """What an added token stands for: one that is found in normalised text begins as that does."""
    normalizer = backend.normalizer
    if writing == SPACES and token.normalized and normalizer is not None:
        return written_bytes(normalizer.normalize_str(token.content), writing)
    return token.content.encode()


def _special(tokenizer: HasTokenizer, name: str, vocabulary: dict[str, int]) -> int:
    token = tokenizer.special_tokens_map.get(f"{name}_token")
    return -1 if token is None else vocabulary.get(str(token), -1)


def ranges(starts: Ids, lengths: Ids) -> Ids:
    """starts[0], starts[0] + 1, ... of all ranges, one after the other."""
    ends = np.cumsum(lengths)
    total = int(ends[-1]) if len(ends) else 0
    return np.arange(total) + np.repeat(starts - (ends - lengths), lengths)
