"""Training batches: sequences and the teacher's targets for them, as stored until they are needed.

Ids and codes travel in their stored widths, 3 bytes an entry in place of 12, and are decoded where
the batch is: on the GPU if it was moved there.

Shapes: B sequences, R rows, L padded length, N targets of a batch, K slots, T temperatures of the
run.
"""

import dataclasses
from collections.abc import Iterator
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from decant.schemas import CompactCode
from decant.storage.cache.logprobs import LAST_CODE, decode_logprobs, gap_table, of_planes
from decant.student_train.data.planes import (
    Numberings,
    ids_on_device,
    numbers_of_planes,
    values_on_device,
)
from decant.student_train.losses import EventTargets, SparseTargets

MODEL_INPUTS = ("input_ids", "attention_mask", "position_ids")
"""Fields of a batch that a model's forward takes, where they are known."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class StoredTargets:
    """The distributions of N targets in their stored form; `decode` gives what losses take."""

    topk_lo: Tensor
    """[N, K] uint8: lowest byte of the numbers of the kept ids."""
    topk_mid: Tensor
    """[N, K] uint8: second byte."""
    topk_hi: Tensor | None
    """[N, K] uint8: third byte, where numbers need it."""
    numberings: Numberings | None
    """What the numbers stand for; None: for the ids that they are."""
    topk_logprob: tuple[Tensor, ...] | None
    """One column of log probs [N, K], float32 or float16, or of steps of compact codes, uint8; or
    their planes, uint8. None for draws without them."""
    num_kept: Tensor | None
    """[N] int32: slots in use, where it varies."""
    draws: Tensor | None
    """[N, K] int16 holding the bits of uint16."""
    log_tail_t1: Tensor
    """[N] float32: the tail at T=1, from which compact codes are rebuilt."""
    log_z: Tensor
    """[N, T] float32 at the temperatures of the batch."""
    log_tail: Tensor
    """[N, T] float32 at the temperatures of the batch."""
    code: CompactCode | None
    """The curve of compact codes; None for other precisions."""
    entropy: Tensor | None = None
    """[N] float32 where there are no log probs."""

    @torch.compiler.disable  # bytes by numpy, which is not to be traced
    def decode(self, checked_for: tuple[int, float]) -> SparseTargets:
        """What the stored form stands for (docs/format.md), at the first temperature.

        Computed on the device where it is.
        """
        token_ids = self._ids(checked_for[0])
        unused = None
        if self.num_kept is not None:
            slots = torch.arange(token_ids.shape[1], device=token_ids.device)
            unused = slots >= self.num_kept[:, None]
            token_ids.masked_fill_(unused, -1)
        logprobs = None if self.topk_logprob is None else self._logprobs(unused)
        if unused is not None and logprobs is not None:
            logprobs.masked_fill_(unused, -torch.inf)
        return SparseTargets(
            token_ids=token_ids,
            logprobs=logprobs,
            log_z=self.log_z[:, 0],
            log_tail=self.log_tail[:, 0],
            draws=None if self.draws is None else self.draws.to(torch.int32) & 0xFFFF,
            entropy=self.entropy,
            checked_for=checked_for,
        )

    def _ids(self, vocab_size: int) -> Tensor:
        """[N, K] int64."""
        planes = [self.topk_lo, self.topk_mid]
        if self.topk_hi is not None:
            planes.append(self.topk_hi)
        if self.numberings is None:
            return numbers_of_planes(planes).to(torch.int64)
        if self.topk_lo.device.type == "cpu":
            return self.numberings.ids([plane.numpy() for plane in planes], vocab_size)
        return ids_on_device(planes, self.numberings)

    def _logprobs(self, unused: Tensor | None) -> Tensor:
        """[N, K] float32; any in unused slots."""
        columns, slots, compact = self.topk_logprob, self.topk_lo.shape[1], self.code is not None
        assert columns is not None
        if columns[0].device.type != "cpu":
            values = values_on_device(columns, slots, compact)
            if self.code is None:
                return values.to(torch.float32, copy=True)
            return decode_compact(values, unused, self.log_tail_t1, self.code)
        stored = of_planes([column.numpy() for column in columns], slots, compact)
        if self.code is None:
            return torch.from_numpy(stored).to(torch.float32, copy=True)
        hidden = None if unused is None else unused.numpy()
        log_tail = self.log_tail_t1.numpy()
        return torch.from_numpy(decode_logprobs(stored, hidden, log_tail, "compact", self.code))


def decode_compact(
    steps: Tensor, unused: Tensor | None, log_tail: Tensor, code: CompactCode
) -> Tensor:
    """`storage.codec.decode_logprobs` of compact steps [N, K] on any device."""
    codes = steps.cumsum(1, dtype=torch.uint8)  # modulo 256, as they were written
    if unused is not None:
        codes.masked_fill_(unused, LAST_CODE)
    table = torch.from_numpy(gap_table(code).copy()).to(steps.device)
    gaps = table.index_select(0, codes.flatten().to(torch.int32)).view(codes.shape)
    weight = torch.exp(-gaps).sum(1, dtype=torch.float64)
    kept = -torch.expm1(log_tail.to(torch.float64))
    return (torch.log(kept) - torch.log(weight)).to(torch.float32)[:, None] - gaps


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Batch:
    """B sequences, right-padded, with the targets of all of them in one flat run.

    Where several sequences share a row there are R < B rows, and position ids in place of the mask.

    Besides its fields, a batch is a mapping of what a causal language model's forward takes:
    `model(**batch)` gives logits [R, L, V], of which row `predictors[n]` of the flattened [R * L]
    predicts target n. The mapping has `input_ids` with `attention_mask` or `position_ids`; no
    `labels`, which would have the model compute a loss without the teacher.
    """

    input_ids: Tensor
    """[R, L] int64, 0 where padded."""
    attention_mask: Tensor | None
    """[R, L] int64; None if sequences share rows."""
    position_ids: Tensor | None = None
    """[R, L] int64, from 0 in each sequence, if sequences share rows."""
    predictors: Tensor
    """[N] int64: index into the flattened [R * L] of the position that predicts each target."""
    labels: Tensor
    """[N] int64: the actual tokens."""
    stored: StoredTargets | None = None
    """The teacher's distributions at the stream's temperatures, as stored; None with events."""
    events: EventTargets | None = None
    """In place of them: the events of chunks of the student's tokens, at T=1."""
    label_logprob: Tensor
    """[N] float32: the teacher's log prob of the actual token at T=1; of all tokens of a chunk at
    its last, 0 before it."""
    sampler_logprobs: Tensor | None = None
    """[N] float32 nats: the log prob of the actual token by the model that sampled it, at T=1; NaN
    for targets of a cache of a mixture that keeps none. None where no cache does."""
    sample_ids: list[str]
    """B strings: the source's own ids of the sequences."""
    num_tokens: int
    """Of all sequences, without padding."""
    vocab_size: int
    """Vocabulary that every value was checked for when it was written."""
    temperatures: tuple[float, ...]
    """T numbers: those that `targets_at` has, besides 1."""
    source: Tensor | None = None
    """[N] int64: which cache of a mixture each target is of; None for one cache."""

    lam: Tensor | None = None
    """[N] float32: that of each target of a skewed divergence, where it is not its option's."""

    @property
    def num_targets(self) -> int:
        """N."""
        return len(self.labels)

    def keys(self) -> tuple[str, ...]:
        """Names of what a model's forward takes, for `model(**batch)`."""
        return tuple(name for name in MODEL_INPUTS if getattr(self, name) is not None)

    def values(self) -> tuple[Tensor, ...]:
        """What a model's forward takes."""
        return tuple(getattr(self, name) for name in self.keys())

    def items(self) -> tuple[tuple[str, Tensor], ...]:
        """What a model's forward takes, by name."""
        return tuple((name, getattr(self, name)) for name in self.keys())

    def __getitem__(self, name: str) -> Tensor:
        if name in self.keys():
            value: Tensor = getattr(self, name)
            return value
        known = [field.name for field in dataclasses.fields(self)]
        said = f"take batch.{name} for the losses" if name in [*known, "targets"] else "it has none"
        raise KeyError(
            f"a batch as a mapping has what a model's forward takes, {', '.join(self.keys())}, and "
            f"no {name!r}: {said}"
        )

    def __contains__(self, name: object) -> bool:
        return name in self.keys()

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def __len__(self) -> int:
        return len(self.keys())

    @cached_property
    def targets(self) -> SparseTargets | EventTargets:
        """The teacher's distributions at the first temperature, decoded once, where they are."""
        if self.events is not None:
            return self.events
        assert self.stored is not None
        return self.stored.decode((self.vocab_size, self.temperatures[0]))

    def targets_at(self, temperature: float) -> SparseTargets | EventTargets:
        """The teacher's distributions at one of the temperatures, or at 1, which is always there.

        Raises ValueError naming the temperatures if it is none of them.
        """
        if self.events is not None:
            return self.events.validate(self.vocab_size, temperature)
        assert self.stored is not None
        checked_for = (self.vocab_size, float(temperature))
        if temperature in self.temperatures:
            i = self.temperatures.index(temperature)
            log_z, log_tail = self.stored.log_z[:, i], self.stored.log_tail[:, i]
        elif temperature == 1:
            log_tail = self.stored.log_tail_t1
            log_z = torch.zeros_like(log_tail)
        else:
            raise ValueError(
                f"temperature {temperature:g} is not among those of the batch: "
                f"{', '.join(f'{t:g}' for t in self.temperatures)}"
            )
        targets = self.targets
        assert isinstance(targets, SparseTargets)
        return dataclasses.replace(targets, log_z=log_z, log_tail=log_tail, checked_for=checked_for)

    @property
    def sampled_targets(self) -> SparseTargets:
        """The actual tokens with the log probs that teacher and sampler gave them: for kind opd.

        Raises ValueError where several tokens of the student stand for one of the teacher's.
        """
        if self.events is not None and len(self.events.sizes) != len(self.labels):
            raise ValueError(
                "targets that are chunks of several tokens are no samples of the student's: opd "
                "needs a cache of the student's own tokenizer"
            )
        targets = SparseTargets.of_labels(
            self.labels, self.label_logprob.clamp(max=0), self.sampler_logprobs
        )
        return dataclasses.replace(targets, checked_for=(self.vocab_size, 1.0))

    def sequence_of_targets(self) -> Tensor:
        """[N] int64: a number for the sequence of each target, another one for each sequence."""
        if self.position_ids is None:
            return self.predictors // self.input_ids.shape[1]
        begun = (self.position_ids.flatten() == 0).cumsum(0)
        return begun.index_select(0, self.predictors)

    def runs(self) -> list[tuple[int, slice]]:
        """Which cache the targets are of, by runs of targets of one; (0, all) of one cache."""
        if self.source is None:
            return [(0, slice(0, self.num_targets))]
        values, counts = torch.unique_consecutive(self.source, return_counts=True)
        found, start = [], 0
        for value, count in zip(values.tolist(), counts.tolist(), strict=True):
            found.append((value, slice(start, start + count)))
            start += count
        return found

    def of_targets(self, rows: Tensor) -> "Batch":
        """The same sequences with some of the targets alone: those at `rows` [n], int64."""
        if self.stored is None:
            raise ValueError("targets that are chunks of tokens cannot be chosen row by row")
        numberings = self.stored.numberings
        stored = dataclasses.replace(
            _map(
                dataclasses.replace(self.stored, numberings=None),
                lambda tensor: tensor.index_select(0, rows),
            ),
            numberings=numberings and numberings.of_targets(rows),
        )
        per_target = {
            name: value.index_select(0, rows)
            for name in (
                "predictors",
                "labels",
                "label_logprob",
                "sampler_logprobs",
                "source",
                "lam",
            )
            if (value := getattr(self, name)) is not None
        }
        return dataclasses.replace(self, stored=stored, **per_target)

    def to(self, device: torch.device | str | int, non_blocking: bool = True) -> "Batch":
        """The same batch on `device`, targets still in their stored form."""
        return _map(self, lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "Batch":
        """The same batch in page-locked memory, from which copies to a GPU run on their own."""
        return _map(self, Tensor.pin_memory)


def _map(value: Any, function: Any) -> Any:
    changed = {}
    for field in dataclasses.fields(value):
        item = getattr(value, field.name)
        if isinstance(item, Tensor):
            changed[field.name] = function(item)
        elif isinstance(item, tuple) and item and isinstance(item[0], Tensor):
            changed[field.name] = tuple(function(tensor) for tensor in item)
        elif isinstance(item, (StoredTargets, Numberings)):
            changed[field.name] = _map(item, function)
        elif isinstance(item, EventTargets):
            changed[field.name] = item.map(function)
    return dataclasses.replace(value, **changed)
