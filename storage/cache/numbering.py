"""Numbers for ids, the frequent ones first, so that the high bytes of what is stored compress.

A numbering is the list of its first ids, its head of H: number c stands for head[c] where c < H and
for the id c - H elsewhere. A shard's footer holds those of its row groups, so that a shard stands
alone: whoever wrote it, and wherever it is linked to, its bytes say what its numbers mean.

Shapes: V vocabulary, H head, n targets, K slots.
"""

import base64
import functools
import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from decant.schemas import FormatError, Layout
from decant.schemas.arrow import WIDE_VOCAB
from decant.storage.cache.logprobs import BLOCK_ROWS, empty

FOOTER_KEY = b"decant.numberings"
"""Of the footer's key-value metadata; absent where no row group has a numbering."""
BLOCK = 256
"""Ids whose numbers differ in the lowest byte alone: their order inside is free."""
LARGEST_HEAD = 16_384
HEADS = tuple(BLOCK << i for i in range(7))
"""Sizes that are tried: up to LARGEST_HEAD."""
ID_BITS = 13.0
"""Bits that the footer takes for an id of a head, about."""
AHEAD = 4
"""Row groups in which a new numbering must earn the bytes that it takes in the footer."""
FADING = 0.5
"""Weight of the counts of a row group in the numbering fitted one row group later."""


@dataclass(frozen=True, slots=True, eq=False)
class Numbering:
    """A numbering of all ids, known by its first ones."""

    head: NDArray[np.int32]
    """[H] distinct ids: those of the numbers below H."""


def largest_head(layout: Layout) -> int:
    """How many ids a head may hold, so that all numbers fit in the bytes of the layout."""
    return LARGEST_HEAD if layout.wide else min(LARGEST_HEAD, WIDE_VOCAB - layout.vocab_size)


def numbers_of_ids(
    ids: NDArray[np.int32], numbering: Numbering, vocab_size: int
) -> NDArray[np.int32]:
    """[n, K] the number of each id; any where the id is negative."""
    head = numbering.head
    numbers = np.arange(len(head), len(head) + vocab_size, dtype=np.int32)
    numbers[head] = np.arange(len(head), dtype=np.int32)
    return numbers.take(ids, mode="clip")


def ids_of_planes(
    planes: Sequence[NDArray[np.uint8]],
    numbering: Numbering | None,
    vocab_size: int,
    dtype: npt.DTypeLike = np.int32,
) -> NDArray[Any]:
    """Ids [n, K], int32 or int64, from the bytes of their numbers, lowest first: two or three.

    A number that stands for no id has an id beyond the vocabulary.
    """
    ids = empty(planes[0].shape, dtype)
    wide = len(planes) == 3
    table = None
    if numbering:
        table = _table(numbering, vocab_size if wide else None, np.dtype(dtype))
    for start in range(0, len(ids), BLOCK_ROWS):
        block = slice(start, start + BLOCK_ROWS)
        numbers: NDArray[Any] = np.multiply(planes[1][block], np.uint16(1 << 8), dtype=np.uint16)
        numbers |= planes[0][block]
        if wide:
            low = numbers
            numbers = np.multiply(planes[2][block], np.int32(1 << 16), dtype=np.int32)
            numbers |= low
        if table is None:
            ids[block] = numbers
            continue
        if wide:
            np.minimum(numbers, np.int32(len(table) - 1), out=numbers)
        # Arrow looks up by the indices as they are; numpy would widen them to eight bytes first.
        taken = pc.take(table, pa.array(numbers.ravel()), boundscheck=False)
        ids[block] = taken.to_numpy().reshape(numbers.shape)
    return ids


@functools.lru_cache(maxsize=16)  # 2 MB each where the vocabulary is large
def _table(numbering: Numbering, vocab_size: int | None, dtype: np.dtype[Any]) -> pa.Array:
    """The id of every number; without a size, of every number of two bytes."""
    head = numbering.head
    size = WIDE_VOCAB if vocab_size is None else len(head) + vocab_size + 1
    return pa.array(np.concatenate([head, np.arange(size - len(head))]).astype(dtype))


class Fitter:
    """Chooses the numbering of each row group of a shard, in turn."""

    def __init__(self, layout: Layout) -> None:
        """Start with ids as they are."""
        self._vocab_size = layout.vocab_size
        largest = min(largest_head(layout), layout.vocab_size)
        self._sizes = [size for size in HEADS if size <= largest]
        self._counts = np.zeros(self._vocab_size)
        self.numberings: list[Numbering] = []
        """Those in use, in the order of their first row groups."""
        self.chosen: list[int | None] = []
        """Of each row group; None: ids as they are."""

    def choose(self, ids: NDArray[np.int32], targets_left: int) -> Numbering | None:
        """The numbering of a row group with these kept ids [n, K], -1 in unused slots.

        The one of the row group before, unless a new one, fitted to the counts so far, is worth its
        bytes. `targets_left` are those of the shard that are not written, with these.
        """
        if len(ids):
            self._consider(ids[ids >= 0], min(AHEAD, targets_left / len(ids)))
        self.chosen.append(len(self.numberings) - 1 if self.numberings else None)
        return self.numberings[-1] if self.numberings else None

    def _consider(self, ids: NDArray[np.int32], row_groups: float) -> None:
        """Add a numbering if it earns its bytes in so many row groups like these ids."""
        here = np.bincount(ids, minlength=self._vocab_size)
        self._counts *= FADING
        self._counts += here
        seen = np.flatnonzero(self._counts)
        seen = seen[np.argsort(-self._counts[seen], kind="stable")]
        order = np.concatenate([seen, np.flatnonzero(self._counts == 0)]).astype(np.int32)
        known = self.numberings[-1].head if self.numberings else order[:0]
        heads = [order[:size] for size in self._sizes if size < len(seen) + BLOCK]
        costs = [row_groups * high_bits(here, head) + len(head) * ID_BITS for head in heads]
        best = int(np.argmin(costs)) if heads else 0
        if heads and costs[best] < row_groups * high_bits(here, known):
            blocks = heads[best].reshape(-1, BLOCK).copy()
            blocks.sort(axis=1)  # takes fewer bytes in the footer
            self.numberings.append(Numbering(blocks.ravel()))

    def to_footer(self) -> dict[bytes, str]:
        """What the footer of the shard says of them, for `from_footer`."""
        if not self.numberings:
            return {}
        heads = [_packed(numbering.head) for numbering in self.numberings]
        return {FOOTER_KEY: json.dumps({"heads": heads, "row_groups": self.chosen})}


def high_bits(counts: NDArray[np.int64], head: NDArray[np.int32]) -> float:
    """Bits that the numbers of so many ids [V] take beside their lowest byte, by their entropy."""
    rest = counts.copy()
    rest[head] = 0
    padded = np.zeros(-(-len(rest) // BLOCK) * BLOCK, rest.dtype)
    padded[: len(rest)] = rest
    groups = [counts[head].reshape(-1, BLOCK).sum(axis=1), padded.reshape(-1, BLOCK).sum(axis=1)]
    n = np.concatenate(groups)
    n = n[n > 0].astype(np.float64)
    return float(n.sum() * np.log2(n.sum()) - (n * np.log2(n)).sum()) if len(n) else 0.0


def from_footer(
    metadata: Mapping[bytes, bytes] | None, layout: Layout, row_groups: int, where: str
) -> list[Numbering | None]:
    """The numbering of each row group; None: ids as they are.

    Raises FormatError, naming the shard, if the footer holds something else.
    """
    text = (metadata or {}).get(FOOTER_KEY)
    if text is None:
        return [None] * row_groups
    try:
        fields: Any = json.loads(text)
        if len(fields["heads"]) > row_groups or set(fields) != {"heads", "row_groups"}:
            raise ValueError(f"{len(fields['heads'])} heads in {row_groups} row groups")
        most = largest_head(layout)
        heads = [_unpacked(head, most) for head in fields["heads"]]
        numberings = [Numbering(head) for head in heads]
        chosen = [_chosen(numberings, at) for at in fields["row_groups"]]
    except (ValueError, KeyError, TypeError, RecursionError, zlib.error) as error:
        raise FormatError(f"{where}: its numberings of ids cannot be read: {error!r}") from error
    if len(chosen) != row_groups:
        raise FormatError(
            f"{where}: numberings of {len(chosen)} row groups, but there are {row_groups}"
        )
    for head in heads:
        ordered = np.sort(head)
        if (ordered[1:] == ordered[:-1]).any() or not (
            ordered[0] >= 0 and ordered[-1] < layout.vocab_size
        ):
            raise FormatError(
                f"{where}: a numbering whose ids are not distinct ids below {layout.vocab_size}"
            )
    return chosen


def _packed(head: NDArray[np.int32]) -> str:
    """base64 of zlib of the differences of successive ids, the four bytes of all in planes."""
    steps = np.diff(head, prepend=np.int32(0)).astype("<u4")
    planes = steps.view(np.uint8).reshape(-1, 4).T
    return base64.b64encode(zlib.compress(planes.tobytes(), 9)).decode()


def _chosen(numberings: list[Numbering], at: Any) -> Numbering | None:
    if at is None:
        return None
    if type(at) is not int or not 0 <= at < len(numberings):
        raise ValueError(f"head {at!r:.60} of {len(numberings)}")
    return numberings[at]


def _unpacked(text: str, most: int) -> NDArray[np.int32]:
    """The ids of a head. Raises ValueError if they are none, or more than `most`."""
    unpack = zlib.decompressobj()
    planes = np.frombuffer(
        unpack.decompress(base64.b64decode(text, validate=True), 4 * most + 1), np.uint8
    )
    if len(planes) > 4 * most:
        raise ValueError(f"a head of more than {most} ids")
    if not len(planes) or len(planes) % 4 or not unpack.eof:
        raise ValueError(f"a head of {len(planes)} bytes")
    steps = np.ascontiguousarray(planes.reshape(4, -1).T).view("<u4")[:, 0]
    return np.cumsum(steps, dtype=np.uint32).astype(np.int32)
