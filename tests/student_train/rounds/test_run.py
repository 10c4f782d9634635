"""Rounds end to end, killed and gone on with, and what stops them."""

import contextlib
import dataclasses
import functools
import json
import os
import random
import re
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from decant.schemas import FormatError
from decant.storage import Busy, CacheReader, Store
from decant.student_train.rounds.config import RoundsConfig
from decant.student_train.rounds.places import Places
from decant.student_train.rounds.processes import PhaseFailed
from decant.student_train.rounds.records import Round
from decant.student_train.rounds.rehearse import rehearse
from decant.student_train.rounds.run import run_rounds
from tests.support import models
from tests.support.commands import command, end_before
from tests.support.dumps import rows
from tests.support.rounds import Forked, rounds_config, save_prompts
from tests.support.services import ServedTeacher, wait_for
from tests.support.trainings import weights


@pytest.fixture(scope="module")
def student_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student of the teacher's tokenizer. Never write to it."""
    path = tmp_path_factory.mktemp("student")
    models.save_teacher(path, seed=5, num_hidden_layers=1)
    return path


@pytest.fixture(scope="module")
def prompts_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few prompts."""
    return save_prompts(tmp_path_factory.mktemp("prompts") / "prompts.jsonl")


@pytest.fixture(scope="module")
def whole(
    teacher_path: Path,
    student_path: Path,
    prompts_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[RoundsConfig, list[Round]]:
    """Two rounds that nothing happened to. Never write to their output."""
    output = tmp_path_factory.mktemp("whole") / "out"
    config = rounds_config(output, teacher_path, student_path, prompts_path, plots=True)
    start = Forked()
    records = run_rounds(config, start)
    assert start.commands == ["dump", "train", "dump", "train"]
    return config, records


@pytest.fixture
def config(whole: tuple[RoundsConfig, list[Round]], tmp_path: Path) -> RoundsConfig:
    """The same into an output that is not there yet."""
    return dataclasses.replace(whole[0], output=str(tmp_path / "out"), plots=False)


PHASE_STEPS = 12
"""Of `end_before`, that any phase takes at least."""


def same(config: RoundsConfig, whole: tuple[RoundsConfig, list[Round]]) -> bool:
    """Whether all caches and the last student are those of the undisturbed rounds."""
    pairs = [
        (Places(Path(config.output), number), Places(Path(whole[0].output), number))
        for number in (1, 2)
    ]
    ours, theirs = (weights(place.training) for place in pairs[1])
    return (
        all(rows(our.cache) == rows(their.cache) for our, their in pairs)
        and ours.keys() == theirs.keys()
        and all((ours[name] == theirs[name]).all() for name in ours)
    )


def test_each_round_trains_the_student_that_answered(
    whole: tuple[RoundsConfig, list[Round]], student_path: Path
) -> None:
    """Its cache says who answered; older caches stay in the mixture with less weight."""
    config, records = whole
    output = Path(config.output)
    assert [record.number for record in records] == [1, 2]
    assert [record.mixture for record in records] == [{}, {"1": 0.5}]
    samplers = [student_path, output / "round-001/training/student"]
    for record, sampler in zip(records, samplers, strict=True):
        manifest = CacheReader(Places(output, record.number).cache).manifest
        assert manifest.source["sampler"]["path"] == str(sampler)
        assert record.sampler == manifest.source["sampler"]
        assert record.targets == manifest.totals.targets > 0
    fingerprints = {record.sampler["fingerprint"] for record in records}
    assert len(fingerprints) == 2
    assert (output / "student").resolve() == (output / "round-002/training/student").resolve()
    lines = [json.loads(line) for line in (output / "rounds.jsonl").read_text().splitlines()]
    assert [line["round"] for line in lines] == [1, 2]
    assert (output / "rounds.png").stat().st_size > 1000
    assert not list(output.glob("round-*/training/checkpoints"))


def test_a_rehearsal_tells_what_a_round_costs(config: RoundsConfig) -> None:
    """Answers, bytes, and the training tried on a few; nothing stays, and nothing is started."""

    def ask(words: Sequence[str]) -> str:
        result = command(words[2], *words[3:])
        assert result.code == 0, result.stderr
        return result.stdout

    report = rehearse(dataclasses.replace(config, rounds=3, keep_rounds=2), ask)
    assert re.search(r"^rounds +3, each:\nanswers +about 12, 1 to a prompt$", report, re.M), report
    assert re.search(r"^ +[0-9.]+ MB of caches on disk, of 2 rounds$", report, re.M), report
    assert f"{Places(Path(config.output), 1).cache}\n" in report
    assert "steps        4 of 4 sequences" in report and "epoch" not in report
    assert not Path(config.output).exists()


def test_done_rounds_are_not_done_again(
    whole: tuple[RoundsConfig, list[Round]], tmp_path: Path
) -> None:
    """The same command starts nothing; more rounds go on from the last student."""
    config = dataclasses.replace(whole[0], output=str(tmp_path / "out"), plots=False)
    shutil.copytree(whole[0].output, config.output, symlinks=True)
    start = Forked()
    assert run_rounds(config, start) == whole[1] and start.commands == []
    more = dataclasses.replace(config, rounds=3, keep_rounds=2)
    records = run_rounds(more, start)
    assert start.commands == ["dump", "train"] and len(records) == 3
    assert records[2].mixture == {"2": 0.5}
    assert not Places(Path(config.output), 1).cache.exists()
    assert not Places(Path(config.output), 1).student.exists()
    assert Places(Path(config.output), 2).student.is_dir()


@pytest.mark.parametrize(
    "seed", [0, *(pytest.param(i, marks=pytest.mark.slow) for i in range(1, 9))]
)
def test_a_killed_command_is_gone_on_with(
    config: RoundsConfig, whole: tuple[RoundsConfig, list[Round]], seed: int
) -> None:
    """SIGKILL in each of the four phases: an error that says so, in the end the same student."""
    random_ = random.Random(seed)
    for phase in ("dump", "train", "dump", "train"):
        kill = functools.partial(end_before, random_.randint(1, PHASE_STEPS), config.output)
        start = Forked(lambda number, _, kill=kill: kill if number == 1 else None)
        with pytest.raises(PhaseFailed) as failed:
            run_rounds(config, start)
        said = f"{failed.value} {start.said}"
        assert re.search(rf"the {phase}.* was killed by SIGKILL.*goes on", said), said
        (killed,) = start.commands
        assert killed == phase

        def stop_after(number: int, _: str) -> Callable[[], None] | None:
            return _fail if number == 2 else None

        with contextlib.suppress(PhaseFailed):
            run_rounds(config, Forked(stop_after))
    assert same(config, whole)


DRIVER_STEPS = 22
"""Of `end_before`, that the driver takes in the folder of a round; a bit more."""


@pytest.mark.parametrize(
    "seed", [0, *(pytest.param(i, marks=pytest.mark.slow) for i in range(1, 9))]
)
def test_a_killed_driver_goes_on(
    config: RoundsConfig, whole: tuple[RoundsConfig, list[Round]], tmp_path: Path, seed: int
) -> None:
    """SIGKILL before any of its own steps on the disk, and again: the same student in the end."""
    random_ = random.Random(seed)
    file = tmp_path / "rounds.json"
    file.write_text(json.dumps(dataclasses.asdict(config)))
    job = ("tests.support.rounds_job", str(file))
    for number in (1, 2):
        prefix = f"{config.output}/round-{number:03}/."
        first = functools.partial(end_before, random_.randint(1, DRIVER_STEPS), prefix)
        result = command(*job, first=first)
        assert result.code in (0, -signal.SIGKILL), result.stderr
    result = command(*job)
    assert result.code == 0, result.stderr
    assert same(config, whole)
    assert not list(Path(config.output).rglob(".*.tmp"))


def test_an_interrupt_is_passed_on(config: RoundsConfig, tmp_path: Path) -> None:
    """The command that runs ends as after a Ctrl-C of its own, and the rounds with it."""
    sent: list[int] = []

    class Interrupted:
        def __init__(self, words: Sequence[str]) -> None:
            self.waits = 0

        def wait(self) -> int:
            self.waits += 1
            if self.waits < 3:
                raise KeyboardInterrupt
            return -9

        def send_signal(self, sig: int, /) -> None:
            sent.append(sig)

    with pytest.raises(KeyboardInterrupt):
        run_rounds(config, Interrupted)
    assert sent == [signal.SIGINT, signal.SIGKILL]


def test_two_drivers_exclude_each_other(config: RoundsConfig) -> None:
    """The second one says that the output is being written."""
    with Store(config.output).lock(), pytest.raises(Busy, match="written by another process"):
        run_rounds(config, Forked())


def test_a_phase_waits_for_what_a_killed_driver_left(config: RoundsConfig, tmp_path: Path) -> None:
    """An older dump that is still ending is waited for, not failed on."""
    cache = Places(Path(config.output), 1).cache
    cache.mkdir(parents=True)
    held, released = threading.Event(), threading.Event()

    def hold() -> None:
        with Store(cache).lock():
            held.set()
            released.wait(60)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait(60)
    started: list[bool] = []

    def start(words: Sequence[str]) -> Any:
        started.append(released.is_set())
        raise OSError("no more")

    threading.Timer(0.2, released.set).start()
    with pytest.raises(PhaseFailed, match="cannot be started"):
        run_rounds(config, start)
    thread.join()
    assert started == [True]


# What stops them.


def test_a_student_that_changed_since_is_refused(
    config: RoundsConfig, student_path: Path, tmp_path: Path
) -> None:
    """Between the answers and the training, by its files; README.md may change."""
    student = tmp_path / "student"
    shutil.copytree(student_path, student)
    config = dataclasses.replace(
        config, rounds=1, train={**config.train, "student": {"path": str(student)}}
    )
    stop = Forked(lambda number, name: _fail if name == "train" else None)
    with pytest.raises(PhaseFailed):
        run_rounds(config, stop)
    (student / "README.md").write_text("other words")
    changed = models.build_model(seed=6, num_hidden_layers=1)
    changed.save_pretrained(student)
    start = Forked()
    with pytest.raises(ValueError, match=r"student .* changed since round 1 began .*put it back"):
        run_rounds(config, start)
    assert start.commands == []
    shutil.copytree(student_path, student, dirs_exist_ok=True)
    run_rounds(config, start)
    assert start.commands == ["train"]


def test_a_student_that_never_answered_may_be_another_one(
    config: RoundsConfig, student_path: Path, tmp_path: Path
) -> None:
    """One without a tokenizer is refused; mended, or another, the same command goes on with it."""
    student = tmp_path / "student"
    models.build_model(seed=6, num_hidden_layers=1).save_pretrained(student)
    config = dataclasses.replace(
        config, rounds=1, train={**config.train, "student": {"path": str(student)}}
    )
    start = Forked(lambda number, name: _fail if name == "train" else None)
    with pytest.raises(PhaseFailed):
        run_rounds(config, start)
    assert "its tokenizer must lie beside its weights" in start.said[0]
    models.build_tokenizer().save_pretrained(student)
    with pytest.raises(PhaseFailed, match="the training of round 1"):
        run_rounds(config, start)
    assert start.commands == ["dump", "dump", "train"]
    other = dataclasses.replace(
        config, train={**config.train, "student": {"path": str(student_path)}}
    )
    with pytest.raises(ValueError, match=rf"began with the student {student}, .* {student_path} n"):
        run_rounds(other, start)


def test_a_round_without_an_accepted_sample_is_an_error(
    config: RoundsConfig, tmp_path: Path
) -> None:
    """A teacher that gives NaN rejects all answers: its dump stops early and says why."""
    teacher = tmp_path / "nan"
    model = models.save_teacher(teacher)
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    model.save_pretrained(teacher)
    dump = {**config.dump, "teacher": {"path": str(teacher), "dtype": "float32"}}
    dump["max_rejected"] = 1.0
    config = dataclasses.replace(config, dump=dump)
    start = Forked()
    with pytest.raises(PhaseFailed, match="the dump of round 1 of 2 ended with code 2"):
        run_rounds(config, start)
    assert start.commands == ["dump"] and "the teacher scores none of" in start.said[0]


def test_a_command_that_fails_is_named(config: RoundsConfig) -> None:
    """Its message stands above, the error says which phase of which round it was."""
    source = {**config.dump["source"], "path": "nowhere.jsonl"}
    start = Forked()
    bad = dataclasses.replace(config, dump={**config.dump, "source": source})
    with pytest.raises(PhaseFailed, match="the dump of round 1 of 2 ended with code 2"):
        run_rounds(bad, start)
    assert "nowhere.jsonl" in start.said[0]


def test_a_launcher_that_fails_says_nothing_of_the_data(config: RoundsConfig) -> None:
    """Its code 1 is that of any failure of its processes, ours would be damaged data."""
    config = dataclasses.replace(config, rounds=1, launcher="accelerate launch")
    start = Forked(lambda number, _: functools.partial(sys.exit, 1) if number == 2 else None)

    def through(words: Sequence[str]) -> Any:
        is_launched = words[1] == "launch"
        return start([sys.executable, *words[2:]] if is_launched else words)

    with pytest.raises(PhaseFailed, match="the training of round 1 of 1 ended with code 1"):
        run_rounds(config, through)


def test_a_teacher_that_is_gone_is_gone_on_with(
    config: RoundsConfig,
    teacher_path: Path,
    whole: tuple[RoundsConfig, list[Round]],
    tmp_path: Path,
) -> None:
    """One that goes away in the middle of the rounds is an error; back again, the same rounds."""
    teacher, away = tmp_path / "teacher", tmp_path / "away"
    shutil.copytree(teacher_path, teacher)
    dump = {**config.dump, "teacher": {**config.dump["teacher"], "path": str(teacher)}}
    config = dataclasses.replace(config, dump=dump)
    go_away = functools.partial(os.rename, teacher, away)
    start = Forked(lambda number, _: go_away if number == 3 else None)
    with pytest.raises(PhaseFailed, match="the dump of round 2 of 2 ended with code 2"):
        run_rounds(config, start)
    assert str(teacher) in start.said[2]
    away.rename(teacher)
    again = Forked()
    run_rounds(config, again)
    assert again.commands == ["dump", "train"] and same(config, whole)


def test_a_service_that_is_gone_is_gone_on_with(config: RoundsConfig, teacher_path: Path) -> None:
    """A service that dies once the student has answered: an error; back again, the same round."""
    service = ServedTeacher(teacher_path)
    teacher = {"engine": "http", "endpoints": [service.url], "wait_seconds": 1}
    config = dataclasses.replace(config, rounds=1, dump={**config.dump, "teacher": teacher})
    answers = Places(Path(config.output), 1).cache / "generated"
    start = Forked()

    def lose_teacher(words: Sequence[str]) -> Any:
        process = start(words)
        wait_for(lambda: any(answers.glob("part-*.parquet")))
        process.send_signal(signal.SIGSTOP)
        service.kill()
        process.send_signal(signal.SIGCONT)
        return process

    with pytest.raises(
        PhaseFailed, match=r"the dump of round 1 of 1 ended with code 2.*goes on in"
    ):
        run_rounds(config, lose_teacher)
    assert service.url in start.said[0]
    sampled = {path.name: path.read_bytes() for path in answers.iterdir()}
    service.start(teacher_path)
    (record,) = run_rounds(config, start)
    assert start.commands == ["dump", "dump", "train"] and record.targets > 0
    assert {path.name: path.read_bytes() for path in answers.iterdir()} == sampled
    assert service.stop() == 0


def test_another_config_is_refused(whole: tuple[RoundsConfig, list[Round]], tmp_path: Path) -> None:
    """What differs is listed; rates and steps count for the rounds to come."""
    config, _ = whole
    output = tmp_path / "out"
    shutil.copytree(config.output, output, symlinks=True)
    moved = dataclasses.replace(config, output=str(output), plots=False)
    other = {**moved.train, "loss": {"kind": "fkl"}, "steps": 5}
    with pytest.raises(
        ValueError, match=r"(?s)another config.*train.loss.kind: was 'rkl', is 'fkl'"
    ):
        run_rounds(dataclasses.replace(moved, train=other), Forked())
    run_rounds(dataclasses.replace(moved, train={**moved.train, "steps": 5}), Forked())
    (output / "round-001/round.json").unlink()
    with pytest.raises(FormatError, match=r"round-001/round.json is missing"):
        run_rounds(moved, Forked())


def _fail() -> None:
    raise SystemExit(2)
