"""Rounds in tests: their config, and commands that are forked instead of started anew."""

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from decant.student_train.rounds.config import RoundsConfig
from tests.support import models
from tests.support.commands import Command

PROMPTS = 12


def save_prompts(path: Path) -> Path:
    """Write a few prompts."""
    words = models.WORDS
    lines = [
        json.dumps({"id": f"p{i}", "prompt": " ".join(words[i % 5 : i % 5 + 3])}) + "\n"
        for i in range(PROMPTS)
    ]
    path.write_text("".join(lines))
    return path


def rounds_config(
    output: Path, teacher: Path, student: Path, prompts: Path, **changes: Any
) -> RoundsConfig:
    """Two rounds of a few steps."""
    base = RoundsConfig(
        output=str(output),
        rounds=2,
        dump={
            "teacher": {"path": str(teacher), "dtype": "float32"},
            "source": {"path": str(prompts), "generate": {"n": 1, "max_new_tokens": 8}},
            "sequences": {"max_length": 32},
            "truncation": {"k": 8},
        },
        train={
            "student": {"path": str(student)},
            "steps": 4,
            "batch_size": 4,
            "optimizer": {"lr": 1e-2},
            "loss": {"kind": "rkl"},
            "save_every_steps": 1,
        },
        plots=False,
    )
    return dataclasses.replace(base, **changes)


class Forked:
    """Starts commands as the rounds do, but forked; remembers them."""

    def __init__(self, first: Callable[[int, str], Callable[[], None] | None] = lambda *_: None):
        """`first` gives what the i-th command, of this name, does before it begins."""
        self._first = first
        self.commands: list[str] = []
        self.said: list[str] = []

    def __call__(self, words: Sequence[str]) -> "_Process":
        """Start `PYTHON -m MODULE ARGUMENTS`."""
        _, dash, module, *arguments = words
        assert dash == "-m"
        self.commands.append(arguments[0])
        first = self._first(len(self.commands), arguments[0])
        return _Process(Command(module, *arguments, first=first), self.said)


class _Process:
    def __init__(self, command: Command, said: list[str]) -> None:
        self._command, self._said = command, said

    def wait(self) -> int:
        result = self._command.result()
        self._said.append(result.stderr)
        return result.code

    def send_signal(self, sig: int, /) -> None:
        self._command.send(sig)  # type: ignore[arg-type]
