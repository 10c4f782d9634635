"""A cache as a map-style dataset: the order of the stream, row groups read once, batches alike."""

import dataclasses
import functools
import itertools
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

from decant.schemas import Truncation
from decant.storage import CacheReader
from decant.student_train import Batch, CacheStream
from decant.student_train.trainers import CacheDataset, Collator, RowGroupSampler
from tests.support import caches

SETTINGS = caches.Settings(truncation=Truncation(k=3), vocab_size=20)
PARTS = [("all", 0.0), ("train", 0.3), ("heldout", 0.3)]


@pytest.fixture(scope="module")
def groups_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nine shards of one row group each, of 1 to 5 sequences."""
    path = tmp_path_factory.mktemp("groups") / "cache"
    shards = []
    for i in range(9):
        shard = caches.random_shards(SETTINGS, num_shards=1, sequences=1 + i % 5, seed=i, length=4)
        shards.append(
            [dataclasses.replace(s, sample_id=f"{i}-{j}") for j, s in enumerate(shard[0])]
        )
    caches.write_cache(path, SETTINGS, shards)
    return path


def ids_of(dataset: CacheDataset, indices: list[int]) -> list[str]:
    return Collator(dataset)([dataset[i] for i in indices]).sample_ids


def noted(reads: list[tuple[int, int]], shard: int, offset: int, _: bytes) -> None:
    reads.append((shard, offset))


@pytest.mark.parametrize(("part", "fraction"), PARTS)
@pytest.mark.parametrize("lanes", [1, 4])
def test_the_order_is_that_of_the_stream(
    groups_cache: Path, part: str, fraction: float, lanes: int
) -> None:
    """Epoch after epoch, for any part, seed and number of lanes; each sequence once."""
    options = {"part": part, "heldout_fraction": fraction, "seed": 3, "lanes": lanes}
    dataset = CacheDataset(groups_cache, **options)
    stream = iter(CacheStream(groups_cache, batch_size=1, **options))
    sampler = RowGroupSampler(dataset)
    for epoch in range(3):
        sampler.set_epoch(epoch)
        indices = list(sampler)
        assert sorted(indices) == list(range(len(dataset))) and len(sampler) == len(dataset)
        expected = [next(stream).sample_ids[0] for _ in indices]
        assert ids_of(dataset, indices) == expected
    stream.close()


def test_indices_are_in_stored_order(groups_cache: Path) -> None:
    """`dataset[i]` is the i-th sequence of the part; outside there is none."""
    dataset = CacheDataset(groups_cache)
    stored = [sequence.sample_id for sequence in CacheReader(groups_cache)]
    assert ids_of(dataset, list(range(len(dataset)))) == stored
    for index in (-1, len(dataset)):
        with pytest.raises(IndexError, match=f"sequence {index} of {len(dataset)}"):
            dataset[index]


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_share_an_epoch_and_go_on_where_they_were(
    groups_cache: Path, world_size: int
) -> None:
    """Said once: no sequence twice, as many on each rank; `start` gives the rest of an epoch."""
    dataset = CacheDataset(groups_cache)
    dataset.set_epoch(2)
    shares = []
    for rank in range(world_size):
        ours = {"rank": rank, "world_size": world_size}
        shares.append(list(RowGroupSampler(dataset, **ours)))
        resumed = RowGroupSampler(dataset, **ours, start=3)
        assert len(resumed) == len(shares[-1]) - 3
        assert list(resumed) == shares[-1][3:]
        assert list(resumed) == shares[-1]  # the next epoch is whole
    whole = list(RowGroupSampler(dataset))
    together = list(itertools.chain(*zip(*shares, strict=True)))
    assert together == whole[: len(whole) // world_size * world_size]
    for wrong in ({"rank": 2, "world_size": 2}, {"start": len(dataset) + 1}):
        with pytest.raises(ValueError, match=r"rank 2 of 2|start .* of an epoch of"):
            RowGroupSampler(dataset, **wrong)


def test_a_row_group_is_read_once_an_epoch(groups_cache: Path) -> None:
    """In the order of the sampler, whatever the lanes hold."""
    for lanes in (1, 3, 16):
        dataset = CacheDataset(groups_cache, lanes=lanes)
        reads: list[tuple[int, int]] = []
        note = functools.partial(noted, reads)
        dataset.reader = CacheReader(groups_cache, listener=note)
        assert len([dataset[i] for i in RowGroupSampler(dataset)]) == len(dataset)
        assert len(reads) == len(set(reads)) == 2 * 9  # a footer and a row group of each shard


def test_a_process_reads_what_it_takes(groups_cache: Path) -> None:
    """Of batches that accelerate deals out, each process reads the row groups of its own."""
    needed: list[set[int]] = []
    for process in range(2):
        dataset = CacheDataset(groups_cache, lanes=4)
        reads: list[tuple[int, int]] = []
        dataset.reader = CacheReader(groups_cache, listener=functools.partial(noted, reads))
        sampler = RowGroupSampler(dataset, dealt=(3, process, 2))
        mine = [dataset[index] for i, index in enumerate(sampler) if i // 3 % 2 == process]
        needed.append({shard for shard, _ in reads})
        assert needed[-1] == {int(item.rows.sample_ids[0].split("-")[0]) for item in mine}
    assert needed[0] != needed[1]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_gives_the_batches_of_the_stream(groups_cache: Path, workers: int) -> None:
    """Through torch's own loader, with and without worker processes."""
    dataset = CacheDataset(groups_cache, temperature=[1.0, 2.0])
    loader: DataLoader[Batch] = DataLoader(
        dataset,
        batch_size=4,
        sampler=RowGroupSampler(dataset, read_ahead=workers == 0),
        collate_fn=Collator(dataset, "rows"),
        num_workers=workers,
        drop_last=True,
    )
    stream = CacheStream(groups_cache, batch_size=4, temperature=[1.0, 2.0])
    count = 0
    for ours, theirs in zip(loader, stream.one_epoch("rows"), strict=False):
        assert ours.sample_ids == theirs.sample_ids
        assert dict(ours).keys() == dict(theirs).keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
        for temperature in (1.0, 2.0):
            at = ours.targets_at(temperature), theirs.targets_at(temperature)
            assert torch.equal(at[0].log_tail, at[1].log_tail)
        count += 1
    assert count == len(loader) == len(dataset) // 4


def test_what_a_collator_cannot_do_is_refused(groups_cache: Path, tmp_path: Path) -> None:
    """A packing it does not know, a temperature that is not stored, a cache of labels alone."""
    with pytest.raises(ValueError, match="packing 'both' is not one of"):
        Collator(CacheDataset(groups_cache), "both")
    with pytest.raises(ValueError, match="temperature 3 is not stored"):
        CacheDataset(groups_cache, temperature=3.0)
    settings = caches.Settings(truncation=Truncation(method="label"), temperatures=(1.0,))
    caches.write_cache(tmp_path / "label", settings, caches.random_shards(settings))
    with pytest.raises(ValueError, match=r"keeps no entries.* `decant train` takes labels alone"):
        CacheDataset(tmp_path / "label")
