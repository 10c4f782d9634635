"""Commands on a machine that fails: at the n-th call on files of a folder, by error or by SIGKILL.

`faults.c` is preloaded into a process that imports the heavy packages once; every command is forked
from it with the library armed, which costs what the command itself does.
"""

import dataclasses
import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.support import ROOT
from tests.support.commands import Result

SOURCE = Path(__file__).with_name("faults.c")
KILL = 0
"""In place of an error number."""
WRITES = ("create", "write", "sync", "truncate", "rename", "link", "mkdir", "close", "mode")
"""Kinds of calls that change what is on a disk."""
READS = ("open", "read")
EVERYTHING = (*WRITES, *READS, "unlink", "lock")
SECONDS = 400
"""That a command may take."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Fault:
    """Which call fails, how."""

    under: tuple[str, ...]
    """Prefixes of the paths that count."""
    kinds: tuple[str, ...]
    """Kinds of calls that count."""
    at: int = 0
    """The call that fails, from 1; 0: none does."""
    how: int = KILL
    """The error number, or KILL."""
    lasting: bool = False
    """Whether all calls after it fail as well."""
    half: bool = False
    """Whether it writes a half of what it should, and the next one fails."""
    log: str = ""
    """A file that gets a line for each call that counts."""
    clock_back: int = 0
    """Seconds that the wall clock goes back, from its second reading on."""

    def __str__(self) -> str:
        kinds = "a call" if len(self.kinds) > 3 else "/".join(self.kinds)
        how = "killed" if self.how == KILL else errno.errorcode[self.how]
        more = " and all after it" if self.lasting else " by half" if self.half else ""
        return f"{how} at {kinds} {self.at}{more}"


def compiler() -> str | None:
    """The C compiler of this machine, if it has one and can preload what it makes."""
    if not sys.platform.startswith("linux"):
        return None
    return shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")


def build(folder: Path) -> Path:
    """Compile the library into a folder; its path."""
    command = compiler()
    assert command is not None
    library = folder / "faults.so"
    options = ["-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
    subprocess.run([command, *options, "-o", str(library), str(SOURCE), "-ldl"], check=True)
    return library


class Machine:
    """A process with the library in it, which forks commands."""

    def __init__(self, library: Path) -> None:
        """Start it; the first command waits until it has imported what all of them need."""
        self._said = library.with_suffix(".txt")
        self._server = subprocess.Popen(
            [sys.executable, "-m", "tests.support.faults.server", str(library)],
            env={**os.environ, "LD_PRELOAD": str(library), "OMP_NUM_THREADS": "1"},
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said.open("w"),
            text=True,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._server.kill()
        self._server.communicate()

    def memory(self) -> int:
        """Bytes of address space that a command has when it begins."""
        self.run(["--version"])
        pages = Path(f"/proc/{self._server.pid}/statm").read_text().split()[0]
        return int(pages) * os.sysconf("SC_PAGE_SIZE")

    def run(
        self,
        arguments: Sequence[str],
        fault: Fault | None = None,
        *,
        environment: Mapping[str, str | None] | None = None,
        limits: Mapping[str, int] | None = None,
        folder: str | Path | None = None,
    ) -> Result:
        """Run `decant ARGUMENTS` to its end.

        `environment` changes variables, None removes one; `limits` are of `resource`, by the names
        after RLIMIT_.
        """
        asked = {
            "arguments": list(arguments),
            "fault": fault and dataclasses.asdict(fault),
            "environment": dict(environment or {}),
            "limits": dict(limits or {}),
            "folder": folder and str(folder),
            "seconds": SECONDS,
        }
        assert self._server.stdin is not None and self._server.stdout is not None
        self._server.stdin.write(json.dumps(asked) + "\n")
        self._server.stdin.flush()
        line = self._server.stdout.readline()
        assert line, f"what forks the commands has ended: {self._said.read_text()}"
        said = json.loads(line)
        assert said["code"] is not None, f"{arguments} took more than {SECONDS} s: {said['stderr']}"
        return Result(**said)


def calls(log: Path) -> list[tuple[str, str]]:
    """Kind and path of the calls that were logged."""
    lines = log.read_text(errors="surrogateescape").splitlines()
    return [(kind, path) for _, kind, path in (line.split("\t", 2) for line in lines)]
