"""Run a sequence of commands that may be interrupted: what is done is not done again.

Of every step its wall time, its CPU time and the peak memory of its process are kept in one JSON
file, summed over the runs that it took.
"""

import hashlib
import json
import os
import resource
import shlex
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from decant.storage.files.durable import publish_bytes

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = Path(__file__).resolve().parent
MODULES = "examples.real."
PEAK_UNITS_PER_MB = 1e6 if sys.platform == "darwin" else 1e3
"""Of `ru_maxrss`: bytes there, KiB elsewhere."""


class StepFailed(Exception):
    """A command did not end well; its own words stand above."""

    def __init__(self, name: str, code: int) -> None:
        """`code`: exit code, or minus the signal."""
        super().__init__(f"step {name!r} ended with exit code {code}")
        self.code = code


@dataclass(slots=True)
class Cost:
    """What a step took."""

    key: str
    """Of the command and the files of the example that it names."""
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    peak_mb: float = 0.0
    runs: int = 0
    is_done: bool = False


class Steps:
    """The steps of one folder."""

    def __init__(self, path: Path) -> None:
        """Go on with the steps that `path` tells of, if it exists."""
        self.path = path
        told = json.loads(path.read_text()) if path.exists() else {}
        self.costs = {name: Cost(**cost) for name, cost in told.items()}

    def run(self, name: str, *arguments: object) -> None:
        """Run `python ARGUMENTS` from the project's root unless it has been done so.

        Raises StepFailed, and KeyboardInterrupt once the interrupted command has ended.
        """
        words = [str(argument) for argument in arguments]
        key = _key(words)
        cost = self.costs.get(name)
        if cost and cost.key == key and cost.is_done:
            print(f"\n[{name}] done before in {cost.seconds:.0f} s", flush=True)
            return
        if cost is None or cost.key != key:
            cost = self.costs[name] = Cost(key)
        print(f"\n[{name}] $ python {shlex.join(words)}", flush=True)
        code = _measured([sys.executable, *words], cost)
        cost.is_done = code == 0
        self._save()
        if code in (130, -2):
            raise KeyboardInterrupt
        if code:
            raise StepFailed(name, code)
        print(f"[{name}] {cost.seconds:.0f} s", flush=True)

    def _save(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        told = {name: asdict(cost) for name, cost in self.costs.items()}
        publish_bytes(self.path, (json.dumps(told, indent=2) + "\n").encode())


def _measured(command: list[str], cost: Cost) -> int:
    """The exit code; adds to `cost` what the command takes."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    started = time.monotonic()
    process = subprocess.Popen(command, cwd=ROOT, env=environment)
    while True:
        try:
            _, status, usage = os.wait4(process.pid, 0)
            break
        except KeyboardInterrupt:  # the command gets it as well, and ends by itself
            continue
    process.returncode = os.waitstatus_to_exitcode(status)
    cost.seconds += time.monotonic() - started
    cost.cpu_seconds += usage.ru_utime + usage.ru_stime
    cost.peak_mb = max(cost.peak_mb, _peak_mb(usage))
    cost.runs += 1
    return process.returncode


def _peak_mb(usage: resource.struct_rusage) -> float:
    return usage.ru_maxrss / PEAK_UNITS_PER_MB


def _key(words: list[str]) -> str:
    """Of the words, and the contents of those that are files of the example."""
    digest = hashlib.sha256("\0".join(words).encode())
    for word in words:
        path = ROOT / (word.replace(".", "/") + ".py" if word.startswith(MODULES) else word)
        if path.is_relative_to(EXAMPLE) and path.is_file():
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
