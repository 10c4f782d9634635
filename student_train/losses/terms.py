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

from decant.student_train.losses.targets import LOG_FLOOR

# Nothing, inside a logsumexp: unlike -inf it has a zero gradient, not a NaN.
LOG_NOTHING = -1e30
# Probabilities and differences of them that a ranking takes for 0.
SMALLEST_RANKED = 1e-8
# alpha_beta with a negative exponent diverges where one side vanishes: linear from exp(_EXP_MAX).
_EXP_MAX = 50.0


def divergence_of_classes(
    kind: str, log_p: Tensor, log_q: Tensor, options: dict[str, Any], *, has_bucket: bool = False
) -> Tensor:
    """Return the divergence [N] of a kind; `has_bucket` says that the last class is the bucket."""
    if kind in _OF_CLASSES:
        return _OF_CLASSES[kind](log_p, log_q, has_bucket=has_bucket, **options)
    return _TERMS[kind](log_p, log_q, **options).sum(1)


def on_policy(log_p: Tensor, log_q: Tensor, log_sampler: Tensor | None, *, clip: float) -> Tensor:
    """Return [N]: the loss of sampled tokens, from both sides' log probs of them.

    With the advantage A = log p - log q, a constant to the gradient: -A in value and -A ∇log q in
    gradient, or with a clip -min(r A, clip(r, 1-clip, 1+clip) A), r = q / sampler, in both.
    """
    advantage = (log_p - log_q).detach()
    if log_sampler is None:
        return -advantage * (1 + log_q - log_q.detach())
    ratio = (log_q - log_sampler).clamp(max=_EXP_MAX).exp()
    return -torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)


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


def _akl(log_p: Tensor, log_q: Tensor, **rule: Any) -> Tensor:
    weight_head, weight_tail = akl_weights(log_p.exp(), log_q.detach().exp(), **rule)
    forward, reverse = _kl_terms(log_p, log_q).sum(1), _kl_terms(log_q, log_p).sum(1)
    return weight_head * forward + weight_tail * reverse


def _is_nothing(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Classes that both sides give nothing, unused slots among them: no mass to sum up."""
    return (log_p <= LOG_FLOOR) & (log_q <= LOG_FLOOR)


def _tail_kl(log_p: Tensor, log_q: Tensor, *, has_bucket: bool, head: float, beta: float) -> Tensor:
    """KL over the `head` most probable classes and the rest as one, and beta times what is left."""
    num_ranked = log_p.shape[1] - has_bucket
    top = log_p[:, :num_ranked].topk(min(int(head), num_ranked), dim=1).indices
    in_head = torch.zeros_like(log_p, dtype=torch.bool).scatter(1, top, True)
    terms = _kl_terms(log_p, log_q)
    in_rest = ~(in_head | _is_nothing(log_p, log_q))
    rest_p, rest_q = (
        torch.where(in_rest, log_x, LOG_NOTHING).logsumexp(1) for log_x in (log_p, log_q)
    )
    of_rest = torch.where(in_rest.any(1), _kl_terms(rest_p, rest_q), 0.0)
    coarse = torch.where(in_head, terms, 0.0).sum(1) + of_rest
    return coarse + beta * (torch.where(in_head, 0.0, terms).sum(1) - of_rest)


def _acceptance(log_p: Tensor, log_q: Tensor, *, has_bucket: bool, bound: str) -> Tensor:
    """-log Σ min(p, q); `upper` leaves the bucket out."""
    both = torch.minimum(log_p, log_q)
    both = torch.where(_is_nothing(log_p, log_q), LOG_NOTHING, both)
    return -(both[:, :-1] if has_bucket and bound == "upper" else both).logsumexp(1)


def _acceptance_hybrid(log_p: Tensor, log_q: Tensor, *, has_bucket: bool, eta: float) -> Tensor:
    """λ KL(p‖q) + (1-λ) TV, with λ = exp(-eta Σ min(p, q)), a constant to the gradient."""
    accepted = torch.minimum(log_p, log_q.detach()).exp().sum(1)
    share = torch.exp(-eta * accepted)
    return share * _kl_terms(log_p, log_q).sum(1) + (1 - share) * _tvd_terms(log_p, log_q).sum(1)


def _mean_over_pairs(
    log_p: Tensor, has_bucket: bool, loss_of: Callable[[Tensor, slice], Tensor]
) -> Tensor:
    """The mean over pairs of kept ids of which the teacher prefers the first; 0 without a pair.

    `loss_of(p_gap, ids)` gives [N, K, K] of all pairs, from p of the first minus p of the second.
    """
    ids = slice(0, log_p.shape[1] - has_bucket)
    p = log_p[:, ids].exp()
    is_known = p > SMALLEST_RANKED
    gap = p[:, :, None] - p[:, None, :]
    preferred = (gap > SMALLEST_RANKED) & is_known[:, :, None] & is_known[:, None, :]
    losses = torch.where(preferred, loss_of(gap, ids), 0.0)
    return losses.sum((1, 2)) / preferred.sum((1, 2)).clamp(min=1)


def _hinge(log_p: Tensor, log_q: Tensor, *, has_bucket: bool, margin: float | str) -> Tensor:
    def loss_of(gap: Tensor, ids: slice) -> Tensor:
        q = log_q[:, ids].exp()
        wanted = gap if margin == "teacher" else torch.full_like(gap, float(margin))
        return (wanted - (q[:, :, None] - q[:, None, :])).clamp(min=0)

    return _mean_over_pairs(log_p, has_bucket, loss_of)


def _logistic(log_p: Tensor, log_q: Tensor, *, has_bucket: bool) -> Tensor:
    def loss_of(_: Tensor, ids: slice) -> Tensor:
        x = log_q[:, ids]  # up to a constant, which differences lose
        return torch.nn.functional.softplus(x[:, None, :] - x[:, :, None])

    return _mean_over_pairs(log_p, has_bucket, loss_of)


def _jeffreys_terms(log_p: Tensor, log_q: Tensor, lam: float) -> Tensor:
    return (1 - lam) * _kl_terms(log_p, log_q) + lam * _kl_terms(log_q, log_p)


def _log_mix(weight_a: float | Tensor, log_a: Tensor, log_b: Tensor) -> Tensor:
    """Return log(weight_a · a + (1 - weight_a) · b), for 0 <= weight_a < 1, or [N] of them."""
    if isinstance(weight_a, Tensor):
        weight_a = weight_a[:, None]
        return torch.logaddexp(log_a + weight_a.log(), log_b + (-weight_a).log1p())
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
"""Sums over classes: the terms [N, C]."""


_OF_CLASSES: dict[str, Callable[..., Tensor]] = {
    "akl": _akl,
    "tail_kl": _tail_kl,
    "acceptance": _acceptance,
    "acceptance_hybrid": _acceptance_hybrid,
    "hinge": _hinge,
    "logistic": _logistic,
}
"""What is no such sum, or has to know the bucket: the divergence [N]."""
