"""The targets of a batch that a step is taken on: the highest by some measure.

Measures are numbers per target and no part of the loss's gradient. Equal ones are taken in the
order of the targets, so that the choice depends on the numbers alone.
Shapes: N targets, R rows of a chunk, K slots, V vocabulary.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from decant.student_train.config.loss import LossTerms
from decant.student_train.data.batch import Batch
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
    terms: LossTerms,
    vocab_size: int,
    weights: tuple[float | Tensor, float | Tensor],
) -> Tensor:
    """[N] the student's entropy at T=1, or the loss of each target with its `weights` (kd, ce).

    `logits_of(rows)` gives logits [R, V] of some of the targets; what is beyond `vocab_size` is cut
    off. [N, V] is never held.
    """
    found = []
    targets, size = batch.targets_at(terms.temperature), rows_at_once(vocab_size)
    for start in range(0, batch.num_targets, size):
        rows = slice(start, min(start + size, batch.num_targets))
        logits_RV = logits_of(rows)[:, :vocab_size].float()
        if by == "student_entropy":
            log_q_RV = logits_RV.log_softmax(1)
            found.append(-(log_q_RV.exp() * log_q_RV).sum(1))
            continue
        kd, ce = (w[rows] if isinstance(w, Tensor) else w for w in weights)
        kd_R = sparse_divergence(
            logits_RV,
            targets[rows],
            kind=terms.kind,
            temperature=terms.temperature,
            tail=terms.tail,
            scale_by_t2=terms.scale_by_t2,
            labels=batch.labels[rows],
            vocab_size=vocab_size,
            **terms.options,
        )
        ce_R = nn.functional.cross_entropy(logits_RV, batch.labels[rows], reduction="none")
        found.append(kd * kd_R + ce * ce_R)
    return torch.cat(found) if found else batch.label_logprob
