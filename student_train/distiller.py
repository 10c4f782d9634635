"""The student with its loss inside: one module whose forward takes a batch and gives nats.

Wrapping the loss into the module's forward keeps DDP and FSDP hooks intact and lets the head run
fused with the loss, so [N, V] logits never exist. Heads that are not a plain linear map (checked
against the model's own logits, not assumed) go through the model's logits instead.
Shapes: B sequences, L length, H hidden, N targets, V vocabulary.
"""

import logging
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from student_train.losses import DIVERGENCES, fused_linear_divergence, sparse_divergence
from student_train.losses.fused import FusedLoss
from student_train.stream import Batch

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
        self._head = _linear_head(student)
        log.info(
            "student %s: %s",
            type(student).__name__,
            "head fused with the loss" if self._head else "loss on the model's own logits",
        )

    def forward(self, batch: Batch, num_targets: float | None = None) -> FusedLoss:
        """The loss of a batch, divided by `num_targets` (default: the batch's own)."""
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
            hidden_BLH = self.student.base_model(**inputs).last_hidden_state
            hidden_NH = hidden_BLH.flatten(0, 1).index_select(0, batch.predictors)
            linear = self.student.get_output_embeddings()
            return fused_linear_divergence(
                hidden_NH,
                linear.weight,
                batch.targets,
                batch.labels,
                kd_weight=self.loss.kd_weight,
                ce_weight=self.loss.ce_weight,
                bias=linear.bias,
                num_targets=num_targets,
                **self._head,
                **options,
            )
        logits_NV = self.student(**inputs).logits.flatten(0, 1).index_select(0, batch.predictors)
        total = num_targets or max(batch.num_targets, 1)
        kd = sparse_divergence(logits_NV, batch.targets, **options).sum() / total
        logits_NV = logits_NV[:, : self.vocab_size].float()
        ce = nn.functional.cross_entropy(logits_NV, batch.labels, reduction="sum") / total
        loss = self.loss.kd_weight * kd + self.loss.ce_weight * ce
        return FusedLoss(loss=loss, kd=kd.detach(), ce=ce.detach())


@torch.no_grad()
def _linear_head(student: PreTrainedModel) -> dict[str, Any] | None:
    """`logit_scale` and `softcap` with which the linear head gives the model's own logits.

    None if no such numbers do, found by comparing on a few tokens.
    """
    settings = student.config.get_text_config()
    options: dict[str, Any] = {
        "logit_scale": float(
            getattr(settings, "logit_scale", None)
            or 1 / (getattr(settings, "logits_scaling", None) or 1)
        ),
        "softcap": getattr(settings, "final_logit_softcapping", None),
    }
    linear = student.get_output_embeddings()
    if not isinstance(linear, nn.Linear):
        return None
    probe = torch.arange(1, 9, device=linear.weight.device).unsqueeze(0) % settings.vocab_size
    was_training = student.training
    student.eval()
    try:
        hidden = student.base_model(input_ids=probe, use_cache=False).last_hidden_state
        ours = options["logit_scale"] * linear(hidden).float()
        if options["softcap"]:
            ours = options["softcap"] * torch.tanh(ours / options["softcap"])
        theirs = student(input_ids=probe, use_cache=False).logits.float()
    except (AttributeError, TypeError, RuntimeError) as error:
        log.info("the head cannot be applied apart: %s", error)
        return None
    finally:
        student.train(was_training)
    same = ours.shape == theirs.shape and torch.allclose(ours, theirs, rtol=1e-2, atol=1e-2)
    return options if same else None
