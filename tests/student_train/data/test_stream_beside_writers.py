"""Training's streams beside what writes the cache: one generation of it, or one line."""

import dataclasses
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from decant.schemas import ScoredSequence
from decant.storage import CacheReader, CacheWriter, Store, migrate
from decant.storage.cache import extension
from decant.storage.cache.plan import plan_of
from decant.storage.cache.records import Rewritten
from decant.storage.cache.renewal import settle
from decant.student_train import CacheStream
from decant.student_train.data.follow import FollowStream
from decant.student_train.data.stream import SequenceStream
from tests.support import caches

SETTINGS = caches.Settings(precision="compact")
SHARDS = 4
Shards = list[list[ScoredSequence]]
STREAMS: dict[str, Callable[[Path], SequenceStream]] = {
    "plain": lambda url: CacheStream(url, batch_size=1),
    "follow": lambda url: FollowStream(url, batch_size=1, poll_seconds=0.01),
}


@pytest.fixture(scope="module")
def shards() -> Shards:
    """Sequences of each shard."""
    return caches.random_shards(SETTINGS, num_shards=SHARDS, sequences=3)


def write(writer: CacheWriter, shard: int, of: list[ScoredSequence], lost: bool) -> None:
    """A shard, with or without its first sequence, again where it is there."""
    with writer.shard(shard, replace=writer.record(shard) is not None) as out:
        for at, sequence in enumerate(of):
            if lost and not at:
                out.reject(sequence.sample_id, sequence.input_ids, sequence.is_target, "none")
            else:
                out.write(sequence)


def make(url: Path, shards: Shards, lost: bool = True) -> None:
    """A final cache, of which every shard lacks a sequence."""
    writer = CacheWriter.create(url, SETTINGS.draft(), plan_of(shards))
    for shard, of in enumerate(shards):
        write(writer, shard, of, lost)
    writer.finalize()


def score_again(url: Path, shards: Shards, lost: bool) -> None:
    """As `--retry-rejected` does."""
    settle(Store(url), CacheWriter(url).manifest)
    writer = CacheWriter(url)
    for shard, of in enumerate(shards):
        write(writer, shard, of, lost)
    writer.finalize()


def extend(url: Path, shards: Shards) -> None:
    """As `--extend` does, by as many shards again."""
    base = CacheReader(url)
    first, added = len(base), []
    for shard, of in enumerate(shards, base.manifest.num_shards):
        (plan,) = plan_of([of])
        added.append(dataclasses.replace(plan, shard=shard, first_sequence=first))
        first += plan.num_sequences
    draft = extension.draft(base.manifest, {"path": "more"}, {})
    writer = extension.start(extension.extension_url(str(url)), base, draft, added)
    extension.take_over(writer, base)
    for plan, of in zip(added, shards, strict=True):
        write(writer, plan.shard, of, False)
    writer.finalize()
    extension.move_in(Store(url))


def epoch(batches: Any, count: int) -> list[tuple[str, int]]:
    """Ids and targets of the next sequences."""
    taken = (next(batches) for _ in range(count))
    return [(batch.sample_ids[0], int(batch.num_targets)) for batch in taken]


@pytest.mark.parametrize("kind", STREAMS)
@pytest.mark.parametrize("begun", [0, 1, 5])
def test_a_stream_has_one_generation_or_says_so(
    kind: str, begun: int, shards: Shards, tmp_path: Path
) -> None:
    """Sequences that are scored again while it reads are not mixed with what it has read."""
    url = tmp_path / "cache"
    make(url, shards)
    count = len(CacheReader(url))
    alone = epoch(iter(STREAMS[kind](url)), count)
    stream = STREAMS[kind](url)
    batches = iter(stream)
    taken = epoch(batches, begun)
    score_again(url, shards, lost=False)
    try:
        taken += epoch(batches, count - begun)
    except Rewritten as error:
        assert "was rewritten while it was read" in str(error) and "\n" not in str(error)
        assert taken == alone[: len(taken)]
    else:
        assert taken == alone
    batches.close()
    anew = epoch(iter(STREAMS[kind](url)), count + SHARDS)
    assert {i for i, _ in anew} == {s.sample_id for of in shards for s in of}


@pytest.mark.parametrize("kind", STREAMS)
def test_an_extension_does_not_disturb_a_stream(kind: str, shards: Shards, tmp_path: Path) -> None:
    """It goes on with the shards that the cache had."""
    url = tmp_path / "cache"
    make(url, shards, lost=False)
    count = len(CacheReader(url))
    alone = epoch(iter(STREAMS[kind](url)), 2 * count)
    batches = iter(STREAMS[kind](url))
    taken = epoch(batches, 3)
    extend(url, shards)
    assert taken + epoch(batches, 2 * count - 3) == alone
    batches.close()


def test_who_follows_while_shards_are_scored_again(shards: Shards, tmp_path: Path) -> None:
    """From the first shard of a dump on, through its retries, from generation to generation."""
    url = tmp_path / "cache"
    writer = CacheWriter.create(url, SETTINGS.draft(), plan_of(shards))
    write(writer, 0, shards[0], True)
    done = threading.Event()
    wrong: list[str] = []
    passes = [0, 0]
    known = {(s.sample_id, int(s.is_target.sum())) for of in shards for s in of}
    known |= {(of[0].sample_id, 0) for of in shards}  # rejected

    def follow() -> None:
        while not done.is_set():
            try:
                batches = iter(FollowStream(url, batch_size=1, poll_seconds=0.01))
                taken = epoch(batches, 2 * SHARDS)
                batches.close()
                if not set(taken) <= known:
                    wrong.append(f"others: {set(taken) - known}")
                passes[0] += 1
            except Rewritten:
                passes[1] += 1
            except Exception as error:
                wrong.append(repr(error))
                return

    thread = threading.Thread(target=follow)
    thread.start()
    for shard in range(1, SHARDS):
        time.sleep(0.05)
        write(writer, shard, shards[shard], True)
    writer.finalize()
    for again in range(8):
        score_again(url, shards, lost=bool(again % 2))
        time.sleep(0.03)
    done.set()
    thread.join()
    assert not wrong and passes[0], (wrong, passes)


def test_who_follows_what_is_migrated_has_all_of_it(tmp_path: Path) -> None:
    """The older cache stays as it is, and the new one is whole when it is there."""
    old, new = tmp_path / "old", tmp_path / "new"
    settings = caches.Settings(version_3=True)
    sequences = caches.random_shards(settings, num_shards=SHARDS, sequences=2)
    caches.write_cache(old, settings, sequences)
    alone = epoch(iter(FollowStream(old, batch_size=1)), 2 * SHARDS)
    batches = iter(FollowStream(old, batch_size=1))
    taken = epoch(batches, 2)
    migrate(str(old), new)
    assert taken + epoch(batches, 2 * SHARDS - 2) == alone
    batches.close()
    assert epoch(iter(FollowStream(new, batch_size=1)), 2 * SHARDS) == alone
