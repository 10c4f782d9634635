"""Divergences between a sparse teacher distribution and student logits.

The student's [N, V] logits are first reduced to [N, K+1]: the kept ids and one logsumexp over all
the rest. Everything after that is ordinary autograd on K+1 classes, with no 1 - Σq anywhere. This
file owns the arguments, the reduction and the tail modes; terms.py the formulas on classes. The
equations and the corner cases stand in docs/losses.md.

Shape letters: N targets, K slots per target, V vocabulary, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from decant.student_train.losses.events import EventTargets
from decant.student_train.losses.kinds import SAMPLED, check
from decant.student_train.losses.targets import LOG_FLOOR, MASKED_LOGIT, NO_TAIL, SparseTargets
from decant.student_train.losses.terms import divergence_of_classes, on_policy

AnyTargets = SparseTargets | EventTargets
OUTSIDE = ("with_tail", "student_tail", "teacher_tail", "with_mu", "below_mu")
"""Sums over targets at the loss's temperature: those whose kept ids have a tail, so not events nor
drawn ones; the student's and the teacher's mass in it; those of a loss with a mu, and of these
those whose kept mass is below it."""


def outside_means(sums: Sequence[float]) -> dict[str, float]:
    """The means over targets that OUTSIDE, reduced and in its order, gives; without what is not."""
    count, student, teacher, with_mu, below = sums
    found = {"student_tail": student / count, "teacher_tail": teacher / count} if count else {}
    return found | ({"below_mu": below / with_mu} if with_mu else {})


@dataclass(frozen=True, kw_only=True, slots=True)
class Divergence:
    """A divergence with its options checked; built by `Divergence.of`."""

    kind: str
    temperature: float
    tail: str
    scale_by_t2: bool
    options: dict[str, Any]

    @staticmethod
    def of(
        kind: str,
        *,
        temperature: float = 1.0,
        tail: str = "bucket",
        scale_by_t2: bool = True,
        **options: float | str,
    ) -> Divergence:
        """Check the arguments of a loss; raise ValueError naming what would be valid."""
        complete = check(kind, temperature, tail, options)
        return Divergence(
            kind=kind,
            temperature=float(temperature),
            tail=tail,
            scale_by_t2=scale_by_t2,
            options=complete,
        )

    @property
    def scale(self) -> float:
        """What value and gradient are multiplied by: T² or 1."""
        return self.temperature**2 if self.scale_by_t2 else 1.0

    def check_targets(
        self, targets: AnyTargets, vocab_size: int, labels: Tensor | None = None
    ) -> AnyTargets:
        """Validate `targets`, and for sampled ones and events that this divergence is allowed.

        For tail='label', what is returned has the tail's mass on the labels.
        """
        if self.kind in SAMPLED:
            return self._check_sampled(targets, vocab_size)
        if isinstance(targets, EventTargets):
            if self.tail != "bucket":
                raise ValueError(
                    f"tail={self.tail!r} has no meaning for events: what only teacher or student "
                    "can say lies in the bucket, so leave tail='bucket'"
                )
            return targets.validate(vocab_size, self.temperature)
        if targets.draws is not None:
            if self.kind != "fkl":
                raise ValueError(
                    f"sampled targets weigh each draw, which is unbiased only for a loss linear "
                    f"in the teacher's probabilities: use kind='fkl', not {self.kind!r}"
                )
            if self.tail != "bucket":
                raise ValueError(
                    f"sampled targets estimate their own tail, so tail={self.tail!r} has no "
                    f"effect: leave tail='bucket'"
                )
            if self.temperature != 1.0:
                raise ValueError(
                    f"sampled targets were drawn at temperature 1 and are unbiased only there, "
                    f"got temperature {self.temperature}"
                )
        if self.kind == "tail_kl" and self.options["head"] >= targets.token_ids.shape[1] > 0:
            raise ValueError(
                f"tail_kl: head {self.options['head']} of {targets.token_ids.shape[1]} kept ids "
                "leaves no tail to weigh: make it smaller, or use fkl"
            )
        targets = targets.validate(vocab_size, self.temperature)
        if self.tail != "label":
            return targets
        if labels is None:
            raise ValueError("tail='label' needs the labels, which get the tail's mass")
        return targets.with_tail_on(labels, vocab_size, self.temperature)

    def _check_sampled(self, targets: AnyTargets, vocab_size: int) -> SparseTargets:
        if not isinstance(targets, SparseTargets) or not targets.of_label_alone:
            raise ValueError(
                f"{self.kind} is of the sampled token alone: give SparseTargets.of_labels(labels, "
                "logprobs), or a batch's `sampled_targets`"
            )
        if self.options["clip"] and targets.sampler_logprobs is None:
            raise ValueError(
                f"{self.kind} with clip {self.options['clip']:g} weighs by the ratio to the "
                "sampler, whose log probs are not given: SparseTargets.of_labels(labels, logprobs, "
                "sampler_logprobs), or clip 0"
            )
        return targets.validate(vocab_size, self.temperature)

    def of_reduced(self, x_NK: Tensor, lse_tail_N: Tensor, targets: AnyTargets) -> Tensor:
        """Return the loss [N] from student logits / T at the kept ids and the rest's logsumexp.

        What `x_NK` holds in unused slots does not matter. Not for tail='uniform'.
        The loss of a chunk of several rows stands in its last.
        """
        if isinstance(targets, EventTargets):
            return targets.divergence(self.kind, x_NK, lse_tail_N, self.options)
        real_NK = targets.is_real()
        x_NK = torch.where(real_NK, x_NK, MASKED_LOGIT)
        if self.tail == "renormalize":
            log_q_NC = x_NK.log_softmax(1)
        else:
            log_q_NC = torch.cat([x_NK, lse_tail_N[:, None]], dim=1).log_softmax(1)
        log_q_NK = torch.where(real_NK, log_q_NC[:, : x_NK.shape[1]], LOG_FLOOR)
        if self.kind in SAMPLED:
            assert targets.logprobs is not None
            sampler_N = targets.sampler_logprobs if self.options["clip"] else None
            return on_policy(targets.logprobs[:, 0], log_q_NK[:, 0], sampler_N, **self.options)
        if targets.draws is not None:
            weights_NK = targets.draw_weights(x_NK.dtype)
            if targets.logprobs is None:
                assert targets.entropy is not None
                return self.scale * (-(weights_NK * log_q_NK).sum(1) - targets.entropy)
            log_p_NK = targets.log_p(self.temperature).to(x_NK.dtype)
            return self.scale * (weights_NK * (log_p_NK - log_q_NK)).sum(1)
        log_p_NK = targets.log_p(self.temperature).to(x_NK.dtype)
        if self.tail in ("bucket", "label"):
            log_p_tail_N = targets.log_tail.to(x_NK.dtype).clamp(min=LOG_FLOOR)
            has_tail_N = lse_tail_N > NO_TAIL
            log_q_tail_N = torch.where(has_tail_N, log_q_NC[:, -1], LOG_FLOOR)
            return self.scale * divergence_of_classes(
                self.kind,
                torch.cat([log_p_NK, log_p_tail_N[:, None]], dim=1),
                torch.cat([log_q_NK, log_q_tail_N[:, None]], dim=1),
                self._options_for(targets),
                has_bucket=True,
            )
        log_p_NK = torch.where(real_NK, log_p_NK, MASKED_LOGIT).log_softmax(1).clamp(min=LOG_FLOOR)
        options = self._options_for(targets)
        return self.scale * divergence_of_classes(self.kind, log_p_NK, log_q_NK, options)

    def _options_for(self, targets: SparseTargets) -> dict[str, Any]:
        """The options, lam [N] being the targets' own where they have one."""
        if targets.lam is None or not self.kind.startswith("skew"):
            return self.options
        return {**self.options, "lam": targets.lam}

    def of_dense(self, x_NV: Tensor, targets: SparseTargets) -> Tensor:
        """Return the loss [N] from all student logits / T, for tail='uniform'."""
        slots_NK = targets.filled_slots()
        log_p_NK = targets.log_p(self.temperature).to(x_NV.dtype).gather(1, slots_NK)
        num_tail_N = (x_NV.shape[1] - targets.is_real().sum(1)).clamp(min=1).to(x_NV.dtype)
        log_each_N = targets.log_tail.to(x_NV.dtype) - num_tail_N.log()
        log_p_NV = log_each_N.clamp(min=LOG_FLOOR)[:, None].expand_as(x_NV)
        log_p_NV = log_p_NV.scatter(1, targets.filled_ids(), log_p_NK)
        log_q_NV = x_NV.log_softmax(1)
        options = self._options_for(targets)
        return self.scale * divergence_of_classes(self.kind, log_p_NV, log_q_NV, options)

    @torch.no_grad()
    def outside(self, x_NK: Tensor, lse_tail_N: Tensor, targets: AnyTargets) -> Tensor:
        """Return [5] sums over targets of what lies outside of the kept ids: see OUTSIDE.

        From the student's logits / T as `of_reduced` takes them. All 0 for events and for drawn
        targets.
        """
        if isinstance(targets, EventTargets) or targets.draws is not None or self.kind in SAMPLED:
            return lse_tail_N.new_zeros(len(OUTSIDE))
        x_NK = torch.where(targets.is_real(), x_NK, MASKED_LOGIT)
        lse_N = torch.logaddexp(x_NK.logsumexp(1), lse_tail_N)
        student_N = (lse_tail_N - lse_N).exp()
        sums = lse_tail_N.new_zeros(len(OUTSIDE))
        sums[0], sums[1], sums[2] = len(targets), student_N.sum(), targets.log_tail.exp().sum()
        if "mu" in self.options:
            sums[3] = len(targets)
            sums[4] = targets.below(self.options["mu"], self.temperature).sum()
        return sums

    def outside_of_logits(self, logits_NV: Tensor, targets: AnyTargets) -> Tensor:
        """Return `outside` from all student logits, cut to the vocabulary."""
        x_NV = logits_NV.detach().to(compute_dtype(logits_NV)) / self.temperature
        ids_NK = targets.filled_ids()
        lse_tail_N = x_NV.scatter(1, ids_NK, MASKED_LOGIT).logsumexp(1)
        return self.outside(x_NV.gather(1, ids_NK), lse_tail_N, targets)


def sparse_divergence(
    student_logits_NV: Tensor,
    targets: AnyTargets,
    kind: str = "akl",
    temperature: float = 1.0,
    tail: str = "bucket",
    *,
    labels: Any = None,
    vocab_size: int | None = None,
    scale_by_t2: bool = True,
    **options: float | str,
) -> Tensor:
    """Return the divergence of each target in nats, [N] float32, times T² unless switched off.

    `kind` and its `options` as in DIVERGENCES, `tail` as in TAIL_MODES; their equations stand in
    docs/losses.md. Columns of the logits from `vocab_size` on (padding of the head) are ignored.
    `labels` [N], the actual tokens, are for tail='label' alone.
    Raises ValueError for targets that break a rule of SparseTargets and for options without effect.
    """
    divergence = Divergence.of(
        kind, temperature=temperature, tail=tail, scale_by_t2=scale_by_t2, **options
    )
    if student_logits_NV.ndim != 2 or student_logits_NV.shape[0] != len(targets):
        raise ValueError(
            f"student logits must be [{len(targets)}, V], one row per target, got "
            f"{tuple(student_logits_NV.shape)}"
        )
    student_logits_NV = student_logits_NV[:, : checked_vocab(vocab_size, student_logits_NV, 1)]
    if labels is not None:
        labels = torch.as_tensor(labels, device=student_logits_NV.device).to(torch.int64)
    targets = divergence.check_targets(targets, student_logits_NV.shape[1], labels)
    with torch.autocast(student_logits_NV.device.type, enabled=False):
        x_NV = student_logits_NV.to(compute_dtype(student_logits_NV)) / temperature
        if tail == "uniform":
            assert isinstance(targets, SparseTargets)
            return divergence.of_dense(x_NV, targets)
        ids_NK = targets.filled_ids()
        lse_tail_N = x_NV.scatter(1, ids_NK, MASKED_LOGIT).logsumexp(1)
        return divergence.of_reduced(x_NV.gather(1, ids_NK), lse_tail_N, targets)


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """Return what the losses compute in: float32, unless the input is float64."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def checked_vocab(vocab_size: int | None, tensor: Tensor, dim: int) -> int:
    """Return `vocab_size`, by default the tensor's whole dimension, refusing one beyond it."""
    num_columns = tensor.shape[dim]
    if vocab_size is None:
        return num_columns
    if not 0 < vocab_size <= num_columns:
        raise ValueError(f"vocab_size {vocab_size} does not fit a head of {num_columns} rows")
    return vocab_size
