"""One fault in one command, and what must hold of it then, and after the same command again."""

import dataclasses
import random
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tests.support.commands import Result
from tests.support.faults import EVERYTHING, KILL, Fault, Machine, calls
from tests.support.faults.scenarios import Given, Scenario, complaints, names_in


@dataclasses.dataclass(frozen=True, slots=True)
class Undisturbed:
    """A scenario to which nothing happened."""

    found: Any
    names: set[str]
    calls: list[tuple[str, str]]
    """Kind and path of the calls in its folder, in order."""


class Bench:
    """Where scenarios are run again and again, each time in the same folder."""

    def __init__(self, machine: Machine, given: Given, folder: Path) -> None:
        """`folder` is made; what is in it goes with every run."""
        self.machine, self.given = machine, given
        self.folder, self.temporary = folder / "work", folder / "tmp"
        self._log = folder / "calls.txt"
        self._known: dict[str, Undisturbed] = {}
        self.tried = Counter[str]()
        """Faults so far, "killed" and "refused", and "missed": they were for a call too far."""

    def undisturbed(self, scenario: Scenario) -> Undisturbed:
        """What it gives, run once."""
        if scenario.name not in self._known:
            self._begin(scenario)
            result = self._run(scenario, self.fault(EVERYTHING, 0, KILL))
            assert result.code == 0, result
            self._known[scenario.name] = Undisturbed(
                scenario.found(self.folder), names_in(self.folder), calls(self._log)
            )
        return self._known[scenario.name]

    def fault(self, kinds: Sequence[str], at: int, how: int, **more: Any) -> Fault:
        """One on the files that a scenario writes, temporary ones too."""
        under = (str(self.folder), str(self.temporary))
        log = str(self._log)
        return Fault(under=under, kinds=tuple(kinds), at=at, how=how, log=log, **more)

    def problems(self, scenario: Scenario, fault: Fault) -> list[str]:
        """What is wrong with how a scenario takes a fault; nothing, it is to be hoped."""
        expected = self.undisturbed(scenario)
        self._begin(scenario)
        first = self._run(scenario, fault)
        if len(calls(self._log)) < fault.at:
            self.tried["missed"] += 1
        else:
            self.tried["killed" if fault.how == KILL else "refused"] += 1
        wrong = [] if fault.how == KILL and first.code == -9 else complaints(first)
        wrong += self._left(scenario, first, fault)
        again = self._run(scenario, None)
        is_made = again.code == 2 and scenario.made and scenario.made in again.stderr
        if again.code and not is_made:
            wrong.append(f"run again, it ends with {again.code}: {again.stderr[-600:]}")
        else:
            wrong += self._otherwise(scenario, expected)
        said = first.stderr.strip().splitlines()
        return [f"{scenario.name}, {fault}: {one}; it said {said[-3:]}" for one in wrong]

    def _begin(self, scenario: Scenario) -> None:
        for folder in (self.folder, self.temporary):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
        scenario.before(self.given, self.folder)

    def _run(self, scenario: Scenario, fault: Fault | None) -> Result:
        arguments = [str(word) for word in scenario.arguments(self.given, self.folder)]
        environment = {"TMPDIR": str(self.temporary)}
        self._log.write_bytes(b"")
        return self.machine.run(arguments, fault, environment=environment)

    def _left(self, scenario: Scenario, result: Result, fault: Fault) -> list[str]:
        """What a command leaves that ended by itself: it has had the time to clear up."""
        if (
            result.code < 0
            or "unlink" in fault.kinds
            or (fault.lasting and "rename" in fault.kinds)
        ):
            return []
        hidden = sorted(
            name
            for name in names_in(self.folder)
            if is_temporary(name) and name.split("/")[0] != scenario.staging
        )
        beside = sorted(names_in(self.temporary))
        return [f"left {name}" for name in hidden + beside]

    def _otherwise(self, scenario: Scenario, expected: Undisturbed) -> list[str]:
        """What is not as if nothing had happened."""
        wrong = []
        names = names_in(self.folder)
        if names != expected.names:
            more, less = sorted(names - expected.names), sorted(expected.names - names)
            wrong.append(f"in the end {more} more and {less} less")
        try:
            found = scenario.found(self.folder)
        except Exception as error:
            return [*wrong, f"what is there cannot be read: {type(error).__name__}: {error}"]
        return wrong if found == expected.found else [*wrong, "what is there is another"]


def is_temporary(name: str) -> bool:
    """Whether a name is one of what is not finished."""
    return any(part.startswith(".") or part.endswith(".tmp") for part in name.split("/"))


def chosen(
    known: Sequence[tuple[str, str]], kinds: Sequence[str], most: int, seed: int
) -> Iterator[int]:
    """At most so many of the calls of these kinds, from 1: those that are not writes first.

    Writes are many, and alike but for the file: of each file one is as good as another.
    """
    random_ = random.Random(seed)
    places = [call for call in known if call[0] in kinds]
    numbers = range(1, len(places) + 1)
    rest = [n for n in numbers if places[n - 1][0] in ("write", "close")]
    first = [n for n in numbers if places[n - 1][0] not in ("write", "close")]
    random_.shuffle(rest)
    random_.shuffle(first)
    half = max(most // 2, most - len(rest))
    picked = first[:half]
    yield from sorted([*picked, *rest[: most - len(picked)]])
