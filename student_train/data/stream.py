"""Stream a cache as training batches: bounded in memory, resumable anywhere.

`order.py` says in which order all ranks together take the sequences; the streams give each rank
its share of it, read ahead. The only state is how many sequences all ranks together have consumed,
so a run can go on with another world size.
"""

import contextlib
import functools
import itertools
import os
from collections import deque
from collections.abc import Generator, Hashable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

from accelerate import Accelerator
from torch.utils.data import IterableDataset, get_worker_info

from decant.schemas import Layout
from decant.storage import CacheReader, StoredRows
from decant.storage.cache.index import RowGroupRef
from decant.student_train.alignment.aligner import AlignedRows
from decant.student_train.data.batch import Batch
from decant.student_train.data.collate import collate
from decant.student_train.data.collate_events import collate_events, own_events
from decant.student_train.data.epoch import OnePass
from decant.student_train.data.generations import GENERATIONS, generations_of, note_rewritten
from decant.student_train.data.order import CacheOrder, Entry
from decant.student_train.data.packing import deal
from decant.student_train.data.stream_config import StreamConfig, ToEvents, temperature_indices

BATCHES_AHEAD = 2


class Found(NamedTuple):
    """A sequence that has been read: its row group's columns, its place there, its cache."""

    rows: StoredRows | AlignedRows
    member: int
    source: int

    @property
    def length(self) -> int:
        """Its tokens."""
        return int(self.rows.row_starts[self.member + 1] - self.rows.row_starts[self.member])


class SequenceStream(IterableDataset[Batch]):
    """Endless batches of one rank, from an order that all ranks share.

    Every global step takes `batch_size * world_size` consecutive sequences of the global order, of
    which rank r takes every `world_size`-th from the r-th on: no two ranks see the same sample and
    every rank always has a full batch. Iterate it directly: it reads ahead in its own threads. In
    the workers of a `DataLoader(stream, batch_size=None)` each gives its share of the steps, in
    the same order; its main process then keeps `consumed` itself, as steps * sequences_per_step.
    """

    readers: list[CacheReader]
    """The caches."""
    num_sequences: int
    """Sequences of one epoch."""
    _layout: Layout
    _temperature_indices: tuple[int, ...]
    _num_lanes: int
    _num_sources: int = 1
    _to_events: list[ToEvents] | None = None
    _aligned: tuple[bool, ...] = ()

    def __init__(self, config: StreamConfig) -> None:
        """Nothing is read yet."""
        super().__init__()
        self.config = config
        self.batch_size, self.rank, self.world_size = (
            config.batch_size,
            config.rank,
            config.world_size,
        )
        self.consumed = 0
        """Sequences that all ranks together have taken."""

    @property
    def reader(self) -> CacheReader:
        """The cache, or the first of several: its tokenizer and vocabulary hold for all."""
        return self.readers[0]

    @property
    def vocab_size(self) -> int:
        """The vocabulary that targets are of: the caches', or the student's if they are events."""
        shared = max(reader.manifest.shared_vocab_size for reader in self.readers)
        return (self.config.vocab_size or shared) if self._to_events else shared

    @property
    def has_events(self) -> bool:
        """Whether targets are events."""
        return self._to_events is not None

    def is_aligned(self, source: int) -> bool:
        """Whether a cache's tokens are others than the student's."""
        return any(self._aligned) and self._aligned[source]

    def _align(self) -> None:
        """Find out whether targets are events: of a student of another tokenizer, or of labels.

        Raises ValueError for temperatures that events do not have.
        """
        made = [self.config.alignment and self.config.alignment(r) for r in self.readers]
        self._aligned = tuple(bool(one) for one in made)
        if not any(made) and all(reader.manifest.layout.slots for reader in self.readers):
            return
        for reader in self.readers:
            if reader.manifest.layout.has_draws:
                raise ValueError(
                    f"{reader.url} holds draws (truncation.method "
                    f"{reader.manifest.truncation.method}), which have no events: they cannot be "
                    "mixed with caches of labels alone or of another tokenizer"
                )
        for value in self.config.temperatures:
            if value != 1:
                what = "another tokenizer than the student's" if any(made) else "labels alone"
                raise ValueError(
                    f"temperature {value:g}: {self.reader.url} is a cache of {what}, whose targets "
                    "are probabilities of strings; a product of tempered probabilities is that of "
                    "no string: set loss.temperature to 1"
                )
        self._to_events = [
            one or functools.partial(own_events, layout=reader.manifest.layout)
            for one, reader in zip(made, self.readers, strict=True)
        ]

    def read(self, group: RowGroupRef, source: int = 0) -> StoredRows | AlignedRows:
        """A row group of a cache, as stored, or as events. Called in several threads at once."""
        stored = self.readers[source].read_stored(group)
        if self._to_events is None:
            return stored
        return self._to_events[source](stored)

    def _order(self, consumed: int) -> Iterator[Entry | None]:
        """The endless global order after `consumed`; None while the next is not known yet."""
        raise NotImplementedError

    def _load(self, visit: tuple[int, ...]) -> StoredRows | AlignedRows:
        """Read the row group of a visit. Called in several threads at once."""
        raise NotImplementedError

    def _await_more(self) -> bool:
        """Return when more of the order may be known; false if it is not waited for any more."""
        raise AssertionError("an order that is known has an end")

    def await_data(self, through: int, accelerator: Accelerator) -> bool:
        """Whether the first `through` sequences can be read; if not, call again.

        All ranks have to call it, and get the same answer.
        """
        return True

    def close(self) -> None:
        """End a wait for data."""

    def state_dict(self) -> dict[str, Any]:
        """Where the stream is: the same for every rank and any world size."""
        raise NotImplementedError

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state. Raises ValueError if it is of another cache, order or part."""
        ours = self.state_dict()
        note_rewritten(self.readers, state.get(GENERATIONS), ours.pop(GENERATIONS, None))
        for name in [name for name in ours if name != "consumed"]:
            if state.get(name) != ours[name]:
                raise ValueError(
                    f"cannot resume the stream of {self.reader.url}: {name} was {state.get(name)}, "
                    f"is {ours[name]}"
                )
        self.consumed = int(state["consumed"])

    def next_sequences(self, num_groups: int) -> list[Found]:
        """The sequences that come next in the order, of so many row groups and one epoch at most.

        Nothing is consumed by it.
        """
        groups: dict[tuple[int, ...], StoredRows | AlignedRows] = {}
        found = []
        for entry in itertools.islice(self._order(self.consumed), self.num_sequences):
            if entry is None or (entry.visit not in groups and len(groups) == num_groups):
                break
            if entry.visit not in groups:
                groups[entry.visit] = self._load(entry.visit)
            found.append(Found(groups[entry.visit], entry.member, entry.source))
        return found

    @property
    def sequences_per_step(self) -> int:
        """Sequences that all ranks together take at a time."""
        return self.batch_size * self.world_size

    @property
    def epoch(self) -> float:
        """How often the part has been passed, by all ranks together."""
        return self.consumed / self.num_sequences

    def __iter__(self) -> Generator[Batch, None, None]:
        worker = get_worker_info()
        share = (worker.id, worker.num_workers) if worker else (0, 1)
        with contextlib.closing(self.steps(share=share)) as steps:
            for (batch,) in steps:
                yield batch

    def steps(
        self, num_microbatches: int = 1, packing: str = "none", share: tuple[int, int] = (0, 1)
    ) -> Generator[list[Batch], None, None]:
        """The microbatches of one optimizer step at a time, its sequences laid out together.

        `packing` is as in `TrainConfig`; `share` (i, n) gives every n-th step from the i-th on.
        """
        first, stride = share
        size = self.batch_size * num_microbatches
        with (
            ThreadPoolExecutor(self.config.threads) as readers,
            ThreadPoolExecutor(1) as collator,
        ):
            sequences = self._read(readers, self.consumed, size, stride, first)
            ahead: deque[Future[list[Batch]]] = deque()
            step: list[Found] = []
            try:
                while True:
                    while len(ahead) * num_microbatches <= BATCHES_AHEAD:
                        found = next(sequences)
                        if found is None:
                            break
                        step.append(found)
                        if len(step) == size:
                            ahead.append(
                                collator.submit(self._lay_out, step, num_microbatches, packing)
                            )
                            step = []
                    if not ahead:
                        if not self._await_more():
                            return
                        continue
                    microbatches = ahead.popleft().result()
                    self.consumed += size * self.world_size * stride
                    yield microbatches
            finally:
                for future in ahead:
                    future.cancel()
                sequences.close()

    def _lay_out(self, sequences: list[Found], num_microbatches: int, packing: str) -> list[Batch]:
        """The batches of a step."""
        picks = deal([found.length for found in sequences], num_microbatches, packing)
        return [self.collate([sequences[i] for i in group], packing) for group in picks]

    def collate(self, sequences: list[Found], packing: str = "none") -> Batch:
        """Join sequences into one batch."""
        if self.config.by_cache:
            sequences = sorted(sequences, key=lambda found: found.source)
        sources = [found.source for found in sequences] if self._num_sources > 1 else None
        rows: Any = [(found.rows, found.member) for found in sequences]
        if self._to_events:
            return collate_events(rows, self.vocab_size, sources, packing)
        return collate(rows, self._layout, self._temperature_indices, sources, packing)

    def _read(
        self, readers: ThreadPoolExecutor, consumed: int, size: int, stride: int, first: int
    ) -> Generator[Found | None, None, None]:
        """This rank's sequences after `consumed`, in steps of `size` a rank.

        Of every `stride`-th step, from `first` on.

        Row groups are read ahead in the order in which they are first needed, about as many as
        there are lanes, and are let go when their lane moves on. None where the next is not known.
        """
        mine = self._mine(consumed, size, stride, first)
        upcoming: deque[Entry] = deque()
        reads: dict[tuple[int, ...], Future[StoredRows | AlignedRows]] = {}
        current: dict[Hashable, tuple[int, ...]] = {}
        limit = -(-self._num_lanes // self.world_size) + self.config.threads
        try:
            while True:
                while not upcoming or len(reads) - len(current) < limit:
                    entry = next(mine)
                    if entry is None:
                        break
                    if entry.visit not in reads:
                        reads[entry.visit] = readers.submit(self._load, entry.visit)
                    upcoming.append(entry)
                if not upcoming:
                    yield None
                    continue
                lane, visit, member, source = upcoming.popleft()
                left = current.get(lane, visit)
                if left != visit:
                    del reads[left]
                current[lane] = visit
                yield Found(reads[visit].result(), member, source)
        finally:
            for read in reads.values():
                read.cancel()

    def _mine(self, consumed: int, size: int, stride: int, first: int) -> Iterator[Entry | None]:
        """This rank's entries of its steps; None where the next of the order is not known yet."""
        position = 0
        for entry in self._order(consumed):
            if entry is None:
                yield None
                continue
            step, slot = divmod(position, size * self.world_size)
            if step % stride == first and slot % self.world_size == self.rank:
                yield entry
            position += 1


class CacheStream(SequenceStream):
    """Endless batches of one rank from a cache: see `SequenceStream`."""

    def __init__(self, url: str | os.PathLike[str], **options: Any) -> None:
        """Open the cache; `options` are the fields of `StreamConfig`.

        Raises FormatError if the cache is not whole, ValueError if a temperature is not stored or
        the part is empty.
        """
        super().__init__(StreamConfig(**options))
        self.readers = [CacheReader(url)]
        self._layout = self.reader.manifest.layout
        self._align()
        self._temperature_indices = temperature_indices(self.reader, self.config.temperatures)
        self.order = order_of(self.reader, self.config)
        self._num_lanes = self.config.lanes
        self.num_sequences = self.order.num_sequences

    def state_dict(self) -> dict[str, Any]:
        """Where the stream is: the same for every rank and any world size."""
        return {
            "cache_id": self.reader.manifest.cache_id,
            "seed": self.order.seed,
            "num_sequences": self.num_sequences,
            "lanes": self.order.lanes,
            GENERATIONS: generations_of(self.readers),
            "consumed": self.consumed,
        }

    def one_epoch(self, packing: str = "none") -> OnePass[Batch]:
        """The batches up to the end of the pass over the part that the stream is in; has a length.

        All batches are full, on all ranks: where the part does not divide, the last one begins the
        next pass, which is so much shorter. Ask again for the next: nothing is taken twice or left.
        """
        return OnePass(self, 1, packing, lambda microbatches: microbatches[0])

    def epoch_steps(self, num_microbatches: int, packing: str = "none") -> OnePass[list[Batch]]:
        """`one_epoch` by optimizer steps of several microbatches: a list of batches at a time."""
        return OnePass(self, num_microbatches, packing, lambda microbatches: microbatches)

    def _order(self, consumed: int) -> Iterator[Entry]:
        return self.order.after(consumed)

    def _load(self, visit: tuple[int, ...]) -> StoredRows | AlignedRows:
        return self.read(self.reader.row_groups()[visit[1]])


def order_of(reader: CacheReader, config: StreamConfig) -> CacheOrder:
    """The order of a part of a whole cache. Raises ValueError if the part is empty."""
    groups = reader.row_groups()
    order = CacheOrder(
        groups.first_sequence,
        groups.sequences,
        part=config.part,
        heldout_fraction=config.heldout_fraction,
        seed=config.seed,
        lanes=config.lanes,
    )
    if not order.num_sequences:
        remedy = "larger" if config.part == "heldout" else "smaller"
        raise ValueError(
            f"{reader.url}: part {config.part!r} with heldout_fraction {config.heldout_fraction} "
            f"holds none of its {len(reader)} sequences: give a {remedy} fraction, or a cache of "
            "its own to evaluate on (eval.cache)"
        )
    return order
