"""Stream a cache as training batches: deterministic, bounded in memory, resumable anywhere.

The order of sequences is an endless run of epochs, each a pure function of (seed, epoch): row
groups permuted, then sequences shuffled inside a window of row groups. The only state is how many
sequences have been consumed by all ranks together, so a run can go on with another world size.

Shapes: B sequences, L padded length, N targets of a batch, K slots.
"""

import dataclasses
import os
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import IterableDataset

from schemas import ScoredSequence
from storage import CacheReader, Rows
from student_train.losses import SparseTargets

PARTS = ("all", "train", "heldout")


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """B sequences, right-padded, with the targets of all of them in one flat run."""

    input_ids: Tensor
    """[B, L] int64, 0 where padded."""
    attention_mask: Tensor
    """[B, L] int64."""
    predictors: Tensor
    """[N] int64: index into the flattened [B * L] of the position that predicts each target."""
    labels: Tensor
    """[N] int64: the actual tokens."""
    targets: SparseTargets
    """The teacher's distributions at the stream's temperature."""
    teacher_logprob: Tensor
    """[N] float32: the teacher's log prob of the actual token at T=1."""
    sample_ids: list[str]
    """[B]."""

    @property
    def num_targets(self) -> int:
        """N."""
        return len(self.labels)

    def to(self, device: torch.device, non_blocking: bool = True) -> "Batch":
        """The same batch with its tensors on `device`."""
        moved: dict[str, Any] = {
            f.name: value.to(device, non_blocking=non_blocking)
            for f in dataclasses.fields(self)
            if isinstance(value := getattr(self, f.name), Tensor | SparseTargets)
        }
        return dataclasses.replace(self, **moved)


class CacheStream(IterableDataset[Batch]):
    """Endless batches of one rank from a cache.

    Every global step takes `batch_size * world_size` consecutive sequences of the global order;
    rank r takes the r-th run of `batch_size` of them, so no two ranks see the same sample and
    every rank always has a full batch. Iterate it directly: it reads ahead in its own threads.
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
        window: int = 8,
        threads: int = 2,
    ) -> None:
        """Open the cache.

        `part` with `heldout_fraction` splits one cache by sequence, the same way whatever the
        seed. `window` is how many row groups are shuffled together and held in memory.
        Raises FormatError if the cache is not whole, ValueError if `temperature` is not stored or
        the part is empty.
        """
        super().__init__()
        if part not in PARTS:
            raise ValueError(f"part {part!r} is not one of {PARTS}")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} of {world_size}")
        if batch_size < 1 or window < 1 or threads < 1:
            raise ValueError("batch_size, window and threads must be at least 1")
        self.reader = CacheReader(url)
        self.batch_size, self.rank, self.world_size = batch_size, rank, world_size
        self.temperature, self.seed, self.window, self.threads = temperature, seed, window, threads
        self._temperature_index = temperature_index(self.reader, temperature)
        self._groups = self.reader.row_groups()
        self._members = [
            select_part(g.first_sequence, g.sequences, part, heldout_fraction) for g in self._groups
        ]
        self.num_sequences = sum(len(members) for members in self._members)
        if not self.num_sequences:
            raise ValueError(
                f"{self.reader.url}: part {part!r} with heldout_fraction {heldout_fraction} "
                f"holds none of its {len(self.reader)} sequences"
            )
        self.consumed = 0

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
            "consumed": self.consumed,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state. Raises ValueError if it is of another cache, seed or part."""
        ours = self.state_dict()
        for name in ("cache_id", "seed", "num_sequences"):
            if state[name] != ours[name]:
                raise ValueError(
                    f"cannot resume the stream of {self.reader.url}: {name} was {state[name]}, "
                    f"is {ours[name]}"
                )
        self.consumed = int(state["consumed"])

    def __iter__(self) -> Generator[Batch, None, None]:
        step = self.batch_size * self.world_size
        with ThreadPoolExecutor(self.threads) as pool:
            order = self._order(pool, self.consumed)
            try:
                while True:
                    run = [next(order) for _ in range(step)]
                    mine = run[self.rank * self.batch_size : (self.rank + 1) * self.batch_size]
                    self.consumed += step
                    yield self._collate([rows[i] for rows, i in mine])
            finally:
                order.close()

    def _order(
        self, pool: ThreadPoolExecutor, consumed: int
    ) -> Generator[tuple[Rows, int], None, None]:
        """Rows and index of each sequence of the global order behind `consumed`, for ever."""
        ahead: deque[tuple[NDArray[np.int64], list[Future[Rows]]]] = deque()
        blocks = self._blocks(consumed)
        try:
            while True:
                while len(ahead) < 2:
                    groups, entries = next(blocks)
                    reads = [pool.submit(self.reader.read, self._groups[g]) for g in groups]
                    ahead.append((entries, reads))
                entries, reads = ahead.popleft()
                rows = [read.result() for read in reads]
                for slot, index in entries:
                    yield rows[slot], index
        finally:
            for _, reads in ahead:
                for read in reads:
                    read.cancel()

    def _blocks(self, consumed: int) -> Iterator[tuple[list[int], NDArray[np.int64]]]:
        """Row groups to read together, and [M, 2] (which of them, which sequence) in order."""
        epoch, skip = divmod(consumed, self.num_sequences)
        while True:
            groups = _permutation(len(self._groups), self.seed, epoch, 0)
            for block, start in enumerate(range(0, len(groups), self.window)):
                chosen = [int(g) for g in groups[start : start + self.window]]
                total = sum(len(self._members[g]) for g in chosen)
                if skip >= total:
                    skip -= total
                    continue
                entries = np.concatenate(
                    [
                        np.stack([np.full(len(self._members[g]), slot), self._members[g]], axis=1)
                        for slot, g in enumerate(chosen)
                    ]
                )
                yield chosen, entries[_permutation(total, self.seed, epoch, block + 1)][skip:]
                skip = 0
            epoch += 1

    def _collate(self, sequences: list[ScoredSequence]) -> Batch:
        return collate(sequences, self._temperature_index, self.temperature, self.reader)


def heldout_batches(
    stream: CacheStream,
) -> Iterator[tuple[Batch, bool]]:
    """One pass over a stream's part in stored order: this rank's batches, and whether each counts.

    Every rank gets the same number of batches; a batch that does not count repeats an earlier one,
    so that models which communicate in their forward stay in step.
    """
    share = -(-stream.num_sequences // (stream.batch_size * stream.world_size))
    given = 0
    pending: list[ScoredSequence] = []
    batch: Batch | None = None
    position = 0
    for group, members in zip(stream._groups, stream._members, strict=True):
        if not len(members):
            continue
        rows = stream.reader.read(group)
        for index in members:
            if position // stream.batch_size % stream.world_size == stream.rank:
                pending.append(rows[int(index)])
            elif batch is None:  # a rank without a share still needs something to repeat
                batch = stream._collate([rows[int(index)]])
            position += 1
            if len(pending) == stream.batch_size:
                batch = stream._collate(pending)
                pending = []
                given += 1
                yield batch, True
    if pending:
        batch = stream._collate(pending)
        given += 1
        yield batch, True
    while given < share:
        assert batch is not None
        given += 1
        yield batch, False


def collate(
    sequences: list[ScoredSequence], temperature_index: int, temperature: float, reader: CacheReader
) -> Batch:
    """Join sequences into one batch; their targets become one flat run in sequence order."""
    length = max(len(s.input_ids) for s in sequences)
    ids = np.zeros((len(sequences), length), np.int64)
    mask = np.zeros_like(ids)
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence.input_ids)] = sequence.input_ids
        mask[row, : len(sequence.input_ids)] = 1
    predictors = [s.positions.astype(np.int64) - 1 + i * length for i, s in enumerate(sequences)]

    def joined(name: str, dtype: type | None = None) -> Tensor:
        values = np.concatenate([getattr(s, name) for s in sequences])
        return torch.from_numpy(values if dtype is None else values.astype(dtype))

    layout = reader.manifest.layout
    targets = SparseTargets(
        token_ids=joined("token_ids", np.int64),
        logprobs=joined("logprobs"),
        log_z=joined("log_z")[:, temperature_index].contiguous(),
        log_tail=joined("log_tail")[:, temperature_index].contiguous(),
        draws=joined("draws") if layout.has_draws else None,
        # Every value was checked when it was written, and its bytes when they were read.
        checked_for=(layout.vocab_size, float(temperature)),
    )
    return Batch(
        input_ids=torch.from_numpy(ids),
        attention_mask=torch.from_numpy(mask),
        predictors=torch.from_numpy(np.concatenate(predictors)),
        labels=joined("labels", np.int64),
        targets=targets,
        teacher_logprob=joined("label_logprob"),
        sample_ids=[s.sample_id for s in sequences],
    )


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
