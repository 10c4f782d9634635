"""The lam of each sequence of a batch, by what the student says of its tokens now.

Numbers per target that are no part of the loss's gradient.
Shapes: N targets, R rows of a chunk, V vocabulary.
"""

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from decant.student_train.config.loss import LossTerms, Terms, of_source
from decant.student_train.data.batch import Batch
from decant.student_train.evaluation.heldout_sums import rows_at_once
from decant.student_train.losses.kinds import KINDS
from decant.student_train.losses.skew import TEACHER_FIRST, lam_of_sequences


def wants_lam(terms: Terms) -> bool:
    """Whether a loss of these has a lam of each sequence."""
    each = (terms,) if isinstance(terms, LossTerms) else terms
    return any(one.gap is not None for one in each)


@torch.no_grad()
def with_lam(
    batch: Batch, logits_of: Callable[[slice], Tensor], terms: Terms, vocab_size: int
) -> Batch:
    """The batch with the lam of each target of a skewed kind: that of its sequence, or its kind's.

    `logits_of(rows)` gives logits [R, V] of some of the targets; [N, V] is never held.
    """
    lam_N = torch.zeros_like(batch.label_logprob)
    size = rows_at_once(vocab_size)
    for source, run in batch.runs():
        its = of_source(terms, source)
        if its.kind not in TEACHER_FIRST or run.start == run.stop:
            continue
        lam = float(its.options.get("lam", KINDS[its.kind]["lam"]))
        lam_N[run] = lam
        if its.gap is None:
            continue
        found = []
        for start in range(run.start, run.stop, size):
            rows = slice(start, min(start + size, run.stop))
            log_q_RV = logits_of(rows)[:, :vocab_size].float().log_softmax(1)
            found.append(log_q_RV.gather(1, batch.labels[rows, None])[:, 0])
        sequence_N = torch.unique(batch.sequence_of_targets()[run], return_inverse=True)[1]
        lam_N[run] = lam_of_sequences(
            batch.label_logprob[run],
            torch.cat(found),
            sequence_N,
            kind=its.kind,
            lam=lam,
            gap=its.gap,
        )
    return dataclasses.replace(batch, lam=lam_N)
