"""Figures of a model of another tokenizer: of its own tokens, and of the chunks that they make up.

Shapes: N tokens of a batch, C chunks, V the model's vocabulary.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from decant.storage import CacheReader
from decant.student_train.alignment.aligner import AlignedRows, Aligner
from decant.student_train.data.batch import Batch
from decant.student_train.data.collate_events import collate_events
from decant.student_train.evaluation.heldout_sums import agreement_of_events, rows_at_once
from decant.student_train.evaluation.model_report import Chunks
from decant.student_train.evaluation.target_figures import target_figures
from decant.student_train.losses import EventTargets, sparse_divergence
from decant.student_train.losses.events import row_slices


class AlignedBatch(NamedTuple):
    """Sequences in the model's tokens."""

    batch: Batch | None
    """None stands for sequences without a chunk."""
    indices: list[int]
    """Their plan indices."""
    num_teacher: NDArray[np.int64]
    """[C] the teacher's tokens of each chunk."""
    teacher_ce: list[NDArray[np.float64]]
    """Of each sequence, -log p of all of the teacher's targets."""


def aligned_batches(
    reader: CacheReader, aligner: Aligner, chosen: NDArray[np.intp], batch_size: int
) -> Iterator[AlignedBatch]:
    """Batches of the chosen sequences, like lengths together.

    Raises ValueError if too many sequences of the row groups cannot be aligned.
    """
    start = 0
    none = np.zeros(0, np.int64)
    for group in reader.row_groups():
        members = chosen[(chosen >= start) & (chosen < start + group.sequences)] - start
        if len(members):
            stored = reader.read_stored(group)
            rows = aligner(stored)
            label_logprob = stored.scalars["label_logprob"]
            lengths, chunks = np.diff(rows.row_starts), np.diff(rows.chunk_starts)
            empty = [start + int(m) for m in members if not chunks[m]]
            if empty:
                yield AlignedBatch(None, empty, none, [])
            whole = sorted((m for m in members.tolist() if chunks[m]), key=lengths.__getitem__)
            for at in range(0, len(whole), batch_size):
                some = whole[at : at + batch_size]
                spans = [slice(*stored.target_starts[m : m + 2].tolist()) for m in some]
                yield AlignedBatch(
                    collate_events([(rows, member) for member in some], aligner.vocab_size),
                    [start + member for member in some],
                    np.concatenate([_of_chunks(rows, member) for member in some]),
                    [-label_logprob[stored.target_rows[s]].astype(np.float64) for s in spans],
                )
        start += group.sequences


def _of_chunks(rows: AlignedRows, member: int) -> NDArray[np.int64]:
    return rows.num_teacher[rows.chunk_starts[member] : rows.chunk_starts[member + 1]]


@torch.no_grad()
def chunk_figures(
    logits_of: Callable[[slice], Tensor],
    batch: Batch,
    num_teacher: NDArray[np.int64],
    vocab_size: int,
    *,
    has_entries: bool,
) -> dict[str, Tensor]:
    """[N] float64 figures of a batch's tokens by name, NaN where one is not of a token.

    `ce`, `correct` and `confidence` are of every token. Of `has_entries`, the KLs over a chunk's
    events and all the rest are in its last row; `agreement` is in rows of chunks of one token on
    either side where one event is more probable than all the rest.
    """
    events = batch.targets_at(1.0)
    assert isinstance(events, EventTargets)
    sizes = events.sizes.cpu()
    is_one = torch.from_numpy(num_teacher == 1) & (sizes == 1)
    is_one_N = is_one.repeat_interleave(sizes).to(events.sizes.device)
    parts: list[dict[str, Tensor]] = []
    for rows in row_slices(events, rows_at_once(vocab_size)):
        logits_RV = logits_of(rows)[:, :vocab_size].float()
        part = target_figures(logits_RV, batch.labels[rows], None)
        if has_entries:
            some = events[rows]
            nothing_R = torch.full_like(part["ce"], torch.nan)
            for name, kind in (("kl_forward", "fkl"), ("kl_reverse", "rkl")):
                kl_R = sparse_divergence(logits_RV, some, kind)
                part[name] = nothing_R.clone()
                part[name][some.last_rows] = kl_R[some.last_rows].double()
            known_R, agreeing_R = agreement_of_events(logits_RV.argmax(1), some)
            known_R &= is_one_N[rows]
            part["agreement"] = torch.where(known_R, agreeing_R.double(), nothing_R)
        parts.append(part)
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def count_chunks(total: Chunks, num_teacher: NDArray[np.int64], sizes: NDArray[np.int64]) -> None:
    """Add the chunks of a batch, by the tokens on either side."""
    many_t, many_s = num_teacher > 1, sizes > 1
    total.tokens += int(sizes.sum())
    total.chunks += len(sizes)
    total.one_to_one += int(np.sum(~many_t & ~many_s))
    total.one_to_many += int(np.sum(~many_t & many_s))
    total.many_to_one += int(np.sum(many_t & ~many_s))
    total.many_to_many += int(np.sum(many_t & many_s))
