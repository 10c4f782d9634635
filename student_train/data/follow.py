"""Train on a cache that is still being dumped: its shards in the order in which they were seen.

The first epoch takes shard after shard, each in an order of its own that depends on the seed
alone; where all processes stand in it follows from the list of shards in the order seen, which is
part of the state, and the number of sequences consumed. Once all shards have been passed, epochs
are those of a complete cache.
"""

import logging
import os
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch.utils.data import get_worker_info

from decant.schemas import FormatError
from decant.storage import CacheReader, StoredRows
from decant.student_train.alignment.aligner import AlignedRows
from decant.student_train.data.order import CacheOrder, Entry
from decant.student_train.data.stream import SequenceStream
from decant.student_train.data.stream_config import StreamConfig, temperature_indices

log = logging.getLogger(__name__)

FIRST_PASS = 1 << 30
"""In the first epoch, shard s has the order of epoch FIRST_PASS + s of its own row groups."""
STEPS_AHEAD = 3
"""Steps that are to be known when one begins, so that reading ahead need not wait."""
VISIBLE_SECONDS = 120.0
REPORT_SECONDS = 60.0


class FollowStream(SequenceStream):
    """Endless batches of one rank from a cache that may not be complete yet."""

    def __init__(
        self, url: str | os.PathLike[str], *, poll_seconds: float = 2.0, **options: Any
    ) -> None:
        """Open the cache; `options` are the fields of `StreamConfig`.

        `poll_seconds` is how often new shards are looked for. With several ranks, `await_data`
        agrees on them and has to be called before each step, by all. Raises ValueError for a part:
        which sequences it holds is known when the cache is whole.
        """
        super().__init__(StreamConfig(**options))
        if self.config.part != "all" or self.config.heldout_fraction:
            raise ValueError(f"{url}: a cache that is still being dumped has no held-out part")
        self.readers = [CacheReader(url, allow_incomplete=True)]
        self._layout = self.reader.manifest.layout
        self._align()
        self._temperature_indices = temperature_indices(self.reader, self.config.temperatures)
        self._num_lanes = self._lanes = self.config.lanes
        self._seed, self._poll_seconds = self.config.seed, poll_seconds
        plan = self.reader.plan
        self._sizes = np.array([shard.num_sequences for shard in plan], np.int64)
        self.num_sequences = int(self._sizes.sum())
        self.arrived: list[int] = []
        """Shards in the order in which they were seen; all ranks agree on it."""
        self._known = 0
        self._more = threading.Condition()
        self._closed = False
        self._next_poll = self._next_report = 0.0
        if self.world_size == 1:
            self._extend(self.reader.index.shards.tolist())

    @property
    def complete(self) -> bool:
        """Whether every shard has arrived."""
        return len(self.arrived) == len(self._sizes)

    def state_dict(self) -> dict[str, Any]:
        """Where the stream is: the same for every rank and any world size."""
        with self._more:
            arrived = list(self.arrived)
        return {
            "cache_id": self.reader.manifest.cache_id,
            "seed": self._seed,
            "num_sequences": self.num_sequences,
            "lanes": self._lanes,
            "arrived": arrived,
            "consumed": self.consumed,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state, with its order of shards. Raises ValueError if it cannot be."""
        super().load_state_dict({**state, "arrived": self.state_dict()["arrived"]})
        with self._more:
            self.arrived, self._known = [], 0
            self._see(list(state["arrived"]))
            self._extend(list(state["arrived"]))
            if self.world_size == 1:
                self._extend(self._unseen())

    def await_data(self, through: int, accelerator: Accelerator) -> bool:
        """Whether the first `through` sequences are known; if not, call again: it waits a little.

        All ranks agree on the answer and on the shards that have arrived.
        """
        ahead = through + STEPS_AHEAD * self.sequences_per_step
        if self.complete or self._known >= ahead:
            return True
        new: list[Any] = [self._look() if accelerator.is_main_process else None]
        if accelerator.num_processes > 1:
            broadcast_object_list(new, from_process=0)
            with self._more:
                if not accelerator.is_main_process:
                    self._see(new[0])
                    self._extend(new[0])
        if self.complete or self._known >= through:
            return True
        self._report()
        time.sleep(min(self._poll_seconds, 0.5))
        return False

    def close(self) -> None:
        """End a wait for shards."""
        with self._more:
            self._closed = True
            self._more.notify_all()

    def _look(self) -> list[int]:
        """Shards that have arrived since the last look, if it is time for one."""
        with self._more:
            if time.monotonic() < self._next_poll:
                return []
            self._next_poll = time.monotonic() + self._poll_seconds
            self.reader.refresh()
            new = self._unseen()
            self._extend(new)
            return new

    def _unseen(self) -> list[int]:
        known = set(self.arrived)
        return [shard for shard in self.reader.index.shards.tolist() if shard not in known]

    def _extend(self, shards: list[int]) -> None:
        with self._more:
            self.arrived += shards
            self._known += int(self._sizes[shards].sum())
            self._more.notify_all()

    def _see(self, shards: list[int]) -> None:
        """Make sure that this rank can read shards which another has seen.

        Raises FormatError if one stays invisible: a file system may take its time, not for ever.
        """
        deadline = time.monotonic() + VISIBLE_SECONDS
        while missing := set(shards) - set(self.reader.index.shards.tolist()):
            if self.reader.manifest.is_final or time.monotonic() > deadline:
                raise FormatError(
                    f"{self.reader.url}: shards {sorted(missing)[:5]} were seen before and are not "
                    "there any more"
                )
            if not self.reader.refresh():
                time.sleep(0.2)

    def _await_more(self) -> bool:
        """Wait for shards; false if the stream was closed."""
        with self._more:
            if not self._closed and (self.world_size > 1 or not self._look()):
                self._report()
                self._more.wait(timeout=min(self._poll_seconds, 0.5))
            return not self._closed

    def _report(self) -> None:
        if time.monotonic() >= self._next_report:
            self._next_report = time.monotonic() + REPORT_SECONDS
            done, planned = len(self.arrived), len(self._sizes)
            log.info("waiting for %s: %d of %d shards are there", self.reader.url, done, planned)

    def _order(self, consumed: int) -> Iterator[Entry | None]:
        if get_worker_info() is not None:
            raise ValueError(
                "a cache that is still being dumped cannot be read in worker processes"
            )
        self._closed = False
        if consumed < self.num_sequences:
            yield from self._first_epoch(consumed)
            consumed = self.num_sequences
        groups = self.reader.row_groups()
        order = CacheOrder(
            groups.first_sequence, groups.sequences, seed=self._seed, lanes=self._lanes
        )
        yield from order.after(consumed)

    def _first_epoch(self, skip: int) -> Iterator[Entry | None]:
        place = 0
        while place < len(self._sizes):
            if place == len(self.arrived):
                yield None
                continue
            shard = self.arrived[place]
            place += 1
            size = int(self._sizes[shard])
            if skip >= size:
                skip -= size
                continue
            groups = self.reader.index.groups_of(shard)
            order = CacheOrder(
                np.array([group.first_sequence for group in groups]),
                np.array([group.sequences for group in groups]),
                seed=self._seed,
                lanes=self._lanes,
            )
            yield from order.epoch(FIRST_PASS + shard, skip)
            skip = 0

    def _load(self, visit: tuple[int, ...]) -> StoredRows | AlignedRows:
        epoch, group = visit
        if epoch < FIRST_PASS:
            return self.read(self.reader.row_groups()[group])
        return self.read(self.reader.index.groups_of(epoch - FIRST_PASS)[group])
