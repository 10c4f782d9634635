"""A teacher known by what it says: log probs of a few fixed tokens, compared with a tolerance.

A stock server gives no hash of its weights. Numbers that other batches, kernels or cards round
otherwise are the same teacher; another model, or a fine-tuned one, is farther away.
"""

import numpy as np

PREFIX = "probe:"
MEDIAN_NATS = 0.05
"""How far two probes of one teacher may lie apart, at half of the tokens."""
LARGEST_NATS = 1.0
"""And at the worst."""
LOWEST = -99.0
"""Smaller log probs are written so."""


def fingerprint_of(values: list[float]) -> str:
    """What a manifest keeps of a probe."""
    return PREFIX + ",".join(f"{max(value, LOWEST):.3f}" for value in values)


def is_probe(fingerprint: str) -> bool:
    """Whether a fingerprint is of this kind."""
    return fingerprint.startswith(PREFIX)


def same_teacher(one: str, other: str) -> bool:
    """Whether two fingerprints are of one teacher."""
    return one == other or difference(one, other) == ""


def difference(one: str, other: str) -> str:
    """How two probes differ, for people; "" if they are of one teacher."""
    a, b = _values(one), _values(other)
    if a is None or b is None or len(a) != len(b) or not len(a):
        return "no such probes"
    apart = np.abs(a - b)
    median, largest = float(np.median(apart)), float(apart.max())
    if median <= MEDIAN_NATS and largest <= LARGEST_NATS:
        return ""
    return f"its log probs of {len(a)} fixed tokens differ by {median:.3g} nats (median)"


def _values(fingerprint: str) -> np.ndarray | None:
    if not is_probe(fingerprint):
        return None
    try:
        return np.array([float(v) for v in fingerprint.removeprefix(PREFIX).split(",")])
    except ValueError:
        return None
