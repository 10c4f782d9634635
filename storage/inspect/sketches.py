"""Figures of a stream of values in bounded memory."""

import numpy as np
from datasketches import kll_floats_sketch
from numpy.typing import NDArray

from decant.storage.inspect.report import (
    RANKS,
    Histogram,
    Spread,
)

SKETCH_SIZE = 2000
"""Of a KLL sketch: a rank error of 0.14%."""


HASH_LIMIT = 4_000_000
"""Hashes of sequences kept, 8 bytes each; from there on of a half, a quarter, ... of them."""


class Quantity:
    """A stream of values of one quantity: a sketch of their ranks, their sum, maybe a histogram."""

    def __init__(self, edges: NDArray | None = None) -> None:
        """`edges` of the histogram's bins, ascending; values beyond them count in the end bins."""
        self._sketch, self._sum = kll_floats_sketch(SKETCH_SIZE), 0.0
        self._edges = np.array([0.0, 1.0]) if edges is None else edges
        self._counts = np.zeros(len(self._edges) - 1, np.int64)

    def add(self, values: NDArray) -> None:
        """Take more values."""
        self._sketch.update(np.ascontiguousarray(values, np.float32))
        self._sum += float(values.sum(dtype=np.float64))
        bins = np.searchsorted(self._edges[1:-1], values, side="right")
        self._counts += np.bincount(bins, minlength=len(self._counts))

    def merge(self, other: "Quantity") -> None:
        """Take the values of another."""
        self._sketch.merge(other._sketch)
        self._sum += other._sum
        self._counts += other._counts

    def result(self) -> Spread | None:
        """None without values."""
        sketch = self._sketch
        if sketch.is_empty():
            return None
        quantiles = sketch.get_quantiles(list(RANKS.values()), True)
        return Spread(
            min=sketch.get_min_value(),
            max=sketch.get_max_value(),
            mean=self._sum / sketch.n,
            **dict(zip(RANKS, quantiles, strict=True)),
        )

    def histogram(self) -> Histogram:
        """All bins up to the last that is not empty, from the first that is not."""
        (used,) = self._counts.nonzero()
        start, stop = (int(used[0]), int(used[-1]) + 1) if len(used) else (0, 0)
        return Histogram(
            edges=tuple(self._edges[start : stop + 1].tolist()),
            counts=tuple(self._counts[start:stop].tolist()),
        )


class SequenceHashes:
    """How many sequences repeat an earlier one: exact up to a limit, in bounded memory.

    Beyond it only hashes whose low bits are zero are kept, one bit more whenever it is reached
    (adaptive sampling, Flajolet 1990): all copies of a sequence or none. The count among these,
    times 2 to the number of bits, is an unbiased estimate.
    """

    def __init__(self, limit: int = HASH_LIMIT) -> None:
        """`limit` is how many hashes are kept at most."""
        self._limit = limit
        self._bits, self._parts, self._size = 0, [np.zeros(0, np.uint64)], 0

    def add(self, hashes: NDArray[np.uint64]) -> None:
        """Take the hashes of more sequences."""
        self._parts.append(self._sampled(hashes))
        self._size += len(self._parts[-1])
        while self._size > self._limit:
            self._bits += 1
            self._parts = [self._sampled(np.concatenate(self._parts))]
            self._size = len(self._parts[0])

    def merge(self, other: "SequenceHashes") -> None:
        """Take the hashes of another."""
        while self._bits < other._bits:
            self._bits += 1
            self._parts = [self._sampled(part) for part in self._parts]
        self._size = sum(map(len, self._parts))
        self.add(np.concatenate(other._parts))

    def duplicates(self) -> tuple[int, bool]:
        """Sequences equal to an earlier one, and whether that is exact."""
        hashes = np.concatenate(self._parts)
        return (len(hashes) - len(np.unique(hashes))) << self._bits, self._bits == 0

    def _sampled(self, hashes: NDArray[np.uint64]) -> NDArray[np.uint64]:
        if not self._bits:
            return hashes
        return hashes[hashes & np.uint64((1 << self._bits) - 1) == 0]
