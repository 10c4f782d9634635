"""Each divergence as a sum over classes, given the log probabilities of both sides.

Pure formulas, differentiable in log_q: nothing here knows of tokens, tails or temperatures. All
log probabilities are finite (LOG_FLOOR stands for 0), [N, C] for N targets and C classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# alpha_beta with a negative exponent diverges where one side vanishes: linear from exp(_EXP_MAX).
_EXP_MAX = 50.0


def divergence_of_classes(
    kind: str, log_p: Tensor, log_q: Tensor, options: dict[str, Any], *, has_bucket: bool = False
) -> Tensor:
    """Return the divergence [N] of a kind; `has_bucket` says that the last class is the bucket."""
    if kind == "akl":
        return _akl_terms(log_p, log_q, has_bucket=has_bucket, **options).sum(1)
    return _TERMS[kind](log_p, log_q, **options).sum(1)


def akl_weights(
    p: Tensor, q: Tensor, *, has_bucket: bool, head_rule: str = "official", mu: float = 0.5
) -> tuple[Tensor, Tensor]:
    """Return ([N], [N]): what akl weighs the forward and the reverse KL by; they sum to 1.

    With the classes in descending p, the head is what comes before the cumulative mass passes `mu`
    (`official`: inclusive sum <= mu, and rank 1 always; `nucleus`: the smallest set reaching mu).
    The weights are the shares of Σ|p - q| on head and tail, 1/2 each where p == q. The bucket is
    the last class and always tail.
    """
    num_ranked = p.shape[1] - has_bucket
    ranked_p, order = p[:, :num_ranked].sort(dim=1, descending=True, stable=True)
    mass_through = ranked_p.cumsum(1)
    is_head = mass_through <= mu if head_rule == "official" else mass_through.roll(1, 1) < mu
    is_head[:, 0] = True
    gap = (p - q).abs()
    gap_head = torch.where(is_head, gap.gather(1, order), 0.0).sum(1)
    gap_total = gap.sum(1)
    share = (gap_head / gap_total.clamp(min=torch.finfo(p.dtype).tiny)).clamp(max=1.0)
    weight_head = torch.where(gap_total > 0, share, 0.5)
    return weight_head, 1 - weight_head


def _kl_terms(log_a: Tensor, log_b: Tensor) -> Tensor:
    return log_a.exp() * (log_a - log_b)


def _akl_terms(log_p: Tensor, log_q: Tensor, **rule: Any) -> Tensor:
    weight_head, weight_tail = akl_weights(log_p.exp(), log_q.detach().exp(), **rule)
    forward, reverse = _kl_terms(log_p, log_q), _kl_terms(log_q, log_p)
    return weight_head[:, None] * forward + weight_tail[:, None] * reverse


def _jeffreys_terms(log_p: Tensor, log_q: Tensor, lam: float) -> Tensor:
    return (1 - lam) * _kl_terms(log_p, log_q) + lam * _kl_terms(log_q, log_p)


def _log_mix(weight_a: float, log_a: Tensor, log_b: Tensor) -> Tensor:
    """Return log(weight_a · a + (1 - weight_a) · b), for 0 <= weight_a < 1."""
    if weight_a == 0:
        return log_b
    return torch.logaddexp(log_a + math.log(weight_a), log_b + math.log1p(-weight_a))


def _jsd_terms(log_p: Tensor, log_q: Tensor, beta: float) -> Tensor:
    if beta == 0:
        return _kl_terms(log_p, log_q)
    if beta == 1:
        return _kl_terms(log_q, log_p)
    log_m = _log_mix(beta, log_p, log_q)
    return beta * _kl_terms(log_p, log_m) + (1 - beta) * _kl_terms(log_q, log_m)


def _tvd_terms(log_p: Tensor, log_q: Tensor) -> Tensor:
    return 0.5 * (log_p.exp() - log_q.exp()).abs()


def _alpha_beta_terms(log_p: Tensor, log_q: Tensor, alpha: float, beta: float) -> Tensor:
    total, gap = alpha + beta, log_q - log_p
    if alpha == 0 and beta == 0:
        return 0.5 * gap.square()
    if alpha == 0:
        terms = (_exp(beta * log_q) * (beta * gap - 1) + _exp(beta * log_p)) / beta**2
    elif beta == 0:
        terms = (_exp(alpha * log_p) * (-alpha * gap - 1) + _exp(alpha * log_q)) / alpha**2
    elif total == 0:
        terms = (alpha * gap + _exp(-alpha * gap) - 1) / alpha**2
    else:
        alone = (alpha * _exp(total * log_p) + beta * _exp(total * log_q)) / total
        terms = (alone - _exp(alpha * log_p + beta * log_q)) / (alpha * beta)
    # Value and gradient are 0 where p == q; rounding would not be, for powers as large as _exp(50).
    return torch.where(gap == 0, 0.0, terms)


def _exp(x: Tensor) -> Tensor:
    """Return exp(x), continued beyond _EXP_MAX by its tangent so that it cannot overflow."""
    return x.clamp(max=_EXP_MAX).exp() * (1 + (x - _EXP_MAX).clamp(min=0))


_TERMS: dict[str, Callable[..., Tensor]] = {
    "fkl": _kl_terms,
    "rkl": lambda log_p, log_q: _kl_terms(log_q, log_p),
    "jeffreys": _jeffreys_terms,
    "jsd": _jsd_terms,
    "tvd": _tvd_terms,
    "skew_fkl": lambda log_p, log_q, lam: _kl_terms(log_p, _log_mix(lam, log_p, log_q)),
    "skew_rkl": lambda log_p, log_q, lam: _kl_terms(log_q, _log_mix(lam, log_q, log_p)),
    "alpha_beta": _alpha_beta_terms,
}
