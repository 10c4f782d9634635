"""Training on a cache that is still being dumped: order, resume, and both processes at once."""

import dataclasses
import itertools
import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from decant.schemas import FormatError, Truncation
from decant.storage import CacheReader
from decant.student_train import (
    CacheStream,
    EvalConfig,
    LossConfig,
    StudentConfig,
    TrainConfig,
    train,
)
from decant.student_train.data.follow import FollowStream
from decant.student_train.data.stream import SequenceStream
from decant.teacher_dump import DumpConfig
from tests.support import caches
from tests.support.commands import Command
from tests.support.dumps import change, save_config
from tests.support.trainings import STUDENT

SETTINGS = caches.Settings(truncation=Truncation(k=3), vocab_size=20)
NUM_SHARDS = 5


def named_shards() -> list[list[Any]]:
    """Five shards of 2 to 6 sequences whose ids say which shard they are in."""
    return [
        [
            dataclasses.replace(sequence, sample_id=f"{shard}-{i}")
            for i, sequence in enumerate(
                caches.random_shards(SETTINGS, num_shards=1, sequences=2 + shard, seed=shard)[0]
            )
        ]
        for shard in range(NUM_SHARDS)
    ]


@pytest.fixture(scope="module")
def complete(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("follow") / "cache"
    caches.write_cache(path, SETTINGS, named_shards())
    return path


def ids_of(stream: SequenceStream, batches: int) -> list[str]:
    iterator = iter(stream)
    taken = [i for batch in itertools.islice(iterator, batches) for i in batch.sample_ids]
    iterator.close()
    return taken


def test_the_order_is_that_of_arrival(complete: Path, tmp_path: Path) -> None:
    """Shards are committed while the stream waits; each is passed whole, in an order of its own.

    The order within a shard does not depend on when it came.
    """
    shards = named_shards()
    writer = caches.start_cache(tmp_path / "cache", SETTINGS, shards)
    order = [3, 0, 4, 1, 2]
    caches.write_shard(writer, order[0], shards[order[0]])
    stream = FollowStream(tmp_path / "cache", batch_size=1, poll_seconds=0.01)
    batches = iter(stream)
    seen: list[str] = []
    for shard in order:
        if shard != order[0]:
            thread = threading.Timer(0.05, caches.write_shard, (writer, shard, shards[shard]))
            thread.start()
        seen += [next(batches).sample_ids[0] for _ in shards[shard]]
        assert sorted(seen[-len(shards[shard]) :]) == sorted(s.sample_id for s in shards[shard])
    assert stream.arrived == order and stream.complete
    writer.finalize()
    again = FollowStream(complete, batch_size=1)
    by_shard: dict[str, list[str]] = {}
    for sample in ids_of(again, len(seen)):
        by_shard.setdefault(sample[0], []).append(sample)
    assert seen == [sample for shard in order for sample in by_shard[str(shard)]]
    # The second epoch is the usual one.
    usual = ids_of(CacheStream(complete, batch_size=1), 2 * len(seen))[len(seen) :]
    rest = [next(batches).sample_ids[0] for _ in seen]
    batches.close()
    assert rest == usual


SETUP = st.fixed_dictionaries({"world_size": st.integers(1, 4), "batch_size": st.integers(1, 3)})


@settings(max_examples=8, deadline=None)
@given(
    arrived=st.permutations(range(NUM_SHARDS)),
    before=SETUP,
    after=SETUP,
    steps=st.integers(0, 6),
)
def test_any_ranks_share_the_order_that_a_state_holds(
    complete: Path, arrived: list[int], before: dict[str, int], after: dict[str, int], steps: int
) -> None:
    """Given the order of the shards, it is one process's, at any world size and after a resume."""

    def order(consumed: int, count: int, setup: dict[str, int]) -> list[str]:
        taken = []
        for rank in range(setup["world_size"]):
            stream = FollowStream(complete, rank=rank, **setup)
            state = stream.state_dict() | {"arrived": arrived, "consumed": consumed}
            stream.load_state_dict(state)
            num_steps = -(-count // stream.sequences_per_step)
            ids = iter(ids_of(stream, num_steps))
            for step, slot in itertools.product(range(num_steps), range(setup["batch_size"])):
                taken.append((step, slot, rank, next(ids)))
        return [sample for *_, sample in sorted(taken)][:count]

    consumed = steps * before["world_size"] * before["batch_size"]
    alone = order(0, consumed + 24, {"world_size": 1, "batch_size": 1})
    assert order(0, consumed, before) + order(consumed, 24, after) == alone
    shards_passed = [int(shard) for shard, _ in itertools.groupby(s[0] for s in alone[:20])]
    assert shards_passed == arrived


def test_a_state_of_shards_that_are_not_there_is_refused(tmp_path: Path, complete: Path) -> None:
    """A complete cache that lacks a shard of the order, and a state of another cache."""
    stream = FollowStream(complete, batch_size=1)
    state = stream.state_dict()
    with pytest.raises(FormatError, match=r"shards \[9\] were seen before"):
        stream.load_state_dict(state | {"arrived": [0, 9]})
    other = caches.Settings(truncation=Truncation(k=4), vocab_size=20)
    caches.write_cache(tmp_path / "other", other, named_shards_of(other))
    with pytest.raises(ValueError, match="cache_id was"):
        FollowStream(tmp_path / "other", batch_size=1).load_state_dict(state)


def named_shards_of(form: caches.Settings) -> list[list[Any]]:
    return caches.random_shards(form, num_shards=1)


def test_a_cache_that_was_replaced_is_noticed(tmp_path: Path) -> None:
    """A reader that looks again names both caches."""
    import shutil

    shards = named_shards()
    writer = caches.start_cache(tmp_path / "cache", SETTINGS, shards)
    caches.write_shard(writer, 1, shards[1])
    reader = CacheReader(tmp_path / "cache", allow_incomplete=True)
    assert reader.refresh() == []
    caches.write_shard(writer, 0, shards[0])
    caches.write_shard(writer, 3, shards[3])
    assert reader.refresh() == [0, 3]
    whole = [sequence.sample_id for sequence in reader]
    assert whole == [s.sample_id for i in (0, 1, 3) for s in shards[i]]
    shutil.rmtree(tmp_path / "cache")
    other = caches.Settings(truncation=Truncation(k=4), vocab_size=20)
    caches.write_cache(tmp_path / "cache", other, named_shards_of(other))
    with pytest.raises(FormatError, match="it was replaced while it was read"):
        reader.refresh()


def test_dump_and_training_at_once(dump_config: DumpConfig, tmp_path: Path) -> None:
    """The dump dies and is run again; training waits, is interrupted, resumes.

    It ends as if the cache had been whole from the start, to the last bit.
    """
    small = change(change(dump_config, "source.limit", 40), "teacher.max_batch_tokens", 64)
    small = dataclasses.replace(small, shard_targets=40, output=str(tmp_path / "cache"))
    dump_yaml = save_config(small, tmp_path)
    cache = Path(small.output)

    def committed() -> int:
        return len(list((cache / "shards").glob("part-*.json"))) if cache.exists() else 0

    dying = Command("teacher_dump", "run", "--config", str(dump_yaml))
    dying.signal_when(lambda: committed() >= 3, signal.SIGKILL)
    dying.result()
    assert not CacheReader(cache, allow_incomplete=True).manifest.is_final
    run = TrainConfig(
        cache=str(cache),
        output=str(tmp_path / "run"),
        student=StudentConfig(config=STUDENT),
        loss=LossConfig(ce_weight=0.1),
        follow=True,
        epochs=1.5,
        batch_size=2,
        log_every_steps=1,
    )
    metrics = tmp_path / "run/metrics.jsonl"

    def interrupt_when_it_waits() -> None:
        before = -1
        while (now := metrics.stat().st_size if metrics.exists() else -1) < 1 or now != before:
            before = now
            time.sleep(0.7)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt_when_it_waits)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        train(run)
    thread.join()
    lines = metrics.read_text().splitlines()
    assert 0 < len(lines) < 30

    again = Command("teacher_dump", "run", "--config", str(dump_yaml))
    summary = train(run)
    assert again.result().code == 0
    assert CacheReader(cache).manifest.is_final
    assert summary["epochs"] >= 1.5
    whole = dataclasses.replace(run, output=str(tmp_path / "whole"))
    assert train(whole)["steps"] == summary["steps"]
    both = [
        [json.loads(x)["loss"] for x in (Path(c.output) / "metrics.jsonl").open()]
        for c in (run, whole)
    ]
    assert both[0] == both[1]
    ours, theirs = (
        AutoModelForCausalLM.from_pretrained(Path(c.output) / "student").state_dict()
        for c in (run, whole)
    )
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_what_follow_cannot_do_is_refused(tmp_path: Path) -> None:
    """A held-out part of what is not there yet, and a mixture."""
    with pytest.raises(ValueError, match="of its own"):
        TrainConfig(
            cache="x",
            output="y",
            student=StudentConfig(config=STUDENT),
            follow=True,
            steps=1,
            eval=EvalConfig(heldout_fraction=0.1),
        )
    with pytest.raises(FormatError, match="holds no cache"):
        FollowStream(tmp_path, batch_size=1)
