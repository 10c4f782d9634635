"""The divergences by name, and which options go together. Imports no torch."""

from __future__ import annotations

import math
from typing import Any

DIVERGENCES: dict[str, dict[str, float | str]] = {
    "fkl": {},
    "rkl": {},
    "akl": {"head_rule": "official", "mu": 0.5},
    "jeffreys": {"lam": 0.5},
    "jsd": {"beta": 0.5},
    "tvd": {},
    "skew_fkl": {"lam": 0.1},
    "skew_rkl": {"lam": 0.1},
    "alpha_beta": {"alpha": 0.2, "beta": 0.7},
}
"""Every kind with its own options and their defaults."""


TAIL_MODES = ("bucket", "renormalize", "teacher_renormalize", "uniform")
"""What stands in for the teacher's probabilities outside the kept ids."""


HEAD_RULES = ("official", "nucleus")


# In alpha_beta, float32 loses the value to cancellation between 0 and this magnitude.
_MIN_EXPONENT = 0.01


def check(kind: str, temperature: float, tail: str, options: dict[str, Any]) -> dict[str, Any]:
    """Return all options of a kind, defaults filled in.

    Raises ValueError naming what would be valid: for an unknown kind, tail or option, and for a
    temperature or an option outside its range.
    """
    if kind not in DIVERGENCES:
        raise ValueError(f"unknown divergence {kind!r}; one of {', '.join(DIVERGENCES)}")
    if tail not in TAIL_MODES:
        raise ValueError(f"unknown tail {tail!r}; one of {', '.join(TAIL_MODES)}")
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"temperature must be > 0 and finite, got {temperature}")
    defaults = DIVERGENCES[kind]
    unknown = sorted(set(options) - set(defaults))
    if unknown:
        valid = ", ".join([*defaults, "scale_by_t2"])
        raise ValueError(f"{kind} has no option {', '.join(unknown)}; its options: {valid}")
    complete: dict[str, Any] = {**defaults, **options}
    _check_ranges(kind, complete)
    return complete


def _check_ranges(kind: str, options: dict[str, Any]) -> None:
    """Raise ValueError if an option of this kind has a value outside its range."""
    for name, value in options.items():
        if name == "head_rule":
            if value not in HEAD_RULES:
                raise ValueError(f"unknown head_rule {value!r}; one of {', '.join(HEAD_RULES)}")
            continue
        if not isinstance(value, (int, float)) or not math.isfinite(value):
            raise ValueError(f"{kind}: {name} must be a finite number, got {value!r}")
        if kind == "alpha_beta":
            continue
        if name == "mu" and not 0 < value < 1:
            raise ValueError(f"{kind}: mu must lie between 0 and 1, got {value}")
        if kind.startswith("skew") and not 0 <= value < 1:
            raise ValueError(f"{kind}: {name} must be in [0, 1), got {value}; at 1 the loss is 0")
        if not 0 <= value <= 1:
            raise ValueError(f"{kind}: {name} must be in [0, 1], got {value}")
    if kind == "alpha_beta":
        alpha, beta = options["alpha"], options["beta"]
        for name, value in (("alpha", alpha), ("beta", beta), ("alpha + beta", alpha + beta)):
            if 0 < abs(value) < _MIN_EXPONENT:
                raise ValueError(
                    f"alpha_beta: {name} = {value} is lost to float32 rounding; make it 0 (its own "
                    f"branch) or at least {_MIN_EXPONENT} in magnitude"
                )
