"""Locks of folders and files, where the kernel has them and where it has not."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from decant.storage import Busy, Store, verify
from tests.support import ROOT

NO_FLOCK = "#include <errno.h>\nint flock(int fd, int how) { errno = ENOSYS; return -1; }\n"
"""What the kernel says of a file system that cannot lock."""

HOLD = """
import sys, time
from pathlib import Path
from decant.storage import Busy, Store
store, how, seconds = Store(sys.argv[1]), sys.argv[2], float(sys.argv[3])
try:
    if how == "claim":
        with store.claim("file") as ours:
            print("held" if ours else "busy", flush=True)
            time.sleep(seconds if ours else 0)
    else:
        with store.lock(shared=how == "shared", wait=how == "wait"):
            print("held", flush=True)
            time.sleep(seconds)
except Busy:
    print("busy", flush=True)
"""


@pytest.fixture(scope="session")
def without_flock(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment in which flock fails as on such a file system."""
    compiler = shutil.which("cc")
    if not compiler or not sys.platform.startswith("linux"):
        pytest.skip("needs a C compiler and a loader that takes LD_PRELOAD")
    folder = tmp_path_factory.mktemp("preload")
    (folder / "no_flock.c").write_text(NO_FLOCK)
    library = folder / "no_flock.so"
    subprocess.run(
        [compiler, "-shared", "-fPIC", "-o", str(library), str(folder / "no_flock.c")], check=True
    )
    return {**os.environ, "LD_PRELOAD": str(library), "OMP_NUM_THREADS": "1"}


@pytest.fixture(params=["flock", "lock files"])
def environment(request: pytest.FixtureRequest) -> dict[str, str]:
    if request.param == "flock":
        return dict(os.environ)
    found: dict[str, str] = request.getfixturevalue("without_flock")
    return found


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "here").mkdir()
    (tmp_path / "here/file").write_text("x")
    return tmp_path / "here"


class Holders:
    """Processes that hold a folder for a while."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self.folder, self.environment = folder, environment
        self.processes: list[subprocess.Popen[str]] = []

    def __call__(self, how: str, seconds: float = 60.0) -> tuple[str, subprocess.Popen[str]]:
        """Start one; what it says, once it has or has not what it wants."""
        command = [sys.executable, "-c", HOLD, str(self.folder), how, str(seconds)]
        process = subprocess.Popen(
            command, cwd=ROOT, env=self.environment, stdout=subprocess.PIPE, text=True
        )
        self.processes.append(process)
        assert process.stdout is not None
        return process.stdout.readline().strip(), process


@pytest.fixture
def hold(folder: Path, environment: dict[str, str]) -> Iterator[Holders]:
    holders = Holders(folder, environment)
    yield holders
    for process in holders.processes:
        process.kill()
        process.wait()


def test_who_is_alone_and_who_shares(hold: Holders) -> None:
    """Shared ones go together; none of them with one that is alone; a killed one holds nothing."""
    said, first = hold("shared")
    assert said == "held"
    said, second = hold("shared")
    assert said == "held"
    assert hold("alone")[0] == "busy"
    for process in (first, second):
        process.send_signal(signal.SIGKILL)
        process.wait()
    said, third = hold("alone")
    assert said == "held"
    assert hold("alone")[0] == hold("shared")[0] == "busy"
    third.kill()
    third.wait()
    assert hold("shared", 0.0)[0] == "held"


def test_a_file_is_claimed_by_one(hold: Holders, folder: Path) -> None:
    """The others are told so; a file that is not there is nobody's; a kill lets go."""
    said, process = hold("claim")
    assert said == "held"
    assert hold("claim")[0] == "busy"
    process.kill()
    process.wait()
    assert hold("claim", 0.0)[0] == "held"
    (folder / "file").unlink()
    assert hold("claim")[0] == "busy"


def test_who_waits_gets_it(hold: Holders) -> None:
    """When the one before lets go."""
    assert hold("alone", 1.0)[0] == "held"
    assert hold("wait", 0.0)[0] == "held"


def test_the_lock_file_of_another_machine_is_stale_when_nobody_touches_it(
    folder: Path, without_flock: dict[str, str]
) -> None:
    """Its process cannot be asked; while it is touched, it holds."""
    hold = Holders(folder, without_flock)
    lock = folder / ".lock"
    lock.write_text(json.dumps({"host": "elsewhere", "space": "", "pid": os.getpid()}))
    assert hold("alone")[0] == "busy"
    before = time.time() - 600
    os.utime(lock, (before, before))
    said, process = hold("alone", 0.0)
    process.wait()
    assert said == "held"
    lock.write_text("")  # of a process that was killed when it had made it
    assert hold("shared")[0] == "busy"
    os.utime(lock, (before, before))
    assert hold("shared", 0.0)[0] == "held"
    for process in hold.processes:
        process.wait()
    assert [path.name for path in folder.iterdir()] == ["file"]


def test_a_dump_runs_where_nothing_can_be_locked(
    teacher_path: Path, texts_path: Path, tmp_path: Path, without_flock: dict[str, str]
) -> None:
    """To its end, with one line that says what stands in, and nothing of it is left."""
    fields = {
        "output": str(tmp_path / "cache"),
        "teacher": {"path": str(teacher_path), "dtype": "float32"},
        "source": {"path": str(texts_path)},
        "sequences": {"max_length": 64},
        "truncation": {"k": 4},
    }
    (tmp_path / "dump.yaml").write_text(yaml.safe_dump(fields))
    done = subprocess.run(
        [sys.executable, "-m", "decant", "dump", "--config", str(tmp_path / "dump.yaml")],
        cwd=ROOT,
        env=without_flock,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "cannot lock files (Function not implemented)" in done.stderr
    assert verify(tmp_path / "cache").problems == ()
    assert not [*tmp_path.rglob(".*lock*")]


def test_a_held_folder_is_named(folder: Path) -> None:
    """With what to do."""
    with (
        Store(folder).lock(),
        pytest.raises(Busy, match="here is being written by another process; wait for it"),
        Store(folder).lock(),
    ):
        pass
