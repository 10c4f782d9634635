"""A student trained for low-bit numbers is saved in them, and is as good as training said."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from decant.student_train import AdapterConfig, EvalConfig, QatConfig, StudentConfig, train
from decant.student_train.model.fake_quantise import fake_quantise
from decant.student_train.outputs.written import NotWritten
from decant.student_train.verdict import evaluate_student
from tests.support.trainings import STUDENT, config

pytest.importorskip("torchao", reason="pip install 'decant[qat]'")

WIDE = {**STUDENT, "initializer_range": 0.2}
"""Wide enough that rounding shows."""


@pytest.mark.parametrize("scheme", ["int4", "int8_dynamic", "int8_dynamic_int4"])
def test_the_quantised_student_is_as_good_as_training_said(
    cache: Path, tmp_path: Path, scheme: str
) -> None:
    """Held-out figures of the folder that is saved are the run's; the plain one's are not."""
    qat = QatConfig(scheme=scheme, group_size=16 if scheme.endswith("int4") else 32)
    run = config(
        cache,
        tmp_path / "run",
        student=StudentConfig(config=WIDE, qat=qat),
        eval=EvalConfig(heldout_fraction=0.2),
        steps=4,
    )
    summary = train(run)
    figures = {}
    for folder in ("student", "student-quantised"):
        path = tmp_path / "run" / folder
        student = StudentConfig(path=str(path))
        found = evaluate_student(student, str(cache), run.loss, heldout_fraction=0.2)
        figures[folder] = found.metrics["heldout_ce"]
    assert figures["student-quantised"] == pytest.approx(summary["heldout_ce"], rel=1e-6)
    assert figures["student"] != pytest.approx(summary["heldout_ce"], rel=1e-6)
    assert (
        json.loads((tmp_path / "run/student/config.json").read_text()).get("quantization_config")
        is None
    )
    sizes = [(tmp_path / "run" / name / "model.safetensors").stat().st_size for name in figures]
    assert sizes[1] < sizes[0]


def test_gradients_reach_the_weights_that_are_rounded() -> None:
    """All but the head and the embeddings, which stay as they are."""
    torch.manual_seed(0)
    student: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model(**WIDE, vocab_size=50))
    names = list(student.state_dict())
    fake_quantise(student, QatConfig(scheme="int4"))
    assert list(student.state_dict()) == names
    assert type(student.get_output_embeddings()) is torch.nn.Linear
    student(input_ids=torch.arange(8).unsqueeze(0)).logits.square().mean().backward()
    layer = student.model.layers[0].mlp.up_proj
    assert layer.weight.grad.abs().sum() > 0
    rounded = layer.weight_fake_quantizer(layer.weight)
    assert 0 < (rounded - layer.weight).abs().max() < layer.weight.abs().max()


def test_what_cannot_be_rounded_is_refused(cache: Path, tmp_path: Path) -> None:
    """Groups that do not divide a layer, adapters, options without effect."""
    student = StudentConfig(config=WIDE, qat=QatConfig(scheme="int4", group_size=24))
    with pytest.raises(ValueError, match=r"group_size 24 does not divide the 32 inputs of model\."):
        train(config(cache, tmp_path / "run", student=student))
    with pytest.raises(ValueError, match=r"qat trains the weights themselves, an adapter"):
        config(cache, tmp_path / "run", student=student, adapter=AdapterConfig(r=2))
    with pytest.raises(ValueError, match="has no effect without a scheme of 4 bits"):
        QatConfig(scheme="int8_dynamic", group_size=64)
    with pytest.raises(ValueError, match="'int3' is not one of"):
        QatConfig(scheme="int3")


def test_a_quantised_student_that_comes_out_otherwise_is_not_published(
    cache: Path, tmp_path: Path
) -> None:
    """The run says so and keeps its checkpoint, from which the same command goes on."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run/student-quantised").write_text("a file where the folder goes")
    student = StudentConfig(config=WIDE, qat=QatConfig(scheme="int4"))
    run = config(cache, tmp_path / "run", student=student, steps=2)
    run = dataclasses.replace(run, optimizer=dataclasses.replace(run.optimizer, warmup_steps=1))
    with pytest.raises(NotWritten, match=r"student-quantised could not be written.*stays"):
        train(run)
    (tmp_path / "run/student-quantised").unlink()
    assert train(run)["resumed_at"] == 2
    assert (tmp_path / "run/student-quantised/config.json").exists()
