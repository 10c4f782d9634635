"""Run our command lines as processes of their own that need not import torch each time.

A fork server imports the heavy packages once; every command is forked from it, before any thread
runs, and executes its module as `python -m` would.
"""

import functools
import itertools
import multiprocessing
import os
import runpy
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

PRELOAD = [
    "decant.teacher_dump.job.run",
    "decant.teacher_dump.planning.predict",
    "decant.teacher_dump.engines.transformers.engine",
]
PRELOAD += ["s3fs"]  # imports what each command with an s3:// URL would wait for
DEADLINE_SECONDS = 300
STEPS = ("open", "os.link", "os.mkdir", "os.remove", "os.rename", "os.rmdir")
"""Audit events of what changes names, or opens a file."""

_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload(PRELOAD)


@dataclass(frozen=True, slots=True)
class Result:
    """How a command ended."""

    code: int
    """Exit code; minus the signal if one ended it."""
    stdout: str
    stderr: str


class Command:
    """A command that runs: `python -m MODULE ARGUMENTS`."""

    def __init__(
        self,
        module: str,
        *arguments: str,
        folder: Path | None = None,
        first: Callable[[], None] | None = None,
    ) -> None:
        """Start it, in `folder` if given; `first` is called in its process before the module."""
        self._output = Path(tempfile.mkdtemp())
        self._process = _server.Process(
            target=_execute, args=(module, arguments, folder, self._output, first)
        )
        self._process.start()

    def kill_after(self, seconds: float) -> None:
        """SIGKILL at this time from now, or let it end before."""
        self._process.join(seconds)
        self._process.kill()

    def signal_when(self, ready: Callable[[], bool], number: signal.Signals) -> None:
        """Send a signal once `ready` holds; it is asked while the process stands still."""
        pid = self._process.pid
        assert pid is not None
        deadline = time.monotonic() + DEADLINE_SECONDS
        while time.monotonic() < deadline and self._process.is_alive():
            if ready():
                os.kill(pid, signal.SIGSTOP)
                if ready():
                    os.kill(pid, number)
                    os.kill(pid, signal.SIGCONT)
                    return
                os.kill(pid, signal.SIGCONT)
            time.sleep(0.002)
        raise AssertionError(f"never ready: {self.result()}")

    @property
    def is_running(self) -> bool:
        """Whether it has not ended yet."""
        return self._process.is_alive()

    def send(self, number: signal.Signals) -> None:
        """Send a signal."""
        assert self._process.pid is not None
        os.kill(self._process.pid, number)

    def stderr(self) -> str:
        """What it has written to stderr so far."""
        return (self._output / "stderr").read_text()

    def result(self) -> Result:
        """Wait for the end."""
        self._process.join(DEADLINE_SECONDS)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
            raise AssertionError(f"the command did not end in {DEADLINE_SECONDS} s")
        assert self._process.exitcode is not None
        texts = [(self._output / name).read_text() for name in ("stdout", "stderr")]
        shutil.rmtree(self._output)
        return Result(self._process.exitcode, *texts)


def command(
    module: str,
    *arguments: str,
    folder: Path | None = None,
    first: Callable[[], None] | None = None,
) -> Result:
    """Run `python -m MODULE ARGUMENTS` to its end."""
    return Command(module, *arguments, folder=folder, first=first).result()


def setting(environment: dict[str, str]) -> Callable[[], None]:
    """What to do `first` in a command that is to have these environment variables."""
    return functools.partial(_set, environment)


def _set(environment: dict[str, str]) -> None:
    os.environ.update(environment)


def end_before(number: int, prefix: str, how: signal.Signals = signal.SIGKILL) -> None:
    """Signal this process before its `number`-th step on the names that start with `prefix`.

    A step makes, renames or removes a file or folder, or opens one to write or to sync it; what
    Arrow does in C++ is not seen. Made for `Command(first=...)`.
    """
    left = itertools.count(number - 1, -1)

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if event not in STEPS:
            return
        path = os.fspath(arguments[0]) if isinstance(arguments[0], str | Path) else ""
        if event == "open":
            is_step = "r" not in (arguments[1] or "")
        else:
            is_step = True
            if arguments[-1] >= 0:  # relative to a folder that shutil.rmtree holds open
                path = os.path.join(os.readlink(f"/proc/self/fd/{arguments[-1]}"), path)
        if is_step and path.startswith(prefix) and next(left) == 0:
            os.kill(os.getpid(), how)

    sys.addaudithook(watch)


def _execute(
    module: str,
    arguments: tuple[str, ...],
    folder: Path | None,
    output: Path,
    first: Callable[[], None] | None,
) -> None:
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        file = os.open(output / name, os.O_WRONLY | os.O_CREAT)
        os.dup2(file, descriptor)
        os.close(file)
    if folder is not None:
        os.chdir(folder)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # as at a terminal
    torch.set_num_threads(1)
    sys.argv = [module, *arguments]
    if first is not None:
        first()
    runpy.run_module(module, run_name="__main__", alter_sys=True)
