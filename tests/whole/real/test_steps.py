"""The steps of examples/real: done once, gone on with, measured; and its text."""

import json
from pathlib import Path

import pytest

from examples.real.docstrings import is_heldout, write
from examples.real.steps import StepFailed, Steps

COUNT = "import pathlib, sys; p = pathlib.Path(sys.argv[1]); p.open('a').write('x')"


def test_a_step_that_is_done_is_not_done_again(tmp_path: Path) -> None:
    """Nor by another run; with other arguments it is."""
    marks = tmp_path / "marks"
    for _ in range(2):
        Steps(tmp_path / "steps.json").run("count", "-c", COUNT, marks)
    assert marks.read_text() == "x"
    Steps(tmp_path / "steps.json").run("count", "-c", COUNT, marks, "more")
    assert marks.read_text() == "xx"


def test_a_step_that_failed_is_done_again_and_costs_add_up(tmp_path: Path) -> None:
    """The error has the exit code; wall time and CPU time are those of both runs."""
    script = (
        "import pathlib, sys, time; p = pathlib.Path(sys.argv[1]); time.sleep(0.2);"
        " sys.exit(0) if p.exists() else (p.touch(), sys.exit(3))"
    )
    steps = Steps(tmp_path / "steps.json")
    with pytest.raises(StepFailed, match=r"'try' ended with exit code 3") as caught:
        steps.run("try", "-c", script, tmp_path / "there")
    assert caught.value.code == 3
    again = Steps(tmp_path / "steps.json")
    again.run("try", "-c", script, tmp_path / "there")
    cost = again.costs["try"]
    assert (cost.is_done, cost.runs) == (True, 2)
    assert cost.seconds > 0.4
    assert cost.cpu_seconds > 0
    assert cost.peak_mb > 1


@pytest.mark.parametrize("script", ["sys.exit(130)", "os.kill(os.getpid(), 2); time.sleep(9)"])
def test_an_interrupted_step_interrupts_the_run(tmp_path: Path, script: str) -> None:
    """Whether it ends by itself with 130 or by the signal; it is not done."""
    steps = Steps(tmp_path / "steps.json")
    with pytest.raises(KeyboardInterrupt):
        steps.run(
            "stop",
            *("-c", f"import os, signal, sys, time; signal.signal(2, signal.SIG_DFL); {script}"),
        )
    assert not Steps(tmp_path / "steps.json").costs["stop"].is_done


def test_the_text_is_split_by_module_and_the_same_each_time(tmp_path: Path) -> None:
    """No module has docstrings on both sides; every record has a text of some length."""
    for name in ("one", "two"):
        for heldout in (False, True):
            write(tmp_path / name / f"{heldout}.jsonl", heldout=heldout, limit=30)
    for heldout in (False, True):
        one, two = (tmp_path / name / f"{heldout}.jsonl" for name in ("one", "two"))
        assert one.read_text() == two.read_text()
        records = [json.loads(line) for line in one.read_text().splitlines()]
        assert len(records) == len({record["id"] for record in records}) == 30
        for record in records:
            assert is_heldout(record["id"].split("-", 1)[1]) == heldout
            assert len(record["text"]) >= 500
