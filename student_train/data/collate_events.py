"""Aligned sequences to one `Batch`, whose targets are events."""

from typing import Any

import numpy as np
import torch

from decant.schemas import Layout
from decant.storage import StoredRows
from decant.storage.cache.logprobs import empty
from decant.storage.cache.rows import decode_rows
from decant.student_train.alignment.aligner import AlignedRows
from decant.student_train.alignment.events import Events, log_complement
from decant.student_train.alignment.token_bytes import ranges
from decant.student_train.data.batch import Batch
from decant.student_train.data.collate import laid_out, source_of
from decant.student_train.losses import EventTargets


def collate_events(
    sequences: list[tuple[AlignedRows, int]],
    vocab_size: int,
    sources: list[int] | None = None,
    packing: str = "none",
) -> Batch:
    """Join sequences, each given by its row group's columns and its place there, into a batch.

    `vocab_size` is the student's; the rest is as in `collate`.
    """
    spans = [_Span(rows, index) for rows, index in sequences]
    ids, mask, position_ids, starts = laid_out(spans, packing)
    predictors = np.concatenate(
        [span.places + (start - 1) for span, start in zip(spans, starts, strict=True)]
    )
    labels = torch.from_numpy(ids).flatten()[torch.from_numpy(predictors + 1)]
    sizes = np.concatenate([span.sizes for span in spans])
    slots = max(span.rows.events.token_ids.shape[1] for span in spans)

    def joined(name: str, fill: float, dtype: Any = None) -> torch.Tensor:
        parts = [getattr(span.rows.events, name)[span.chunks] for span in spans]
        if parts[0].ndim == 2 and any(part.shape[1] < slots for part in parts):
            parts = [
                np.pad(p, ((0, 0), (0, slots - p.shape[1])), constant_values=fill) for p in parts
            ]
        shape = (sum(map(len, parts)), *parts[0].shape[1:])
        out = empty(shape, dtype or np.result_type(*parts))
        return torch.from_numpy(np.concatenate(parts, out=out))

    samplers = [span.rows.sampler_logprobs for span in spans]
    sampler_logprobs = None
    if any(column is not None for column in samplers):  # whose chunks are of one token each
        parts = [
            np.full(len(span.places), np.nan, np.float32) if column is None else column[span.chunks]
            for span, column in zip(spans, samplers, strict=True)
        ]
        sampler_logprobs = torch.from_numpy(np.concatenate(parts))
    label_logprob = torch.zeros(len(labels))
    label_logprob[torch.from_numpy(np.cumsum(sizes) - 1)] = joined("observed", 0.0)
    return Batch(
        input_ids=torch.from_numpy(ids),
        attention_mask=None if mask is None else torch.from_numpy(mask),
        position_ids=None if position_ids is None else torch.from_numpy(position_ids),
        predictors=torch.from_numpy(predictors),
        labels=labels,
        events=EventTargets(
            token_ids=joined("token_ids", -1, np.int64),
            log_p=joined("log_p", -np.inf),
            log_rest=joined("log_rest", 0.0),
            labels=labels,
            sizes=torch.from_numpy(sizes),
            checked_for=(vocab_size, 1.0),
        ),
        label_logprob=label_logprob,
        sampler_logprobs=sampler_logprobs,
        sample_ids=[rows.sample_ids[index] for rows, index in sequences],
        num_tokens=sum(span.length for span in spans),
        vocab_size=vocab_size,
        temperatures=(1.0,),
        source=source_of(sources, [len(span.places) for span in spans]),
    )


class _Span:
    """Where one sequence is in the columns of its row group."""

    def __init__(self, rows: AlignedRows, index: int) -> None:
        self.rows: Any = rows
        self.start = int(rows.row_starts[index])
        self.length = int(rows.row_starts[index + 1]) - self.start
        self.chunks = slice(int(rows.chunk_starts[index]), int(rows.chunk_starts[index + 1]))
        self.sizes = rows.size[self.chunks]
        self.places = ranges(rows.first[self.chunks] - self.start, self.sizes)


def own_events(stored: StoredRows, layout: Layout) -> AlignedRows:
    """Rows of the student's own tokenizer with each target as a chunk of its own.

    Its events are the kept ids; where labels alone are stored, the label.
    """
    rows = decode_rows(stored, layout)
    slots = rows.token_ids.shape[1]
    labels = rows.label_logprob
    if slots:
        assert rows.logprobs is not None and rows.log_tail is not None
        token_ids, log_p, log_rest = rows.token_ids, rows.logprobs, rows.log_tail[:, 0]
    else:
        token_ids, log_p = rows.labels[:, None], labels[:, None]
        with np.errstate(divide="ignore"):
            log_rest = log_complement(labels.astype(np.float64)).astype(np.float32)
    kept_mass = -np.expm1(np.minimum(log_rest, 0).astype(np.float64)) * bool(slots)
    return AlignedRows(
        sample_ids=rows.sample_ids,
        token_id=rows.input_ids,
        row_starts=rows.row_starts,
        chunk_starts=rows.target_starts,
        first=np.flatnonzero(rows.is_target),
        size=np.ones(len(labels), np.int64),
        num_teacher=np.ones(len(labels), np.int64),
        events=Events(
            token_ids=token_ids,
            log_p=log_p,
            log_rest=log_rest,
            observed=labels,
            kept_mass=kept_mass,
            found_mass=kept_mass,
        ),
        sampler_logprobs=rows.sampler_logprobs,
    )
