"""Machines that fail: what they refuse is one clear line, and the same command again completes.

Errors and kills strike at the n-th call on files, by a preloaded library (`tests/support/faults/`).
CRASH_SEED chooses other calls.
"""

import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from decant.storage import verify
from tests.support.dumps import rows
from tests.support.faults import Fault, Machine, build, compiler
from tests.support.faults.modes import KILLED, MODES, Mode
from tests.support.faults.scenarios import (
    BY_NAME,
    SCENARIOS,
    Given,
    Scenario,
    complaints,
    names_in,
    save_given,
)
from tests.support.faults.trials import Bench, chosen, is_temporary

SEED = int(os.environ.get("CRASH_SEED", "0"))
OF_EACH_MODE, KILLS = 4, 12
"""Trials of a scenario in the slow tests."""
QUICK = (
    ("dump", "full disk"),
    ("dump", "quota"),
    ("generate", "full disk in a write"),
    ("export", "full disk"),
    ("import", "broken disk"),
    ("merge", "quota"),
    ("inspect", "read-only disk"),
    ("train", "full disk"),
)
QUICK_KILLS = ("generate", "migrate", "export", "train")
pytestmark = pytest.mark.xdist_group("unlucky")


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Given:
    """What the commands start from. Never write to it."""
    return save_given(tmp_path_factory.mktemp("given"))


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    """Runs commands, with faults."""
    if compiler() is None:
        pytest.skip("no C compiler (cc, gcc, clang) on Linux here: faults cannot be injected")
    with Machine(build(tmp_path_factory.mktemp("faults"))) as running:
        yield running


@pytest.fixture(scope="module")
def bench(machine: Machine, given: Given, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """Runs scenarios."""
    return Bench(machine, given, tmp_path_factory.mktemp("bench"))


def places(bench: Bench, scenario: Scenario, mode: Mode, trials: int) -> list[int]:
    """At which calls of a scenario a misfortune strikes."""
    known = bench.undisturbed(scenario).calls
    return list(chosen(known, mode.kinds, round(trials * scenario.share), SEED))


def problems(bench: Bench, scenario: Scenario, mode: Mode, trials: int) -> list[str]:
    """What is wrong with how a scenario takes a misfortune, at some of its calls."""
    wrong = []
    for at in places(bench, scenario, mode, trials):
        wrong += bench.problems(scenario, bench.fault(mode.kinds, at, mode.how, **mode.more))
    return wrong


@pytest.mark.parametrize(("name", "mode"), QUICK)
def test_what_a_machine_refuses_is_one_line_and_no_loss(bench: Bench, name: str, mode: str):
    """It names the file and the way out, leaves nothing, and the command again completes."""
    assert problems(bench, BY_NAME[name], MODES[mode], 1) == []


@pytest.mark.parametrize("name", QUICK_KILLS)
def test_what_is_killed_is_completed_by_the_same_command(bench: Bench, name: str):
    """Row for row, with no file more and none less."""
    assert problems(bench, BY_NAME[name], KILLED, 1) == []


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", BY_NAME)
def test_no_refusal_at_any_call_is_a_loss(bench: Bench, name: str, mode: str):
    """Every command that writes, with every misfortune, at calls from its first to its last."""
    assert problems(bench, BY_NAME[name], MODES[mode], OF_EACH_MODE) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", BY_NAME)
def test_no_kill_at_any_call_is_a_loss(bench: Bench, name: str):
    """Every command that writes, killed before calls from its first to its last."""
    assert problems(bench, BY_NAME[name], KILLED, KILLS) == []


@pytest.mark.slow
def test_the_calls_that_fail_are_many(bench: Bench):
    """At least 300 that are refused and 200 before which the command is killed.

    With `-rP` pytest shows the figures, also of those that were tried until here.
    """
    refused = sum(
        len(places(bench, scenario, mode, OF_EACH_MODE))
        for scenario in SCENARIOS
        for mode in MODES.values()
    )
    killed = sum(len(places(bench, scenario, KILLED, KILLS)) for scenario in SCENARIOS)
    print(f"chosen: {refused} refusals, {killed} kills; tried until here: {dict(bench.tried)}")
    assert refused >= 300 and killed >= 200


# Machines that are poor from the start.


def arguments(scenario: Scenario, given: Given, folder: Path) -> list[str]:
    """Of a scenario's command, in a folder that has what it starts from."""
    scenario.before(given, folder)
    return [str(word) for word in scenario.arguments(given, folder)]


POOR = ("dump", "extend", "merge", "train")


@pytest.mark.parametrize("name", POOR)
def test_without_locks_of_the_kernel_lock_files_stand_in(
    bench: Bench, machine: Machine, given: Given, tmp_path: Path, name: str
):
    """As on Lustre: it is said once, the result is the same, and no lock file stays."""
    scenario = BY_NAME[name]
    fault = Fault(under=("/",), kinds=("lock",), at=1, how=errno.ENOSYS, lasting=True)
    result = machine.run(arguments(scenario, given, tmp_path), fault)
    assert result.code == 0, result.stderr
    assert "cannot lock files (Function not implemented)" in result.stderr
    assert scenario.found(tmp_path) == bench.undisturbed(scenario).found
    assert [name for name in names_in(tmp_path) if is_temporary(name)] == []


@pytest.mark.parametrize("name", ["dump", "train"])
def test_a_clock_that_jumps_back_changes_nothing(
    bench: Bench, machine: Machine, given: Given, tmp_path: Path, name: str
):
    """Neither the result, nor any rate or time that is shown."""
    scenario = BY_NAME[name]
    fault = Fault(under=(), kinds=(), clock_back=86_400)
    result = machine.run(arguments(scenario, given, tmp_path), fault)
    assert result.code == 0, result.stderr
    assert scenario.found(tmp_path) == bench.undisturbed(scenario).found
    assert not [word for word in result.stderr.split() if word.startswith("-") and "/s" in word]


@pytest.mark.parametrize("name", POOR)
def test_few_open_files_are_enough(machine: Machine, given: Given, tmp_path: Path, name: str):
    """64 of them."""
    scenario = BY_NAME[name]
    result = machine.run(arguments(scenario, given, tmp_path), limits={"NOFILE": 64})
    assert result.code == 0, result.stderr
    scenario.found(tmp_path)


@pytest.mark.parametrize("files", [4, 8, 12])
def test_too_few_open_files_are_one_line(
    machine: Machine, given: Given, tmp_path: Path, files: int
):
    """Which says how many there may be, and leaves nothing."""
    scenario = BY_NAME["dump"]
    result = machine.run(arguments(scenario, given, tmp_path), limits={"NOFILE": files})
    if result.code:
        assert complaints(result) == [] and "Too many open files" in result.stderr, result.stderr
        assert f"may have {files} files open" in result.stderr
    assert [name for name in names_in(tmp_path) if is_temporary(name)] == []


@pytest.mark.parametrize(
    ("name", "megabytes"),
    [
        ("inspect", 2),
        ("dump", 300),
        *(
            pytest.param(name, megabytes, marks=pytest.mark.slow)
            for name in ("dump", "inspect", "train")
            for megabytes in (70, 100, 200, 400, 800)
        ),
    ],
)
def test_too_little_memory_is_one_line(
    machine: Machine, given: Given, tmp_path: Path, name: str, megabytes: int
):
    """It has so much more than when it begins; what ends it says that memory does."""
    scenario = BY_NAME[name]
    limits = {"AS": machine.memory() + (megabytes << 20)}
    result = machine.run(arguments(scenario, given, tmp_path), limits=limits)
    if result.code:
        assert result.code == 2 and "Traceback" not in result.stderr, result
        assert "memory" in result.stderr.lower() or "thread" in result.stderr, result.stderr
        assert machine.run(arguments_again(scenario, given, tmp_path)).code == 0
    scenario.found(tmp_path)


def arguments_again(scenario: Scenario, given: Given, folder: Path) -> list[str]:
    """The same command in the same folder."""
    return [str(word) for word in scenario.arguments(given, folder)]


NOWHERE: dict[str, str | None] = {"HOME": None, "TMPDIR": None, "XDG_CACHE_HOME": None}


@pytest.mark.parametrize("name", ["dump", "inspect", "train"])
@pytest.mark.parametrize("where", [NOWHERE, {"HOME": "/proc/nowhere", "TMPDIR": "/proc/nowhere"}])
def test_neither_home_nor_tmpdir_is_needed(
    machine: Machine, given: Given, tmp_path: Path, name: str, where: dict[str, str | None]
):
    """Unset, or naming what is not there."""
    scenario = BY_NAME[name]
    result = machine.run(arguments(scenario, given, tmp_path), environment=where)
    assert result.code == 0, result.stderr
    scenario.found(tmp_path)


READING = (
    ("verify",),
    ("head",),
    ("inspect",),
    ("export", "OUT"),
    ("subset", "OUT", "--share", "0.5"),
)


@pytest.mark.parametrize("words", READING, ids=lambda words: words[0])
def test_a_read_only_cache_can_be_read(
    machine: Machine, given: Given, tmp_path: Path, words: tuple[str, ...]
):
    """Nothing is kept in it, and nothing is said of that."""
    shutil.copytree(given.cache, tmp_path / "cache")
    kinds = ("create", "mkdir", "rename", "link", "unlink", "write", "mode", "lock")
    fault = Fault(
        under=(str(tmp_path / "cache"),), kinds=kinds, at=1, how=errno.EROFS, lasting=True
    )
    command, *rest = (str(tmp_path / "out") if word == "OUT" else word for word in words)
    result = machine.run([command, str(tmp_path / "cache"), *rest], fault)
    assert result.code == 0 and "Traceback" not in result.stderr, result
    assert verify(tmp_path / "cache").ok


UNREADABLE = ("texts.jsonl", "teacher", "cache")


@pytest.mark.parametrize("what", UNREADABLE)
@pytest.mark.parametrize(
    "at", [1, *(pytest.param(at, marks=pytest.mark.slow) for at in (2, 3, 5, 9))]
)
def test_what_cannot_be_read_is_named(
    machine: Machine, given: Given, tmp_path: Path, what: str, at: int
):
    """A disk that fails under the source, the teacher or a cache."""
    scenario = BY_NAME["export" if what == "cache" else "dump"]
    under = str(given.folder / what)
    fault = Fault(under=(under,), kinds=("open", "read", "map"), at=at, how=errno.EIO, lasting=True)
    result = machine.run(arguments(scenario, given, tmp_path), fault)
    if result.code:
        assert complaints(result) == [] and under in result.stderr, result.stderr
        assert result.code == 2, result.stderr
    assert machine.run(arguments_again(scenario, given, tmp_path)).code == 0


# Paths as nobody would choose them.

PATHS = (
    "with spaces",
    "a::b",
    "line\nbreak",
    "100%25 of #1? [x]",
    "*{a,b}~",
    b"not \xff utf-8".decode(errors="surrogateescape"),
    "x" * 250,
    "x" * 300,
    "/".join(["d" * 200] * 25),
    "-dash",
    "ünï ☃",
)


def crossed(*names: str) -> list[Any]:
    """Every name with every path; all but one name for each path are slow."""
    return [
        pytest.param(
            name,
            path,
            id=f"{name}-{ascii(path)[:24]}",
            marks=[] if (i - j) % len(names) == 0 else pytest.mark.slow,
        )
        for i, path in enumerate(PATHS)
        for j, name in enumerate(names)
    ]


@pytest.mark.parametrize(
    ("name", "path"), crossed("export", "merge", "import", "inspect-html", "dump", "train")
)
def test_an_output_of_any_name_works_or_is_refused(
    machine: Machine, given: Given, tmp_path: Path, name: str, path: str
):
    """By one line, with nothing left."""
    scenario = BY_NAME[name]
    result = machine.run(arguments(scenario, given, tmp_path / path))
    if result.code:
        assert complaints(result) == [], result.stderr
        assert files_in(tmp_path) == []
    else:
        scenario.found(tmp_path / path)
        assert [name for name in names_in(tmp_path) if name.endswith(".tmp")] == []


@pytest.mark.parametrize(("what", "path"), crossed("cache", "texts.jsonl", "dump.yaml", "teacher"))
def test_an_input_of_any_name_works_or_is_refused(
    machine: Machine, given: Given, tmp_path: Path, what: str, path: str
):
    """By one line: caches, teachers, sources and configurations."""
    source = given.config if what == "dump.yaml" else given.folder / what
    place = tmp_path / (path + source.suffix)
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(source, place) if source.is_dir() else shutil.copyfile(source, place)
    except OSError:
        pass  # no such path can be: it is named all the same
    out = str(tmp_path / "out")
    plain = ["dump", "--config", str(given.config), "--output", out]
    words = {
        "cache": ["export", str(place), out],
        "teacher": [*plain, "--teacher.path", str(place)],
        "texts.jsonl": [*plain, "--source.path", str(place)],
        "dump.yaml": ["dump", "--config", str(place), "--output", out],
    }[what]
    result = machine.run(words)
    if result.code:
        assert complaints(result) == [], result.stderr
        assert not Path(out).exists()
    elif what != "cache":
        assert rows(out) == rows(given.cache)


def files_in(folder: Path) -> list[str]:
    """Of all kinds, without the folders that they are in."""
    return [name for name in names_in(folder) if not (folder / name).is_dir()]


def test_every_scenario_has_a_name_of_its_own():
    """They are known by it."""
    assert len(BY_NAME) == len(SCENARIOS)
