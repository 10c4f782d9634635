"""A student is complete when it was read back as it was trained; whatever fails loses no step."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from decant.student_train import AdapterConfig, LossConfig, OptimizerConfig, StudentConfig, train
from decant.student_train.dry_run import dry_run
from decant.student_train.model.distiller import Distiller
from decant.student_train.model.student import check_savable
from decant.student_train.outputs.save import save_student
from decant.student_train.outputs.written import NotWritten
from tests.support import ROOT, models
from tests.support.trainings import STUDENT, config, losses, weights


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A pretrained student with the teacher's tokenizer."""
    models.save_teacher(tmp_path / "base", seed=3)
    return tmp_path / "base"


@pytest.fixture
def fresh_state() -> Iterator[None]:
    """Accelerate reads its variables once per process."""
    AcceleratorState._reset_state()
    yield
    AcceleratorState._reset_state()


def tensors_in(path: Path) -> set[str]:
    """The names in a file of weights."""
    with safe_open(path, "pt") as file:
        return set(file.keys())


@pytest.mark.parametrize("adapter", [AdapterConfig(), AdapterConfig(r=2, merge=False)])
def test_a_student_that_the_launcher_compiles_is_saved_whole(
    cache: Path,
    tmp_path: Path,
    base: Path,
    adapter: AdapterConfig,
    monkeypatch: pytest.MonkeyPatch,
    fresh_state: None,
) -> None:
    """torch.compile renames weights; the saved ones have the student's names and values."""
    plain = config(
        cache, tmp_path / "plain", steps=2, student=StudentConfig(path=str(base)), adapter=adapter
    )
    train(plain)
    AcceleratorState._reset_state()
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "eager")
    train(dataclasses.replace(plain, output=str(tmp_path / "compiled")))
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "plain"), rel=1e-4)
    file = "adapter_model.safetensors" if adapter.r else "model.safetensors"
    found, expected = (
        tensors_in(tmp_path / run / "student" / file) for run in ("compiled", "plain")
    )
    assert found == expected and found
    if not adapter.r:
        ours, theirs = weights(tmp_path / "compiled"), weights(tmp_path / "plain")
        for name, value in theirs.items():
            torch.testing.assert_close(ours[name], value, rtol=1e-3, atol=1e-5)


def distiller(vocab_size: int = 40) -> Distiller:
    torch.manual_seed(0)
    student = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(**{**STUDENT, "vocab_size": vocab_size})
    )
    return Distiller(student, LossConfig(), vocab_size)


def test_weights_of_other_names_are_not_saved(tmp_path: Path) -> None:
    """What was published before stays, and the message names a tensor."""
    (tmp_path / "student").mkdir()
    (tmp_path / "student/old").write_text("precious")
    model = distiller()
    gathered = {f"wrapped.{name}": value for name, value in model.state_dict().items()}
    accelerator: Any = SimpleNamespace(
        get_state_dict=lambda model: gathered,
        unwrap_model=lambda model: model,
        is_main_process=True,
        wait_for_everyone=lambda: None,
    )
    with pytest.raises(NotWritten, match=r"not the student's: 12 names differ, first lm_head"):
        save_student(accelerator, model, None, tmp_path, card="")
    assert (tmp_path / "student/old").read_text() == "precious"


@pytest.mark.parametrize("damage", ["another", "absent"])
def test_a_student_that_is_not_read_back_as_it_was_trained_is_not_published(
    tmp_path: Path, damage: str
) -> None:
    """A tensor that came out changed, or not at all, whatever class wrote it."""
    model = distiller()
    own = model.student.save_pretrained

    def save_pretrained(folder: Path, state_dict: dict[str, torch.Tensor]) -> None:
        own(folder, state_dict=state_dict)
        kept = load_file(folder / "model.safetensors")
        name = "model.layers.0.mlp.up_proj.weight"
        if damage == "absent":
            del kept[name]
        else:
            kept[name] = kept[name] + 1e-3
        save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})

    model.student.save_pretrained = save_pretrained  # type: ignore[method-assign]
    message = "is another" if damage == "another" else "is not there"
    with pytest.raises(NotWritten, match=f"up_proj.weight {message} when it is read back"):
        save_student(Accelerator(cpu=True), model, None, tmp_path, card="")
    assert not (tmp_path / "student").exists()


def test_saved_files_have_the_permissions_that_the_umask_gives(cache: Path, tmp_path: Path) -> None:
    """Weights too: others may read them if they may read the rest."""
    train(config(cache, tmp_path / "run", steps=1, optimizer=OptimizerConfig()))
    (tmp_path / "plain").write_text("")
    expected = (tmp_path / "plain").stat().st_mode
    for path in (tmp_path / "run/student").iterdir():
        assert path.stat().st_mode == expected, path


def test_generation_settings_without_effect_do_not_keep_a_student_from_being_saved(
    cache: Path, tmp_path: Path, base: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As published models have them; what has an effect stays as it was."""
    settings = {"do_sample": False, "temperature": 0.9, "top_p": 0.6, "early_stopping": True}
    settings |= {"pad_token_id": -1, "output_attentions": True, "max_new_tokens": 77}
    (base / "generation_config.json").write_text(json.dumps({**settings, "eos_token_id": 1}))
    caplog.set_level("INFO")
    student = StudentConfig(path=str(base))
    train(config(cache, tmp_path / "run", steps=1, optimizer=OptimizerConfig(), student=student))
    assert "temperature 0.9, top_p 0.6" in caplog.text
    saved = GenerationConfig.from_pretrained(tmp_path / "run/student")
    assert saved.max_new_tokens == 77 and saved.eos_token_id == 1 and not saved.do_sample
    assert saved.temperature in (None, 1.0)


def test_what_could_not_be_saved_is_refused_before_training(
    cache: Path, tmp_path: Path, base: Path
) -> None:
    """By a run and by a dry run, whether loading or only saving it fails."""
    (base / "generation_config.json").write_text(json.dumps({"num_return_sequences": 3}))
    run = config(cache, tmp_path / "run", student=StudentConfig(path=str(base)))
    for begin in (train, dry_run):
        with pytest.raises(ValueError, match=r"base cannot be loaded: .*num_return_sequences"):
            begin(run)
    assert not (tmp_path / "run/metrics.jsonl").exists()
    student = models.build_model()
    student.generation_config.num_return_sequences = 3
    with pytest.raises(ValueError, match=r"could not be saved: its GenerationConfig.*return_seq"):
        check_savable(student, models.build_tokenizer())


def test_a_base_that_is_gone_at_the_end_costs_no_step(
    cache: Path, tmp_path: Path, base: Path
) -> None:
    """The adapter cannot be merged; once the base is back, the same run saves the student."""
    student = StudentConfig(path=str(base))
    run = config(
        cache, tmp_path / "run", steps=40, student=student, adapter=AdapterConfig(r=2), plots=False
    )
    metrics = tmp_path / "run/metrics.jsonl"

    def take_away() -> None:
        while not metrics.exists() or len(metrics.read_text().splitlines()) < 3:
            time.sleep(0.005)
        base.rename(tmp_path / "away")

    thread = threading.Thread(target=take_away)
    thread.start()
    with pytest.raises(NotWritten, match=r"run/student could not.*base cannot be loaded.*stays"):
        train(run)
    thread.join()
    before = losses(tmp_path / "run")
    assert len(before) == 40
    (tmp_path / "away").rename(base)
    assert train(run)["resumed_at"] == 40
    assert losses(tmp_path / "run") == before
    assert (tmp_path / "run/student/model.safetensors").stat().st_size > 0


def test_a_full_disk_is_one_line_with_a_path(cache: Path, tmp_path: Path) -> None:
    """Exit code 2, whichever library was writing; files may not grow beyond 20 KB here."""
    fields = {
        "cache": str(cache),
        "output": str(tmp_path / "run"),
        "student": {"config": STUDENT},
        "steps": 2,
    }
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(fields))
    command = f"ulimit -f 20; exec {sys.executable} -m student_train --config {tmp_path}/train.yaml"
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=ROOT,
        env={**os.environ, "MPLBACKEND": "agg"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert f"error: {tmp_path}/run/checkpoints/step-00000002 could not be written: " in done.stderr
    assert not (tmp_path / "run/student").exists()
