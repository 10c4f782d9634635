"""How a student's head is found: scaled and capped ones are fused, unusual ones are not."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from decant.student_train.config.loss import LossConfig
from decant.student_train.losses import sparse_divergence
from decant.student_train.model.distiller import Distiller
from decant.student_train.model.head import UnusualHead, linear_head
from tests.support import dense_reference as reference

SIZES: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 0,
}


def student_of(model_type: str, **options: Any) -> PreTrainedModel:
    """A tiny random student of a model family."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = AutoConfig.for_model(model_type, **{**SIZES, **options})
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def batch_for(vocab_size: int) -> Any:
    """Two sequences with a target at every second token."""
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(0, vocab_size, (2, 9), generator=generator)
    predictors = torch.arange(0, 18, 2)[:8]
    teacher = 2 * torch.randn(8, vocab_size, generator=generator)
    targets = reference.targets_of(teacher, reference.top_kept(teacher, [5] * 8))
    return SimpleNamespace(
        input_ids=input_ids,
        attention_mask=torch.ones_like(input_ids),
        position_ids=None,
        predictors=predictors,
        labels=torch.randint(0, vocab_size, (8,), generator=generator),
        targets_at=lambda temperature: targets,
        num_targets=8,
        lam=None,
    )


def loss_and_gradients(model: Distiller) -> tuple[float, Tensor]:
    """What a step of the model gives."""
    model.zero_grad()
    out = model(batch_for(model.vocab_size))
    out.loss.backward()
    gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    return out.loss.item(), torch.cat(gradients)


@pytest.mark.parametrize(
    ("model_type", "options", "expected"),
    [
        ("llama", {}, {"logit_scale": 1.0, "softcap": None}),
        ("llama", {"tie_word_embeddings": True}, {"logit_scale": 1.0, "softcap": None}),
        ("gemma2", {"final_logit_softcapping": 2.0}, {"logit_scale": 1.0, "softcap": 2.0}),
        ("cohere", {"logit_scale": 0.0625}, {"logit_scale": 0.0625, "softcap": None}),
        ("granite", {"logits_scaling": 8.0}, {"logit_scale": 0.125, "softcap": None}),
        ("hyperclovax", {"logits_scaling": 0.5}, {"logit_scale": 0.5, "softcap": None}),
    ],
)
def test_scaled_and_capped_heads_are_found_and_fused(
    model_type: str,
    options: dict[str, Any],
    expected: dict[str, Any],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Scale and softcap are told from the model, and the fused loss is that on its own logits."""
    student = student_of(model_type, **options)
    caplog.set_level(logging.INFO)
    model = Distiller(student, LossConfig(kind="akl", ce_weight=0.5), 37)
    assert model.head == expected
    assert "head fused with the loss" in caplog.text
    fused, fused_gradients = loss_and_gradients(model)
    model.head = None
    plain, plain_gradients = loss_and_gradients(model)
    assert fused == pytest.approx(plain, rel=1e-5)
    torch.testing.assert_close(fused_gradients, plain_gradients, rtol=1e-3, atol=1e-6)


def test_a_16_bit_head_is_fused() -> None:
    """The check leaves room for the rounding of 16-bit weights."""
    student = student_of("gemma2", final_logit_softcapping=30.0).bfloat16()
    assert linear_head(student) == {"logit_scale": 1.0, "softcap": 30.0}


class ScaledHead(nn.Linear):
    """A head that does more than its product."""

    def forward(self, hidden: Tensor) -> Tensor:
        """Return the product, doubled."""
        return 2 * super().forward(hidden)


def unusual_students() -> dict[str, PreTrainedModel]:
    """Students whose head is not what the fused loss computes, by what the log says of them."""
    deep = student_of("llama")
    deep.lm_head = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 40))
    deep.lm_head.weight = deep.lm_head[1].weight
    doubled = student_of("llama")
    doubled.lm_head = ScaledHead(16, 40)
    hidden_cap = student_of("gemma2", final_logit_softcapping=30.0)
    own_forward = hidden_cap.forward

    def forward(**inputs: Any) -> Any:
        out = own_forward(**inputs)
        out.logits = 50 * torch.tanh(out.logits / 50)
        return out

    hidden_cap.forward = forward  # type: ignore[method-assign]
    projected = student_of("llama")
    projected.lm_head.register_forward_pre_hook(lambda _, args: (args[0] * 3,))
    return {
        "its head is a Sequential": deep,
        "its head is not the product with its weight": doubled,
        "its logits are no scaled and capped output of its head": hidden_cap,
        "its head does not read the last hidden state": projected,
    }


@pytest.mark.parametrize("reason", unusual_students())
def test_unusual_heads_go_through_the_models_own_logits(
    reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A head that the check does not recognise is not fused; the log says why, and training works.

    The capped one has logits so small that its cap shows in none of them.
    """
    student = unusual_students()[reason]
    with pytest.raises(UnusualHead, match=reason):
        linear_head(student)
    caplog.set_level(logging.INFO)
    model = Distiller(student, LossConfig(kind="fkl", ce_weight=0.5), 37)
    assert f"loss on the model's own logits, because {reason}" in caplog.text
    batch = batch_for(37)
    logits = student(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    logits = logits.flatten(0, 1)[batch.predictors][:, :37]
    kd = sparse_divergence(logits, batch.targets_at(1.0), "fkl").mean()
    truth = kd + 0.5 * F.cross_entropy(logits, batch.labels)
    assert loss_and_gradients(model)[0] == pytest.approx(truth.item(), rel=1e-5)
