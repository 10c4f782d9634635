"""A pretrained student is loaded with all of its weights, and runs no code that nobody allowed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from decant.storage import CacheReader
from decant.student_train import StudentConfig, train
from decant.student_train.model.student import load_student
from tests.support import models
from tests.support.trainings import config


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A pretrained student with the teacher's tokenizer."""
    models.save_teacher(tmp_path / "base", seed=3)
    return tmp_path / "base"


@pytest.mark.parametrize("fault", ["missing", "renamed", "another shape"])
def test_a_student_whose_weights_are_not_all_there_is_refused(
    cache: Path, base: Path, fault: str
) -> None:
    """They would be random numbers; the message names the first, and what is there instead."""
    held = load_file(base / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    value = held.pop(name)
    if fault == "renamed":
        held["model.layers.1.mlp.w3.weight"] = value
    elif fault == "another shape":
        held[name] = value[:5]
    save_file(held, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="1 tensors that its config") as refusal:
        load_student(StudentConfig(path=str(base)), CacheReader(cache), 0)
    assert f"first {name}" in str(refusal.value) and str(base) in str(refusal.value)
    assert ("w3.weight instead, perhaps renamed" in str(refusal.value)) == (fault == "renamed")


CODE = """
from transformers import LlamaConfig, LlamaForCausalLM

class OwnConfig(LlamaConfig):
    model_type = "own"

class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""


def test_code_of_a_student_runs_when_it_is_asked_for(
    cache: Path, base: Path, tmp_path: Path
) -> None:
    """Without the option it is refused at once, with its name; with it, the student is trained."""
    fields = json.loads((base / "config.json").read_text())
    names = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    fields |= {"model_type": "own", "architectures": ["OwnModel"], "auto_map": names}
    (base / "config.json").write_text(json.dumps(fields))
    (base / "own.py").write_text(CODE)
    student = StudentConfig(path=str(base))
    with pytest.raises(ValueError, match=r"trust it: student\.trust_remote_code: true"):
        train(config(cache, tmp_path / "run", student=student))
    trusted = StudentConfig(path=str(base), trust_remote_code=True)
    train(config(cache, tmp_path / "run", steps=2, student=trusted))
    found = load_file(tmp_path / "run/student/model.safetensors")
    before = load_file(base / "model.safetensors")
    assert found.keys() == before.keys()
    assert any(not torch.equal(found[name], before[name]) for name in before)


def test_quantised_weights_are_not_trained_themselves(
    cache: Path, base: Path, tmp_path: Path
) -> None:
    """Their gradients would be lost; the message says what to do."""
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    quantised = AutoModelForCausalLM.from_pretrained(
        base, quantization_config=BitsAndBytesConfig(load_in_4bit=True), device_map={"": "cpu"}
    )
    quantised.save_pretrained(tmp_path / "quantised")
    models.build_tokenizer().save_pretrained(tmp_path / "quantised")
    student = StudentConfig(path=str(tmp_path / "quantised"))
    with pytest.raises(ValueError, match=r"holds quantised weights.*adapter\.r"):
        train(config(cache, tmp_path / "run", student=student))
