"""CacheStream: deterministic, each sample once per epoch, resumable at any world size."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from schemas import FormatError
from storage import CacheReader
from student_train import CacheStream
from student_train.stream import heldout_batches, select_part


def ids_of(stream: CacheStream, batches: int) -> list[str]:
    """Sample ids of the next batches of one rank, in order."""
    iterator = iter(stream)
    taken = [i for batch in itertools.islice(iterator, batches) for i in batch.sample_ids]
    iterator.close()
    return taken


def all_ids(cache: Path) -> list[str]:
    return [sequence.sample_id for sequence in CacheReader(cache)]


@settings(max_examples=12, deadline=None)
@given(
    world=st.integers(1, 4),
    batch=st.integers(1, 5),
    other_world=st.integers(1, 4),
    other_batch=st.integers(1, 5),
    steps=st.integers(0, 12),
    lanes=st.integers(1, 5),
    seed=st.integers(0, 3),
)
def test_an_epoch_holds_every_sample_once_across_a_change_of_world_size(
    cache: Path,
    world: int,
    batch: int,
    other_world: int,
    other_batch: int,
    steps: int,
    lanes: int,
    seed: int,
) -> None:
    """Consume some of an epoch with one world size, the rest with another: each sample once."""
    expected = sorted(all_ids(cache))
    steps = min(steps, len(expected) // (world * batch))
    seen: list[str] = []
    state = None
    for rank in range(world):
        stream = CacheStream(
            cache, batch_size=batch, rank=rank, world_size=world, seed=seed, lanes=lanes
        )
        seen += ids_of(stream, steps)
        state = stream.state_dict()
    left = len(expected) - len(seen)
    more = -(-left // (other_world * other_batch))
    rest = []
    for rank in range(other_world):
        stream = CacheStream(
            cache,
            batch_size=other_batch,
            rank=rank,
            world_size=other_world,
            seed=seed,
            lanes=lanes,
        )
        stream.load_state_dict(state)
        ids = ids_of(stream, more)
        rest += [
            (step, slot, rank, sample)
            for index, sample in enumerate(ids)
            for step, slot in [divmod(index, other_batch)]
        ]
    # The last global batch runs over into the next epoch: only its first part still counts.
    in_order = [sample for *_, sample in sorted(rest)]
    assert sorted(seen + in_order[:left]) == expected


def test_the_order_depends_on_the_seed_and_the_epoch_alone(cache: Path) -> None:
    """The same seed gives the same order at any read-ahead; other seeds and epochs differ."""
    n = len(CacheReader(cache))
    first = ids_of(CacheStream(cache, batch_size=1, threads=1), 2 * n)
    again = ids_of(CacheStream(cache, batch_size=1, threads=3), 2 * n)
    other = ids_of(CacheStream(cache, batch_size=1, seed=1), n)
    assert first == again
    assert first[:n] != first[n:] and sorted(first[:n]) == sorted(first[n:])
    assert other != first[:n]


def test_a_batch_carries_what_the_reader_gives(cache: Path) -> None:
    """Ids, labels, distributions and the predicting position of each target are the cache's."""
    by_id = {s.sample_id: s for s in CacheReader(cache)}
    stream = CacheStream(cache, batch_size=3, temperature=2.0)
    batch = next(iter(stream))
    flat = batch.input_ids.flatten()
    start = 0
    for row, sample_id in enumerate(batch.sample_ids):
        sequence = by_id[sample_id]
        length, n = len(sequence.input_ids), sequence.num_targets
        assert batch.input_ids[row, :length].tolist() == sequence.input_ids.tolist()
        assert batch.attention_mask[row].sum() == length
        part = slice(start, start + n)
        assert flat[batch.predictors[part] + 1].tolist() == sequence.labels.tolist()
        assert batch.labels[part].tolist() == sequence.labels.tolist()
        assert torch.equal(batch.targets.token_ids[part].int(), torch.tensor(sequence.token_ids))
        torch.testing.assert_close(
            batch.targets.logprobs[part], torch.tensor(sequence.logprobs), rtol=0, atol=2e-6
        )
        assert torch.equal(batch.targets.log_z[part], torch.tensor(sequence.log_z[:, 1]))
        assert torch.equal(batch.targets.log_tail[part], torch.tensor(sequence.log_tail[:, 1]))
        start += n
    assert start == batch.num_targets


def test_a_temperature_that_was_not_stored_is_refused(cache: Path) -> None:
    """The message names the stored ones."""
    with pytest.raises(ValueError, match=r"temperature 3 is not stored.*has 1, 2"):
        CacheStream(cache, batch_size=1, temperature=3.0)


def test_train_and_heldout_parts_are_disjoint_and_whole(cache: Path) -> None:
    """Each sequence is in exactly one part, whatever the seed."""
    parts = {}
    for part in ("train", "heldout"):
        stream = CacheStream(cache, batch_size=1, part=part, heldout_fraction=0.3, seed=7)
        parts[part] = ids_of(stream, stream.num_sequences)
    assert not set(parts["train"]) & set(parts["heldout"])
    assert sorted(parts["train"] + parts["heldout"]) == sorted(all_ids(cache))


def test_the_heldout_share_is_what_was_asked_for() -> None:
    """Over many sequences the split is close to the fraction."""
    share = len(select_part(0, 100_000, "heldout", 0.05)) / 100_000
    assert abs(share - 0.05) < 0.003


@pytest.mark.parametrize("world", [1, 2, 3])
def test_ranks_evaluate_each_sequence_once_and_stay_in_step(cache: Path, world: int) -> None:
    """Every rank gets the same number of batches; those that count hold each sample once."""
    counted, numbers = [], set()
    for rank in range(world):
        stream = CacheStream(cache, batch_size=4, rank=rank, world_size=world)
        batches = list(heldout_batches(stream))
        numbers.add(len(batches))
        counted += [i for batch, counts in batches if counts for i in batch.sample_ids]
    assert len(numbers) == 1
    assert sorted(counted) == sorted(all_ids(cache))


def test_a_flipped_bit_is_found_before_the_batch(cache: Path, tmp_path: Path) -> None:
    """The stream raises instead of yielding numbers from a damaged shard."""
    import shutil

    damaged = tmp_path / "damaged"
    shutil.copytree(cache, damaged)
    for shard in (damaged / "shards").glob("*.parquet"):
        data = bytearray(shard.read_bytes())
        data[len(data) // 2] ^= 4
        shard.write_bytes(data)
    with pytest.raises(FormatError, match="is damaged"):
        next(iter(CacheStream(damaged, batch_size=1)))


def test_the_state_of_another_stream_is_refused(cache: Path) -> None:
    """A state says which cache, seed and part it is of."""
    state = CacheStream(cache, batch_size=1, seed=1).state_dict()
    with pytest.raises(ValueError, match="seed was 1, is 0"):
        CacheStream(cache, batch_size=1, seed=0).load_state_dict(state)


def test_an_empty_part_is_refused(cache: Path) -> None:
    """A held-out fraction too small to hold a sequence is an error, not a silent nothing."""
    with pytest.raises(ValueError, match="holds none of its"):
        CacheStream(cache, batch_size=1, part="heldout", heldout_fraction=1e-9)


def test_random_order_uses_raw_words() -> None:
    """The permutation is pinned: it must never change, or runs could not be resumed."""
    from student_train.stream import _permutation

    assert (
        _permutation(8, 0, 0, 0).tolist()
        == np.argsort(np.random.Philox(key=[0, 0]).random_raw(8), kind="stable").tolist()
    )
    assert sorted(_permutation(1000, 3, 2, 1).tolist()) == list(range(1000))
