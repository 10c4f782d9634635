"""Readers beside writers: each sees one generation of a cache, whole, or says that it is gone."""

import contextlib
import dataclasses
import itertools
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from decant.schemas import ScoredSequence
from decant.schemas.strict import UnfitError
from decant.storage import CacheReader, CacheWriter, Store, migrate, verify
from decant.storage.cache import extension, paths
from decant.storage.cache.plan import plan_of
from decant.storage.cache.records import Rewritten
from decant.storage.cache.renewal import settle, unsettled
from decant.storage.edit.derived import make as make_derived
from decant.storage.edit.merge import merge
from decant.storage.edit.rewrite import rewrite
from decant.storage.exchange.export import export
from decant.storage.inspect.collect import inspect
from decant.storage.inspect.diff import diff
from decant.storage.inspect.head import head
from tests.support import caches

SETTINGS = caches.Settings(precision="compact")
SHARDS, AGAIN = 3, (0, 2)
"""Shards in all, and those that are scored again."""
Rows = list[tuple[str, bytes, bytes]]


class Stopped(Exception):
    """What ends a writer, as a kill would."""


class Steps(Store):
    """A place at which something happens after every change of it."""

    def __init__(self, url: Any, then: Callable[[int], None]) -> None:
        super().__init__(url)
        self._then, self.count = then, 0

    def _changed(self) -> None:
        self.count += 1
        self._then(self.count)

    @contextlib.contextmanager
    def staged(self, name: str, *, new: bool = False) -> Iterator[Path]:
        with super().staged(name, new=new) as path:
            yield path
        self._changed()

    def remove(self, name: str) -> None:
        super().remove(name)
        self._changed()

    def remove_folder(self, folder: str) -> None:
        super().remove_folder(folder)
        self._changed()


@pytest.fixture(scope="module")
def shards() -> list[list[ScoredSequence]]:
    """Random sequences of each shard."""
    return caches.random_shards(SETTINGS, num_shards=SHARDS, sequences=2)


@pytest.fixture(params=["local", "memory"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A directory, or an object store, which has no locks and no links."""
    if request.param == "local":
        return str(tmp_path / "cache")
    return f"memory://generations/{tmp_path.name}"


def write_shard(
    writer: CacheWriter, shard: int, sequences: list[ScoredSequence], *, lost: bool, again: bool
) -> None:
    """A shard with all of its sequences, or with its first one rejected."""
    with writer.shard(shard, replace=again) as out:
        for at, sequence in enumerate(sequences):
            if lost and at == 0:
                out.reject(sequence.sample_id, sequence.input_ids, sequence.is_target, "no reason")
            else:
                out.write(sequence)


def make(url: str, shards: list[list[ScoredSequence]]) -> None:
    """A final cache whose shards AGAIN lack a sequence."""
    writer = CacheWriter.create(url, SETTINGS.draft(), plan_of(shards))
    for shard, sequences in enumerate(shards):
        write_shard(writer, shard, sequences, lost=shard in AGAIN, again=False)
    writer.finalize()


def score_again(
    url: str,
    shards: list[list[ScoredSequence]],
    then: Callable[[int], None] = lambda _: None,
    *,
    lost: bool = False,
) -> int:
    """As `--retry-rejected` does; returns how many changes it made of the place."""
    settle(Store(url), CacheWriter(url).manifest)
    writer = CacheWriter(url)
    writer.store = store = Steps(url, then)
    for shard in AGAIN:
        record = writer.record(shard)
        if record is None or bool(record.rejected) != lost:
            write_shard(writer, shard, shards[shard], lost=lost, again=True)
    writer.finalize()
    return store.count


def rows_of(reader: CacheReader) -> Rows:
    """What every sequence holds."""
    groups = reader.row_groups()
    every = [sequence for group in groups for sequence in reader.read(group)]
    return [(s.sample_id, s.input_ids.tobytes(), s.label_logprob.tobytes()) for s in every]


def held(reader: CacheReader, expected: Rows) -> bool:
    """Whether a reader still gives what it was opened for; if not, it says that it cannot."""
    try:
        assert rows_of(reader) == expected
    except Rewritten as error:
        assert "was rewritten while it was read (generation" in str(error)
        assert "\n" not in str(error)
        return False
    return True


def files(url: str) -> list[str]:
    """Every name in a cache."""
    store = Store(url)
    return sorted(
        f"{folder}/{name}"
        for folder in (paths.SHARDS, paths.RECORDS, paths.PLAN, paths.RENEWAL, paths.EXTENSION)
        for name in store.names(folder)
    )


def test_between_any_two_steps_a_cache_is_the_old_or_the_new_one(
    url: str, shards: list[list[ScoredSequence]], tmp_path: Path
) -> None:
    """To who opens it, verifies it, or has had it open since any step before."""
    make(url, shards)
    before = rows_of(CacheReader(url))
    readers: list[tuple[CacheReader, Rows]] = [(CacheReader(url), before)]
    seen: list[int] = []
    kept: list[bool] = []

    def look(step: int) -> None:
        report = verify(url)
        assert report.ok, (step, report.problems)
        fresh = CacheReader(url)
        rows = rows_of(fresh)
        assert (rows == before) == (fresh.generation == 0)
        gives = [held(reader, expected) for reader, expected in readers]
        assert all(gives) or fresh.generation  # until the new one is there, nobody notices
        kept.extend(gives)
        readers.append((CacheReader(url), rows))
        seen.append(fresh.generation)

    steps = score_again(url, shards, look)
    assert seen == sorted(seen) and set(seen) == {0, 1} and len(seen) == steps
    assert True in kept and False in kept
    assert rows_of(CacheReader(url)) != before
    assert not unsettled(Store(url), CacheReader(url).manifest)
    assert [name for name in files(url) if not name.startswith(paths.SHARDS)] == [
        paths.segment(paths.PLAN),
        paths.record_index(1),
    ]


def test_wherever_it_stops_the_next_run_completes_it(
    shards: list[list[ScoredSequence]], tmp_path: Path
) -> None:
    """The cache is whole in between, and no file is left over in the end."""
    make(str(tmp_path / "whole"), shards)
    old = rows_of(CacheReader(tmp_path / "whole"))
    steps = score_again(str(tmp_path / "whole"), shards)
    expected = rows_of(CacheReader(tmp_path / "whole"))
    for last in range(1, steps + 1):
        url = str(tmp_path / f"at-{last}")

        def stop(step: int, last: int = last) -> None:
            if step >= last:
                raise Stopped

        make(url, shards)
        with pytest.raises(Stopped):
            score_again(url, shards, stop)
        assert verify(url).ok and rows_of(CacheReader(url)) in (old, expected)
        score_again(url, shards)
        assert verify(url).ok and rows_of(CacheReader(url)) == expected
        assert not (Path(url) / paths.RENEWAL).exists(), files(url)


def extended(url: str, shards: list[list[ScoredSequence]]) -> None:
    """The extension of a cache by two shards, complete and not moved in."""
    base = CacheReader(url)
    first, added = len(base), []
    for shard, sequences in enumerate(shards[:2], base.manifest.num_shards):
        (plan,) = plan_of([sequences])
        added.append(dataclasses.replace(plan, shard=shard, first_sequence=first))
        first += plan.num_sequences
    draft = extension.draft(base.manifest, {"path": "more"}, {})
    writer = extension.start(extension.extension_url(url), base, draft, added)
    extension.take_over(writer, base)
    for plan, sequences in zip(added, shards, strict=False):
        write_shard(writer, plan.shard, sequences, lost=False, again=False)
    writer.finalize()


def test_an_extension_is_moved_in_under_readers(
    url: str, shards: list[list[ScoredSequence]]
) -> None:
    """Those that have the old cache go on with it; who opens it has either, whole."""
    make(url, shards)
    old = CacheReader(url)
    before = rows_of(old)
    extended(url, shards)

    def look(step: int) -> None:
        report = verify(url)
        assert report.ok, (step, report.problems)
        assert rows_of(old) == before
        rows = rows_of(CacheReader(url))
        assert rows[: len(before)] == before and len(rows) in (len(before), len(before) + 4)

    extension.move_in(Steps(url, look))
    assert len(CacheReader(url)) == len(before) + 4


def test_a_cache_that_was_scored_again_while_it_was_extended(
    url: str, shards: list[list[ScoredSequence]]
) -> None:
    """The extension takes what the old shards hold by then, under names that nobody reads."""
    make(url, shards)
    extended(url, shards)
    score_again(url, shards)
    rows = rows_of(CacheReader(url))
    writer = CacheWriter(extension.extension_url(url))
    extension.take_over(writer, CacheReader(url))
    writer.finalize()

    def look(step: int) -> None:
        report = verify(url)
        assert report.ok, (step, report.problems)

    extension.move_in(Steps(url, look))
    assert rows_of(CacheReader(url))[: len(rows)] == rows and verify(url).ok


def test_what_is_made_of_a_cache_is_of_one_generation(
    shards: list[list[ScoredSequence]], tmp_path: Path
) -> None:
    """Copies, links and rows taken while it is rewritten are not published, and may be had anew."""
    url = str(tmp_path / "cache")
    make(url, shards)
    reader = CacheReader(url)
    blueprint = merge([reader, CacheReader(url)], "keep-all")[0]
    score_again(url, shards)
    with pytest.raises(Rewritten, match="run the command again"):
        make_derived(tmp_path / "merged", blueprint)
    assert not (tmp_path / "merged").exists()


def test_a_cache_that_goes_is_said_to(shards: list[list[ScoredSequence]], tmp_path: Path) -> None:
    """Removed, or another in its place, while it is read."""
    url = tmp_path / "cache"
    make(str(url), shards)
    reader = CacheReader(url)
    shutil.rmtree(url)
    with pytest.raises(Rewritten, match="holds no cache any more"):
        rows_of(reader)
    make(str(url), shards)
    other = CacheReader(url)
    shutil.rmtree(url)
    make(str(url), shards[:2])
    with pytest.raises(Rewritten, match="replaced while it was read"):
        rows_of(other)


@pytest.mark.parametrize("seconds", [3.0, pytest.param(90.0, marks=pytest.mark.slow)])
def test_readers_in_a_loop_beside_a_writer(
    seconds: float, shards: list[list[ScoredSequence]], tmp_path: Path
) -> None:
    """Generation after generation; whoever reads has one of them, or one clear line."""
    url = str(tmp_path / "cache")
    make(url, shards)
    known = [rows_of(CacheReader(url))]
    score_again(url, shards)
    known.append(rows_of(CacheReader(url)))
    done = threading.Event()
    wrong: list[str] = []
    counts: dict[str, list[int]] = {}
    number = itertools.count()

    def verified() -> None:
        report = verify(url)
        assert report.ok, report.problems

    def exported() -> None:
        target = tmp_path / f"export-{next(number)}"
        export(url, target)

    def merged() -> None:
        target = tmp_path / f"merged-{next(number)}"
        both = CacheReader(url), CacheReader(url)
        make_derived(target, merge(both, "keep-all")[0])
        merged = rows_of(CacheReader(target))
        half = len(merged) // 2
        assert merged[:half] in known and merged[half:] in known

    def rows() -> None:
        assert rows_of(CacheReader(url)) in known

    looks = {
        "rows": rows,
        "verify": verified,
        "inspect": lambda: inspect(url, workers=1),
        "head": lambda: head(url),
        "diff": lambda: diff(url, url),
        "export": exported,
        "merge": merged,
    }

    def loop(name: str) -> None:
        counts[name] = [0, 0]
        while not done.is_set():
            try:
                looks[name]()
                counts[name][0] += 1
            except Rewritten:
                counts[name][1] += 1
                time.sleep(0.01)
            except Exception as error:
                wrong.append(f"{name}: {error!r}")
                return

    threads = [threading.Thread(target=loop, args=(name,)) for name in looks]
    for thread in threads:
        thread.start()
    end = time.monotonic() + seconds
    try:
        for again in itertools.count(1):
            score_again(url, shards, lost=bool(again % 2))
            if time.monotonic() > end or wrong:
                break
            time.sleep(float(np.random.default_rng(again).uniform(0, 0.2)))
    finally:
        done.set()
        for thread in threads:
            thread.join()
    assert not wrong, wrong
    assert counts["rows"][0] and counts["verify"][0], counts


MAKERS: dict[str, Callable[[str, Path], object]] = {
    "dump": lambda old, new: make(
        str(new), caches.random_shards(SETTINGS, num_shards=SHARDS, sequences=2)
    ),
    "migrate": lambda old, new: migrate(old, new),
    "rewrite": lambda old, new: make_derived(new, rewrite(CacheReader(old))),
    "merge": lambda old, new: make_derived(
        new, merge((CacheReader(old), CacheReader(old)), "keep-all")[0]
    ),
}


@pytest.mark.parametrize("maker", MAKERS)
def test_who_reads_what_comes_to_be_has_nothing_or_all(maker: str, tmp_path: Path) -> None:
    """Whoever looks while another cache is made finds none, or one not complete, or all of it."""
    settings = caches.Settings(version_3=True)
    old, places = str(tmp_path / "old"), [tmp_path / f"new-{i}" for i in range(3)]
    sequences = caches.random_shards(settings, num_shards=SHARDS, sequences=2)
    writer = CacheWriter.create(old, settings.draft(), plan_of(sequences))
    for shard, of_shard in enumerate(sequences):
        write_shard(writer, shard, of_shard, lost=False, again=False)
    writer.finalize()
    done = threading.Event()
    wrong: list[str] = []
    seen: dict[Path, set[int]] = {place: set() for place in places}

    def look() -> None:
        while not done.is_set():
            for place in places:
                try:
                    seen[place].add(len(rows_of(CacheReader(place))))
                    head(place)
                    report = verify(place)
                    assert report.ok, report.problems
                except UnfitError as error:
                    if "holds no cache" not in str(error) and "is not complete" not in str(error):
                        wrong.append(str(error))
                except Exception as error:
                    wrong.append(repr(error))
                time.sleep(0.01)  # or the writer hardly gets on

    threads = [threading.Thread(target=look)]
    for thread in threads:
        thread.start()
    try:
        for place in places:
            MAKERS[maker](old, place)
        time.sleep(0.2)
    finally:
        done.set()
        for thread in threads:
            thread.join()
    assert not wrong, wrong[:3]
    assert all(len(sizes) == 1 for sizes in seen.values()), seen


def test_an_older_cache_is_scored_again_in_its_own_version(
    shards: list[list[ScoredSequence]], tmp_path: Path
) -> None:
    """One of version 3 stays of it, and has a next generation."""
    settings = caches.Settings(version_3=True)
    sequences = caches.random_shards(settings, num_shards=SHARDS, sequences=2)
    url = str(tmp_path / "cache")
    writer = CacheWriter.create(url, settings.draft(), plan_of(sequences))
    for shard, of_shard in enumerate(sequences):
        write_shard(writer, shard, of_shard, lost=shard in AGAIN, again=False)
    writer.finalize()
    opened = CacheReader(url)
    before = rows_of(opened)
    score_again(url, sequences)
    assert verify(url).ok and CacheReader(url).manifest.format_version == 3
    assert CacheReader(url).generation == 1 and not held(opened, before)
    assert migrate(url, tmp_path / "migrated").is_final and verify(tmp_path / "migrated").ok
