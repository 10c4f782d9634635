"""Scored sequences to one `Batch`."""

import math
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from decant.schemas import Layout
from decant.storage import StoredRows
from decant.storage.cache.logprobs import empty
from decant.student_train.data.batch import Batch, StoredTargets
from decant.student_train.data.packing import rows_of
from decant.student_train.data.planes import Numberings


def collate(
    sequences: list[tuple[StoredRows, int]],
    layout: Layout,
    temperature_indices: tuple[int, ...],
    sources: list[int] | None = None,
    packing: str = "none",
) -> Batch:
    """Join sequences, each given by its row group's columns and its place there, into a batch.

    `temperature_indices` says which of the layout's temperatures the batch is to carry, `sources`
    which cache of a mixture each sequence is of, `packing` how they are laid out in rows. Targets
    keep the order of the sequences, wherever these are.
    """
    spans = [_Span(rows, index) for rows, index in sequences]
    ids, mask, position_ids, starts = laid_out(spans, packing)
    predictors = np.concatenate(
        [span.positions + (start - 1) for span, start in zip(spans, starts, strict=True)]
    )
    num_targets = len(predictors)

    def joined(column: Any) -> Any:
        parts = [column(span.rows) for span in spans]
        if parts[0] is None:
            return None
        taken = [part[span.targets] for part, span in zip(parts, spans, strict=True)]
        out = empty((num_targets, *parts[0].shape[1:]), parts[0].dtype)
        return np.concatenate(taken, out=out)

    def tensor(values: NDArray | None, view: str | None = None) -> Any:
        if values is None:
            return None
        return torch.from_numpy(values if view is None else values.view(view))

    def at_temperature(name: str, index: int, missing: float) -> Tensor:
        """[N] a field at one of the layout's temperatures."""
        if name not in layout.fields:
            return torch.full((num_targets,), missing)
        found = joined(lambda rows: rows.by_temperature[name][index])
        return torch.full((num_targets,), missing) if found is None else tensor(found)

    def at_temperatures(name: str, missing: float) -> Tensor:
        """[N, T] a field at the temperatures of the batch."""
        return torch.stack([at_temperature(name, i, missing) for i in temperature_indices], dim=1)

    def columns_of_logprobs() -> tuple[Tensor, ...] | None:
        columns = spans[0].rows.topk_logprob
        if columns is None:
            return None
        each = range(len(columns))
        return tuple(tensor(joined(lambda rows, i=i: rows.topk_logprob[i])) for i in each)

    def sampler_logprobs() -> Tensor | None:
        """[N], NaN for the sequences of caches that keep none."""
        parts = [span.rows.sampler_logprobs for span in spans]
        if all(part is None for part in parts):
            return None
        nothing = (np.full(len(span.positions), np.nan, np.float32) for span in spans)
        taken = [
            none if part is None else part[span.targets]
            for part, none, span in zip(parts, nothing, spans, strict=True)
        ]
        return torch.from_numpy(np.concatenate(taken))

    num_kept = joined(lambda rows: rows.num_kept)
    stored = StoredTargets(
        topk_lo=tensor(joined(lambda rows: rows.topk_lo)),
        topk_mid=tensor(joined(lambda rows: rows.topk_mid)),
        topk_hi=tensor(joined(lambda rows: rows.topk_hi)),
        numberings=Numberings.of(
            [span.rows.numbering for span in spans], [len(span.positions) for span in spans]
        ),
        topk_logprob=columns_of_logprobs(),
        num_kept=tensor(None if num_kept is None else num_kept.astype(np.int32)),
        draws=tensor(joined(lambda rows: rows.draws), "i2"),
        log_tail_t1=at_temperature("log_tail", 0, -math.inf),  # draws alone stand for all ids
        log_z=at_temperatures("log_z", 0.0),  # no column at T=1
        log_tail=at_temperatures("log_tail", -math.inf),
        code=layout.code if layout.precision == "compact" else None,
        entropy=tensor(joined(lambda rows: rows.scalars.get("entropy"))),
    )
    return Batch(
        input_ids=torch.from_numpy(ids),
        attention_mask=tensor(mask),
        position_ids=tensor(position_ids),
        predictors=torch.from_numpy(predictors),
        labels=torch.from_numpy(ids).flatten()[torch.from_numpy(predictors + 1)],
        stored=stored,
        label_logprob=tensor(joined(lambda rows: rows.scalars["label_logprob"])),
        sampler_logprobs=sampler_logprobs(),
        sample_ids=[span.sample_id for span in spans],
        num_tokens=sum(span.length for span in spans),
        vocab_size=layout.vocab_size,
        temperatures=tuple(float(layout.temperatures[i]) for i in temperature_indices),
        source=source_of(sources, [len(span.positions) for span in spans]),
    )


def source_of(sources: list[int] | None, num_targets: list[int]) -> Tensor | None:
    """[N] the cache that each target is of, given that and the number of targets by sequence."""
    if sources is None:
        return None
    return torch.repeat_interleave(torch.tensor(sources), torch.tensor(num_targets))


class Span(Protocol):
    """Where one sequence is in the columns of its row group."""

    rows: Any
    """Has `token_id`."""
    start: int
    length: int


def laid_out(
    spans: Sequence[Span], packing: str
) -> tuple[NDArray[np.int64], NDArray[np.int64] | None, NDArray[np.int64] | None, list[int]]:
    """Ids [R, L] of rows; a mask, or position ids if packed; the place of each sequence's start."""
    rows = rows_of([span.length for span in spans], packing)
    num_columns = max(sum(spans[i].length for i in row) for row in rows)
    ids = np.zeros((len(rows), num_columns), np.int64)
    beside = np.zeros_like(ids)
    counts = np.arange(num_columns)
    starts = [0] * len(spans)
    for r, row in enumerate(rows):
        at = 0
        for i in row:
            span, end = spans[i], at + spans[i].length
            ids[r, at:end] = span.rows.token_id[span.start : span.start + span.length]
            beside[r, at:end] = 1 if packing == "none" else counts[: span.length]
            starts[i] = r * num_columns + at
            at = end
        if packing != "none":
            beside[r, at:] = counts[: num_columns - at]  # padding is a sequence of its own
    return (ids, beside, None, starts) if packing == "none" else (ids, None, beside, starts)


class _Span:
    """Where one sequence is in the columns of its row group."""

    def __init__(self, rows: StoredRows, index: int) -> None:
        self.rows = rows
        self.start = int(rows.row_starts[index])
        self.length = int(rows.row_starts[index + 1]) - self.start
        self.sample_id = rows.sample_ids[index]
        target_rows = rows.target_rows[rows.target_starts[index] : rows.target_starts[index + 1]]
        self.positions = target_rows - self.start
        self.targets: slice | NDArray[np.int64] = target_rows
        if len(target_rows) and target_rows[-1] - target_rows[0] < len(target_rows):
            first = int(target_rows[0])  # one run, which is copied and not gathered
            self.targets = slice(first, first + len(target_rows))
