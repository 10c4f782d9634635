"""A batch as a mapping, and a stream by epochs."""

from pathlib import Path

import pytest
import torch

from decant.schemas import Truncation
from decant.student_train import Batch, CacheStream
from tests.support import caches, models

SETTINGS = caches.Settings(truncation=Truncation(k=3))
NUM_SEQUENCES = 14


@pytest.fixture(scope="module")
def small_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("batch") / "cache"
    shards = caches.random_shards(SETTINGS, num_shards=2, sequences=NUM_SEQUENCES // 2)
    caches.write_cache(path, SETTINGS, shards)
    return path


@pytest.mark.parametrize("packing", ["none", "rows"])
def test_a_batch_unpacks_to_what_a_model_takes(small_cache: Path, packing: str) -> None:
    """`model(**batch)` gives the logits that `predictors` point into, padded or packed."""
    stream = CacheStream(small_cache, batch_size=5)
    batch = next(iter(stream.one_epoch(packing)))
    beside = "attention_mask" if packing == "none" else "position_ids"
    assert set(batch) == set(batch.keys()) == {"input_ids", beside}
    assert dict(batch) == dict(batch.items()) == {name: getattr(batch, name) for name in batch}
    assert len(batch) == len(batch.values()) == 2 and "labels" not in batch
    model = models.build_model()
    logits = model(**batch).logits
    assert torch.equal(
        logits, model(**{"input_ids": batch.input_ids, beside: batch[beside]}).logits
    )
    assert logits.flatten(0, 1)[batch.predictors].shape == (batch.num_targets, 320)
    moved = batch.to("meta")
    assert isinstance(moved, Batch) and moved["input_ids"].device.type == "meta"


def test_what_a_batch_has_besides_is_named(small_cache: Path) -> None:
    """Asking the mapping for another field says where it is."""
    batch = next(iter(CacheStream(small_cache, batch_size=2)))
    with pytest.raises(KeyError, match=r"no 'labels': take batch\.labels for the losses"):
        batch["labels"]
    with pytest.raises(KeyError, match="no 'pixel_values': it has none"):
        batch["pixel_values"]


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("num_microbatches", [1, 2])
def test_epochs_of_a_stream_end_and_lose_nothing(
    small_cache: Path, world_size: int, num_microbatches: int
) -> None:
    """Passes have a length, full batches on every rank, and together the order of the stream."""
    size = 3
    taken = []
    for rank in range(world_size):
        options = {"batch_size": size, "rank": rank, "world_size": world_size}
        stream, endless = CacheStream(small_cache, **options), CacheStream(small_cache, **options)
        ids: list[list[str]] = []
        for passes in range(1, 4):
            epoch = stream.epoch_steps(num_microbatches)
            expected = len(epoch)
            begun = len(ids)
            for step in epoch:
                assert [len(batch.sample_ids) for batch in step] == [size] * num_microbatches
                ids.append([sample for batch in step for sample in batch.sample_ids])
            assert len(ids) - begun == expected
            assert passes <= stream.epoch < passes + size * num_microbatches * world_size / 14
            assert stream.vocab_size == SETTINGS.vocab_size
        steps = endless.steps(num_microbatches)
        in_order = [[s for batch in next(steps) for s in batch.sample_ids] for _ in ids]
        steps.close()
        assert ids == in_order
        taken.append(len(ids))
    assert len(set(taken)) == 1


def test_a_pass_that_is_left_goes_on_where_it_was(small_cache: Path) -> None:
    """Breaking out of an epoch and asking again gives the rest of it, once."""
    stream = CacheStream(small_cache, batch_size=2)
    seen = []
    for batch in stream.one_epoch():
        seen += batch.sample_ids
        if len(seen) == 6:
            break
    epoch = stream.one_epoch()
    assert len(epoch) == (NUM_SEQUENCES - 6) // 2
    seen += [sample for batch in epoch for sample in batch.sample_ids]
    assert len(seen) == len(set(seen)) == NUM_SEQUENCES
    assert stream.epoch == 1
    again = [sample for batch in epoch for sample in batch.sample_ids]
    assert set(again) == set(seen) and again != seen
