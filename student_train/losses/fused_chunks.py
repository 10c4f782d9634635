"""One chunk of the fused loss: logits to losses, and in their place the gradient of the logits.

Owns the order of the dense passes over [R, V]; fused.py owns the products with the head around it.

Shape letters: N targets, K slots, V student vocabulary, R rows of a chunk.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from decant.student_train.losses.divergences import AnyTargets, Divergence
from decant.student_train.losses.targets import MASKED_LOGIT, SparseTargets

IGNORED_LABEL = -100


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """Consecutive targets of one divergence."""

    divergence: Divergence
    targets: AnyTargets
    """Checked."""
    first: int
    """Of the job's targets, where these begin."""
    chunk_rows: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """What the forward pass needs besides tensors with gradients."""

    parts: tuple[Part, ...]
    labels: Tensor | None
    kd_weight: float | Tensor
    ce_weight: float | Tensor
    source: Tensor | None
    """[N] which of `num_sources` each target is of, to sum up by; None: they are not told apart."""
    num_sources: int
    logit_scale: float
    softcap: float | None
    num_targets: float
    vocab_size: int
    wants_gradient: bool


def loss_of_chunk(
    logits_RV: Tensor, rows: slice, part: Part, job: Job, wants_gradient: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return (kd [R], ce [R], outside [5], gradient [R, V]) of rows that lie in one part.

    The logits are given up: the gradient may stand in their place.
    """
    targets = part.targets[rows.start - part.first : rows.stop - part.first]
    if part.divergence.tail == "uniform":
        assert isinstance(targets, SparseTargets)
        return _dense_chunk(logits_RV, rows, targets, part.divergence, job, wants_gradient)
    return _reduced_chunk(logits_RV, rows, targets, part.divergence, job, wants_gradient)


def finish_logits(logits_RV: Tensor, bias_V: Tensor | None, job: Job) -> Tensor | None:
    """Turn raw products into logits in place; return d logits / d product where not constant."""
    if bias_V is not None:
        logits_RV.add_(bias_V[: job.vocab_size])
    if job.logit_scale != 1.0:
        logits_RV.mul_(job.logit_scale)
    if job.softcap is None:
        return None
    logits_RV.div_(job.softcap).tanh_()
    slope_RV = 1 - logits_RV.square()
    logits_RV.mul_(job.softcap)
    return slope_RV


def _reduced_chunk(
    logits_RV: Tensor,
    rows: slice,
    targets: AnyTargets,
    divergence: Divergence,
    job: Job,
    wants_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return (kd [R], ce [R], outside [5], gradient [R, V]), the gradient in place of the logits.

    For j outside the kept ids, dL/dz_j = G_* · softmax(tail)_j / T with G_* = dL/d lse_tail; so one
    exp over [R, V] serves the logsumexp and the gradient.
    """
    temperature = divergence.temperature
    real_RK, ids_RK = targets.is_real(), targets.filled_ids()
    label_R1, has_label_R1 = _labels(job, rows, logits_RV.device)
    label_logit_R1 = logits_RV.gather(1, label_R1)
    kept_RK = logits_RV.gather(1, ids_RK)
    logits_RV.scatter_(1, ids_RK, MASKED_LOGIT)

    top_R1 = logits_RV.amax(1, keepdim=True)
    exps_RV = exps_t1_RV = logits_RV.sub_(top_R1)
    if temperature != 1.0:
        if job.labels is not None:
            exps_t1_RV = exps_RV.exp()
        exps_RV.div_(temperature)
    exps_RV.exp_()
    sum_R1 = exps_RV.sum(1, keepdim=True)

    with torch.enable_grad():
        x_RK = (kept_RK / temperature).requires_grad_()
        lse_tail_R = (top_R1 / temperature + sum_R1.log()).squeeze(1).requires_grad_()
        kd_R = divergence.of_reduced(x_RK, lse_tail_R, targets)
    outside = divergence.outside(x_RK.detach(), lse_tail_R.detach(), targets)
    ce_R = kd_R.new_zeros(len(kd_R))
    if job.labels is not None:
        sum_t1_R1 = sum_R1 if exps_t1_RV is exps_RV else exps_t1_RV.sum(1, keepdim=True)
        kept_RK = torch.where(real_RK, kept_RK, MASKED_LOGIT)
        classes_RC = torch.cat([kept_RK, top_R1 + sum_t1_R1.log()], dim=1)
        lse_R1 = classes_RC.logsumexp(1, keepdim=True)
        ce_R = torch.where(has_label_R1, lse_R1 - label_logit_R1, 0.0).squeeze(1)
    if not wants_gradient:
        return kd_R.detach(), ce_R, outside, None

    # The loss of a chunk of several rows stands in its last row, and so does its weight.
    weight_R = job.kd_weight[rows] if isinstance(job.kd_weight, Tensor) else job.kd_weight
    grad_x_RK, grad_tail_R = torch.autograd.grad(
        kd_R, (x_RK, lse_tail_R), torch.ones_like(kd_R) * weight_R, materialize_grads=True
    )
    kd_factor = job.logit_scale / temperature
    grad_kept_RK = kd_factor * grad_x_RK
    tail_factor_R1 = kd_factor * grad_tail_R[:, None] / sum_R1
    if not isinstance(job.ce_weight, Tensor) and job.ce_weight == 0:
        exps_RV.mul_(tail_factor_R1)
    else:
        ce_factor_R1 = _column(job.ce_weight, rows) * job.logit_scale * has_label_R1
        grad_kept_RK += ce_factor_R1 * (kept_RK - lse_R1).exp()
        ce_tail_factor_R1 = ce_factor_R1 * (top_R1 - lse_R1).exp()
        if exps_t1_RV is exps_RV:
            exps_RV.mul_(tail_factor_R1 + ce_tail_factor_R1)
        else:
            exps_RV.mul_(tail_factor_R1).addcmul_(exps_t1_RV, ce_tail_factor_R1)
        exps_RV.scatter_add_(1, label_R1, -ce_factor_R1)
    return kd_R.detach(), ce_R, outside, exps_RV.scatter_add_(1, ids_RK, grad_kept_RK)


def _dense_chunk(
    logits_RV: Tensor,
    rows: slice,
    targets: SparseTargets,
    divergence: Divergence,
    job: Job,
    wants_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return the same for tail='uniform', whose classes are the whole vocabulary."""
    label_R1, has_label_R1 = _labels(job, rows, logits_RV.device)
    with torch.enable_grad():
        logits_RV = logits_RV.detach().requires_grad_()
        x_RV = logits_RV / divergence.temperature
        kd_R = divergence.of_dense(x_RV, targets)
        ce_R = kd_R.new_zeros(len(kd_R))
        if job.labels is not None:
            nll_R1 = -logits_RV.log_softmax(1).gather(1, label_R1)
            ce_R = torch.where(has_label_R1, nll_R1, 0.0).squeeze(1)
        loss = weighted_sum(job.kd_weight, kd_R, rows) + weighted_sum(job.ce_weight, ce_R, rows)
        loss = job.logit_scale * loss
    outside = divergence.outside_of_logits(logits_RV, targets)
    gradient = torch.autograd.grad(loss, logits_RV)[0] if wants_gradient else None
    return kd_R.detach(), ce_R.detach(), outside, gradient


def _column(weight: float | Tensor, rows: slice) -> float | Tensor:
    """Return a weight fit to multiply [R, ...] of a chunk."""
    return weight[rows, None] if isinstance(weight, Tensor) else weight


def weighted_sum(weight: float | Tensor, loss_R: Tensor, rows: slice) -> Tensor:
    """Return the sum over a chunk, each row by its weight."""
    return (weight[rows] * loss_R).sum() if isinstance(weight, Tensor) else weight * loss_R.sum()


def _labels(job: Job, rows: slice, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return [R, 1] labels fit for gathering, and [R, 1] which of them count."""
    if job.labels is None:
        nothing_R1 = torch.zeros(rows.stop - rows.start, 1, dtype=torch.int64, device=device)
        return nothing_R1, nothing_R1 != 0
    labels_R1 = job.labels[rows, None]
    has_label_R1 = labels_R1 != IGNORED_LABEL
    return torch.where(has_label_R1, labels_R1, 0), has_label_R1
