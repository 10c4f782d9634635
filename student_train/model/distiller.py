"""The student with its loss inside: one module whose forward takes a batch and gives nats.

Wrapping the loss into the module's forward keeps DDP and FSDP hooks intact and lets the head run
fused with the loss, so [N, V] logits never exist. Heads that are not a linear map, scaled and
capped (probed on the model, not assumed) go through the model's logits instead.
Shapes: B sequences, L length, H hidden, N targets, V vocabulary.
"""

import dataclasses
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from decant.student_train.config.loss import LossConfig, LossTerms, Terms
from decant.student_train.config.selection import BY_STUDENT, BY_TEACHER, SelectionConfig
from decant.student_train.data.batch import Batch
from decant.student_train.data.parts import parts_of, weights_of
from decant.student_train.evaluation.heldout_sums import HeldoutSums, sums_of_chunks
from decant.student_train.losses import fused_linear_divergences, sparse_divergence
from decant.student_train.losses.divergences import OUTSIDE, Divergence
from decant.student_train.losses.fused import FusedLoss
from decant.student_train.losses.products import wide_linear
from decant.student_train.model.head import UnusualHead, linear_head
from decant.student_train.model.hooks import Sealed, call_as, opened
from decant.student_train.model.probes import refuse_sight_of_later_tokens
from decant.student_train.model.routers import routers_of
from decant.student_train.model.selection import by_student, highest, teacher_entropy
from decant.student_train.model.skewing import wants_lam, with_lam
from decant.student_train.model.student import layer_classes

log = logging.getLogger(__name__)


class Distiller(nn.Module):
    """A causal LM and the sparse distillation loss of its batches."""

    def __init__(
        self,
        student: PreTrainedModel,
        loss: LossConfig,
        vocab_size: int,
        selection: SelectionConfig | None = None,
        label_bytes: Tensor | None = None,
    ) -> None:
        """`vocab_size` is that of the targets: the student's rows beyond it are masked.

        `selection` says on which of the targets a loss is taken; they are all measured.
        `label_bytes` [V] are the bytes of each token, for figures per byte. Raises ValueError if
        the student has fewer rows, or sees later tokens.
        """
        super().__init__()
        self.student = student
        self.loss = loss
        self.vocab_size = vocab_size
        self.selection = selection or SelectionConfig()
        self.label_bytes = label_bytes
        rows = student.get_output_embeddings().weight.shape[0]
        if rows < vocab_size:
            raise ValueError(
                f"the student has {rows} output rows, the cache's vocabulary {vocab_size} ids; "
                "use a student of the teacher's tokenizer, or tokenizer_mismatch: align"
            )
        refuse_sight_of_later_tokens(student)
        name = type(student).__name__
        self.head: dict[str, Any] | None = None
        """Options of the fused loss for this student's head; None if its own logits are used."""
        self.routers = routers_of(student, loss.router_weight)
        """The load-balancing loss of a mixture of experts, if it has one and it has a weight."""
        try:
            self.head = linear_head(student)
            log.info("student %s: head fused with the loss", name)
        except UnusualHead as reason:
            log.info("student %s: loss on the model's own logits, because %s", name, reason)

    @property
    def _no_split_modules(self) -> list[str]:
        """Layers to be sharded as units; accelerate asks (FSDP2)."""
        return layer_classes(self.student)

    def tie_weights(self) -> None:
        """Tie the student's embeddings again; accelerate asks after moving parameters (FSDP2)."""
        self.student.tie_weights()

    def __call__(
        self, batch: Batch, num_targets: float | None = None, terms: Terms | None = None
    ) -> FusedLoss:
        """The loss of a batch, divided by `num_targets` (default: those of it that are selected).

        `terms` are the numbers of the step, by default those at the begin of a run.
        """
        terms = terms or self.loss.at(0, 1)
        found: FusedLoss = opened(super().__call__(Sealed((batch, terms)), num_targets))
        return found

    def within(
        self,
        wrapped: nn.Module,
        top: nn.Module,
        batch: Batch,
        num_targets: float | None = None,
        terms: Terms | None = None,
    ) -> FusedLoss:
        """What `__call__` gives, computed in the forward of a loop's own model around the student.

        `top` is the student or an adapter around it, and `wrapped` what the loop has made of it for
        several processes, perhaps nothing.
        """
        terms = terms or self.loss.at(0, 1)

        def forward(_: Sealed) -> FusedLoss:
            return self._loss(batch, terms, num_targets)

        out: FusedLoss = call_as(top, forward, Sealed(batch), wrapped=wrapped)
        return out

    def measure(self, batch: Batch, terms: Terms) -> HeldoutSums:
        """What the student is worth on a batch; logits are held for some targets at a time."""
        _, out = super().__call__(Sealed((batch, terms)), measure=True)
        return out.content

    def forward(
        self, batch: "Sealed", num_targets: float | None = None, measure: bool = False
    ) -> "tuple[Tensor, Sealed]":
        """What `__call__` or `measure` gives, sealed, and the loss for hooks to see."""
        content, terms = batch.content
        if measure:
            sums = self._measure(content, terms)
            return sums.loss, Sealed(sums)
        out = self._loss(content, terms, num_targets)
        return out.loss, Sealed(out)

    def _loss(self, batch: Batch, terms: Terms, num_targets: float | None) -> FusedLoss:
        count = self.selection.kept(batch.num_targets)
        share = count / (num_targets or max(count, 1))
        if self.selection.by == BY_TEACHER:
            batch = batch.of_targets(highest(teacher_entropy(batch), count))
        inputs = _inputs(batch)
        if self.routers:
            inputs["output_router_logits"] = True
        if self.head is not None:
            return self._fused(inputs, batch, terms, num_targets, self.head, share)
        outputs = self.student(**inputs)
        logits_NV = outputs.logits.flatten(0, 1).index_select(0, batch.predictors)
        if wants_lam(terms):
            batch = with_lam(batch, logits_NV.detach().__getitem__, terms, self.vocab_size)
        if self.selection.by in BY_STUDENT:
            rows = self._rows_by_student(logits_NV.detach().__getitem__, batch, terms)
            batch, logits_NV = batch.of_targets(rows), logits_NV.index_select(0, rows)
        total = num_targets or max(batch.num_targets, 1)
        kd_weight, ce_weight = weights_of(batch, terms)
        kd_N = torch.cat(
            [
                sparse_divergence(
                    logits_NV[part.rows],
                    part.targets,
                    labels=batch.labels[part.rows],
                    vocab_size=self.vocab_size,
                    **part.terms.divergence(),
                )
                for part in parts_of(batch, terms)
            ]
            or [logits_NV.new_zeros(0)]
        )
        logits_NV = logits_NV[:, : self.vocab_size].float()
        ce_N = nn.functional.cross_entropy(logits_NV, batch.labels, reduction="none")
        loss = (kd_weight * kd_N + ce_weight * ce_N).sum() / total
        kd, ce = (values_N.detach().sum() / total for values_N in (kd_N, ce_N))
        outside = logits_NV.new_zeros(len(OUTSIDE))
        for part in parts_of(batch, terms):
            divergence = Divergence.of(**part.terms.divergence())
            outside += divergence.outside_of_logits(logits_NV[part.rows], part.targets) / total
        by_source = _by_source(batch, terms, kd_N, ce_N)
        out = FusedLoss(loss=loss, kd=kd, ce=ce, outside=outside, by_source=by_source)
        return self._with_routers(out, outputs, batch.attention_mask, share)

    def _with_routers(
        self, out: FusedLoss, outputs: Any, mask: Tensor | None, share: float
    ) -> FusedLoss:
        """The loss with that of the routers; `share` is the batch's, of the step's targets."""
        if self.routers is None:
            return out
        router = share * self.routers.loss(outputs.router_logits, mask)
        loss = out.loss + self.routers.weight * router.to(out.loss)
        return dataclasses.replace(out, loss=loss, router=router.detach())

    def _fused(
        self,
        inputs: dict[str, Any],
        batch: Batch,
        terms: Terms,
        num_targets: float | None,
        options: dict[str, Any],
        share: float,
    ) -> FusedLoss:
        def loss_of(hidden_NH: Tensor, head: nn.Linear) -> FusedLoss:
            chosen = batch
            if wants_lam(terms):
                logits_of = self._logits_of(hidden_NH.detach(), head)
                chosen = with_lam(batch, logits_of, terms, self.vocab_size)
            if self.selection.by in BY_STUDENT:
                logits_of = self._logits_of(hidden_NH.detach(), head)
                rows = self._rows_by_student(logits_of, chosen, terms)
                chosen, hidden_NH = chosen.of_targets(rows), hidden_NH.index_select(0, rows)
            kd_weight, ce_weight = weights_of(chosen, terms)
            differ = not isinstance(terms, LossTerms)
            return fused_linear_divergences(
                hidden_NH,
                head.weight,
                [part.loss for part in parts_of(chosen, terms)],
                chosen.labels,
                bias=head.bias,
                kd_weight=kd_weight,
                ce_weight=ce_weight,
                num_targets=num_targets or None,  # 0: all of the step were rejected
                vocab_size=self.vocab_size,
                source=chosen.source if differ else None,
                num_sources=0 if isinstance(terms, LossTerms) else len(terms),
                **options,
            )

        def with_routers(out: FusedLoss, outputs: Any) -> FusedLoss:
            return self._with_routers(out, outputs, batch.attention_mask, share)

        return self._at_head(inputs, batch, loss_of, with_routers)

    def _measure(self, batch: Batch, terms: Terms) -> HeldoutSums:
        label_bytes = self.label_bytes
        if label_bytes is not None:
            label_bytes = label_bytes.to(batch.labels.device)

        def sums(logits_of: Callable[[slice], Tensor]) -> HeldoutSums:
            return sums_of_chunks(logits_of, batch, terms, self.vocab_size, label_bytes=label_bytes)

        found: HeldoutSums = self.with_logits(batch, sums)
        return found

    def with_logits(
        self, batch: Batch, function: Callable[[Callable[[slice], Tensor]], Any]
    ) -> Any:
        """What `function` makes of the logits of a batch's targets.

        It is given what gives the logits [R, V] of some of them, so that no more need be held.
        """
        inputs = _inputs(batch)
        if self.head is None:
            logits_NV = self.student(**inputs).logits.flatten(0, 1)
            return function(logits_NV.index_select(0, batch.predictors).__getitem__)

        def at_head(hidden_NH: Tensor, head: nn.Linear) -> Any:
            return function(self._logits_of(hidden_NH, head))

        return self._at_head(inputs, batch, at_head, lambda found, _: found)

    def _logits_of(self, hidden_NH: Tensor, head: nn.Linear) -> Callable[[slice], Tensor]:
        """What gives the logits [R, V] of some rows of the hidden states."""
        assert self.head is not None
        scale, softcap = self.head["logit_scale"], self.head["softcap"]
        product = wide_linear(hidden_NH, head.weight, head.bias) if self._is_plain(head) else None

        def logits_of(rows: slice) -> Tensor:
            logits_RV = scale * (product(rows) if product else head(hidden_NH[rows]).float())
            return softcap * torch.tanh(logits_RV / softcap) if softcap else logits_RV

        return logits_of

    def _is_plain(self, head: nn.Linear) -> bool:
        """Whether the head's weight is one to multiply with, and not a quantised form of it."""
        is_quantised = bool(getattr(self.student, "is_quantized", False))
        return not is_quantised or type(head.weight) is nn.Parameter

    def _rows_by_student(
        self, logits_of: Callable[[slice], Tensor], batch: Batch, terms: Terms
    ) -> Tensor:
        """The targets that are selected by what the student says of all of them."""
        values_N = by_student(self.selection.by, logits_of, batch, terms, self.vocab_size)
        return highest(values_N, self.selection.kept(batch.num_targets))

    def _at_head(
        self,
        inputs: dict[str, Any],
        batch: Batch,
        function: Callable[[Tensor, Any], Any],
        completed: Callable[[Any, Any], Any],
    ) -> Any:
        """What `function` makes of the last hidden states of the predictors and of the head.

        `completed` makes the result of that and of all that the student's body gave.
        """
        head = self.student.get_output_embeddings()

        def at_head(hidden_NH: Tensor) -> Any:
            return function(hidden_NH, head)

        def of_student() -> Any:
            outputs = self.student.base_model(**inputs)
            hidden_NH = outputs.last_hidden_state.flatten(0, 1).index_select(0, batch.predictors)
            return completed(call_as(head, at_head, hidden_NH), outputs)

        return call_as(self.student, of_student)


def _inputs(batch: Batch) -> dict[str, Any]:
    """What the student's forward takes."""
    inputs: dict[str, Any] = {"input_ids": batch.input_ids, "use_cache": False}
    if batch.position_ids is None:
        inputs["attention_mask"] = batch.attention_mask
    else:
        inputs["position_ids"] = batch.position_ids
    return inputs


def _by_source(batch: Batch, terms: Terms, kd_N: Tensor, ce_N: Tensor) -> Tensor | None:
    """As `FusedLoss.by_source`."""
    if isinstance(terms, LossTerms) or batch.source is None:
        return None
    columns = torch.stack([torch.ones_like(kd_N), kd_N, ce_N], dim=1).detach()
    return columns.new_zeros(len(terms), 3).index_add_(0, batch.source, columns)
