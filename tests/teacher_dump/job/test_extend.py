"""A final cache gets more records: readers see the old cache or the longer one, whole."""

import dataclasses
import functools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from decant.storage import CacheReader, Store, verify
from decant.storage.cache import paths
from decant.teacher_dump import DumpConfig, dump
from decant.teacher_dump.job.run import Worker
from tests.support import models
from tests.support.commands import Command, command, end_before
from tests.support.dumps import (
    HALF,
    MODULE,
    change,
    failing_after,
    files,
    rows,
    save_config,
    save_records,
)


@dataclasses.dataclass(frozen=True)
class Given:
    """A cache, the config that extends it, and the cache of those records alone."""

    base: Path
    first: DumpConfig
    more: DumpConfig
    alone: Path


@pytest.fixture(scope="module")
def given(dump_config: DumpConfig, tmp_path_factory: pytest.TempPathFactory) -> Given:
    """Never write to its caches."""
    folder = tmp_path_factory.mktemp("given")
    generator = np.random.default_rng(3)
    for name in ("first", "more"):
        texts = [
            {"id": f"{name}-{i}", "text": " ".join(generator.choice(models.WORDS, 8 + i % 5))}
            for i in range(16)
        ]
        save_records(folder / f"{name}.jsonl", *texts)
    small = dataclasses.replace(dump_config, shard_targets=80)
    first = change(small, "source.path", str(folder / "first.jsonl"))
    more = change(small, "source.path", str(folder / "more.jsonl"))
    for config, name in ((first, "base"), (more, "alone")):
        dump(dataclasses.replace(config, output=str(folder / name)))
    return Given(folder / "base", first, more, folder / "alone")


@pytest.fixture
def cache(given: Given, tmp_path: Path) -> Path:
    """A copy of the cache to extend."""
    shutil.copytree(given.base, tmp_path / "cache")
    return tmp_path / "cache"


def into(config: DumpConfig, cache: Path) -> DumpConfig:
    return dataclasses.replace(config, output=str(cache))


def assert_extended(cache: Path, given: Given) -> None:
    """Its rows are the old ones, untouched, then those of the records added."""
    report = verify(cache)
    assert report.ok, report.problems
    assert rows(cache) == rows(given.base) + rows(given.alone)
    old = CacheReader(given.base).manifest.num_shards
    for shard in range(old):
        name = paths.shard(shard)
        assert (cache / name).read_bytes() == (given.base / name).read_bytes()
    assert not (cache / paths.EXTENSION).exists() and not (cache / paths.INPUTS).exists()
    (step,) = CacheReader(cache).manifest.source["extensions"]
    assert step["cache_id"] == CacheReader(given.base).manifest.cache_id
    assert step["shards"] == old and step["source"]["path"] == given.more.source.path


def test_a_cache_is_extended(cache: Path, given: Given, tmp_path: Path) -> None:
    """By the command; again it has nothing to do; the first config still fits."""
    inode = (cache / paths.shard(0)).stat().st_ino
    config = save_config(into(given.more, cache), tmp_path)
    done = command(MODULE, "run", "--config", config, "--extend")
    assert done.code == 0, done.stderr
    assert_extended(cache, given)
    assert (cache / paths.shard(0)).stat().st_ino == inode
    before = files(cache)
    dump(into(given.more, cache), extend="refuse")
    dump(into(given.first, cache))
    assert files(cache) == before


def test_extended_twice(cache: Path, given: Given, tmp_path: Path) -> None:
    """Each extension is a step of the manifest."""
    dump(into(given.more, cache), extend="refuse")
    texts = [{"id": f"third-{i}", "text": "a lazy dog runs away"} for i in range(3)]
    third = save_records(tmp_path / "third.jsonl", *texts)
    dump(into(change(given.more, "source.path", str(third)), cache), extend="refuse")
    reader = CacheReader(cache)
    assert verify(cache).ok and len(reader.manifest.source["extensions"]) == 2
    assert [reader[i].sample_id for i in (0, 16, 32)] == ["first-0", "more-0", "third-0"]


def test_readers_see_the_old_cache_until_the_new_one_is_whole(cache: Path, given: Given) -> None:
    """A teacher that breaks half-way leaves the cache as it was; the same call goes on."""
    opened = CacheReader(cache)
    with failing_after(HALF), pytest.raises(Exception, match="fell off"):
        dump(into(given.more, cache), extend="refuse")
    assert verify(cache).ok and rows(cache) == rows(given.base)
    started = [p.name for p in (cache / paths.EXTENSION / "shards").glob("*.parquet")]
    dump(into(given.more, cache), extend="refuse")
    assert_extended(cache, given)
    assert started and len(list(opened)) == 16


def test_on_an_object_store(given: Given) -> None:
    """The same, where files are copied and nothing is locked."""
    url = "memory://extended/cache"
    dump(dataclasses.replace(given.first, output=url))
    dump(dataclasses.replace(given.more, output=url), extend="refuse")
    assert verify(url).ok and rows(url) == rows(given.base) + rows(given.alone)
    assert paths.EXTENSION not in Store(url).names("")


def test_several_workers_extend_together(cache: Path, given: Given) -> None:
    """Each its share of the new shards; the last to end moves them in."""
    for index in (1, 0):
        assert verify(cache).ok and len(CacheReader(cache)) == 16
        dump(into(given.more, cache), Worker(index, 2), extend="refuse")
    assert_extended(cache, given)


@pytest.mark.parametrize("step", [60, 111, 118, 145])
def test_killed_while_it_is_moved_in(step: int, cache: Path, given: Given, tmp_path: Path) -> None:
    """Whatever step SIGKILL comes before, a reader sees one of the two caches, whole."""
    with failing_after(10**6):
        dump(into(given.more, cache), Worker(0, 2), extend="refuse")
    config = save_config(into(given.more, cache), tmp_path)
    words = ("run", "--config", config, "--extend")
    killed = functools.partial(end_before, step, str(cache))
    done = Command(MODULE, *words, first=killed).result()
    assert done.code == -9, done.stderr  # else fewer steps are taken than this
    report = verify(cache)
    assert report.ok, report.problems
    assert rows(cache) in (rows(given.base), rows(given.base) + rows(given.alone))
    again = command(MODULE, *words)
    assert again.code == 0, again.stderr
    assert_extended(cache, given)


def test_known_sample_ids(cache: Path, given: Given, tmp_path: Path) -> None:
    """Are refused by name, left out, or scored again, as asked for."""
    texts = [{"id": name, "text": "the quick brown fox"} for name in ("first-3", "new")]
    path = save_records(tmp_path / "mixed.jsonl", *texts)
    config = into(change(given.more, "source.path", str(path)), cache)
    before = files(cache)
    with pytest.raises(ValueError, match=r"'first-3' is in .* already"):
        dump(config, extend="refuse")
    assert files(cache) == before
    kept = tmp_path / "kept"
    shutil.copytree(cache, kept)
    dump(dataclasses.replace(config, output=str(kept)), extend="keep")
    assert [s.sample_id for s in CacheReader(kept)][-2:] == ["first-3", "new"]
    dump(config, extend="skip")
    assert [s.sample_id for s in CacheReader(cache)][-2:] == ["first-15", "new"]
    assert CacheReader(cache).manifest.source["extensions"][0]["settings"]["known"] == 1
    again = into(change(given.more, "source.path", str(given.first.source.path)), cache)
    with pytest.raises(ValueError, match="give no sequence with a target that"):
        dump(again, extend="skip")
    assert verify(cache).ok


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("truncation.k", 8, r"truncation\.k: the cache has 16, this run gives 8"),
        ("temperatures", [1.0], "temperatures: the cache has"),
        ("sequences.target_share", 0.5, r"sequences\.target_share: the cache has 1"),
        ("teacher.path", "seed 7", r"teacher\.fingerprint: the cache has"),
    ],
)
def test_what_does_not_fit_is_refused(
    field: str, value: object, said: str, cache: Path, given: Given, tmp_path: Path
) -> None:
    """Another k, temperature or teacher, by its name; the cache stays as it was."""
    if field == "teacher.path":
        models.save_teacher(tmp_path / "other", seed=7)
        value = str(tmp_path / "other")
    before = files(cache)
    with pytest.raises(ValueError, match=said):
        dump(into(change(given.more, field, value), cache), extend="refuse")
    assert files(cache) == before


def test_there_must_be_a_final_cache(given: Given, tmp_path: Path) -> None:
    """Nothing, or a cache that is not complete, cannot be extended."""
    with pytest.raises(ValueError, match="holds no cache to extend"):
        dump(into(given.more, tmp_path / "none"), extend="refuse")
    with failing_after(HALF), pytest.raises(Exception, match="fell off"):
        dump(into(given.first, tmp_path / "half"))
    with pytest.raises(ValueError, match="is not complete: complete it first"):
        dump(into(given.more, tmp_path / "half"), extend="refuse")


def test_a_shard_of_an_extension_is_not_made_of_other_records(cache: Path, given: Given) -> None:
    """The first config mends its own shards; it says that it cannot mend those added."""
    dump(into(given.more, cache), extend="refuse")
    last = CacheReader(cache).manifest.num_shards - 1
    (cache / paths.shard(0)).unlink()
    dump(into(given.first, cache))
    assert_extended_rows = rows(cache) == rows(given.base) + rows(given.alone)
    assert assert_extended_rows and verify(cache).ok
    (cache / paths.shard(last)).unlink()
    with pytest.raises(ValueError, match=rf"shard {last} of .* came from an extension"):
        dump(into(given.first, cache))
    assert json.loads((cache / paths.MANIFEST).read_text())["num_shards"] == last + 1
