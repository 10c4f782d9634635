"""What fewer entries would cost, against the dense teacher."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from decant.schemas import (
    Truncation,
    to_json,
)
from decant.storage.__main__ import main
from decant.storage.cli import process as cli
from decant.storage.inspect.budget import Budget, Step, choose
from decant.storage.inspect.collect import inspect
from decant.storage.inspect.command import InspectArguments
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
    assert report.recommended_k is None and report.truncation_curve[-1].fkl == 0
    assert report.beyond_k is not None and kl(p, stored).mean() <= report.beyond_k < 1
    inclusive = np.cumsum(p, axis=1)
    head = np.minimum(np.maximum((inclusive <= 0.5).sum(axis=1), 1), n)
    assert_spread(report.akl_head_size, head)
    kept_mass = np.take_along_axis(inclusive, n[:, None] - 1, axis=1)[:, 0]
    assert report.akl_inexact == pytest.approx((kept_mass < 0.5).mean())


def test_errors_are_those_of_a_ratio_over_sequences(tmp_path: Path) -> None:
    """By the formula, one sequence at a time, and near what 2,000 bootstrap samples give."""
    form = dataclasses.replace(SETTINGS, temperatures=(1.0,))
    generator = np.random.default_rng(3)
    made = [
        caches.random_sequence(generator, form, length=6 + i % 9, spread=1 + i % 5)
        for i in range(40)
    ]
    sequences, dense = zip(*made, strict=True)
    caches.write_cache(tmp_path / "cache", form, [list(sequences[:11]), list(sequences[11:])])
    report = inspect(tmp_path / "cache")
    n = np.array([len(d) for d in dense])
    costs, masses = [], []
    for d in dense:
        p = -np.sort(-np.exp(d), axis=1)
        cut, stored = (even_tail(p, np.full(len(p), k)) for k in (2, 8))
        costs.append((kl(p, cut) - kl(p, stored)).sum())
        masses.append(p[:, :2].sum())
    at = report.truncation_curve[1]
    for sums, mean, error in (
        (np.array(costs), at.fkl, at.fkl_error),
        (np.array(masses), at.retained_mass, at.retained_mass_error),
    ):
        m = sums.sum() / n.sum()
        expected = math.sqrt(40 / 39 * ((sums - m * n) ** 2).sum()) / n.sum()
        assert mean == pytest.approx(m, rel=1e-4) and error == pytest.approx(expected, rel=1e-3)
        drawn = generator.integers(0, 40, (2000, 40))
        assert error == pytest.approx((sums[drawn].sum(1) / n[drawn].sum(1)).std(), rel=0.15)
    assert report.truncation_curve[-1].fkl_error == 0
    alone = caches.Settings(temperatures=(1.0,))
    caches.write_cache(tmp_path / "one", alone, [[sequences[0]]])
    assert inspect(tmp_path / "one").truncation_curve[0].fkl_error is None


def test_bytes_at_each_k_are_those_of_a_cache_of_it(tmp_path: Path) -> None:
    """Within a tenth, also of a cache whose number of entries varies."""
    for truncation in (Truncation(k=32), Truncation(method="topp", k=32, p=0.95)):
        form = caches.Settings(truncation=truncation, vocab_size=400, precision="compact")
        generator = np.random.default_rng(1)
        made = [caches.random_sequence(generator, form, length=120, spread=3) for _ in range(15)]
        caches.write_cache(tmp_path / truncation.method, form, [[one for one, _ in made]])
        curve = inspect(tmp_path / truncation.method).truncation_curve
        for k in (4, 16):
            fewer = dataclasses.replace(form, truncation=dataclasses.replace(truncation, k=k))
            cut = [
                caches.scored_sequence(dense, one.input_ids, one.is_target, fewer)
                for one, dense in made
            ]
            caches.write_cache(tmp_path / f"{truncation.method}-{k}", fewer, [cut])
            expected = inspect(tmp_path / f"{truncation.method}-{k}").bytes_per_target
            assert curve[k - 1].bytes_per_target == pytest.approx(expected, rel=0.1)


STEPS = [
    Step(k=k, nats=nats, error=error, bytes_per_target=size)
    for k, nats, error, size in ((8, 1.0, 0.1, 20), (16, 0.5, 0.05, 40), (64, 0.0, 0.0, 140))
]


@pytest.mark.parametrize(
    ("budget", "beyond", "k", "words"),
    [
        ({"max_bytes": "50"}, 0.1, 16, "largest k in 50.0 bytes per target is k=16: 0.5 to 0.6"),
        ({"max_bytes": "50kb"}, 0.1, 16, "largest k in 50.0 bytes per target"),
        ({"max_bytes": "19.5"}, 0.1, None, "no k fits 19.5 bytes per target: k=8 takes 20.0"),
        ({"max_bytes": "150"}, 0.1, None, "all of k=64 fits 150.0 bytes per target; more"),
        ({"max_bytes": "150"}, 0.0, None, "all of k=64 fits 150.0 bytes per target"),
        ({"max_nats": 0.7}, 0.1, 16, "known to cost at most 0.7 nats is k=16"),
        ({"max_nats": 0.69}, 0.1, None, "no k below 64 is known to cost at most 0.69 nats; 64"),
        ({"max_nats": 0.05}, 0.1, None, "may cost up to 0.1, and what is below 64 costs more"),
        ({"max_nats": 0.7, "max_bytes": "50"}, 0.1, 16, "k=16"),
        ({"max_nats": 0.7, "max_bytes": "30"}, 0.1, None, "no k fits both"),
    ],
)
def test_a_budget_is_answered_by_what_is_known(
    budget: dict[str, Any], beyond: float, k: int | None, words: str
) -> None:
    """Never by the largest k, of which the curve says nothing; errors count against a k."""
    choice = choose(STEPS, beyond, Budget(**budget), 1000)
    assert choice.k == k and words in choice.text
    if "max_nats" in budget:  # of one sequence no error is known
        alone = [dataclasses.replace(step, error=None) for step in STEPS]
        assert choose(alone, beyond, Budget(**budget), 1000).k is None


@pytest.mark.parametrize(
    ("budget", "words"),
    [
        ({"max_bytes": "20 apples"}, "neither bytes per target"),
        ({"max_bytes": "0"}, "neither bytes per target"),
        ({"max_nats": -1.0}, "max-nats must be a number above 0"),
        ({"max_bytes": "20000000000"}, "far more than k=64 takes"),
        ({}, "no budget"),
    ],
)
def test_what_is_no_budget_is_refused(budget: dict[str, Any], words: str) -> None:
    """With what would be one."""
    with pytest.raises(ValueError, match=words):
        choose(STEPS, 0.1, Budget(**budget), 1000)


def test_inspect_recommends_by_a_budget_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """No figure that restates K; kept figures hold no recommendation."""
    known = known_cache(tmp_path / "cache", SETTINGS)

    def recommended(*options: str) -> int | None:
        assert main(["inspect", str(known.path), "--json", *options]) == cli.DONE
        found: int | None = json.loads(capsys.readouterr().out)["recommended_k"]
        return found

    assert recommended() is None
    by_bytes = recommended("--max-bytes", "100")
    assert by_bytes is not None and 1 <= by_bytes < 8
    assert recommended("--max-nats", "3") is not None
    assert recommended() is None
    assert main(["inspect", str(known.path), "--max-bytes", "99"]) == cli.DONE
    assert f"the largest k in 99.0 bytes per target is k={by_bytes}" in capsys.readouterr().out
    with pytest.raises(ValueError, match="--max-bytes 'much' is neither bytes per target"):
        InspectArguments(url=str(known.path), max_bytes="much")


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
