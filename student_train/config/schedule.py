"""Values that change over a run, as pure functions of the step: nothing needs to be saved."""

import bisect
import itertools
import math
from dataclasses import dataclass
from typing import Any

SHAPES = ("linear", "cosine", "step")
UNITS = ("fraction", "steps")


@dataclass(frozen=True, kw_only=True)  # no slots: jsonargparse reads defaults through vars()
class Schedule:
    """A value that goes through `values` at the places `at`."""

    values: list[float]
    """The values, in order."""
    at: list[float]
    """Where each value is reached: ascending. Before the first place the first value holds, after
    the last place the last."""
    shape: str = "linear"
    """Between two places: linear, cosine (half a period: slow, fast, slow), or step, where each
    value holds until the next."""
    unit: str = "fraction"
    """What `at` counts: fraction of the run, from 0 at the first step to 1 at the last, or steps,
    0 being the first."""

    def __post_init__(self) -> None:
        if self.shape not in SHAPES:
            raise ValueError(f"schedule shape {self.shape!r} is not one of {SHAPES}")
        if self.unit not in UNITS:
            raise ValueError(f"schedule unit {self.unit!r} is not one of {UNITS}")
        if len(self.values) != len(self.at) or len(self.at) < 2:
            raise ValueError(
                f"a schedule needs two or more values and as many places, found values "
                f"{self.values} at {self.at}"
            )
        if not all(math.isfinite(x) for x in [*self.values, *self.at]):
            raise ValueError(f"a schedule needs finite numbers: {self.values} at {self.at}")
        if self.at[0] < 0 or any(a >= b for a, b in itertools.pairwise(self.at)):
            raise ValueError(f"the places of a schedule must ascend from 0 on, found {self.at}")
        if self.unit == "fraction" and self.at[-1] > 1:
            raise ValueError(
                f"places of a schedule in fractions of the run end at 1, found {self.at}; "
                "steps need `unit: steps`"
            )

    def value(self, step: int, steps: int) -> float:
        """The value at a step (0-based) of a run of `steps`."""
        place = step / max(1, steps - 1) if self.unit == "fraction" else step
        after = bisect.bisect_right(self.at, place)
        if after == 0:
            return float(self.values[0])
        start = float(self.values[after - 1])
        if after == len(self.at) or self.shape == "step":
            return start
        before = self.at[after - 1]
        share = (place - before) / (self.at[after] - before)
        if self.shape == "cosine":
            share = (1 - math.cos(math.pi * share)) / 2
        return start + share * (self.values[after] - start)


def value_at(value: float | Schedule, step: int, steps: int) -> float:
    """A number as it is, a schedule at its step."""
    return value.value(step, steps) if isinstance(value, Schedule) else float(value)


def values_of(value: float | Schedule) -> list[float]:
    """The values that a number or a schedule goes through, without what is between."""
    return list(value.values) if isinstance(value, Schedule) else [float(value)]


def parse_option(value: Any, name: str) -> Any:
    """An option of a loss: a mapping stands for a schedule, all else for itself."""
    if not isinstance(value, dict):
        return value
    try:
        return Schedule(**value)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} {value}: {error}") from error
