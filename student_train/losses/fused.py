"""The output head and the loss in one step that never holds [N, V].

Chunk by chunk over the targets: logits, reduced classes, loss, and at once the gradients of hidden
states, head and bias, so backward only multiplies by the incoming scalar. The formulas live in
divergences.py; this file owns the order of the dense passes and the precision of the sums.

Shape letters: N targets, K slots, V student vocabulary, H hidden size, R rows of a chunk.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from decant.student_train.losses.divergences import (
    OUTSIDE,
    AnyTargets,
    Divergence,
    checked_vocab,
    compute_dtype,
)
from decant.student_train.losses.events import row_slices
from decant.student_train.losses.kinds import RANKINGS
from decant.student_train.losses.products import add_product, product_dtype, product_into
from decant.student_train.losses.targets import MASKED_LOGIT, SparseTargets

IGNORED_LABEL = -100

# Each chunk reads and writes the head's whole gradient once, which costs more than its arithmetic
# under about 200 rows (docs/losses.md has the figures); more than 64 MiB of logits gains nothing.
CHUNK_BYTES = 64 * 2**20
MIN_CHUNK_ROWS = 256


@dataclass(frozen=True, kw_only=True, slots=True)
class FusedLoss:
    """The loss of a batch of targets and its parts, all 0-d and divided by the same number."""

    loss: Tensor
    """kd_weight · kd + ce_weight · ce, each target with its weights; has a gradient."""
    kd: Tensor
    """The divergence, T² included, detached."""
    ce: Tensor
    """The cross entropy of the labels at T=1, detached; 0 without labels."""
    outside: Tensor
    """[5] what lies outside the kept ids (`divergences.OUTSIDE`), detached, divided likewise."""
    router: Tensor | None = None
    """The load-balancing loss of a student's routers, detached, without its weight in `loss`."""

    def parts(self) -> list[Tensor]:
        """The loss, what it is made of, and what lies outside of the kept ids; the router last."""
        router = [] if self.router is None else [self.router]
        return [self.loss, self.kd, self.ce, *self.outside, *router]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Job:
    """What the forward pass needs besides tensors with gradients."""

    divergence: Divergence
    targets: AnyTargets
    labels: Tensor | None
    kd_weight: float | Tensor
    ce_weight: float | Tensor
    logit_scale: float
    softcap: float | None
    num_targets: float
    vocab_size: int
    chunk_rows: int
    wants_gradient: bool


def fused_linear_divergence(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    targets: AnyTargets,
    labels_N: Tensor | None = None,
    kind: str = "fkl",
    kd_weight: float | Tensor = 1.0,
    ce_weight: float | Tensor = 0.0,
    temperature: float = 1.0,
    tail: str = "bucket",
    chunk_size: int | None = None,
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    num_targets: int | float | None = None,
    vocab_size: int | None = None,
    scale_by_t2: bool = True,
    **options: float | str,
) -> FusedLoss:
    """Return the loss of a linear head without ever holding its [N, V] logits.

    Equals, with z = logit_scale · (hidden Wᵀ + bias), z = softcap · tanh(z / softcap) if given, and
    all columns from `vocab_size` on cut off,

        (kd_weight · sparse_divergence(z, targets, ...).sum()
         + ce_weight · cross_entropy(z, labels, ignore_index=-100, reduction="sum")) / num_targets

    The weights may be tensors [N], one weight per target. `num_targets` (default N) is the count to
    divide by: that of the whole optimizer step when it has several microbatches or ranks.
    `chunk_size` is in rows, by default 64 MiB of logits but at least 256 rows. Matrix products run
    in the inputs' dtype, or autocast's; logits, losses and sums of gradients are float32. Backward
    may run once: the gradients are handed over, not copied.
    """
    if labels_N is not None:
        labels_N = torch.as_tensor(labels_N, device=hidden_NH.device).to(torch.int64)
    vocab_size = _check_shapes(hidden_NH, weight_VH, bias, targets, labels_N, vocab_size)
    for weight_name, weight in (("kd_weight", kd_weight), ("ce_weight", ce_weight)):
        if isinstance(weight, Tensor) and weight.shape != (len(targets),):
            shape = tuple(weight.shape)
            raise ValueError(f"{weight_name} must be a number or [{len(targets)}], got {shape}")
    if labels_N is None and (isinstance(ce_weight, Tensor) or ce_weight != 0):
        raise ValueError(f"ce_weight={ce_weight} needs labels")
    for name, value in (
        ("softcap", softcap),
        ("num_targets", num_targets),
        ("chunk_size", chunk_size),
    ):
        if value is not None and value <= 0:
            raise ValueError(f"{name} must be > 0, got {value}")
    divergence = Divergence.of(
        kind, temperature=temperature, tail=tail, scale_by_t2=scale_by_t2, **options
    )
    job = _Job(
        divergence=divergence,
        targets=divergence.check_targets(targets, vocab_size, labels_N),
        labels=labels_N,
        kd_weight=kd_weight,
        ce_weight=ce_weight,
        logit_scale=logit_scale,
        softcap=softcap,
        num_targets=float(num_targets or max(len(targets), 1)),
        vocab_size=vocab_size,
        chunk_rows=chunk_size or _chunk_rows(kind, targets.token_ids.shape[1], vocab_size),
        wants_gradient=torch.is_grad_enabled(),
    )
    loss, kd, ce, outside = _FusedLinearDivergence.apply(hidden_NH, weight_VH, bias, job)
    return FusedLoss(loss=loss, kd=kd, ce=ce, outside=outside)


def _chunk_rows(kind: str, num_slots: int, vocab_size: int) -> int:
    """Return how many rows are computed at once; a ranking's pairs are not to outgrow logits."""
    rows = max(MIN_CHUNK_ROWS, CHUNK_BYTES // (4 * vocab_size))
    if kind in RANKINGS:
        rows = min(rows, max(1, CHUNK_BYTES // (4 * max(num_slots, 1) ** 2)))
    return rows


def _check_shapes(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    bias_V: Tensor | None,
    targets: AnyTargets,
    labels_N: Tensor | None,
    vocab_size: int | None,
) -> int:
    """Return the vocabulary size in use."""
    if hidden_NH.ndim != 2 or weight_VH.ndim != 2 or hidden_NH.shape[1] != weight_VH.shape[1]:
        raise ValueError(
            f"hidden must be [N, H] and weight [V, H], got {tuple(hidden_NH.shape)} and "
            f"{tuple(weight_VH.shape)}"
        )
    if bias_V is not None and bias_V.shape != weight_VH.shape[:1]:
        raise ValueError(f"bias must be [{weight_VH.shape[0]}], got {tuple(bias_V.shape)}")
    if len(targets) != len(hidden_NH):
        raise ValueError(f"{len(hidden_NH)} hidden states but {len(targets)} targets")
    vocab_size = checked_vocab(vocab_size, weight_VH, 0)
    if labels_N is not None:
        if labels_N.shape != (len(targets),):
            raise ValueError(f"labels must be [{len(targets)}], got {tuple(labels_N.shape)}")
        is_bad = (labels_N != IGNORED_LABEL) & ((labels_N < 0) | (labels_N >= vocab_size))
        if bool(is_bad.any()):
            raise ValueError(
                f"label {int(labels_N[is_bad][0])} is neither {IGNORED_LABEL} nor within the "
                f"student's vocabulary of {vocab_size}"
            )
    return vocab_size


class _FusedLinearDivergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_NH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, job: _Job
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        wants_hidden, wants_weight, wants_bias = (
            job.wants_gradient and needed for needed in ctx.needs_input_grad[:3]
        )
        wants_any = wants_hidden or wants_weight or wants_bias
        narrow, wide = product_dtype(hidden_NH, weight_VH), compute_dtype(hidden_NH)
        new_zeros = functools.partial(torch.zeros, dtype=wide, device=hidden_NH.device)
        grad_hidden = new_zeros(hidden_NH.shape) if wants_hidden else None
        grad_weight = new_zeros(weight_VH.shape) if wants_weight else None
        grad_bias = new_zeros(weight_VH.shape[0]) if wants_bias else None
        loss_sum, kd_sum, ce_sum = new_zeros(()), new_zeros(()), new_zeros(())
        outside_sum = new_zeros(len(OUTSIDE))
        loss_of_chunk = _dense_chunk if job.divergence.tail == "uniform" else _reduced_chunk
        with torch.autocast(hidden_NH.device.type, enabled=False):
            head_VH = weight_VH[: job.vocab_size].to(narrow)
            slices = list(row_slices(job.targets, job.chunk_rows))
            most_rows = max((rows.stop - rows.start for rows in slices), default=0)
            buffer_RV = hidden_NH.new_empty(most_rows, job.vocab_size, dtype=wide)
            for rows in slices:
                hidden_RH = hidden_NH[rows].to(narrow)
                logits_RV = product_into(hidden_RH, head_VH.T, buffer_RV[: len(hidden_RH)])
                slope_RV = _finish_logits(logits_RV, bias_V, job)
                kd_R, ce_R, outside, grad_RV = loss_of_chunk(logits_RV, rows, job, wants_any)
                loss_sum += _sum(job.kd_weight, kd_R, rows) + _sum(job.ce_weight, ce_R, rows)
                kd_sum += kd_R.sum()
                ce_sum += ce_R.sum()
                outside_sum += outside
                if grad_RV is None:
                    continue
                if slope_RV is not None:
                    grad_RV.mul_(slope_RV)
                if grad_bias is not None:
                    grad_bias[: job.vocab_size] += grad_RV.sum(0)
                if grad_weight is not None:
                    add_product(grad_weight[: job.vocab_size], grad_RV, hidden_RH)
                if grad_hidden is not None:
                    product_into(grad_RV.to(narrow), head_VH, grad_hidden[rows])
        ctx.scale = 1 / job.num_targets
        ctx.gradients = [
            (grad_hidden, hidden_NH.dtype),
            (grad_weight, weight_VH.dtype),
            (grad_bias, None if bias_V is None else bias_V.dtype),
        ]
        sums = (loss_sum, kd_sum, ce_sum, outside_sum)
        loss, kd_mean, ce_mean, outside_mean = (x / job.num_targets for x in sums)
        ctx.mark_non_differentiable(kd_mean, ce_mean, outside_mean)
        return loss, kd_mean, ce_mean, outside_mean

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError(
                "backward of the fused loss ran twice: its gradients are handed over the first "
                "time, so add losses up before calling backward"
            )
        gradients, ctx.gradients = ctx.gradients, None
        # One multiplication in float32 covers the mean and any loss scaling of the trainer, so
        # neither can push small entries under the range of a 16-bit dtype beforehand.
        factor = grad_loss * ctx.scale
        scaled = [
            None if gradient is None else gradient.mul_(factor).to(dtype)
            for gradient, dtype in gradients
        ]
        return (*scaled, None)


def _finish_logits(logits_RV: Tensor, bias_V: Tensor | None, job: _Job) -> Tensor | None:
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
    logits_RV: Tensor, rows: slice, job: _Job, wants_gradient: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return (kd [R], ce [R], outside [5], gradient [R, V]), the gradient in place of the logits.

    For j outside the kept ids, dL/dz_j = G_* · softmax(tail)_j / T with G_* = dL/d lse_tail; so one
    exp over [R, V] serves the logsumexp and the gradient.
    """
    targets, temperature = job.targets[rows], job.divergence.temperature
    real_RK, ids_RK = targets.is_real(), targets.filled_ids()
    label_R1, has_label_R1 = _labels(job, rows)
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
        kd_R = job.divergence.of_reduced(x_RK, lse_tail_R, targets)
    outside = job.divergence.outside(x_RK, lse_tail_R, targets)
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
    logits_RV: Tensor, rows: slice, job: _Job, wants_gradient: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return the same for tail='uniform', whose classes are the whole vocabulary."""
    label_R1, has_label_R1 = _labels(job, rows)
    with torch.enable_grad():
        logits_RV = logits_RV.detach().requires_grad_()
        x_RV = logits_RV / job.divergence.temperature
        targets = job.targets[rows]
        assert isinstance(targets, SparseTargets)
        kd_R = job.divergence.of_dense(x_RV, targets)
        ce_R = kd_R.new_zeros(len(kd_R))
        if job.labels is not None:
            nll_R1 = -logits_RV.log_softmax(1).gather(1, label_R1)
            ce_R = torch.where(has_label_R1, nll_R1, 0.0).squeeze(1)
        loss = _sum(job.kd_weight, kd_R, rows) + _sum(job.ce_weight, ce_R, rows)
        loss = job.logit_scale * loss
    outside = job.divergence.outside_of_logits(logits_RV, targets)
    gradient = torch.autograd.grad(loss, logits_RV)[0] if wants_gradient else None
    return kd_R.detach(), ce_R.detach(), outside, gradient


def _column(weight: float | Tensor, rows: slice) -> float | Tensor:
    """Return a weight fit to multiply [R, ...] of a chunk."""
    return weight[rows, None] if isinstance(weight, Tensor) else weight


def _sum(weight: float | Tensor, loss_R: Tensor, rows: slice) -> Tensor:
    """Return the sum over a chunk, each row by its weight."""
    return (weight[rows] * loss_R).sum() if isinstance(weight, Tensor) else weight * loss_R.sum()


def _labels(job: _Job, rows: slice) -> tuple[Tensor, Tensor]:
    """Return [R, 1] labels fit for gathering, and [R, 1] which of them count."""
    if job.labels is None:
        device = job.targets.token_ids.device
        nothing_R1 = torch.zeros(rows.stop - rows.start, 1, dtype=torch.int64, device=device)
        return nothing_R1, nothing_R1 != 0
    labels_R1 = job.labels[rows, None]
    has_label_R1 = labels_R1 != IGNORED_LABEL
    return torch.where(has_label_R1, labels_R1, 0), has_label_R1
