"""What fewer entries would cost, against the dense teacher."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from decant.schemas import (
    Truncation,
    to_json,
)
from decant.storage.inspect.collect import inspect
from tests.support import caches
from tests.support.inspected import SETTINGS, assert_spread, known_cache


def kl(p: NDArray[np.float64], q: NDArray[np.float64]) -> NDArray[np.float64]:
    """[n] KL(p || q) over the last axis."""
    return (p * np.log(p / q)).sum(axis=1)


def even_tail(p: NDArray[np.float64], kept: NDArray[np.integer]) -> NDArray[np.float64]:
    """[n, V] descending p with all but the first kept [n] entries made even."""
    is_tail = np.arange(p.shape[1]) >= kept[:, None]
    even = (p * is_tail).sum(axis=1, keepdims=True) / is_tail.sum(axis=1, keepdims=True)
    return np.where(is_tail, even, p)


@pytest.mark.parametrize("method", ["topk", "topp"])
def test_the_cost_of_fewer_entries_is_that_over_the_vocabulary(method: str, tmp_path: Path) -> None:
    """fkl(k) = KL(p || u_k) - KL(p || u_n) and rkl(k) over n + 1 classes, by dense float64."""
    truncation = Truncation(k=8) if method == "topk" else Truncation(method="topp", k=12, p=0.8)
    known = known_cache(tmp_path / "cache", dataclasses.replace(SETTINGS, truncation=truncation))
    report = inspect(known.path)
    p = -np.sort(-np.exp(known.dense), axis=1)
    n, slots = (
        np.concatenate([(s.token_ids >= 0).sum(axis=1) for s in known.sequences]),
        truncation.k,
    )
    is_tail = np.arange(p.shape[1]) >= n[:, None]

    def classes(x: NDArray[np.float64]) -> NDArray[np.float64]:
        """[n, K+1] the kept entries, 1 where unused, and the bucket."""
        bucket = (x * is_tail).sum(axis=1, keepdims=True)
        return np.concatenate([np.where(is_tail, 1, x)[:, :slots], bucket], axis=1)

    stored = even_tail(p, n)
    assert [at.k for at in report.truncation_curve] == list(range(1, slots + 1))
    for at in report.truncation_curve:
        cut = even_tail(p, np.minimum(at.k, n))
        assert at.fkl == pytest.approx((kl(p, cut) - kl(p, stored)).mean(), abs=2e-5)
        assert at.rkl == pytest.approx(kl(classes(cut), classes(p)).mean(), abs=2e-5)
        assert at.rkl <= kl(cut, p).mean()
        mass = np.where(np.arange(p.shape[1]) < np.minimum(at.k, n)[:, None], p, 0).sum(axis=1)
        assert at.retained_mass == pytest.approx(mass.mean(), abs=1e-6)
    good = [at.k for at in report.truncation_curve if at.fkl <= 0.01]
    assert report.recommended_k == good[0] and report.truncation_curve[-1].fkl == 0
    assert report.beyond_k is not None and kl(p, stored).mean() <= report.beyond_k < 1
    inclusive = np.cumsum(p, axis=1)
    head = np.minimum(np.maximum((inclusive <= 0.5).sum(axis=1), 1), n)
    assert_spread(report.akl_head_size, head)
    kept_mass = np.take_along_axis(inclusive, n[:, None] - 1, axis=1)[:, 0]
    assert report.akl_inexact == pytest.approx((kept_mass < 0.5).mean())


def test_a_cache_of_all_ids_loses_nothing(tmp_path: Path) -> None:
    """Where k = V: an empty tail is finite everywhere, and strictly JSON."""
    settings = caches.Settings(truncation=Truncation(k=5), vocab_size=5, temperatures=(1.0,))
    known = known_cache(tmp_path / "cache", settings)
    report = inspect(known.path)
    json.dumps(to_json(report), allow_nan=False)
    assert report.beyond_k == report.truncation_curve[-1].fkl == 0
    p = -np.sort(-np.exp(known.dense), axis=1)
    assert report.truncation_curve[1].fkl == pytest.approx(
        kl(p, even_tail(p, np.full(len(p), 2))).mean(), abs=1e-5
    )
