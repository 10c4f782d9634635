"""The programs of examples/loops train, in as few lines as the guide says."""

import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from decant.student_train.losses import sparse_divergence
from decant.student_train.trainers import CacheDataset
from tests.support import ROOT, models

PROGRAMS = sorted((ROOT / "examples/loops").glob("*.py"))


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda path: path.stem)
def test_the_programs_of_the_guide_train(
    program: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In at most 30 lines of code, each makes a student that is nearer to the teacher."""
    if "lightning" in program.stem:
        pytest.importorskip("pytorch_lightning")
    assert sum(bool(line.strip()) for line in program.read_text().splitlines()) <= 30
    models.save_teacher(tmp_path / "student", "qwen2", seed=5, initializer_range=0.05)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    arguments = [str(cache), str(tmp_path / "student"), str(tmp_path / "trained")]
    monkeypatch.setattr(sys, "argv", [str(program), *arguments])
    runpy.run_path(str(program), run_name="__main__")
    trained: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    before = divergence(trained, cache)
    if (tmp_path / "trained/adapter_config.json").exists():
        trained = PeftModel.from_pretrained(trained, tmp_path / "trained")
    else:
        trained = AutoModelForCausalLM.from_pretrained(tmp_path / "trained")
    assert divergence(trained, cache) < 0.97 * before


@torch.no_grad()
def divergence(student: Any, cache: Path) -> float:
    """Mean over the targets of a cache."""
    total = count = 0.0
    for batch in CacheDataset(cache).stream(batch_size=16).one_epoch():
        logits = student(**batch).logits.flatten(0, 1)[batch.predictors]
        total += float(sparse_divergence(logits, batch.targets, "fkl", vocab_size=300).sum())
        count += batch.num_targets
    return total / count
