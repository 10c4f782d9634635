"""What `accelerate launch` brings along is honoured or refused, never heeded in silence."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from accelerate.state import AcceleratorState

from decant.student_train import LossConfig, StudentConfig, TrainConfig, train
from decant.student_train.runtime.launch import refuse_launch, tell_deepspeed
from tests.support.trainings import config, losses


@pytest.fixture
def fresh_state() -> Iterator[None]:
    """Accelerate reads its variables once per process."""
    AcceleratorState._reset_state()
    yield
    AcceleratorState._reset_state()


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        (
            {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"},
            "accumulation_steps 4, this config has 2",
        ),
        ({"ACCELERATE_MIXED_PRECISION": "fp8"}, "mixed_precision fp8, this config has no"),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "launched for Megatron-LM"),
        (
            {"ACCELERATE_USE_PARALLELISM_CONFIG": "true", "PARALLELISM_CONFIG_TP_SIZE": "2"},
            "tensor parallelism",
        ),
        (
            {"ACCELERATE_USE_PARALLELISM_CONFIG": "true", "PARALLELISM_CONFIG_CP_SIZE": "2"},
            "context parallelism",
        ),
        ({"ACCELERATE_USE_FSDP": "true"}, "FSDP 1, .*fsdp_version: 2"),
        (
            {
                "ACCELERATE_USE_FSDP": "true",
                "FSDP_VERSION": "2",
                "FSDP_ACTIVATION_CHECKPOINTING": "true",
            },
            "set gradient_checkpointing here",
        ),
        (
            {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_IGNORED_MODULES": "head"},
            "fsdp_ignored_modules",
        ),
    ],
)
def test_settings_that_would_change_numbers_are_refused(
    environment: dict[str, str], message: str
) -> None:
    """The message names the setting and what to use in its place."""
    run = TrainConfig(
        cache="c", output="o", steps=1, student=StudentConfig(path="p"), gradient_accumulation=2
    )
    with pytest.raises(ValueError, match=message):
        refuse_launch(run, environment)


@pytest.mark.parametrize(
    ("theirs", "message"),
    [
        ({"scheduler": {"type": "WarmupLR"}}, "has 'scheduler': leave it out"),
        ({"optimizer": {"type": "Lamb"}}, "has 'optimizer': leave it out"),
        ({"bf16": {"enabled": True}}, "has bf16 enabled, this config mixed_precision no"),
        ({"tensor_parallel": {"autotp_size": 2}}, "autotp_size 2"),
        (
            {"gradient_clipping": 0.3},
            r"gradient_clipping 0\.3, this config optimizer\.max_grad_norm",
        ),
    ],
)
def test_a_deepspeed_file_that_says_otherwise_is_refused(
    theirs: dict[str, object], message: str
) -> None:
    """It is read by accelerate before our numbers go in."""
    run = TrainConfig(cache="c", output="o", steps=1, student=StudentConfig(path="p"))
    with pytest.raises(ValueError, match=message):
        tell_deepspeed(SimpleNamespace(deepspeed_config=theirs, zero_stage=2), run)


def test_settings_that_agree_are_taken() -> None:
    """The same numbers, and what accelerate writes by default."""
    run = TrainConfig(
        cache="c", output="o", steps=1, student=StudentConfig(path="p"), mixed_precision="bf16"
    )
    refuse_launch(run, {})
    refuse_launch(
        run,
        {
            "ACCELERATE_MIXED_PRECISION": "bf16",
            "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1",
            "ACCELERATE_USE_PARALLELISM_CONFIG": "true",
            "PARALLELISM_CONFIG_TP_SIZE": "1",
            "PARALLELISM_CONFIG_DP_SHARD_SIZE": "8",
        },
    )


def test_a_launcher_that_accumulates_as_the_config_says_changes_no_number(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh_state: None
) -> None:
    """Accelerate would divide each loss by the same number once more."""
    plain = config(cache, tmp_path / "plain", gradient_accumulation=2, steps=3)
    train(plain)
    AcceleratorState._reset_state()
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "2")
    train(dataclasses.replace(plain, output=str(tmp_path / "launched")))
    assert losses(tmp_path / "launched") == losses(tmp_path / "plain")
    norms = [
        [json.loads(line)["grad_norm"] for line in (tmp_path / run / "metrics.jsonl").open()]
        for run in ("plain", "launched")
    ]
    assert norms[0] == norms[1]


def test_tensorboard_gets_the_curve_and_the_config(cache: Path, tmp_path: Path) -> None:
    """The documented example: options by their dotted names, every logged number at its step."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = config(
        cache,
        tmp_path / "run",
        steps=3,
        trackers=["tensorboard"],
        loss=LossConfig(kind="akl", options={"mu": 0.4}),
    )
    train(run)
    events = EventAccumulator(str(tmp_path / "run/decant"))
    events.Reload()
    curve = [(event.step, event.value) for event in events.Scalars("loss")]
    assert curve == [(i + 1, pytest.approx(v)) for i, v in enumerate(losses(tmp_path / "run"))]
    (options,) = (tmp_path / "run/decant").glob("*/hparams.yml")
    assert "loss.options.mu: 0.4" in options.read_text()


def test_wandb_gets_the_run_without_a_network(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In its offline mode, which writes a folder to be synchronised later."""
    pytest.importorskip("wandb")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    train(config(cache, tmp_path / "run", steps=2, trackers=["wandb"], plots=False))
    assert len(losses(tmp_path / "run")) == 2
    assert [*tmp_path.glob("wandb/offline-run-*/run-*.wandb")]


def test_mlflow_gets_the_curve_and_the_config(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Options by their dotted names, the loss of each step."""
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file://{tmp_path}/mlruns")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    train(config(cache, tmp_path / "run", steps=2, trackers=["mlflow"], plots=False))
    (curve,) = tmp_path.glob("mlruns/*/*/metrics/loss")
    found = [float(line.split()[1]) for line in curve.read_text().splitlines()]
    assert found == pytest.approx(losses(tmp_path / "run"))
    assert [*tmp_path.glob("mlruns/*/*/params/loss.kind")]
