"""Stream a cache as training batches: deterministic, bounded in memory, resumable anywhere.

The order of sequences is an endless run of epochs, each a pure function of (seed, epoch): row
groups are permuted and dealt to `lanes`, the sequences of each group are shuffled, and the lanes
give one sequence in turn. So neighbours in the order come from different groups, and a rank that
takes every W-th sequence reads only its own lanes where W divides their number. The only state is
how many sequences all ranks together have consumed, so a run can go on with another world size.
"""

import os
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import IterableDataset, get_worker_info

from storage import CacheReader, StoredRows
from student_train.batch import Batch, collate

PARTS = ("all", "train", "heldout")
BATCHES_AHEAD = 2
SEQUENCES_AT_ONCE = 1 << 22
Visit = tuple[int, int]
"""(epoch, row group): one pass over a row group."""


class CacheStream(IterableDataset[Batch]):
    """Endless batches of one rank from a cache.

    Every global step takes `batch_size * world_size` consecutive sequences of the global order, of
    which rank r takes every `world_size`-th from the r-th on: no two ranks see the same sample and
    every rank always has a full batch. Iterate it directly: it reads ahead in its own threads. In
    the workers of a `DataLoader(stream, batch_size=None)` each gives its share of the steps, in
    the same order; its main process then keeps `consumed` itself, as steps * sequences_per_step.
    """

    def __init__(
        self,
        url: str | os.PathLike[str],
        *,
        batch_size: int,
        temperature: float = 1.0,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        part: str = "all",
        heldout_fraction: float = 0.0,
        lanes: int = 16,
        threads: int = 2,
        pin_memory: bool = False,
    ) -> None:
        """Open the cache.

        `part` with `heldout_fraction` splits one cache by sequence, the same way whatever the
        seed. `lanes` is how many row groups are read from in turn; a rank holds at most about
        2 * lanes / world_size of them, undecoded (3 MB each at k=64). `pin_memory` puts batches
        into page-locked memory. Raises FormatError if the cache is not whole, ValueError if
        `temperature` is not stored or the part is empty.
        """
        super().__init__()
        if part not in PARTS:
            raise ValueError(f"part {part!r} is not one of {PARTS}")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} of {world_size}")
        if batch_size < 1 or lanes < 1 or threads < 1:
            raise ValueError("batch_size, lanes and threads must be at least 1")
        self.reader = CacheReader(url)
        self.batch_size, self.rank, self.world_size = batch_size, rank, world_size
        self.temperature, self.seed, self.lanes, self.threads = temperature, seed, lanes, threads
        self.pin_memory = pin_memory
        self._temperature_index = temperature_index(self.reader, temperature)
        self._part, self._heldout_fraction = part, heldout_fraction
        self._sizes = self._part_sizes()
        self.num_sequences = int(self._sizes.sum())
        if not self.num_sequences:
            raise ValueError(
                f"{self.reader.url}: part {part!r} with heldout_fraction {heldout_fraction} "
                f"holds none of its {len(self.reader)} sequences"
            )
        self.consumed = 0

    @property
    def sequences_per_step(self) -> int:
        """Sequences that all ranks together take at a time."""
        return self.batch_size * self.world_size

    @property
    def epoch(self) -> float:
        """How often the part has been passed, by all ranks together."""
        return self.consumed / self.num_sequences

    def state_dict(self) -> dict[str, Any]:
        """Where the stream is: the same for every rank and any world size."""
        return {
            "cache_id": self.reader.manifest.cache_id,
            "seed": self.seed,
            "num_sequences": self.num_sequences,
            "lanes": self.lanes,
            "consumed": self.consumed,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state. Raises ValueError if it is of another cache, order or part."""
        ours = self.state_dict()
        for name in ("cache_id", "seed", "num_sequences", "lanes"):
            if state.get(name) != ours[name]:
                raise ValueError(
                    f"cannot resume the stream of {self.reader.url}: {name} was {state.get(name)}, "
                    f"is {ours[name]}"
                )
        self.consumed = int(state["consumed"])

    def __iter__(self) -> Generator[Batch, None, None]:
        worker = get_worker_info()
        stride, first = (worker.num_workers, worker.id) if worker else (1, 0)
        step, start = self.sequences_per_step, self.consumed
        with ThreadPoolExecutor(self.threads) as readers, ThreadPoolExecutor(1) as collator:
            sequences = self._read(readers, start, stride, first)
            ahead: deque[Future[Batch]] = deque()
            try:
                while True:
                    while len(ahead) <= BATCHES_AHEAD:
                        batch = [next(sequences) for _ in range(self.batch_size)]
                        ahead.append(collator.submit(self.collate, batch))
                    batch_ready = ahead.popleft().result()
                    self.consumed += step * stride
                    yield batch_ready
            finally:
                for future in ahead:
                    future.cancel()
                sequences.close()

    def collate(self, sequences: list[tuple[StoredRows, int]]) -> Batch:
        """Join sequences, each a row group's columns and a place in it, into one batch."""
        batch = collate(sequences, self.reader.manifest.layout, self._temperature_index)
        return batch.pin_memory() if self.pin_memory else batch

    def _read(
        self, readers: ThreadPoolExecutor, consumed: int, stride: int, first: int
    ) -> Generator[tuple[StoredRows, int], None, None]:
        """This rank's sequences behind `consumed`: of every `stride`-th step, from `first` on.

        Row groups are read ahead in the order in which they are first needed, about as many as
        there are lanes, and are let go when their lane moves on.
        """
        mine = self._mine(consumed, stride, first)
        upcoming: deque[tuple[int, Visit, int]] = deque()
        reads: dict[Visit, Future[StoredRows]] = {}
        current: dict[int, Visit] = {}
        limit = -(-self.lanes // self.world_size) + self.threads
        try:
            while True:
                while not upcoming or len(reads) - len(current) < limit:
                    lane, visit, member = next(mine)
                    if visit not in reads:
                        group = self.reader.row_groups()[visit[1]]
                        reads[visit] = readers.submit(self.reader.read_stored, group)
                    upcoming.append((lane, visit, member))
                lane, visit, member = upcoming.popleft()
                left = current.get(lane, visit)
                if left != visit:
                    del reads[left]
                current[lane] = visit
                yield reads[visit].result(), member
        finally:
            for read in reads.values():
                read.cancel()

    def _mine(self, consumed: int, stride: int, first: int) -> Iterator[tuple[int, Visit, int]]:
        """Lane, visit and member of this rank's sequences of its steps."""
        epoch, skip = divmod(consumed, self.num_sequences)
        position = 0
        while True:
            for entry in self._epoch(epoch, skip):
                step, slot = divmod(position, self.sequences_per_step)
                if step % stride == first and slot % self.world_size == self.rank:
                    yield entry
                position += 1
            epoch, skip = epoch + 1, 0

    def _epoch(self, epoch: int, skip: int) -> Iterator[tuple[int, Visit, int]]:
        """The order of one epoch, behind its first `skip` sequences."""
        order = _permutation(len(self._sizes), self.seed, epoch, 0)
        order = order[self._sizes[order] > 0]
        dealt = [order[lane :: self.lanes] for lane in range(min(self.lanes, len(order)))]
        ends = [np.cumsum(self._sizes[groups]) for groups in dealt]
        totals = np.array([lane_ends[-1] for lane_ends in ends])
        taken = _taken(totals, skip)
        lanes = [
            self._lane(epoch, groups, lane_ends, int(n))
            for groups, lane_ends, n in zip(dealt, ends, taken, strict=True)
        ]
        # Whose turn comes first: the lanes that have not yet given in the round that was cut.
        turns = deque(sorted(np.flatnonzero(taken < totals).tolist(), key=lambda i: (taken[i], i)))
        while turns:
            lane = turns.popleft()
            visit, member = next(lanes[lane])
            yield lane, visit, member
            taken[lane] += 1
            if taken[lane] < totals[lane]:
                turns.append(lane)

    def _lane(
        self, epoch: int, groups: NDArray[np.int64], ends: NDArray[np.int64], taken: int
    ) -> Iterator[tuple[Visit, int]]:
        """The sequences of one lane behind the first `taken`."""
        start = int(np.searchsorted(ends, taken, side="right"))
        skip = taken - (int(ends[start - 1]) if start else 0)
        for group in groups[start:].tolist():
            members = self.members(group)
            shuffled = members[_permutation(len(members), self.seed, epoch, 1 + group)]
            for member in shuffled[skip:].tolist():
                yield (epoch, group), member
            skip = 0

    def members(self, group: int) -> NDArray[np.int64]:
        """Which sequences of a row group belong to the part, in stored order."""
        groups = self.reader.row_groups()
        first, size = int(groups.first_sequence[group]), int(groups.sequences[group])
        return select_part(first, size, self._part, self._heldout_fraction)

    def _part_sizes(self) -> NDArray[np.int64]:
        """How many sequences of each row group belong to the part."""
        sizes = self.reader.row_groups().sequences
        if self._part == "all":
            return sizes
        ends, counts, start = np.cumsum(sizes), [], 0
        while start < len(sizes):  # in pieces: a cache may hold billions of sequences
            first = int(ends[start - 1]) if start else 0
            stop = max(start + 1, int(np.searchsorted(ends, first + SEQUENCES_AT_ONCE)))
            size = int(ends[stop - 1]) - first
            chosen = select_part(first, size, self._part, self._heldout_fraction)
            below = np.searchsorted(chosen, ends[start:stop] - first)
            counts.append(np.diff(below, prepend=0))
            start = stop
        return np.concatenate(counts) if counts else sizes


def _taken(totals: NDArray[np.int64], count: int) -> NDArray[np.int64]:
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


def heldout_batches(
    stream: CacheStream,
) -> Iterator[tuple[Batch, bool]]:
    """One pass over a stream's part in stored order: this rank's batches, and whether each counts.

    Every rank gets the same number of batches; a batch that does not count repeats an earlier one,
    so that models which communicate in their forward stay in step.
    """
    share = -(-stream.num_sequences // (stream.batch_size * stream.world_size))
    given = 0
    pending: list[tuple[StoredRows, int]] = []
    batch: Batch | None = None
    position = 0
    for group, where in enumerate(stream.reader.row_groups()):
        members = stream.members(group)
        if not len(members):
            continue
        rows = stream.reader.read_stored(where)
        for index in members.tolist():
            if position // stream.batch_size % stream.world_size == stream.rank:
                pending.append((rows, index))
            elif batch is None:  # a rank without a share still needs something to repeat
                batch = stream.collate([(rows, index)])
            position += 1
            if len(pending) == stream.batch_size:
                batch = stream.collate(pending)
                pending = []
                given += 1
                yield batch, True
    if pending:
        batch = stream.collate(pending)
        given += 1
        yield batch, True
    while given < share:
        assert batch is not None
        given += 1
        yield batch, False


def temperature_index(reader: CacheReader, temperature: float) -> int:
    """Which stored temperature this is. Raises ValueError naming the stored ones if it is none."""
    stored = reader.manifest.temperatures
    if temperature not in stored:
        raise ValueError(
            f"temperature {temperature:g} is not stored in {reader.url}, which has "
            f"{', '.join(f'{t:g}' for t in stored)}. It cannot be computed from a sparse cache: "
            "train at a stored one, or dump again with it in `temperatures`"
        )
    return stored.index(temperature)


def select_part(
    first_sequence: int, num_sequences: int, part: str, heldout_fraction: float
) -> NDArray[np.int64]:
    """Which of a row group's sequences belong to a part: by plan index alone, so for ever."""
    if not 0 <= heldout_fraction < 1:
        raise ValueError(f"heldout_fraction must lie in [0, 1), found {heldout_fraction}")
    if part == "all":
        return np.arange(num_sequences)
    if heldout_fraction == 0:
        raise ValueError(f"part {part!r} needs a heldout_fraction above 0")
    index = np.arange(first_sequence, first_sequence + num_sequences, dtype=np.uint64)
    mixed = (index + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    mixed ^= mixed >> np.uint64(32)
    mixed *= np.uint64(0xD6E8FEB86659FD93)
    heldout = (mixed >> np.uint64(11)).astype(np.float64) / 2**53 < heldout_fraction
    return np.flatnonzero(heldout if part == "heldout" else ~heldout)


def _permutation(size: int, seed: int, epoch: int, block: int) -> NDArray[np.int64]:
    """A permutation from raw Philox words: the same on every platform and numpy release."""
    words = np.random.Philox(key=[seed, (epoch << 32) + block]).random_raw(size)
    return np.argsort(words, kind="stable")
