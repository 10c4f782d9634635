"""CacheStream: deterministic, each sample once per epoch, resumable at any world size."""

import dataclasses
import itertools
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from decant.schemas import FormatError, Truncation
from decant.storage import CacheReader, CacheWriter, Store
from decant.storage.cache.records import Rewritten
from decant.storage.cache.renewal import settle
from decant.student_train import CacheStream
from decant.student_train.data.batch import decode_compact
from decant.student_train.data.heldout import heldout_batches
from decant.student_train.data.order import permutation, select_part, taken_in_turn
from decant.student_train.data.planes import values_on_device
from tests.support import caches

SETTINGS = caches.Settings(truncation=Truncation(k=3), vocab_size=20)


def ids_of(stream: CacheStream, batches: int) -> list[str]:
    """Sample ids of the next batches of one rank, in order."""
    iterator = iter(stream)
    taken = [i for batch in itertools.islice(iterator, batches) for i in batch.sample_ids]
    iterator.close()
    return taken


def all_ids(cache: Path) -> list[str]:
    return [sequence.sample_id for sequence in CacheReader(cache)]


@pytest.fixture(scope="module")
def many_groups(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eleven shards of one row group each, of 1 to 5 sequences."""
    path = tmp_path_factory.mktemp("groups") / "cache"
    shards = [
        caches.random_shards(SETTINGS, num_shards=1, sequences=1 + i % 5, seed=i, length=4)[0]
        for i in range(11)
    ]
    named = [
        [dataclasses.replace(s, sample_id=f"{i}-{j}") for j, s in enumerate(shard)]
        for i, shard in enumerate(shards)
    ]
    caches.write_cache(path, SETTINGS, named)
    return path


def global_order(cache: Path, consumed: int, count: int, setup: dict[str, int]) -> list[str]:
    """The next `count` samples of all ranks and workers together, in the order of the epoch."""
    workers = setup["workers"]
    taken = []
    for rank in range(setup["world_size"]):
        for worker in range(workers):
            stream = CacheStream(
                cache,
                batch_size=setup["batch_size"],
                rank=rank,
                world_size=setup["world_size"],
                seed=setup["seed"],
                lanes=setup["lanes"],
            )
            stream.consumed = consumed
            steps = -(-count // stream.sequences_per_step)
            mine = range(worker, steps, workers)
            share = stream.steps(share=(worker, workers))
            batches = [batch for (batch,) in itertools.islice(share, len(mine))]
            share.close()
            ids = iter([sample for batch in batches for sample in batch.sample_ids])
            taken += [
                (step, slot, rank, sample)
                for step in mine
                for slot, sample in enumerate(itertools.islice(ids, setup["batch_size"]))
            ]
    return [sample for *_, sample in sorted(taken)][:count]


SETUP = st.fixed_dictionaries(
    {
        "world_size": st.integers(1, 5),
        "workers": st.integers(1, 3),
        "batch_size": st.integers(1, 4),
    }
)


@settings(max_examples=15, deadline=None)
@given(
    before=SETUP,
    after=SETUP,
    steps=st.integers(0, 40),
    lanes=st.integers(1, 13),
    seed=st.integers(0, 3),
)
def test_an_epoch_holds_every_sample_once_across_a_change_of_setup(
    many_groups: Path,
    before: dict[str, int],
    after: dict[str, int],
    steps: int,
    lanes: int,
    seed: int,
) -> None:
    """Consume some with one world size and worker count, the rest with others: each sample once.

    And the order is the same as one process's: it does not depend on who consumes it.
    """
    same = {"lanes": lanes, "seed": seed}
    expected = sorted(all_ids(many_groups))
    step = before["world_size"] * before["batch_size"]
    consumed = min(steps, len(expected) // step) * step
    seen = global_order(many_groups, 0, consumed, before | same)
    rest = global_order(many_groups, consumed, len(expected) - consumed, after | same)
    assert sorted(seen + rest) == expected
    alone = {"world_size": 1, "workers": 1, "batch_size": 1}
    assert seen + rest == global_order(many_groups, 0, len(expected), alone | same)


def test_the_workers_of_a_data_loader_share_the_steps(many_groups: Path) -> None:
    """Two real worker processes give the batches of one process, in its order."""
    alone = ids_of(CacheStream(many_groups, batch_size=2), 10)
    loader = DataLoader(CacheStream(many_groups, batch_size=2), batch_size=None, num_workers=2)
    found = [i for batch in itertools.islice(loader, 10) for i in batch.sample_ids]
    assert found == alone


@given(totals=st.lists(st.integers(0, 6), min_size=1, max_size=6), share=st.floats(0, 1))
def test_turns_are_counted_as_they_are_taken(totals: list[int], share: float) -> None:
    """Going round lane by lane, a lane that is empty being passed over."""
    count = int(share * sum(totals))
    expected, left = [0] * len(totals), count
    while left:
        for lane, total in enumerate(totals):
            if left and expected[lane] < total:
                expected[lane] += 1
                left -= 1
    assert taken_in_turn(np.array(totals), count).tolist() == expected


def test_a_rank_reads_its_own_lanes_alone(many_groups: Path) -> None:
    """With as many lanes as ranks, no row group is read by two ranks within an epoch."""
    groups_of = []
    for rank in range(3):
        stream = CacheStream(many_groups, batch_size=1, rank=rank, world_size=3, lanes=3)
        shortest = min(int(t) for t in lane_totals(stream))
        mine = itertools.islice(stream._mine(0, 1, 1, 0), shortest)
        groups_of.append({visit for _, visit, _, _ in mine})
    assert not set.intersection(*groups_of) and all(groups_of)
    assert len(set.union(*groups_of)) == sum(map(len, groups_of))


def lane_totals(stream: CacheStream) -> list[int]:
    lanes = [0] * stream.order.lanes
    for lane, _, _, _ in stream.order.epoch(0):
        lanes[lane] += 1
    return lanes


@pytest.mark.parametrize("method", ["topk", "topk+sample", "topp"])
@pytest.mark.parametrize("precision", ["f32", "f16", "compact"])
@pytest.mark.parametrize("vocab_size", [60, 70_000])
def test_batches_are_decoded_as_the_reader_decodes(
    method: str, precision: str, vocab_size: int, tmp_path: Path
) -> None:
    """Every layout, on the CPU to the last bit and by the device path within float32 rounding."""
    truncation = {
        "topk": Truncation(k=5),
        "topk+sample": Truncation(method="topk+sample", k=3, draws=7, seed=1),
        "topp": Truncation(method="topp", k=9, p=0.8),
    }[method]
    chosen = caches.Settings(truncation=truncation, vocab_size=vocab_size, precision=precision)
    caches.write_cache(tmp_path / "c", chosen, caches.random_shards(chosen, sequences=3, length=5))
    by_id = {s.sample_id: s for s in CacheReader(tmp_path / "c")}
    batch = next(iter(CacheStream(tmp_path / "c", batch_size=3, temperature=2.0)))
    expected = [by_id[i] for i in batch.sample_ids]
    for name in ("token_ids", "logprobs", "draws"):
        if getattr(expected[0], name) is not None:
            values = np.concatenate([getattr(s, name) for s in expected])
            np.testing.assert_array_equal(getattr(batch.targets, name).numpy(), values)
    stored, slots = batch.stored, truncation.slots
    unused = batch.targets.token_ids < 0
    values = values_on_device(stored.topk_logprob, slots, precision == "compact")
    if precision == "compact":
        values = decode_compact(values, unused, stored.log_tail_t1, stored.code)
    values = values.to(torch.float32).masked_fill(unused, -torch.inf)
    atol = 3e-6 if precision == "compact" else 0
    torch.testing.assert_close(values, batch.targets.logprobs, rtol=0, atol=atol)


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
        assert torch.equal(batch.targets.logprobs[part], torch.tensor(sequence.logprobs))
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
    assert (
        permutation(8, 0, 0, 0).tolist()
        == np.argsort(np.random.Philox(key=[0, 0]).random_raw(8), kind="stable").tolist()
    )
    assert sorted(permutation(1000, 3, 2, 1).tolist()) == list(range(1000))


def test_a_state_goes_on_with_the_next_generation(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Sequences that were scored again keep their places in the order; a line says it."""
    (sequences,) = caches.random_shards(SETTINGS, num_shards=1, sequences=6)
    writer = caches.start_cache(tmp_path / "cache", SETTINGS, [sequences])
    lost, *rest = sequences
    with writer.shard(0) as shard:
        shard.reject(lost.sample_id, lost.input_ids, lost.is_target, "none")
        for sequence in rest:
            shard.write(sequence)
    writer.finalize()
    stream = CacheStream(tmp_path / "cache", batch_size=2)
    stream.consumed = 2
    state, before = stream.state_dict(), ids_of(stream, 5)
    caches.write_shard(writer, 0, sequences, replace=True)
    writer.finalize()
    again = CacheStream(tmp_path / "cache", batch_size=2)
    again.load_state_dict(state)
    assert ids_of(again, 5) == before
    assert "was rewritten since the checkpoint" in caplog.text
    older = {name: value for name, value in state.items() if name != "generations"}
    caplog.clear()
    again.load_state_dict(older)
    assert not caplog.text


def test_a_stream_beside_a_writer_has_one_generation_or_says_so(tmp_path: Path) -> None:
    """Who trains while sequences are scored again sees all of one generation, or one line."""
    shards = caches.random_shards(SETTINGS, num_shards=3, sequences=4)
    url = tmp_path / "cache"

    def score(writer: CacheWriter, lost: bool, again: bool) -> None:
        for index in (0, 2) if again else range(3):
            first, *rest = shards[index]
            with writer.shard(index, replace=again) as shard:
                if lost:
                    shard.reject(first.sample_id, first.input_ids, first.is_target, "none")
                for sequence in rest if lost else shards[index]:
                    shard.write(sequence)
        writer.finalize()

    def score_again(lost: bool) -> None:
        settle(Store(url), CacheWriter(url).manifest)
        score(CacheWriter(url), lost, again=True)

    def targets() -> list[tuple[list[str], int]]:
        epoch = CacheStream(url, batch_size=1).one_epoch()
        return [(list(batch.sample_ids), batch.num_targets) for batch in epoch]

    score(caches.start_cache(url, SETTINGS, shards), lost=True, again=False)
    known = [targets()]
    score_again(lost=False)
    known.append(targets())
    assert known[0] != known[1]

    end, failed = time.monotonic() + 2, []

    def write() -> None:
        try:
            for number in itertools.count():
                score_again(lost=number % 2 == 0)
                if time.monotonic() > end:
                    return
        except Exception as error:
            failed.append(error)

    thread = threading.Thread(target=write)
    thread.start()
    whole = 0
    while thread.is_alive():
        try:
            assert targets() in known
            whole += 1
        except Rewritten as error:
            assert "was rewritten while it was read" in str(error) and "\n" not in str(error)
    thread.join()
    assert whole and not failed, failed
