"""A cache as a map-style dataset, the order that suits its row groups, and batches of its items.

The order is that of `CacheStream`, so that a loop of theirs sees what ours does. A row group is
read once and kept while its sequences are taken; the sampler knows what comes, so groups are read
ahead in threads.
"""

import os
from collections import OrderedDict, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import Any

import numpy as np
from torch.utils.data import Dataset, Sampler

from decant.storage import CacheReader, StoredRows
from decant.student_train.config.run import PACKINGS
from decant.student_train.data.batch import Batch
from decant.student_train.data.collate import collate
from decant.student_train.data.order import Entry
from decant.student_train.data.stream import CacheStream, Found, order_of
from decant.student_train.data.stream_config import StreamConfig, temperature_indices

READ_AHEAD_THREADS = 2


class CacheDataset(Dataset[Found]):
    """The sequences of a cache, or of a part of it, by index in stored order.

    Give it to a `DataLoader` with a `RowGroupSampler` and a `Collator`: another order reads a row
    group of thousands of tokens for nearly every sequence. `dataset[i]` says where a sequence is in
    its row group's columns, which `Collator` joins to a `Batch`.
    """

    def __init__(
        self,
        url: str | os.PathLike[str],
        *,
        temperature: float | Sequence[float] = 1.0,
        part: str = "all",
        heldout_fraction: float = 0.0,
        seed: int = 0,
        lanes: int = 16,
    ) -> None:
        """Open a cache; the options are those of `CacheStream`, with the same defaults.

        Raises FormatError if the cache is not whole, ValueError if a temperature is not stored or
        the part is empty.
        """
        super().__init__()
        self.config = StreamConfig(
            batch_size=1,
            temperature=temperature,
            part=part,
            heldout_fraction=heldout_fraction,
            seed=seed,
            lanes=lanes,
        )
        self.url = str(url)
        self.reader = CacheReader(url)
        if not self.reader.manifest.layout.slots:
            raise ValueError(
                f"{url} keeps no entries (truncation.method "
                f"{self.reader.manifest.truncation.method}): `decant train` takes labels alone, a "
                "trainer of transformers or TRL needs a cache of entries"
            )
        self.temperature_indices = temperature_indices(self.reader, self.temperatures)
        self.order = order_of(self.reader, self.config)
        self.epoch = 0
        """Of the order in which a sampler gives the sequences."""
        self._ends = np.cumsum(self.order.sizes)
        self._kept: OrderedDict[int, Future[StoredRows]] = OrderedDict()
        self._threads: ThreadPoolExecutor | None = None
        self._process = os.getpid()

    @property
    def temperatures(self) -> tuple[float, ...]:
        """Those whose targets the batches carry."""
        return self.config.temperatures

    @property
    def vocab_size(self) -> int:
        """Ids of the cache: a student has at least as many output rows."""
        return self.reader.manifest.shared_vocab_size

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What the order follows from; a run goes on with the same alone."""
        return {
            "cache_id": self.reader.manifest.cache_id,
            "seed": self.order.seed,
            "num_sequences": len(self),
            "lanes": self.order.lanes,
        }

    def set_epoch(self, epoch: int) -> None:
        """Which epoch a sampler gives when it is next iterated; trainers call it."""
        self.epoch = int(epoch)

    def __len__(self) -> int:
        return self.order.num_sequences

    def __getitem__(self, index: int) -> Found:
        if not 0 <= index < len(self):
            raise IndexError(f"sequence {index} of {len(self)}")
        group = int(np.searchsorted(self._ends, index, side="right"))
        members = self.order.members(group)
        return Found(self._rows(group), int(members[index - self._ends[group]]), 0)

    def index_of(self, entry: Entry) -> int:
        """The index of a place in the order."""
        group = entry.visit[1]
        members = self.order.members(group)
        return int(self._ends[group]) - len(members) + int(np.searchsorted(members, entry.member))

    def read_ahead(self, group: int) -> None:
        """Begin to read a row group that is soon needed."""
        self._reading(group)

    def stream(self, **options: Any) -> CacheStream:
        """The same part as a stream; `options` say its batch size, rank and world size."""
        config = self.config
        return CacheStream(
            self.url,
            temperature=config.temperature,
            part=config.part,
            heldout_fraction=config.heldout_fraction,
            seed=config.seed,
            lanes=config.lanes,
            **options,
        )

    def _rows(self, group: int) -> StoredRows:
        return self._reading(group).result()

    def _reading(self, group: int) -> Future[StoredRows]:
        if self._process != os.getpid():  # a loader's worker has none of its parent's threads
            self._kept, self._threads, self._process = OrderedDict(), None, os.getpid()
        if group in self._kept:
            self._kept.move_to_end(group)
            return self._kept[group]
        if self._threads is None:
            self._threads = ThreadPoolExecutor(READ_AHEAD_THREADS)
        reading = self._threads.submit(self.reader.read_stored, self.reader.row_groups()[group])
        self._kept[group] = reading
        while len(self._kept) > 2 * self.order.lanes + 1:  # those in turn, and those to come
            self._kept.popitem(last=False)
        return reading

    def __getstate__(self) -> dict[str, Any]:
        """For the workers of a loader that are started anew."""
        return {**self.__dict__, "_kept": OrderedDict(), "_threads": None}


class RowGroupSampler(Sampler[int]):
    """The indices of one epoch of a `CacheDataset`, in the order of `CacheStream`.

    With a rank, every `world_size`-th of them from the rank's on, as many on every rank: what does
    not divide is left out of this epoch. Under a trainer of accelerate's leave both as they are: it
    deals whole batches to the processes itself.
    """

    def __init__(
        self,
        dataset: CacheDataset,
        *,
        rank: int = 0,
        world_size: int = 1,
        start: int = 0,
        read_ahead: bool = True,
        dealt: tuple[int, int, int] = (1, 0, 1),
    ) -> None:
        """`start` skips so many of this rank's indices of the first epoch that is iterated.

        `read_ahead` is to be off where a loader has workers: these read for themselves. `dealt`
        (batch size, process, processes) says which of the indices accelerate will leave to this
        process: only what these need is read ahead.
        """
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} of {world_size}")
        if not 0 <= start <= len(dataset) // world_size:
            raise ValueError(f"start {start} of an epoch of {len(dataset) // world_size}")
        self.dataset, self.rank, self.world_size = dataset, rank, world_size
        self._start, self._read_ahead, self._dealt = start, read_ahead, dealt

    def set_epoch(self, epoch: int) -> None:
        """Which epoch the next iteration gives."""
        self.dataset.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.dataset) // self.world_size - self._start

    def __iter__(self) -> Iterator[int]:
        count, start = len(self), self._start
        self._start = 0
        order = self.dataset.order.epoch(self.dataset.epoch, start * self.world_size)
        mine = islice(order, self.rank, None, self.world_size)
        ahead: deque[Entry] = deque()
        batch_size, process, processes = self._dealt
        seen = 0
        for _ in range(count):
            while len(ahead) <= self.dataset.order.lanes and (entry := next(mine, None)):
                if self._read_ahead and seen // batch_size % processes == process:
                    self.dataset.read_ahead(entry.visit[1])
                ahead.append(entry)
                seen += 1
            yield self.dataset.index_of(ahead.popleft())


class Collator:
    """Joins the items of a `CacheDataset` to a `Batch`: the `collate_fn` of a loader."""

    def __init__(self, dataset: CacheDataset, packing: str = "none") -> None:
        """`packing` is as in `TrainConfig`."""
        if packing not in PACKINGS:
            raise ValueError(f"packing {packing!r} is not one of {PACKINGS}")
        self._layout = dataset.reader.manifest.layout
        self._temperature_indices = dataset.temperature_indices
        self._packing = packing

    def __call__(self, items: list[Found]) -> Batch:
        """The batch of some items of the dataset."""
        rows: Any = [(item.rows, item.member) for item in items]
        return collate(rows, self._layout, self._temperature_indices, None, self._packing)
