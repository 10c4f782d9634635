"""Batches whose sequences come from row groups of unlike numberings: ids are the cache's."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from decant.schemas import Truncation
from decant.storage import CacheReader
from decant.student_train import CacheStream
from decant.student_train.data.mixture import MixtureStream
from decant.student_train.data.planes import ids_on_device
from tests.support import caches

LENGTH = 50
TRUNCATION = Truncation(k=64)


def sequences(settings: caches.Settings, name: str, favoured: Any, count: int = 3) -> list[Any]:
    """Of one shard, with names of their own."""
    (shard,) = caches.random_shards(
        settings, num_shards=1, sequences=count, length=LENGTH, favoured=favoured
    )
    return [dataclasses.replace(s, sample_id=f"{name}-{i}") for i, s in enumerate(shard)]


def numberings(cache: Path) -> list[bool]:
    """Whether each row group has one."""
    reader = CacheReader(cache)
    return [reader.read_stored(group).numbering is not None for group in reader.row_groups()]


def assert_ids(batch: Any, expected: dict[str, np.ndarray]) -> None:
    """As they were written, decoded on the CPU and by the device path, moved or not."""
    every = np.concatenate([expected[name] for name in batch.sample_ids])
    some = torch.arange(len(every) - 1, -1, -3)
    for moved, wanted in (
        (batch, every),
        (batch.to(torch.device("cpu")), every),
        (batch.of_targets(some), every[some.numpy()]),
    ):
        np.testing.assert_array_equal(moved.targets.token_ids.numpy(), wanted)
        stored = moved.stored
        planes = [stored.topk_lo, stored.topk_mid]
        planes += [] if stored.topk_hi is None else [stored.topk_hi]
        found = ids_on_device(planes, stored.numberings)
        np.testing.assert_array_equal(found.numpy(), wanted)


@pytest.mark.parametrize("vocab_size", [3_000, 60_000])
def test_sequences_of_several_numberings_share_a_batch(vocab_size: int, tmp_path: Path) -> None:
    """Of two shards with a numbering each, and of one that is too small to earn one."""
    settings = caches.Settings(truncation=TRUNCATION, vocab_size=vocab_size)
    ids = np.random.default_rng(0).permutation(vocab_size)
    shards = [
        sequences(settings, "one", ids[:300]),
        [dataclasses.replace(sequences(settings, "two", (), 1)[0], sample_id="two-0")],
        sequences(settings, "three", ids[300:600]),
    ]
    caches.write_cache(tmp_path, settings, shards)
    assert numberings(tmp_path) == [True, False, True]
    expected = {s.sample_id: s.token_ids for shard in shards for s in shard}
    batch = next(iter(CacheStream(tmp_path, batch_size=7)))
    assert len(set(batch.sample_ids)) == 7
    assert_ids(batch, expected)


def test_caches_of_two_versions_share_a_batch(tmp_path: Path) -> None:
    """Ids of two bytes, and numbers of three, of the same vocabulary."""
    ids = np.random.default_rng(0).permutation(60_000)
    expected = {}
    for name, version_3 in (("old", True), ("new", False)):
        settings = caches.Settings(truncation=TRUNCATION, vocab_size=60_000, version_3=version_3)
        shard = sequences(settings, name, ids[:300])
        caches.write_cache(tmp_path / name, settings, [shard])
        assert numberings(tmp_path / name) == [not version_3]
        expected |= {s.sample_id: s.token_ids for s in shard}
    for names in (("old", "new"), ("new", "old")):
        urls = [tmp_path / name for name in names]
        batch = next(iter(MixtureStream(urls, [1, 1], batch_size=6)))
        assert set(batch.sample_ids) == set(expected)
        assert_ids(batch, expected)
