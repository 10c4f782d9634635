"""The output head and the loss in one step that never holds [N, V].

Chunk by chunk over the targets: logits, reduced classes, loss, and at once the gradients of hidden
states, head and bias, so backward only multiplies by the incoming scalar. The formulas live in
divergences.py; this file owns the order of the dense passes and the precision of the sums.

Shape letters: N targets, K slots, V student vocabulary, H hidden size, R rows of a chunk.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
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
from decant.student_train.losses.fused_chunks import (
    IGNORED_LABEL,
    Job,
    Part,
    finish_logits,
    loss_of_chunk,
    weighted_sum,
)
from decant.student_train.losses.kinds import RANKINGS
from decant.student_train.losses.products import add_product, product_dtype, product_into

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
    by_source: Tensor | None = None
    """[S, 3] of each cache of a mixture, where they are told apart: targets, and the sums of
    divergence and cross-entropy over them, detached, divided by nothing."""
    router: Tensor | None = None
    """The load-balancing loss of a student's routers, detached, without its weight in `loss`."""

    def as_one(self) -> Tensor:
        """All of it in one row, detached: loss, kd, ce, [5] of `outside`, and the router's if any.

        What is told of S caches is behind them, 3 S numbers.
        """
        router = [] if self.router is None else [self.router]
        parts = [self.loss, self.kd, self.ce, *self.outside, *router]
        told = [] if self.by_source is None else [self.by_source.flatten().to(self.loss)]
        return torch.cat([torch.stack([part.detach() for part in parts]), *told])


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
    part = LossPart(
        targets=targets,
        kind=kind,
        temperature=temperature,
        tail=tail,
        scale_by_t2=scale_by_t2,
        options=options,
    )
    return fused_linear_divergences(
        hidden_NH,
        weight_VH,
        [part],
        labels_N,
        kd_weight=kd_weight,
        ce_weight=ce_weight,
        chunk_size=chunk_size,
        bias=bias,
        logit_scale=logit_scale,
        softcap=softcap,
        num_targets=num_targets,
        vocab_size=vocab_size,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class LossPart:
    """Consecutive targets and the divergence that is taken on them, as in `sparse_divergence`."""

    targets: AnyTargets
    kind: str
    temperature: float = 1.0
    tail: str = "bucket"
    scale_by_t2: bool = True
    options: Mapping[str, Any] = field(default_factory=dict)


def fused_linear_divergences(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    parts: Sequence[LossPart],
    labels_N: Tensor | None = None,
    *,
    kd_weight: float | Tensor = 1.0,
    ce_weight: float | Tensor = 0.0,
    chunk_size: int | None = None,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    num_targets: int | float | None = None,
    vocab_size: int | None = None,
    source: Tensor | None = None,
    num_sources: int = 0,
) -> FusedLoss:
    """`fused_linear_divergence` of targets that stand in parts, each with a divergence of its own.

    The parts' targets are the N rows of `hidden_NH`, one part after the other; all else is of all
    of them together, and no more memory is held than for one part. With `source` [N], numbers below
    `num_sources`, the result says the sums by source.
    """
    total = sum(len(part.targets) for part in parts)
    if labels_N is not None:
        labels_N = torch.as_tensor(labels_N, device=hidden_NH.device).to(torch.int64)
    vocab_size = _check_shapes(hidden_NH, weight_VH, bias, total, labels_N, vocab_size)
    for weight_name, weight in (("kd_weight", kd_weight), ("ce_weight", ce_weight)):
        if isinstance(weight, Tensor) and weight.shape != (total,):
            shape = tuple(weight.shape)
            raise ValueError(f"{weight_name} must be a number or [{total}], got {shape}")
    if labels_N is None and (isinstance(ce_weight, Tensor) or ce_weight != 0):
        raise ValueError(f"ce_weight={ce_weight} needs labels")
    for name, value in (
        ("softcap", softcap),
        ("num_targets", num_targets),
        ("chunk_size", chunk_size),
    ):
        if value is not None and value <= 0:
            raise ValueError(f"{name} must be > 0, got {value}")
    job = Job(
        parts=_checked_parts(parts, labels_N, vocab_size, chunk_size),
        labels=labels_N,
        kd_weight=kd_weight,
        ce_weight=ce_weight,
        source=source,
        num_sources=num_sources,
        logit_scale=logit_scale,
        softcap=softcap,
        num_targets=float(num_targets or max(total, 1)),
        vocab_size=vocab_size,
        wants_gradient=torch.is_grad_enabled(),
    )
    loss, kd, ce, outside, by_source = _FusedLinearDivergence.apply(hidden_NH, weight_VH, bias, job)
    by_source = None if source is None else by_source
    return FusedLoss(loss=loss, kd=kd, ce=ce, outside=outside, by_source=by_source)


def _checked_parts(
    parts: Sequence[LossPart], labels_N: Tensor | None, vocab_size: int, chunk_size: int | None
) -> tuple[Part, ...]:
    """The parts with what is asked for checked."""
    checked, first = [], 0
    for part in parts:
        divergence = Divergence.of(
            part.kind,
            temperature=part.temperature,
            tail=part.tail,
            scale_by_t2=part.scale_by_t2,
            **part.options,
        )
        stop = first + len(part.targets)
        labels = None if labels_N is None else labels_N[first:stop]
        slots = part.targets.token_ids.shape[1]
        checked.append(
            Part(
                divergence=divergence,
                targets=divergence.check_targets(part.targets, vocab_size, labels),
                first=first,
                chunk_rows=chunk_size or _chunk_rows(part.kind, slots, vocab_size),
            )
        )
        first = stop
    return tuple(checked)


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
    num_targets: int,
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
    if num_targets != len(hidden_NH):
        raise ValueError(f"{len(hidden_NH)} hidden states but {num_targets} targets")
    vocab_size = checked_vocab(vocab_size, weight_VH, 0)
    if labels_N is not None:
        if labels_N.shape != (num_targets,):
            raise ValueError(f"labels must be [{num_targets}], got {tuple(labels_N.shape)}")
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
        ctx: Any, hidden_NH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, job: Job
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
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
        outside_sum, by_source = new_zeros(len(OUTSIDE)), new_zeros((job.num_sources, 3))
        with torch.autocast(hidden_NH.device.type, enabled=False):
            head_VH = weight_VH[: job.vocab_size].to(narrow)
            chunks = [
                (slice(part.first + rows.start, part.first + rows.stop), part)
                for part in job.parts
                for rows in row_slices(part.targets, part.chunk_rows)
            ]
            most_rows = max((rows.stop - rows.start for rows, _ in chunks), default=0)
            buffer_RV = hidden_NH.new_empty(most_rows, job.vocab_size, dtype=wide)
            for rows, part in chunks:
                hidden_RH = hidden_NH[rows].to(narrow)
                logits_RV = product_into(hidden_RH, head_VH.T, buffer_RV[: len(hidden_RH)])
                slope_RV = finish_logits(logits_RV, bias_V, job)
                kd_R, ce_R, outside, grad_RV = loss_of_chunk(logits_RV, rows, part, job, wants_any)
                loss_sum += weighted_sum(job.kd_weight, kd_R, rows)
                loss_sum += weighted_sum(job.ce_weight, ce_R, rows)
                kd_sum += kd_R.sum()
                ce_sum += ce_R.sum()
                outside_sum += outside
                if job.source is not None:
                    columns = torch.stack([torch.ones_like(kd_R), kd_R, ce_R], dim=1)
                    by_source.index_add_(0, job.source[rows], columns.to(wide))
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
        ctx.mark_non_differentiable(kd_mean, ce_mean, outside_mean, by_source)
        return loss, kd_mean, ce_mean, outside_mean, by_source

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
