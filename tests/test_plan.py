"""Claims about the plan: its counts are exact, its predictions close, and it writes nothing."""

import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest

from schemas import Truncation
from storage import CacheReader
from teacher_dump import DumpConfig, SequenceConfig, SourceError, dump
from teacher_dump.plan import plan


def numbers(table: str, line: str) -> list[float]:
    """The numbers of the line that starts with this name."""
    (found,) = [text for text in table.splitlines() if text.startswith(line)]
    return [float(number.replace(",", "")) for number in re.findall(r"\d[\d.,]*", found)]


def retained(table: str) -> dict[int, list[float]]:
    """Mean, 5 % quantile and smallest retained mass by k."""
    rows = re.findall(r"^ +(\d+) +([\d.]+) +([\d.]+) +([\d.]+)$", table, re.MULTILINE)
    return {int(k): [float(value) for value in values] for k, *values in rows}


@pytest.fixture
def config(dump_config: DumpConfig, tmp_path: Path) -> DumpConfig:
    """The config of `cache`, into a directory that is not there yet."""
    return dataclasses.replace(dump_config, output=str(tmp_path / "cache"))


def test_counts_are_those_of_the_dump(config: DumpConfig, cache: Path):
    """Sequences, tokens, targets and shards are counted, not estimated."""
    table = plan(config, sample=3)
    manifest = CacheReader(cache).manifest
    assert numbers(table, "records")[0] == 90
    assert numbers(table, "sequences, tokens")[:2] == [manifest.num_sequences, manifest.num_tokens]
    assert numbers(table, "targets, shards") == [manifest.num_targets, manifest.num_shards]


def test_retained_mass_is_that_of_the_dump(config: DumpConfig, cache: Path):
    """With every sequence in the sample, to the last digit; with a third of them, within 0.05."""
    mass = np.exp(np.concatenate([s.logprobs for s in CacheReader(cache)])).cumsum(axis=1)
    exact = retained(plan(config, sample=90))
    assert list(exact) == [1, 2, 4, 8, 16]
    for k, (mean, low, smallest) in exact.items():
        of_k = mass[:, k - 1]
        expected = [of_k.mean(), np.quantile(of_k, 0.05), of_k.min()]
        np.testing.assert_allclose([mean, low, smallest], expected, atol=1e-4)
    for k, (mean, *_) in retained(plan(config, sample=30)).items():
        assert abs(mean - exact[k][0]) < 0.05


@pytest.mark.parametrize(
    ("truncation", "precision"),
    [
        (Truncation(k=16), "compact"),
        (Truncation(method="topp", k=32, p=0.6), "f16"),
        (Truncation(method="topk+sample", k=4, draws=10), "f32"),
    ],
    ids=lambda value: value if isinstance(value, str) else value.method,
)
def test_bytes_are_close_to_those_of_the_dump(config: DumpConfig, truncation, precision):
    """Within 1 % from all sequences, 10 % from a third of them, for shards that are not tiny."""
    config = dataclasses.replace(
        config, truncation=truncation, precision=precision, shard_targets=10_000
    )
    totals = dump(config).totals
    assert totals is not None
    for sample, tolerance in ((90, 0.01), (30, 0.1)):
        megabytes, per_target = numbers(plan(config, sample=sample), "bytes")
        assert per_target == pytest.approx(totals.bytes / totals.targets, rel=tolerance)
        assert megabytes == pytest.approx(totals.bytes / 1e6, abs=0.1)


def test_a_plan_writes_nothing(config: DumpConfig, cache: Path, tmp_path: Path):
    """No output is made, and one that is there is neither opened nor changed."""
    plan(config, sample=2)
    assert list(tmp_path.iterdir()) == []
    before = {path: path.stat().st_mtime_ns for path in cache.rglob("*")}
    plan(dataclasses.replace(config, output=str(cache), truncation=Truncation(k=3)), sample=2)
    assert {path: path.stat().st_mtime_ns for path in cache.rglob("*")} == before


def test_a_plan_is_the_same_at_every_run(config: DumpConfig):
    """The sample is drawn with a fixed seed; only the measured time differs."""
    tables = [plan(config, sample=5).splitlines() for _ in range(2)]
    assert len(tables[0]) > 10
    for first, second in zip(*tables, strict=True):
        assert first == second or first.startswith("time ")


def test_random_entries_have_no_retained_mass(config: DumpConfig):
    """Truncation.method: sample keeps no top entries to speak of."""
    table = plan(dataclasses.replace(config, truncation=Truncation(method="sample", draws=9)), 2)
    assert "retained" not in table and numbers(table, "bytes")[1] > 0
    head = Truncation(method="topk+sample", k=4, draws=9)
    assert list(retained(plan(dataclasses.replace(config, truncation=head), 2))) == [1, 2, 4]


def test_a_plan_refuses_what_the_dump_refuses(config: DumpConfig, tmp_path: Path):
    """By the same checks, before any scoring."""
    with pytest.raises(ValueError, match="only 300 ids"):
        plan(dataclasses.replace(config, truncation=Truncation(k=301)))
    with pytest.raises(ValueError, match="at most 128 positions"):
        plan(dataclasses.replace(config, sequences=SequenceConfig(max_length=129)))
    with pytest.raises(ValueError, match="sample must be at least 1, found 0"):
        plan(config, sample=0)
    empty = tmp_path / "records.jsonl"
    empty.write_text('{"input_ids": [5, 6], "loss_mask": [1, 0]}\n')
    source = dataclasses.replace(config.source, path=str(empty))
    with pytest.raises(SourceError, match="no sequence with a target"):
        plan(dataclasses.replace(config, source=source))
