"""The demo: what its text is split into, and what it prints of its runs."""

import importlib
from pathlib import Path
from types import ModuleType

import pytest

from examples.demo import corpus

DEMO = Path(corpus.__file__).parent


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> tuple[ModuleType, ModuleType]:
    """run.py and rates.py, imported as the scripts beside one another that they are."""
    monkeypatch.syspath_prepend(str(DEMO))
    return importlib.import_module("run"), importlib.import_module("rates")


def test_splits_share_no_module():
    """Training, validation and held-out text come from other top-level modules."""
    modules = {
        split: {name.split("/")[0].removesuffix(".py") for name, _ in corpus.documents(split)}
        for split in corpus.SPLITS
    }
    assert all(modules.values())
    assert sum(map(len, modules.values())) == len(set.union(*modules.values()))


def test_draws_share_no_file_and_are_of_one_size():
    """Each draw is a part of its own, as large as asked for; past the end is an error."""
    draws = [corpus.drawn("train", 300_000, draw) for draw in range(3)]
    names = [name for draw in draws for name, _ in draw]
    assert len(names) == len(set(names))
    for draw in draws:
        sizes = [len(text.encode()) for _, text in draw]
        assert sum(sizes) >= 300_000 > sum(sizes[:-1])
    with pytest.raises(ValueError, match="the text of train has no whole draw 1000"):
        corpus.drawn("train", 300_000, 1000)


def test_a_first_draw_may_be_all_there_is():
    """Of a split with less text than asked for, draw 0 is everything."""
    whole = corpus.drawn("heldout", 10**9)
    assert len(whole) == len(list(corpus.documents("heldout")))


def test_the_claim_is_of_each_sides_own_rate_and_of_pairs(scripts):
    """The lead is a mean over pairs of a seed, with its deviation, in nats and in bits per byte."""
    run, _ = scripts
    summary = {"steps": 300, "peak_memory_mb": 900.0}
    results = [
        {
            "cache": {
                "targets": 1000,
                "bytes": 120_000,
                "bytes_per_target": 120.0,
                "temperatures": [{"retained_mass": {"mean": 0.9, "p05": 0.6}}],
            },
            "distilled": summary | {"heldout_ce": 5.0 + seed, "heldout_bits_per_byte": 2.0},
            "cross-entropy": summary
            | {"heldout_ce": 5.2 + 1.1 * seed, "heldout_bits_per_byte": 2.1},
        }
        for seed in range(2)
    ]
    printed = run.report({"teacher_ce": 2.7}, results, seconds=9.0)
    assert "distillation is ahead by                 0.2500 +- 0.0707 nats per token" in printed
    assert "in bits per byte                     0.1000 +- 0.0000" in printed
    assert printed.count("learning rate") == len(run.LOSSES)


def test_the_best_rate_is_of_the_mean_over_seeds(scripts):
    """One lucky seed does not choose."""
    _, rates = scripts
    losses = {"1e-3": (5.0, 5.9), "2e-3": (5.2, 5.2), "4e-3": (5.6, 5.3)}
    lines = [
        {"seed": seed, "rate": rate, "student": name, "ce": ce, "bits_per_byte": 2.0}
        for rate, of_seeds in losses.items()
        for seed, ce in enumerate(of_seeds)
        for name in ("distilled", "cross-entropy")
    ]
    rows = rates.report(lines).strip().splitlines()
    assert rows[0].split()[-4:] == ["1e-3", "2e-3", "4e-3", "best"]
    assert rows[1].split() == ["distilled", "5.4500", "5.2000", "5.4500", "2e-3"]


def test_the_shipped_rates_are_of_the_grid(scripts):
    """`make demo` trains at rates that `make demo-rates` compares, the configuration too."""
    run, rates = scripts
    assert set(run.RATES) == set(run.LOSSES)
    assert set(run.RATES.values()) <= set(rates.GRID)
    config = (DEMO / "train.yaml").read_text()
    (line,) = [line for line in config.splitlines() if line.strip().startswith("lr:")]
    assert float(line.split()[1]) == float(run.RATES["distilled"])
