"""Commands as processes of their own, which end when this one does.

A phase is never imported: it is asked to do its work as a person would ask it, and goes on where it
was when it is asked again.
"""

import ctypes
import logging
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from decant.schemas import FormatError
from decant.search_path import FOLDER
from decant.storage import Busy, Store
from decant.storage.cli.process import BAD_DATA, DONE, INTERRUPTED

log = logging.getLogger(__name__)

DIES_WITH_PARENT = 1
"""PR_SET_PDEATHSIG of Linux's prctl."""


class Process(Protocol):
    """A command that runs."""

    def wait(self) -> int:
        """Its exit code, once it has ended; minus the signal if one ended it."""

    def send_signal(self, sig: int, /) -> None:
        """Send it a signal."""


Start = Callable[[Sequence[str]], Process]
"""Starts a command, given as the words of its command line."""


class PhaseFailed(RuntimeError):
    """A command of a round ended without having done its work; its own message says why."""


def start_process(words: Sequence[str]) -> Process:
    """Start a command in a session of its own: a Ctrl-C is this process's to pass on.

    Its messages go where ours do. On Linux it is asked to stop when this process is killed.
    """
    return subprocess.Popen(
        words,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        env=with_this_package(os.environ),
        start_new_session=True,
        preexec_fn=_die_with(os.getpid()) if sys.platform == "linux" else None,
    )


def with_this_package(environment: Mapping[str, str]) -> dict[str, str]:
    """An environment in which Python finds the package that runs here, also that of a clone.

    One that is installed is found anyway, and its folder is put before nothing.
    """
    if not (FOLDER / "pyproject.toml").is_file():
        return dict(environment)
    before = [environment["PYTHONPATH"]] if environment.get("PYTHONPATH") else []
    return {**environment, "PYTHONPATH": os.pathsep.join([str(FOLDER), *before])}


def command_words(name: str, config: Path) -> list[str]:
    """The words of `decant NAME --config FILE` with this Python."""
    return [sys.executable, "-m", "decant", name, "--config", str(config)]


def training_words(launcher: str, config: Path) -> list[str]:
    """The words of a training, through a launcher if there is one."""
    if not launcher:
        return command_words("train", config)
    return [*launcher_words(launcher), "-m", "decant.student_train", "--config", str(config)]


def launcher_words(launcher: str) -> list[str]:
    """The words of a launcher, its program that beside this Python if there is one.

    Raises ValueError if they are none, or if there is no such program.
    """
    try:
        program, *options = shlex.split(launcher)
    except ValueError as error:
        raise ValueError(f"launcher {launcher!r} is no command: {error}") from error
    beside = os.path.dirname(sys.executable)
    found = shutil.which(program, path=beside) or shutil.which(program)
    if found is None:
        raise ValueError(
            f"launcher: {program} is neither beside this Python ({beside}) nor on the path: give "
            "the program's full path"
        )
    return [found, *options]


def run_phase(
    start: Start, words: Sequence[str], folder: Path, what: str, *, is_launched: bool = False
) -> None:
    """Run a command that writes to a folder to its end, once nobody else does.

    One that `is_launched` ends with its launcher's code, which says no more than that it failed.
    Raises PhaseFailed if it fails, FormatError if it found damaged data, KeyboardInterrupt if this
    process is interrupted, which the command is then as well.
    """
    _await_writer(folder)
    try:
        process = start(words)
    except OSError as error:
        raise PhaseFailed(f"{what}: {words[0]} cannot be started ({error})") from error
    try:
        code = process.wait()
    except KeyboardInterrupt:
        process.send_signal(signal.SIGINT)
        try:
            process.wait()
        except KeyboardInterrupt:  # once more: whoever asks does not want to wait
            process.send_signal(signal.SIGKILL)
            process.wait()
        raise
    if code == DONE:
        return
    if code == INTERRUPTED:
        raise KeyboardInterrupt(f"{what} was interrupted; the same command goes on from there")
    if code < 0:
        name = signal.Signals(-code).name
        more = ", for want of memory perhaps" if -code == signal.SIGKILL else ""
        raise PhaseFailed(
            f"{what} was killed by {name}{more}: {folder} keeps what is committed, and the same "
            "command goes on from there"
        )
    told = f"{what} ended with code {code}, its message is above"
    if code == BAD_DATA and not is_launched:
        raise FormatError(f"{told}: {folder} is damaged")
    raise PhaseFailed(f"{told}: once its cause is mended, the same command goes on in {folder}")


def _await_writer(folder: Path) -> None:
    """Wait until nobody writes to a folder: what a killed run has left may be ending."""
    if not folder.is_dir():
        return
    try:
        with Store(folder).lock():
            return
    except Busy:
        log.info("waits for another process that is writing to %s", folder)
    with Store(folder).lock(wait=True):
        return


def _die_with(parent: int) -> Callable[[], None]:
    """What a child does first: ask to be sent SIGTERM when its parent dies."""
    prctl = ctypes.CDLL(None, use_errno=True).prctl

    def ask() -> None:
        prctl(DIES_WITH_PARENT, signal.SIGTERM)
        if os.getppid() != parent:  # it was quicker
            os.kill(os.getpid(), signal.SIGTERM)

    return ask
