"""What a run says: lines off a terminal, a bar that fits on one, a table or JSON at the end."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import pty
import re
import shutil
import struct
import sys
import termios
from pathlib import Path

import pytest
import yaml
from accelerate import Accelerator

from decant.student_train import EvalConfig, TrainConfig, train
from decant.student_train.__main__ import main
from decant.student_train.outputs.metrics import Recent
from decant.student_train.outputs.progress import Progress, duration
from tests.support.trainings import STUDENT, config

EVALUATED = EvalConfig(heldout_fraction=0.3, every_steps=3, keep_best="heldout_ce")


def said(caplog: pytest.LogCaptureFixture, pattern: str) -> list[str]:
    """The lines that the run of the fixture logged and that a pattern is found in."""
    lines = [record.getMessage() for record in caplog.get_records("setup")]
    return [line for line in lines if re.search(pattern, line)]


@pytest.fixture
def run(cache: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> TrainConfig:
    """A run with evaluations and checkpoints, which has been trained."""
    caplog.set_level("INFO")
    options = {"log_every_steps": 2, "save_every_steps": 4, "steps": 6}
    run = config(cache, tmp_path / "run", eval=EVALUATED, **options)
    train(run)
    return run


def test_a_run_off_a_terminal_says_where_it_is(
    run: TrainConfig, caplog: pytest.LogCaptureFixture
) -> None:
    """A line per `log_every_steps`, one per evaluation, step 0 included, one per checkpoint."""
    assert [line[:9] for line in said(caplog, "loss .*tokens/s")] == [
        "step 2/6:",
        "step 4/6:",
        "step 6/6:",
    ]
    for line in said(caplog, "loss .*tokens/s"):
        assert re.fullmatch(
            r"step \d/6: loss [\d.]+ \(kd [\d.]+, ce [\d.]+\), lr [\d.e-]+, [\d,]+ tokens/s, "
            r"[\d.]+ GB, \d+:\d\d:\d\d left",
            line,
        ), line
    evaluations = said(caplog, r"held-out CE [\d.]+ \(teacher [\d.]+\), divergence")
    assert [line[5] for line in evaluations[:3]] == ["0", "3", "6"]
    assert "before training" in evaluations[0] and "best at step" in evaluations[1]
    assert [line[5] for line in said(caplog, "checkpoint .*step-0000000[46]")] == ["4", "6"]


def test_step_0_is_a_line_of_the_metrics(run: TrainConfig) -> None:
    """So that one sees how far the student came; the summary has it too."""
    lines = [json.loads(line) for line in (Path(run.output) / "metrics.jsonl").open()]
    assert lines[0].pop("step") == 0
    summary = json.loads((Path(run.output) / "summary.json").read_text())
    assert lines[0] == summary["before"] and lines[0]["heldout_ce"] > 0
    assert [line["step"] for line in lines[1:] if "heldout_ce" in line] == [3, 6]


def test_a_resumed_run_knows_where_it_began(run: TrainConfig) -> None:
    """Step 0 is not evaluated again, and is there once."""
    output = Path(run.output)
    before = json.loads((output / "summary.json").read_text())["before"]
    (output / "summary.json").unlink()
    shutil.rmtree(output / "checkpoints/step-00000006")
    summary = train(run)
    assert summary["before"] == before and summary["resumed_at"] == 4
    steps = [json.loads(line)["step"] for line in (output / "metrics.jsonl").open()]
    assert steps.count(0) == 1


def test_a_finished_run_says_so(run: TrainConfig, caplog: pytest.LogCaptureFixture) -> None:
    """Where, and what to do to train again; nothing else happens."""
    caplog.clear()
    train(run)
    (line,) = caplog.messages
    assert line.startswith(f"{run.output} is complete already: nothing is trained")


def test_a_changed_option_is_named_alone(run: TrainConfig) -> None:
    """Not the group that it is in."""
    changed = dataclasses.replace(
        run,
        loss=dataclasses.replace(run.loss, kind="akl", options={"mu": 0.4}),
        optimizer=dataclasses.replace(run.optimizer, betas=[0.9, 0.99]),
    )
    with pytest.raises(ValueError, match="is of another config") as refusal:
        train(changed)
    differing = str(refusal.value).splitlines()[1:-1]
    assert differing == [
        "  loss.kind: was 'fkl', this run gives 'akl'",
        "  loss.options.mu: was None, this run gives 0.4",
        "  optimizer.betas: was [0.9, 0.95], this run gives [0.9, 0.99]",
    ]


def test_a_size_of_evaluation_batches_may_change(run: TrainConfig) -> None:
    """A run whose evaluation had no memory left can go on."""
    smaller = dataclasses.replace(run, eval=dataclasses.replace(run.eval, batch_size=2))
    assert train(smaller)["steps"] == 6


def test_the_command_ends_with_a_table_or_with_json(
    cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """On stdout, and nothing else there; the table has before, after and the teacher."""
    fields = {
        "cache": str(cache),
        "output": str(tmp_path / "run"),
        "student": {"config": STUDENT},
        "steps": 3,
        "optimizer": {"lr": 0.01},
        "eval": {"heldout_fraction": 0.3},
    }
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(fields))
    assert main(["--config", str(tmp_path / "train.yaml")]) == 0
    table = capsys.readouterr().out
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert table.startswith(f"student  {tmp_path}/run/student\nsteps    3 (")
    numbers = re.search(r"^cross-entropy, nats +([\d.]+) +([\d.]+) +([\d.]+)$", table, re.MULTILINE)
    assert numbers is not None
    expected = (summary["before"]["heldout_ce"], summary["heldout_ce"], summary["teacher_ce"])
    assert [float(n) for n in numbers.groups()] == pytest.approx(expected, abs=1e-4)
    assert max(map(len, table.splitlines()[1:])) <= 80
    assert main(["--config", str(tmp_path / "train.yaml"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == {k: v for k, v in summary.items() if k not in ("config", "batches")}


def test_a_run_without_heldout_data_says_what_is_missing(
    cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The table would be empty."""
    arguments = ["--cache", str(cache), "--output", str(tmp_path / "run"), "--steps", "1"]
    assert main([*arguments, "--student.config", json.dumps(STUDENT)]) == 0
    assert "eval.heldout_fraction" in capsys.readouterr().out.splitlines()[-1]


def test_the_bar_fits_into_80_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    """With large numbers too, and events are lines above it."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    with os.fdopen(theirs, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        recent = Recent()
        recent.add(1e6, 2e6, 0.0, 1.0)
        with Progress(100_000, 0, Accelerator(cpu=True)) as progress:
            for _ in range(3):
                progress.stepped(12.345, recent, 1.0)
                progress.bar.refresh()
            progress.say(3, "checkpoint x")
            progress.logged(3, {}, recent)
        monkeypatch.undo()
    shown = ""
    with contextlib.suppress(OSError):  # that the other end is closed
        while part := os.read(ours, 4096):
            shown += part.decode()
    os.close(ours)
    assert re.search(r"3/100000 \|.*\| .* left, loss 12.345, 2,000,000 tokens/s", shown)
    assert re.search(r"step       3/100,000: checkpoint x\r?\n", shown)
    assert max(len(part) for part in re.split(r"[\r\n]", shown)) <= 80


def test_durations_are_hours_minutes_and_seconds() -> None:
    """Rounded to seconds, beyond a day too."""
    assert [duration(s) for s in (0.4, 59.6, 3725, 100_000)] == [
        "0:00:00",
        "0:01:00",
        "1:02:05",
        "27:46:40",
    ]
