"""In which order the sequences of a cache are trained on: pure functions, nothing is read.

An epoch is a pure function of (seed, epoch): row groups are permuted and dealt to `lanes`, the
sequences of each group are shuffled, and the lanes give one sequence in turn. So neighbours in the
order come from different groups, and it can be entered anywhere without walking up to there.
"""

from collections import deque
from collections.abc import Hashable, Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

PARTS = ("all", "train", "heldout")
SEQUENCES_AT_ONCE = 1 << 22


class Entry(NamedTuple):
    """One place in an order."""

    lane: Hashable
    """What gives one sequence in turn; it leaves a row group when it goes on to the next."""
    visit: tuple[int, ...]
    """One pass over one row group: (epoch, row group), after the number of the cache if there
    are several."""
    member: int
    """Which sequence of the row group."""
    source: int = 0
    """Which of several caches."""


class CacheOrder:
    """The order of one part of some row groups, epoch after epoch."""

    def __init__(
        self,
        first_sequence: NDArray[np.int64],
        sequences: NDArray[np.int64],
        *,
        part: str = "all",
        heldout_fraction: float = 0.0,
        seed: int = 0,
        lanes: int = 16,
    ) -> None:
        """Take row groups, each by the plan index of its first sequence and how many it has."""
        if part not in PARTS:
            raise ValueError(f"part {part!r} is not one of {PARTS}")
        if lanes < 1:
            raise ValueError(f"lanes must be at least 1, found {lanes}")
        self.seed, self.lanes = seed, lanes
        self._first, self._all = first_sequence, sequences
        self._part, self._heldout_fraction = part, heldout_fraction
        self.sizes = self._part_sizes()
        """[row groups] sequences of the part in each."""
        self.num_sequences = int(self.sizes.sum())
        """Sequences of the part."""

    def after(self, consumed: int) -> Iterator[Entry]:
        """The endless order after its first `consumed` sequences."""
        epoch, skip = divmod(consumed, self.num_sequences)
        while True:
            yield from self.epoch(epoch, skip)
            epoch, skip = epoch + 1, 0

    def epoch(self, epoch: int, skip: int = 0) -> Iterator[Entry]:
        """The order of one epoch, after its first `skip` sequences."""
        order = permutation(len(self.sizes), self.seed, epoch, 0)
        order = order[self.sizes[order] > 0]
        dealt = [order[lane :: self.lanes] for lane in range(min(self.lanes, len(order)))]
        ends = [np.cumsum(self.sizes[groups]) for groups in dealt]
        totals = np.array([lane_ends[-1] for lane_ends in ends], dtype=np.int64)
        taken = taken_in_turn(totals, skip)
        lanes = [
            self._lane(epoch, groups, lane_ends, int(n))
            for groups, lane_ends, n in zip(dealt, ends, taken, strict=True)
        ]
        # Whose turn comes first: the lanes that have not yet given in the round that was cut.
        turns = deque(sorted(np.flatnonzero(taken < totals).tolist(), key=lambda i: (taken[i], i)))
        while turns:
            lane = turns.popleft()
            visit, member = next(lanes[lane])
            yield Entry(lane, visit, member)
            taken[lane] += 1
            if taken[lane] < totals[lane]:
                turns.append(lane)

    def _lane(
        self, epoch: int, groups: NDArray[np.int64], ends: NDArray[np.int64], taken: int
    ) -> Iterator[tuple[tuple[int, int], int]]:
        """The sequences of one lane after the first `taken`."""
        start = int(np.searchsorted(ends, taken, side="right"))
        skip = taken - (int(ends[start - 1]) if start else 0)
        for group in groups[start:].tolist():
            members = self.members(group)
            shuffled = members[permutation(len(members), self.seed, epoch, 1 + group)]
            for member in shuffled[skip:].tolist():
                yield (epoch, group), member
            skip = 0

    def members(self, group: int) -> NDArray[np.int64]:
        """Which sequences of a row group belong to the part, in stored order."""
        first, size = int(self._first[group]), int(self._all[group])
        return select_part(first, size, self._part, self._heldout_fraction)

    def _part_sizes(self) -> NDArray[np.int64]:
        """How many sequences of each row group belong to the part."""
        sizes = self._all
        if self._part == "all":
            return sizes
        ends, counts, start = np.cumsum(sizes), [], 0
        while start < len(sizes):  # in pieces: a cache may hold billions of sequences
            before = int(ends[start - 1]) if start else 0
            stop = max(start + 1, int(np.searchsorted(ends, before + SEQUENCES_AT_ONCE)))
            # Row groups follow each other without a gap in a whole cache, not in an unfinished one.
            index = _ranges(self._first[start:stop], sizes[start:stop])
            chosen = np.zeros(len(index) + 1, np.int64)
            chosen[1:] = np.cumsum(_in_part(index, self._part, self._heldout_fraction))
            edges = np.concatenate([[0], ends[start:stop] - before])
            counts.append(np.diff(chosen[edges]))
            start = stop
        return np.concatenate(counts) if counts else sizes


def _ranges(first: NDArray[np.int64], sizes: NDArray[np.int64]) -> NDArray[np.int64]:
    """first[0], first[0] + 1, ... of all ranges, one after the other."""
    starts = np.cumsum(sizes) - sizes
    return np.arange(int(sizes.sum())) + np.repeat(first - starts, sizes)


def taken_in_turn(totals: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """How many each lane has given after `count` turns, lanes that are empty being passed over."""
    low, high = 0, int(totals.max(initial=0))
    while low < high:  # the last round that is complete
        middle = (low + high + 1) // 2
        if int(np.minimum(totals, middle).sum()) <= count:
            low = middle
        else:
            high = middle - 1
    taken = np.minimum(totals, low)
    more = np.flatnonzero(totals > low)[: count - int(taken.sum())]
    taken[more] += 1
    return taken


def select_part(
    first_sequence: int, num_sequences: int, part: str, heldout_fraction: float
) -> NDArray[np.int64]:
    """Which of consecutive sequences belong to a part: by plan index alone, so for ever."""
    index = np.arange(first_sequence, first_sequence + num_sequences)
    return np.flatnonzero(_in_part(index, part, heldout_fraction))


def _in_part(index: NDArray[np.int64], part: str, heldout_fraction: float) -> NDArray[np.bool_]:
    if not 0 <= heldout_fraction < 1:
        raise ValueError(f"heldout_fraction must lie in [0, 1), found {heldout_fraction}")
    if part == "all":
        return np.ones(len(index), np.bool_)
    if heldout_fraction == 0:
        raise ValueError(f"part {part!r} needs a heldout_fraction above 0")
    mixed = (index.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    mixed ^= mixed >> np.uint64(32)
    mixed *= np.uint64(0xD6E8FEB86659FD93)
    heldout = (mixed >> np.uint64(11)).astype(np.float64) / 2**53 < heldout_fraction
    return heldout if part == "heldout" else ~heldout


def permutation(size: int, seed: int, epoch: int, block: int) -> NDArray[np.int64]:
    """A permutation from raw Philox words: the same on every platform and numpy release."""
    words = np.random.Philox(key=[seed, (epoch << 32) + block]).random_raw(size)
    return np.argsort(words, kind="stable")
