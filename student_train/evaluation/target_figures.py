"""How a model's distribution of each target compares with the teacher's, as far as that is stored.

The teacher's probabilities are known for the kept ids S and, as one sum r, for all others. With the
model's q and its mass q* outside S, in nats at T=1:

    KL(p || q) >= sum_S p log(p/q) + r log(r/q*)        equal if r = 0, or both agree in shape there
    KL(p || q) <= sum_S p log(p/q) + r log(c/q_min)     c: no id outside S has more than this
    KL(q || p) >= sum_S q log(q/p) + q* log(q*/r)       no upper bound where r > 0: p may be 0 there
    sum min(p, q) lies between its sum over S and that plus min(r, q*)

What is decoded from f16 sums to 1 only within its rounding, so each sum of a log(a/b) goes with
- a + b (the generalised KL, as in the decoding error): with m = sum_S p + r the forward KLs have
1 - m more than is written, the reverse one m - 1.

Shape letters: R targets, K slots, V vocabulary.
"""

import torch
from torch import Tensor

from decant.student_train.losses import SparseTargets
from decant.student_train.losses.targets import LOG_FLOOR, MASKED_LOGIT

OF_LABELS = ("ce", "correct", "confidence")
OF_ENTRIES = (
    *("kl_forward", "kl_forward_upper", "kl_reverse", "acceptance", "acceptance_upper"),
    *("teacher_tail", "model_tail", "teacher_confidence", "teacher_correct"),
)
"""Figures that take the log probs of kept entries."""


@torch.no_grad()
def target_figures(
    logits_RV: Tensor, labels_R: Tensor, targets: SparseTargets | None
) -> dict[str, Tensor]:
    """[R] float64 figures of some targets, by name, from float32 logits of the shared vocabulary.

    `ce` is -log q of the actual token. `targets` is None where no entry is kept; of draws alone
    `kl_forward` is an unbiased estimate without bounds, and what takes log probs is left out.
    """
    lse_R = logits_RV.logsumexp(1)
    top_R, chosen_R = logits_RV.max(1)
    label_R = logits_RV.gather(1, labels_R[:, None])[:, 0]
    found = {
        "ce": (lse_R - label_R).double(),
        "correct": (chosen_R == labels_R).double(),
        "confidence": (top_R - lse_R).exp().double(),
    }
    if targets is None:
        return found
    real_RK, ids_RK = targets.is_real(), targets.filled_ids()
    log_q_RK = (logits_RV.gather(1, ids_RK) - lse_R[:, None]).double()
    if targets.logprobs is None:
        assert targets.entropy is not None
        weights_RK = torch.where(real_RK, targets.draw_weights(torch.float64), 0.0)
        cross_R = -(weights_RK * log_q_RK).sum(1)
        return found | {"kl_forward": cross_R - targets.entropy.double()}
    log_p_RK = targets.log_p(1.0).double()
    p_RK = torch.where(real_RK, log_p_RK.exp(), 0.0)
    q_RK = torch.where(real_RK, log_q_RK.exp(), 0.0)
    rest_RV = logits_RV.scatter(1, ids_RK, MASKED_LOGIT)
    log_rest_R = (rest_RV.logsumexp(1) - lse_R).double()
    q_rest_R = log_rest_R.exp()
    log_tail_R = targets.log_tail.double()
    tail_R = log_tail_R.exp()
    gap_R = log_tail_R.clamp(min=LOG_FLOOR) - log_rest_R
    missing_R = 1 - p_RK.sum(1) - tail_R
    inside_R = (p_RK * (log_p_RK - log_q_RK)).sum(1) + missing_R
    lower_R = inside_R + _weighted(tail_R, gap_R)
    lowest_R = _smallest(logits_RV, ids_RK) - lse_R
    cap_R = torch.minimum(_cap(log_p_RK, real_RK, targets.draws), log_tail_R)
    upper_R = inside_R + _weighted(tail_R, cap_R - lowest_R.double())
    reverse_R = (q_RK * (log_q_RK - log_p_RK)).sum(1) + _weighted(q_rest_R, -gap_R) - missing_R
    overlap_R = torch.minimum(p_RK, q_RK).sum(1)
    known_R = torch.ones_like(real_RK[:, 0])
    if targets.draws is not None:  # an exact head begins with the most probable one
        known_R = targets.draws[:, 0] == 0
    first_R = targets.token_ids[:, 0]
    return found | {
        "kl_forward": lower_R,
        "kl_forward_upper": torch.maximum(lower_R, upper_R),
        "kl_reverse": reverse_R,
        "acceptance": overlap_R,
        "acceptance_upper": overlap_R + torch.minimum(tail_R, q_rest_R),
        "teacher_tail": tail_R,
        "model_tail": q_rest_R,
        "teacher_confidence": torch.where(known_R, p_RK[:, 0], torch.nan),
        "teacher_correct": (known_R & (first_R == labels_R)).double(),
        "agreement": torch.where(known_R, (chosen_R == first_R).double(), torch.nan),
    }


def _weighted(weight_R: Tensor, value_R: Tensor) -> Tensor:
    """Weight · value, which is 0 at weight 0."""
    return torch.where(weight_R > 0, weight_R * value_R, 0.0)


def _smallest(logits_RV: Tensor, ids_RK: Tensor) -> Tensor:
    """[R] the smallest logit outside the kept ids."""
    return logits_RV.scatter(1, ids_RK, -MASKED_LOGIT).amin(1)


def _cap(log_p_RK: Tensor, real_RK: Tensor, draws_RK: Tensor | None) -> Tensor:
    """[R] log of what no id outside the kept ones can exceed: the last of the most probable."""
    head_RK = real_RK if draws_RK is None else real_RK & (draws_RK == 0)
    return torch.where(head_RK, log_p_RK, 0.0).amin(1)
