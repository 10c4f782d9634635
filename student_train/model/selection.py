"""The targets of a batch that a step is taken on: the highest by some measure.

Measures are numbers per target and no part of the loss's gradient. Equal ones are taken in the
order of the targets, so that the choice depends on the numbers alone.
Shapes: N targets, R rows of a chunk, K slots, V vocabulary.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from decant.student_train.config.loss import Terms
from decant.student_train.data.batch import Batch
from decant.student_train.data.parts import parts_of, weights_of
from decant.student_train.evaluation.heldout_sums import rows_at_once
from decant.student_train.losses import SparseTargets, sparse_divergence


def highest(values_N: Tensor, count: int) -> Tensor:
    """[count] indices of the highest values, ascending; of equal ones the first."""
    order_N = torch.sort(values_N, descending=True, stable=True).indices
    return order_N[:count].sort().values


def teacher_entropy(batch: Batch) -> Tensor:
    """[N] nats at T=1: -sum p log p over the kept ids and all the rest as one class.

    Where draws are stored without log probs, the exact entropy, which is stored with them.
    """
    targets = batch.targets_at(1.0)
    assert isinstance(targets, SparseTargets)
    if targets.logprobs is None:
        assert targets.entropy is not None
        return targets.entropy
    log_p_NK = torch.where(targets.is_real(), targets.logprobs, 0.0)
    p_NK = torch.where(targets.is_real(), log_p_NK.exp(), 0.0)
    tail_N = targets.log_tail.exp()
    rest_N = torch.where(tail_N > 0, tail_N * targets.log_tail, 0.0)
    return -((p_NK * log_p_NK).sum(1) + rest_N)


@torch.no_grad()
def by_student(
    by: str,
    logits_of: Callable[[slice], Tensor],
    batch: Batch,
    terms: Terms,
    vocab_size: int,
) -> Tensor:
    """[N] the student's entropy at T=1, or the loss of each target with its weights.

    `logits_of(rows)` gives logits [R, V] of some of the targets; what is beyond `vocab_size` is cut
    off. [N, V] is never held.
    """
    found = []
    weights, size = weights_of(batch, terms), rows_at_once(vocab_size)
    for part in parts_of(batch, terms):
        for start in range(0, len(part.targets), size):
            inside = slice(start, min(start + size, len(part.targets)))
            rows = slice(part.rows.start + inside.start, part.rows.start + inside.stop)
            logits_RV = logits_of(rows)[:, :vocab_size].float()
            if by == "student_entropy":
                log_q_RV = logits_RV.log_softmax(1)
                found.append(-(log_q_RV.exp() * log_q_RV).sum(1))
                continue
            kd, ce = (w[rows] if isinstance(w, Tensor) else w for w in weights)
            kd_R = sparse_divergence(
                logits_RV,
                part.targets[inside],
                labels=batch.labels[rows],
                vocab_size=vocab_size,
                **part.terms.divergence(),
            )
            ce_R = nn.functional.cross_entropy(logits_RV, batch.labels[rows], reduction="none")
            found.append(kd * kd_R + ce * ce_R)
    return torch.cat(found) if found else batch.label_logprob
