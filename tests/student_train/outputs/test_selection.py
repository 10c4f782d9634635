"""The best student is the one that is saved, and a run stops when nothing gets better."""

import dataclasses
import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from decant.student_train import (
    AdapterConfig,
    EvalConfig,
    LossConfig,
    OptimizerConfig,
    StudentConfig,
    TrainConfig,
)
from decant.student_train import train as train_now
from tests.support import models
from tests.support.trainings import config

WILD = OptimizerConfig(lr=0.3, schedule="constant", max_grad_norm=0.0)
"""Learns little and leaps."""
EVERY_2 = EvalConfig(heldout_fraction=0.3, every_steps=2, keep_best="heldout_ce")


def lines_of(run: TrainConfig) -> list[dict]:
    """The evaluations after training has begun."""
    lines = [json.loads(x) for x in (Path(run.output) / "metrics.jsonl").open()]
    return [line for line in lines if "heldout_ce" in line and line["step"]]


def heldout_ce(run: TrainConfig) -> float:
    """Of the student that was saved, measured by a run that evaluates it as it is."""
    again = dataclasses.replace(
        run,
        output=run.output + "-again",
        student=StudentConfig(path=str(Path(run.output) / "student")),
        adapter=AdapterConfig(),
        eval=EvalConfig(heldout_fraction=0.3),
        optimizer=OptimizerConfig(lr=1e-30),
        steps=1,
    )
    return train_now(again)["heldout_ce"]


@pytest.mark.parametrize("adapted", [False, True])
def test_the_saved_student_is_the_best_of_the_evaluated(
    cache: Path, tmp_path: Path, adapted: bool
) -> None:
    """By what was asked for, not the last; the summary has its figures and its step."""
    # Whoever follows this random teacher unlearns to predict the text: the best comes early.
    run = config(cache, tmp_path / "run", steps=12, eval=EVERY_2, loss=LossConfig(kind="rkl"))
    run = dataclasses.replace(run, optimizer=OptimizerConfig(lr=0.05, schedule="constant"))
    if adapted:
        models.save_teacher(tmp_path / "base", seed=3)
        student = StudentConfig(path=str(tmp_path / "base"))
        run = dataclasses.replace(run, student=student, adapter=AdapterConfig(r=2))
    summary = train_now(run)
    values = {line["step"]: line["heldout_ce"] for line in lines_of(run)}
    assert sorted(values) == [2, 4, 6, 8, 10, 12]
    best = min(values, key=lambda step: values[step])
    assert best != 12, "the last was the best: nothing was tested"
    assert summary["best_step"] == best
    assert summary["heldout_ce"] == pytest.approx(values[best], rel=1e-6)
    assert heldout_ce(run) == pytest.approx(values[best], rel=1e-4)


def test_a_figure_that_is_to_rise_is_maximised(cache: Path, tmp_path: Path) -> None:
    """Accuracy and agreement, unlike losses."""
    metric = "acceptance_upper"
    evaluation = dataclasses.replace(EVERY_2, keep_best=metric)
    run = config(cache, tmp_path / "run", steps=8, eval=evaluation, optimizer=WILD)
    summary = train_now(run)
    assert summary[metric] == pytest.approx(max(line[metric] for line in lines_of(run)))


def test_a_run_stops_when_patience_is_over(cache: Path, tmp_path: Path) -> None:
    """After that many evaluations without a better one; a rerun knows that it is complete."""
    evaluation = dataclasses.replace(EVERY_2, patience=3)
    run = config(cache, tmp_path / "run", steps=500, eval=evaluation, optimizer=WILD)
    summary = train_now(run)
    assert summary["steps"] < 500
    assert summary["steps"] == summary["best_step"] + 2 * 3
    assert [line["step"] for line in lines_of(run)] == list(range(2, summary["steps"] + 1, 2))
    assert train_now(run) == summary


def test_a_resumed_run_keeps_the_best_so_far(cache: Path, tmp_path: Path) -> None:
    """Interrupted behind its best, it ends with the student of an undisturbed run."""
    # Whoever follows this random teacher unlearns to predict the text: the best comes early.
    whole = config(cache, tmp_path / "whole", steps=60, eval=EVERY_2, loss=LossConfig(kind="rkl"))
    whole = dataclasses.replace(whole, optimizer=OptimizerConfig(lr=0.05, schedule="constant"))
    part = dataclasses.replace(whole, output=str(tmp_path / "part"), save_every_steps=7)
    expected = train_now(whole)
    metrics = Path(part.output) / "metrics.jsonl"

    def interrupt() -> None:
        while not metrics.exists() or f'"step": {expected["best_step"] + 4}' not in (
            metrics.read_text()
        ):
            time.sleep(0.003)
        os.kill(os.getpid(), signal.SIGINT)

    assert expected["best_step"] < 50
    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        train_now(part)
    thread.join()
    found = train_now(part)
    assert found["best_step"] == expected["best_step"]
    assert found["heldout_ce"] == expected["heldout_ce"]
    ours, theirs = (
        AutoModelForCausalLM.from_pretrained(Path(run.output) / "student").state_dict()
        for run in (part, whole)
    )
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_best_of_nothing_is_refused() -> None:
    """A figure that is not measured, patience without a figure, a best of one evaluation."""
    with pytest.raises(ValueError, match="not among the metrics"):
        EvalConfig(heldout_fraction=0.1, every_steps=1, keep_best="accuracy")
    with pytest.raises(ValueError, match="there are none"):
        EvalConfig(keep_best="heldout_ce")
    with pytest.raises(ValueError, match=r"rouge1.*not among"):
        EvalConfig(heldout_fraction=0.1, every_steps=1, keep_best="rouge1")
    with pytest.raises(ValueError, match=r"needs eval\.keep_best"):
        EvalConfig(heldout_fraction=0.1, every_steps=1, patience=2)
    with pytest.raises(ValueError, match="no effect without"):
        EvalConfig(heldout_fraction=0.1, keep_best="heldout_ce")


def test_the_best_of_a_dead_run_is_not_the_next_ones(cache: Path, tmp_path: Path) -> None:
    """A run without a checkpoint begins anew, whatever weights another config left as the best."""
    run = config(cache, tmp_path / "run", eval=EVERY_2, steps=4)
    train_now(dataclasses.replace(run, output=str(tmp_path / "other")))
    left = tmp_path / "run/best"
    left.mkdir(parents=True)
    (left / "best.json").write_text(json.dumps({"step": 3, "figures": {"heldout_ce": 0.0}}))
    (left / "weights.pt").write_bytes(b"of another run")
    summary, expected = train_now(run), json.loads((tmp_path / "other/summary.json").read_text())
    assert summary["best_step"] == expected["best_step"] != 3
    assert summary["heldout_ce"] == expected["heldout_ce"]
