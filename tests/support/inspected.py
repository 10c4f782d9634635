"""Caches whose every figure follows from dense distributions, and how figures are compared."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from decant.schemas import (
    ScoredSequence,
)
from decant.storage.inspect.report import (
    RANKS,
    Spread,
)
from tests.support import caches

SETTINGS = caches.Settings(temperatures=(1.0, 2.0, 0.5))


@dataclasses.dataclass(frozen=True)
class Known:
    """A cache and all that went into it."""

    path: Path
    sequences: list[ScoredSequence]
    dense: NDArray[np.float64]
    """[n, V] log probs of all targets in order."""


def known_cache(path: Path, settings: caches.Settings) -> Known:
    """Write a cache of two shards."""
    generator = np.random.default_rng(7)
    made = [
        caches.random_sequence(generator, settings, length=10 + 5 * i, prompt=1 + i)
        for i in range(6)
    ]
    sequences = [sequence for sequence, _ in made]
    caches.write_cache(path, settings, [sequences[:2], sequences[2:]])
    return Known(path, sequences, np.concatenate([dense for _, dense in made]))


def assert_spread(found: Spread | None, values: NDArray, *, within: float = 2e-6) -> None:
    """The spread of these values, stored to `within`."""
    assert found is not None
    for name, rank in RANKS.items():
        expected = np.quantile(values, rank, method="inverted_cdf")
        assert getattr(found, name) == pytest.approx(expected, abs=within), name
    assert found.min == pytest.approx(values.min(), abs=within)
    assert found.max == pytest.approx(values.max(), abs=within)
    assert found.mean == pytest.approx(values.mean(), abs=within)
