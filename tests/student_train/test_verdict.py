"""A finished student is evaluated without training: the same numbers as a training's own."""

import json
import re
from pathlib import Path

import pytest

from decant.student_train import EvalConfig, LossConfig, StudentConfig, train
from decant.student_train.verdict import evaluate_student
from tests.support.commands import command
from tests.support.trainings import config

METRICS = (
    *("heldout_ce", "heldout_perplexity", "heldout_divergence", "teacher_ce", "ece"),
    *("top1_accuracy", "top1_agreement", "acceptance_lower", "acceptance_upper"),
)


@pytest.fixture(scope="module")
def run(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of a training that held a fifth of the cache out."""
    output = tmp_path_factory.mktemp("run") / "run"
    train(config(cache, output, steps=2, eval=EvalConfig(heldout_fraction=0.2, batch_size=5)))
    return output


def test_the_numbers_are_those_of_the_training(cache: Path, run: Path) -> None:
    """On the part that the training held out, with the same divergence, in other batches."""
    summary = json.loads((run / "summary.json").read_text())
    verdict = evaluate_student(
        StudentConfig(path=str(run / "student")), str(cache), batch_size=3, heldout_fraction=0.2
    )
    for name in METRICS:
        assert verdict.metrics[name] == pytest.approx(summary[name], rel=1e-5), name
    hot = evaluate_student(
        StudentConfig(path=str(run / "student")), str(cache), LossConfig(kind="rkl", temperature=2)
    )
    assert (hot.kind, hot.temperature) == ("rkl", 2.0) and hot.sequences > verdict.sequences


def test_the_command(cache: Path, run: Path) -> None:
    """The output folder of a training stands for its student; text and JSON say the same."""
    words = ("evaluate", "--student", str(run), "--cache", str(cache))
    done = command("decant", *words, "--json")
    assert done.code == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["student"] == str(run / "student") and set(METRICS) < set(found["metrics"])
    text = command("decant", *words, "--batch-size", "7").stdout
    lines = dict(re.findall(r"^(\S.*?)  +(.*)$", text, re.MULTILINE))
    metrics = found["metrics"]
    assert lines["cross-entropy"].startswith(f"{metrics['heldout_ce']:.4f} nats")
    assert lines["divergence"] == f"{metrics['heldout_divergence']:.4f} nats (fkl, T=1)"
    assert lines["acceptance"].startswith(f"{metrics['acceptance_lower']:.4f} to ")


def test_what_cannot_be_evaluated_is_one_line(cache: Path, run: Path, tmp_path: Path) -> None:
    """Exit code 2: no cache, no student, a temperature or kind that is not there."""
    words = ["evaluate", "--student", str(run), "--cache"]
    for more, said in (
        ([str(tmp_path / "absent")], "no such directory"),
        ([str(cache), "--temperature", "3"], "temperature"),
        ([str(cache), "--kind", "fk"], "loss.kind 'fk' is not one of"),
        ([str(cache), "--student", str(tmp_path / "none")], "cannot be loaded"),
    ):
        done = command("decant", *words, *more)
        assert done.code == 2 and said in done.stderr.splitlines()[0], done.stderr
