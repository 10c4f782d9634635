"""The routers of a mixture of experts are balanced as the student's own class would."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from decant.student_train import CacheStream, Distiller, LossConfig, StudentConfig, train
from tests.support.trainings import STUDENT, config

EXPERTS = {
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "head_dim": 16,
    },
}


def fields(kind: str, **more: Any) -> dict[str, Any]:
    return {**STUDENT, **EXPERTS[kind], "model_type": kind, "router_aux_loss_coef": 0.5, **more}


def gradient(student: Any, loss: torch.Tensor) -> torch.Tensor:
    """Of the first router."""
    (router,) = (
        p
        for name, p in student.named_parameters()
        if name.endswith(("mlp.gate.weight", "mlp.router.weight"))
    )
    (found,) = torch.autograd.grad(loss, router)
    return found


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("kind", EXPERTS)
def test_the_loss_of_the_routers_is_added(cache: Path, kind: str, fused: bool) -> None:
    """Loss and gradient are those without it, plus weight times what transformers computes."""
    torch.manual_seed(0)
    student: Any = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(**fields(kind, vocab_size=320))
    )
    batch = next(iter(CacheStream(cache, batch_size=5)))
    balanced = Distiller(student, LossConfig(), 300)
    plain = Distiller(student, LossConfig(router_weight=0.0), 300)
    if not fused:
        balanced.head = plain.head = None
    expected = student(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask, output_router_logits=True
    ).aux_loss
    num_targets = 2.0 * batch.num_targets  # of a step of which this batch is half
    with_it, without = balanced(batch, num_targets), plain(batch, num_targets)
    assert with_it.router is not None and without.router is None
    torch.testing.assert_close(with_it.router, 0.5 * expected.detach())
    torch.testing.assert_close(with_it.loss, without.loss + 0.5 * 0.5 * expected)
    slope = gradient(student, expected)
    assert slope.abs().max() > 1e-4
    torch.testing.assert_close(
        gradient(student, with_it.loss), gradient(student, without.loss) + 0.25 * slope
    )


def test_a_run_logs_and_lowers_the_loss_of_its_routers(cache: Path, tmp_path: Path) -> None:
    """With a heavy weight the experts are used more alike; packed rows and microbatches alike."""
    run = config(
        cache,
        tmp_path / "run",
        student=StudentConfig(config=fields("mixtral", initializer_range=0.5)),
        loss=LossConfig(router_weight=50.0),
        gradient_accumulation=2,
        packing="rows",
        steps=12,
    )
    train(run)
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").open()]
    assert lines[-1]["router"] < lines[0]["router"] - 0.01
    assert lines[0]["router"] >= 2.0  # 1 per chosen expert, if all are used alike


def test_a_weight_without_routers_is_refused(cache: Path, tmp_path: Path) -> None:
    """An option without effect is an error."""
    run = dataclasses.replace(config(cache, tmp_path / "run"), loss=LossConfig(router_weight=1.0))
    with pytest.raises(ValueError, match=r"router_weight 1\.0: LlamaForCausalLM has no loss"):
        train(run)
