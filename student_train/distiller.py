"""The student with its loss inside: one module whose forward takes a batch and gives nats.

Wrapping the loss into the module's forward keeps DDP and FSDP hooks intact and lets the head run
fused with the loss, so [N, V] logits never exist. Heads that are not a linear map, scaled and
capped (probed on the model, not assumed) go through the model's logits instead.
Shapes: B sequences, L length, H hidden, N targets, V vocabulary.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from student_train.batch import Batch
from student_train.losses import DIVERGENCES, fused_linear_divergence, sparse_divergence
from student_train.losses.fused import FusedLoss

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)  # no slots: jsonargparse reads defaults through vars()
class LossConfig:
    """What is minimised: kd_weight * divergence(teacher, student) + ce_weight * cross-entropy."""

    kind: str = "fkl"
    """Divergence: fkl, rkl, akl, jeffreys, jsd, tvd, skew_fkl, skew_rkl or alpha_beta."""
    kd_weight: float = 1.0
    """Weight of the divergence to the teacher."""
    ce_weight: float = 0.0
    """Weight of the cross-entropy on the actual tokens."""
    temperature: float = 1.0
    """Softmax temperature of the divergence; must be stored in the cache."""
    tail: str = "bucket"
    """What stands for the ids that were not kept: see docs/losses.md."""
    scale_by_t2: bool = True
    """Multiply the divergence, value and gradient, by temperature squared."""
    options: dict[str, Any] = field(default_factory=dict)
    """Options of the kind, for example {head_rule: nucleus, mu: 0.5} for akl."""

    def __post_init__(self) -> None:
        if self.kind not in DIVERGENCES:
            raise ValueError(f"loss.kind {self.kind!r} is not one of {tuple(DIVERGENCES)}")
        if self.kd_weight < 0 or self.ce_weight < 0 or self.kd_weight + self.ce_weight == 0:
            raise ValueError(
                f"loss weights must be >= 0 and not both 0, found kd_weight {self.kd_weight}, "
                f"ce_weight {self.ce_weight}"
            )


class Distiller(nn.Module):
    """A causal LM and the sparse distillation loss of its batches."""

    def __init__(self, student: PreTrainedModel, loss: LossConfig, vocab_size: int) -> None:
        """`vocab_size` is the cache's shared vocabulary: the student's rows beyond it are masked.

        Raises ValueError if the student has fewer rows.
        """
        super().__init__()
        self.student = student
        self.loss = loss
        self.vocab_size = vocab_size
        rows = student.get_output_embeddings().weight.shape[0]
        if rows < vocab_size:
            raise ValueError(
                f"the student has {rows} output rows, the cache's vocabulary {vocab_size} ids; "
                "use a student of the teacher's tokenizer"
            )
        name = type(student).__name__
        self._head: dict[str, Any] | None = None
        try:
            self._head = linear_head(student)
            log.info("student %s: head fused with the loss", name)
        except UnusualHead as reason:
            log.info("student %s: loss on the model's own logits, because %s", name, reason)

    def tie_weights(self) -> None:
        """Tie the student's embeddings again; accelerate asks after moving parameters (FSDP2)."""
        self.student.tie_weights()

    def __call__(self, batch: Batch, num_targets: float | None = None) -> FusedLoss:
        """The loss of a batch, divided by `num_targets` (default: the batch's own)."""
        _, out = super().__call__(_Sealed(batch), num_targets)
        return out.content

    def forward(self, batch: "_Sealed", num_targets: float | None) -> "tuple[Tensor, _Sealed]":
        """What `__call__` gives, sealed, and the loss for hooks to see."""
        out = self._loss(batch.content, num_targets)
        return out.loss, _Sealed(out)

    def _loss(self, batch: Batch, num_targets: float | None) -> FusedLoss:
        inputs = {
            "input_ids": batch.input_ids,
            "attention_mask": batch.attention_mask,
            "use_cache": False,
        }
        options: dict[str, Any] = {
            "kind": self.loss.kind,
            "temperature": self.loss.temperature,
            "tail": self.loss.tail,
            "scale_by_t2": self.loss.scale_by_t2,
            "vocab_size": self.vocab_size,
            **self.loss.options,
        }
        if self._head is not None:
            return self._fused(inputs, batch, num_targets, {**self._head, **options})
        logits_NV = self.student(**inputs).logits.flatten(0, 1).index_select(0, batch.predictors)
        total = num_targets or max(batch.num_targets, 1)
        kd = sparse_divergence(logits_NV, batch.targets, **options).sum() / total
        logits_NV = logits_NV[:, : self.vocab_size].float()
        ce = nn.functional.cross_entropy(logits_NV, batch.labels, reduction="sum") / total
        loss = self.loss.kd_weight * kd + self.loss.ce_weight * ce
        return FusedLoss(loss=loss, kd=kd.detach(), ce=ce.detach())

    def _fused(
        self,
        inputs: dict[str, Any],
        batch: Batch,
        num_targets: float | None,
        options: dict[str, Any],
    ) -> FusedLoss:
        head = self.student.get_output_embeddings()

        def loss_of(hidden_NH: Tensor) -> FusedLoss:
            return fused_linear_divergence(
                hidden_NH,
                head.weight,
                batch.targets,
                batch.labels,
                kd_weight=self.loss.kd_weight,
                ce_weight=self.loss.ce_weight,
                bias=head.bias,
                num_targets=num_targets,
                **options,
            )

        def loss_of_student() -> FusedLoss:
            hidden_BLH = self.student.base_model(**inputs).last_hidden_state
            hidden_NH = hidden_BLH.flatten(0, 1).index_select(0, batch.predictors)
            return _call_as(head, loss_of, hidden_NH)

        return _call_as(self.student, loss_of_student)


class _Sealed:
    """Keeps a batch or a loss in float32.

    FSDP2's mixed precision casts the float tensors of every argument and result that it can look
    into, dataclasses too: a teacher's log probs would be rounded to 16 bits on their way in.
    """

    def __init__(self, content: Any) -> None:
        self.content = content


def _call_as(module: nn.Module, forward: Callable[..., FusedLoss], *args: Tensor) -> FusedLoss:
    """Return `module(*args)` with `forward` in place of its own.

    So the module's hooks run around it: FSDP2 gathers a module's parameters before its forward and
    frees them after, wherever the module was sharded.
    """

    def sealed(*args: Tensor) -> tuple[Tensor, _Sealed]:
        out = forward(*args)
        return out.loss, _Sealed(out)

    own = module.__dict__.get("forward")
    module.forward = sealed
    try:
        return module(*args)[1].content
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own


class UnusualHead(Exception):
    """The student's logits are not a linear map of its last hidden state, scaled and capped."""


@torch.no_grad()
def linear_head(student: PreTrainedModel) -> dict[str, Any]:
    """`logit_scale` and `softcap` that turn what the head puts out into the model's logits.

    Found in the config and confirmed by a forward over a few tokens, in which the head's output is
    replaced by numbers wide enough that scales and caps show. Raises UnusualHead with the reason.
    """
    head = student.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise UnusualHead(f"its head is a {type(head).__name__}")
    settings = student.config.get_text_config()
    tokens = torch.arange(1, 9, device=head.weight.device).unsqueeze(0) % settings.vocab_size
    calls: list[tuple[Tensor, Tensor, Tensor]] = []

    def replace(_: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
        spread = torch.linspace(-100, 100, output.shape[-1], device=output.device)
        calls.append((args[0], output, spread.to(output.dtype).expand_as(output)))
        return calls[-1][-1]

    was_training = student.training
    student.eval()
    hook = head.register_forward_hook(replace)
    try:
        logits = student(input_ids=tokens, use_cache=False).logits
        hidden = student.base_model(input_ids=tokens, use_cache=False).last_hidden_state
    except (AttributeError, TypeError, RuntimeError, ValueError) as error:
        raise UnusualHead(f"the head cannot be applied apart: {error}") from error
    finally:
        hook.remove()
        student.train(was_training)
    if len(calls) != 1:
        raise UnusualHead(f"its forward calls the head {len(calls)} times")
    its_input, output, replaced = calls[0]
    if not _close(its_input, hidden):
        raise UnusualHead("its head does not read the last hidden state")
    if not _close(output, nn.functional.linear(its_input, head.weight, head.bias)):
        raise UnusualHead("its head is not the product with its weight")
    softcap = getattr(settings, "final_logit_softcapping", None)
    for scale in _possible_scales(settings):
        ours = scale * replaced.float()
        if softcap:
            ours = softcap * torch.tanh(ours / softcap)
        if _close(logits, ours):
            return {"logit_scale": scale, "softcap": softcap}
    raise UnusualHead("its logits are no scaled and capped output of its head that its config says")


def _possible_scales(settings: Any) -> list[float]:
    """What model families multiply the head's output by, as their configs call it; always 1."""
    scales = [1.0]
    for name in ("logit_scale", "lm_head_multiplier", "output_multiplier", "logits_scaling"):
        if value := getattr(settings, name, None):
            # Granite divides by logits_scaling, HyperCLOVA X multiplies.
            scales += [float(value), 1 / float(value)]
    return scales


def _close(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors agree to 16-bit rounding; a broken student is for the loss to find."""
    if a.shape != b.shape:
        return False
    a, b = a.float(), b.float()
    rounding = 1e-2 * float(b.nan_to_num().abs().mean())
    return torch.allclose(a, b, rtol=1e-2, atol=rounding, equal_nan=True)
