"""Training that is killed at any moment goes on to the very same end; one run at a time."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from decant.storage.files.store import Busy
from decant.student_train import EvalConfig, TrainConfig, train
from tests.support.trainings import config, losses, weights

STEPS = 60
KILLS = 5


def start(run: TrainConfig) -> Any:
    """Train in a process of its own, forked from one that has the imports done."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.support.trainings"])
    process = context.Process(target=train, args=(run,))
    process.start()
    return process


def lines(output: Path) -> list[str]:
    """The lines of metrics.jsonl, the last perhaps torn."""
    path = output / "metrics.jsonl"
    return path.read_text().splitlines() if path.exists() else []


def wait_for(process: Any, condition: Any) -> None:
    """Wait until a condition holds or the process has ended; fails after a minute."""
    deadline = time.monotonic() + 60
    while process.is_alive() and not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def test_a_run_killed_at_any_moment_ends_as_if_it_had_not_been(cache: Path, tmp_path: Path) -> None:
    """SIGKILL again and again, in steps, evaluations and checkpoints: bit-equal curve, weights."""
    options = {
        "steps": STEPS,
        "save_every_steps": 2,
        "gradient_accumulation": 2,
        "packing": "rows",
        "eval": EvalConfig(heldout_fraction=0.1, every_steps=7),
    }
    train(config(cache, tmp_path / "whole", **options))
    killed = config(cache, tmp_path / "killed", **options)
    output, generator = tmp_path / "killed", np.random.default_rng(0)
    died_at = []
    for _ in range(KILLS):
        before = len(losses_so_far(output))
        process = start(killed)
        wait_for(process, lambda before=before: len(losses_so_far(output)) not in (0, before))
        time.sleep(generator.uniform(0, 0.12))
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
        process.join()
        died_at.append(len(losses_so_far(output)))
        for checkpoint in (output / "checkpoints").glob("step-*"):
            assert json.loads((checkpoint / "decant.json").read_text())["step"] > 0
            assert (checkpoint / "optimizer.bin").stat().st_size > 0
        if process.exitcode == 0:
            break
    assert len({steps for steps in died_at if 0 < steps < STEPS}) >= 2, died_at
    train(killed)
    assert losses(output) == losses(tmp_path / "whole")
    assert [json.loads(line)["step"] for line in lines(output)] == [
        json.loads(line)["step"] for line in lines(tmp_path / "whole")
    ]
    theirs = weights(tmp_path / "whole")
    for name, value in weights(output).items():
        assert torch.equal(value, theirs[name]), name
    assert not list(output.glob(".*.tmp"))


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_a_run_ended_in_its_last_save_is_not_trained_again(
    cache: Path, tmp_path: Path, how: signal.Signals
) -> None:
    """The last step has a checkpoint before the student is saved, whatever `save_every_steps`."""
    run, output = config(cache, tmp_path / "run", steps=4), tmp_path / "run"
    process = start(run)
    wait_for(process, lambda: (output / "checkpoints/step-00000004").exists())
    if process.is_alive():
        os.kill(process.pid, how)
    process.join()
    assert not (output / "summary.json").exists() or process.exitcode == 0
    curve = losses_so_far(output)
    assert len(curve) == 4
    train(run)
    assert losses_so_far(output) == curve
    train(config(cache, tmp_path / "whole", steps=4))
    theirs = weights(tmp_path / "whole")
    for name, value in weights(output).items():
        assert torch.equal(value, theirs[name]), name


def losses_so_far(output: Path) -> list[float]:
    """The losses in the lines that are whole."""
    found = []
    for line in lines(output):
        try:
            found.append(json.loads(line).get("loss"))
        except ValueError:
            break
    return [loss for loss in found if loss is not None]


def test_two_runs_do_not_share_an_output(cache: Path, tmp_path: Path) -> None:
    """The second is refused while the first trains, and changes nothing; afterwards it may."""
    long = config(cache, tmp_path / "run", steps=100_000)
    process = start(long)
    try:
        wait_for(process, lambda: len(lines(tmp_path / "run")) > 2)
        assert process.is_alive()
        with pytest.raises(Busy, match=r"run is being written by another process"):
            train(long)
        assert process.is_alive()
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    train(dataclasses.replace(long, steps=2))
    assert len(losses(tmp_path / "run")) == 2


def test_a_half_written_checkpoint_is_no_checkpoint(cache: Path, tmp_path: Path) -> None:
    """What a killed save left is passed over, and cleaned up by the next."""
    run = config(cache, tmp_path / "run", steps=4, save_every_steps=2)
    train(run)
    expected = weights(tmp_path / "run")
    (tmp_path / "run/summary.json").unlink()
    shutil.rmtree(tmp_path / "run/checkpoints/step-00000004")
    half = tmp_path / "run/checkpoints/.step-00000003.tmp"
    half.mkdir()
    (half / "model.safetensors").write_bytes(b"torn")
    train(dataclasses.replace(run, save_every_steps=3))
    assert not half.exists()
    for name, value in weights(tmp_path / "run").items():
        assert torch.equal(value, expected[name]), name
