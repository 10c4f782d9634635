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
    "tail_kl": {"head": 10, "beta": 2.0},
    "acceptance": {"bound": "lower"},
    "acceptance_hybrid": {"eta": 3.0},
    "hinge": {"margin": "teacher"},
    "logistic": {},
}
"""Every divergence with its own options and their defaults."""


SAMPLED: dict[str, dict[str, float | str]] = {"opd": {"clip": 0.0}}
"""Kinds that look at the sampled token alone, with their options: estimates, no divergences."""


KINDS = {**DIVERGENCES, **SAMPLED}
"""All that a loss may be."""


TAIL_MODES = ("bucket", "renormalize", "teacher_renormalize", "uniform", "label")
"""What stands in for the teacher's probabilities outside the kept ids."""


RANKINGS = ("hinge", "logistic")
"""Kinds that compare the order of the kept ids, and nothing else."""


FINITE_AT_ZERO = ("fkl", "jsd", "tvd", "skew_fkl", "skew_rkl")
"""Kinds that are finite where the teacher rules out what the student does not."""


WORDS = {
    "head_rule": ("official", "nucleus"),
    "bound": ("lower", "upper"),
    "margin": ("teacher",),
}
"""Options that may be words, and which."""


# In alpha_beta, float32 loses the value to cancellation between 0 and this magnitude.
_MIN_EXPONENT = 0.01


def check(kind: str, temperature: float, tail: str, options: dict[str, Any]) -> dict[str, Any]:
    """Return all options of a kind, defaults filled in.

    Raises ValueError naming what would be valid: for an unknown kind, tail or option, and for a
    temperature or an option outside its range.
    """
    if kind not in KINDS:
        raise ValueError(f"unknown divergence {kind!r}; one of {', '.join(KINDS)}")
    if tail not in TAIL_MODES:
        raise ValueError(f"unknown tail {tail!r}; one of {', '.join(TAIL_MODES)}")
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"temperature must be > 0 and finite, got {temperature}")
    if kind in SAMPLED and temperature != 1:
        raise ValueError(
            f"{kind} compares log probs of tokens that were sampled at temperature 1, and a cache "
            f"stores those of its labels at 1 alone: temperature {temperature:g} has no meaning, "
            "leave it at 1"
        )
    defaults = KINDS[kind]
    unknown = sorted(set(options) - set(defaults))
    if unknown:
        valid = ", ".join([*defaults, "scale_by_t2"])
        raise ValueError(f"{kind} has no option {', '.join(unknown)}; its options: {valid}")
    complete: dict[str, Any] = {**defaults, **options}
    _check_ranges(kind, complete)
    _check_tail(kind, tail, complete)
    return complete


def _check_tail(kind: str, tail: str, options: dict[str, Any]) -> None:
    """Raise ValueError if a kind has no value with a tail mode, or none that differs."""
    if tail == "bucket":
        return
    if kind in RANKINGS:
        raise ValueError(f"{kind} compares kept ids alone: tail={tail!r} has no effect, leave it")
    if kind in SAMPLED:
        raise ValueError(
            f"{kind} looks at the sampled token alone: tail={tail!r} has no effect, leave it"
        )
    if (kind, tail) == ("tail_kl", "uniform"):
        raise ValueError("tail_kl ranks ids, and tail='uniform' makes those of the tail alike")
    if options.get("bound") == "upper":
        raise ValueError(f"acceptance: bound='upper' is of tail='bucket', got tail={tail!r}")
    ends_in_rkl = options.get("beta") == 1 if kind == "jsd" else options.get("lam") == 0
    if tail == "label" and (
        kind not in FINITE_AT_ZERO or (ends_in_rkl and kind in ("jsd", "skew_rkl"))
    ):
        raise ValueError(
            f"tail='label' gives every id but the kept ones and the label the probability 0, where "
            f"{kind} with {options} is infinite: use {', '.join(FINITE_AT_ZERO)}"
        )


def _check_ranges(kind: str, options: dict[str, Any]) -> None:
    """Raise ValueError if an option of this kind has a value outside its range."""
    for name, value in options.items():
        if isinstance(value, str) and name in WORDS:
            if value not in WORDS[name]:
                raise ValueError(f"unknown {name} {value!r}; one of {', '.join(WORDS[name])}")
            continue
        is_word = name in WORDS and name != "margin"
        if is_word or not isinstance(value, (int, float)) or not math.isfinite(value):
            expected = f"one of {', '.join(WORDS[name])}" if is_word else "a finite number"
            raise ValueError(f"{kind}: {name} must be {expected}, got {value!r}")
        if kind == "alpha_beta":
            continue
        if name in ("eta", "margin") or (name, kind) == ("beta", "tail_kl"):
            if value < 0:
                raise ValueError(f"{kind}: {name} must be >= 0, got {value}")
            continue
        if name == "head":
            if value < 1 or value != int(value):
                raise ValueError(f"{kind}: head must be a whole number >= 1, got {value}")
            continue
        if name == "clip":
            if not 0 <= value < 1:
                raise ValueError(f"{kind}: clip must be in [0, 1), 0 being off, got {value}")
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
