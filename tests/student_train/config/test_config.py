"""Options of a training: what is expanded, and what is refused before anything is loaded."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from decant.student_train import (
    AdapterConfig,
    CacheShare,
    EvalConfig,
    GenerationConfig,
    OptimizerConfig,
    StudentConfig,
    TrainConfig,
)


def config(**changes: Any) -> TrainConfig:
    fields: dict[str, Any] = {"cache": "c", "output": "o", "student": StudentConfig(path="p")}
    return TrainConfig(**{**fields, "steps": 5, **changes})


def test_a_home_directory_is_meant_wherever_a_path_is_given(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """No shell expands what stands in a YAML file."""
    monkeypatch.setenv("HOME", "/home/ada")
    run = config(
        output="~/out",
        cache="~/cache",
        student=StudentConfig(path="~/student"),
        eval=EvalConfig(cache="~/heldout", generation=GenerationConfig(path="~/prompts.jsonl")),
    )
    assert run.output == "/home/ada/out" and run.cache == "/home/ada/cache"
    assert run.student.path == "/home/ada/student"
    assert run.eval.cache == "/home/ada/heldout"
    assert run.eval.generation.path == "/home/ada/prompts.jsonl"
    assert CacheShare(cache="~", weight=1).cache == "/home/ada"
    with pytest.raises(ValueError, match="output ~nobody-here/x: there is no user of that name"):
        config(output="~nobody-here/x")


def test_float16_weights_are_trained_in_an_adapter_alone() -> None:
    """AdamW's steps overflow them; frozen ones are fine."""
    half = StudentConfig(path="p", dtype="float16")
    with pytest.raises(ValueError, match=r"float16 cannot be trained.*mixed_precision"):
        config(student=half)
    assert config(student=half, adapter=AdapterConfig(r=4)).student.dtype == "float16"


def test_a_warmup_longer_than_the_run_is_refused() -> None:
    """Once the number of steps is known: at once for steps, later for epochs."""
    optimizer = OptimizerConfig(warmup_steps=6)
    with pytest.raises(ValueError, match="warmup_steps 6 is more than the run's 5 steps"):
        config(optimizer=optimizer)
    run = config(steps=0, epochs=1.0, optimizer=optimizer)
    with pytest.raises(ValueError, match="Give at most 5, or 0"):
        run.refuse_long_warmup(5)
    run.refuse_long_warmup(6)


def test_all_linear_stands_alone() -> None:
    """Names beside it would have no effect."""
    assert AdapterConfig(r=4, target_modules=["all-linear"])
    with pytest.raises(ValueError, match="all-linear names all layers already"):
        AdapterConfig(r=4, target_modules=["all-linear", "q_proj"])


def test_trust_goes_with_a_path(tmp_path: Path) -> None:
    """A student from a configuration runs no code but transformers'."""
    with pytest.raises(ValueError, match=r"no effect with student\.config"):
        dataclasses.replace(StudentConfig(config={"model_type": "llama"}), trust_remote_code=True)
