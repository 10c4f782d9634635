"""Silent damage to a whole cache: `verify` finds all of it, training whatever it would read.

For each damage `verify` names the file; an epoch of the training reader raises FormatError with
that name, or gives exactly the undamaged batches where it does not touch what was damaged.
"""

import dataclasses
import itertools
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from decant.schemas import FormatError
from decant.storage import CacheReader, CacheWriter, Store, verify
from decant.storage.cache import paths
from decant.storage.files.sealed import publish_json, read_json
from decant.student_train import CacheStream
from tests.support import caches

SETTINGS = caches.Settings(precision="compact")
NUM_SHARDS = 5
SHARDS = range(NUM_SHARDS)
BATCH_SIZE = 4
CACHE_FILES = (
    *map(paths.shard, SHARDS),
    *map(paths.record, SHARDS),
    paths.MANIFEST,
    paths.RECORD_INDEX,
    paths.segment(paths.PLAN),
)
UNREAD = (paths.segment(paths.PLAN), *map(paths.record, SHARDS))
"""Files of a final cache that training does not touch."""
MAGIC_BYTES = 4
"""Leading bytes of a shard, which no byte range holds."""


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole cache of several shards. Never write to it."""
    path = tmp_path_factory.mktemp("whole") / "cache"
    caches.write_cache(path, SETTINGS, caches.random_shards(SETTINGS, num_shards=NUM_SHARDS))
    return path


@pytest.fixture(scope="module")
def earlier(whole: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dump of the same plan with other numbers, such as another GPU gives. Never write to it."""
    path = tmp_path_factory.mktemp("earlier") / "cache"
    shards = caches.random_shards(SETTINGS, num_shards=NUM_SHARDS, seed=1)
    caches.write_cache(path, SETTINGS, shards)
    assert CacheReader(path).manifest.cache_id == CacheReader(whole).manifest.cache_id
    return path


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    """A copy of the whole cache, to damage."""
    return Path(shutil.copytree(whole, tmp_path / "cache"))


@pytest.fixture(scope="module")
def batches(whole: Path) -> list[Any]:
    """What training reads from the whole cache."""
    return list(epoch(whole))


def epoch(cache: Path) -> Iterator[Any]:
    """The batches of one epoch of the training reader, as comparable values."""
    stream = CacheStream(cache, batch_size=BATCH_SIZE, temperature=2.0, lanes=3)
    iterator = iter(stream)
    try:
        for batch in itertools.islice(iterator, -(-stream.num_sequences // BATCH_SIZE)):
            yield values(batch)
    finally:
        iterator.close()


def values(item: Any) -> Any:
    """Every field of a batch, bit for bit."""
    if dataclasses.is_dataclass(item):
        return {f.name: values(getattr(item, f.name)) for f in dataclasses.fields(item)}
    if isinstance(item, tuple):
        return tuple(values(part) for part in item)
    if isinstance(item, torch.Tensor):
        return item.dtype, tuple(item.shape), item.numpy().tobytes()
    return item


def assert_found(cache: Path, name: str, batches: list[Any], *, read: bool, what: Any = "") -> None:
    """`verify` names the file; so does training, before a wrong batch, if it reads the damage."""
    problems = verify(cache).problems
    assert any(name in problem for problem in problems), (name, what, problems)
    given = []
    try:
        for batch in epoch(cache):
            given.append(batch)
    except FormatError as error:
        assert Path(name).name in str(error), (name, what, error)
        assert read, (name, what, error)
    else:
        assert not read, (name, what)
        assert len(given) == len(batches)
    assert given == batches[: len(given)], (name, what)


@pytest.mark.parametrize("count", [120, pytest.param(500, marks=pytest.mark.slow)])
def test_every_flipped_bit_is_found(copy: Path, batches: list[Any], count: int) -> None:
    """At random offsets of the shards, the records and the manifest."""
    generator = random.Random(0)
    for _ in range(count):
        folder = generator.choice(("shards", "records", "manifest"))
        name = {
            "shards": paths.shard(generator.choice(SHARDS)),
            "records": generator.choice((paths.RECORD_INDEX, *map(paths.record, SHARDS))),
            "manifest": generator.choice((paths.MANIFEST, paths.segment(paths.PLAN))),
        }[folder]
        path = copy / name
        good = path.read_bytes()
        offset, bit = generator.randrange(len(good)), generator.randrange(8)
        bad = bytearray(good)
        bad[offset] ^= 1 << bit
        path.write_bytes(bad)
        read = name not in UNREAD and not (folder == "shards" and offset < MAGIC_BYTES)
        assert_found(copy, name, batches, read=read, what=(offset, bit))
        path.write_bytes(good)
    assert verify(copy).ok


@pytest.mark.parametrize("count", [30, pytest.param(100, marks=pytest.mark.slow)])
def test_every_truncation_is_found(copy: Path, batches: list[Any], count: int) -> None:
    """Each file emptied, without its last byte, and cut at random lengths."""
    generator = random.Random(0)
    ends = [(name, kept) for name in CACHE_FILES for kept in (0.0, 1.0)]
    cuts = [(generator.choice(CACHE_FILES), generator.random()) for _ in range(count - len(ends))]
    assert len(ends) < count
    for name, kept in ends + cuts:
        path = copy / name
        good = path.read_bytes()
        length = min(int(kept * len(good)), len(good) - 1)
        path.write_bytes(good[:length])
        assert_found(copy, name, batches, read=name not in UNREAD, what=length)
        path.write_bytes(good)
    assert verify(copy).ok


@pytest.mark.parametrize("name", CACHE_FILES)
def test_a_deleted_or_grown_file_is_found(copy: Path, batches: list[Any], name: str) -> None:
    """What grew behind a shard's footer is found by `verify` and in no range that is read."""
    path = copy / name
    good = path.read_bytes()
    path.unlink()
    assert_found(copy, name, batches, read=name not in UNREAD)
    path.write_bytes(good + b"\0")
    read = name not in UNREAD and not name.startswith(paths.SHARDS)
    assert_found(copy, name, batches, read=read)


def test_swapped_shards_are_found(copy: Path, batches: list[Any]) -> None:
    """Neighbours and others, without their records, with them, and the records alone."""
    for one, other in ((0, 1), (1, 3), (0, 4)):
        swap(copy, paths.shard(one), paths.shard(other))
        named = {Path(problem.split()[0]).name for problem in verify(copy).problems}
        assert named == {Path(paths.shard(index)).name for index in (one, other)}
        with pytest.raises(FormatError, match=f"part-00000[{one}{other}].parquet is damaged"):
            list(epoch(copy))
        swap(copy, paths.record(one), paths.record(other))
        for index in (one, other):
            assert any(paths.record(index) in problem for problem in verify(copy).problems)
        with pytest.raises(FormatError, match=f"part-00000[{one}{other}].parquet is damaged"):
            list(epoch(copy))
        swap(copy, paths.shard(one), paths.shard(other))
        assert_found(copy, paths.record(one), batches, read=False)
        swap(copy, paths.record(one), paths.record(other))
    assert verify(copy).ok


def swap(cache: Path, one: str, other: str) -> None:
    first, second = (cache / one).read_bytes(), (cache / other).read_bytes()
    (cache / one).write_bytes(second)
    (cache / other).write_bytes(first)


@pytest.mark.parametrize("index", SHARDS)
def test_a_shard_of_an_earlier_dump_is_found(
    copy: Path, earlier: Path, batches: list[Any], index: int
) -> None:
    """Of the same plan and cache id: alone, its record alone, and both together."""
    shard, record = paths.shard(index), paths.record(index)
    good = {name: (copy / name).read_bytes() for name in (shard, record)}
    for names in ([shard], [record], [shard, record]):
        for name in names:
            shutil.copy(earlier / name, copy / name)
        for name in names:
            if names == [shard, record] and name == record:
                assert any("differs from the sealed" in p for p in verify(copy).problems)
            else:
                assert_found(copy, name, batches, read=name == shard)
        for name in names:
            (copy / name).write_bytes(good[name])
    assert verify(copy).ok


def test_an_earlier_manifest_or_index_is_found(
    copy: Path, earlier: Path, batches: list[Any], tmp_path: Path
) -> None:
    """That of another dump of the same plan, and that from before this one was final."""
    started = tmp_path / "started"
    caches.start_cache(started, SETTINGS, caches.random_shards(SETTINGS, num_shards=NUM_SHARDS))
    good = (copy / paths.MANIFEST).read_bytes()
    shutil.copy(earlier / paths.MANIFEST, copy / paths.MANIFEST)
    assert_found(copy, paths.RECORD_INDEX, batches, read=True)
    shutil.copy(started / paths.MANIFEST, copy / paths.MANIFEST)
    (problem,) = verify(copy).problems
    assert f"{paths.MANIFEST} is not final" in problem
    with pytest.raises(FormatError, match="not complete: 5 of 5 shards"):
        list(epoch(copy))
    (copy / paths.MANIFEST).write_bytes(good)
    shutil.copy(earlier / paths.RECORD_INDEX, copy / paths.RECORD_INDEX)
    assert_found(copy, paths.RECORD_INDEX, batches, read=True)


def test_a_shard_of_another_cache_is_found(copy: Path, batches: list[Any], tmp_path: Path) -> None:
    """Same plan, same shapes, another precision: sealed or not, it does not belong."""
    other = dataclasses.replace(SETTINGS, precision="f16")
    shards = caches.random_shards(SETTINGS, num_shards=NUM_SHARDS)
    caches.write_cache(tmp_path / "other", other, shards)
    writer = caches.start_cache(tmp_path / "started", SETTINGS, shards)
    (tmp_path / "started" / paths.SHARDS).mkdir()
    for name in (paths.shard(0), paths.record(0)):
        shutil.copy(tmp_path / "other" / name, copy / name)
        shutil.copy(tmp_path / "other" / name, tmp_path / "started" / name)
    assert_found(copy, paths.shard(0), batches, read=True)
    partial = lambda: CacheReader(tmp_path / "started", allow_incomplete=True)  # noqa: E731
    for touch in (lambda: list(writer.committed()), partial):
        with pytest.raises(FormatError, match=r"shard 0 of cache .* expected shard 0 of cache"):
            touch()


def test_a_flipped_bit_of_a_commit_record_stops_an_incomplete_cache(tmp_path: Path) -> None:
    """Before the seal, the records beside the shards are what is read."""
    shards = caches.random_shards(SETTINGS)
    writer = caches.start_cache(tmp_path, SETTINGS, shards)
    caches.write_shard(writer, 0, shards[0])
    path = tmp_path / paths.record(0)
    good = path.read_bytes()
    generator = random.Random(0)
    for _ in range(40):
        bad = bytearray(good)
        bad[generator.randrange(len(good))] ^= 1 << generator.randrange(8)
        path.write_bytes(bad)
        with pytest.raises(FormatError, match=path.name):
            CacheReader(tmp_path, allow_incomplete=True)
        with pytest.raises(FormatError, match=path.name):
            list(CacheWriter(tmp_path).committed())
        assert any(path.name in problem for problem in verify(tmp_path).problems)


@pytest.mark.parametrize("text", ["NaN", "1e999", "[" * 100_000, '"\\ud800"', "9" * 5000])
def test_what_only_looks_like_json_is_named(copy: Path, batches: list[Any], text: str) -> None:
    """Numbers that JSON does not have, text that is none, depth without end."""
    for name in (paths.MANIFEST, paths.record(0)):
        good = (copy / name).read_bytes()
        sealed = f'{{"seconds": {text}, "checksum": "0"}}' if text[0] != "[" else text
        (copy / name).write_text(sealed)
        assert_found(copy, name, batches, read=name not in UNREAD)
        (copy / name).write_bytes(good)


def test_totals_are_checked_against_the_records(copy: Path) -> None:
    """Every sum in the manifest, behind a good checksum."""
    store = Store(copy)
    manifest = read_json(store, paths.MANIFEST)
    for name, value in manifest["totals"].items():
        publish_json(
            store, paths.MANIFEST, {**manifest, "totals": {**manifest["totals"], name: value + 1}}
        )
        assert [p.split(": ")[1] for p in verify(copy).problems] == [
            "totals are not the sums over the records"
        ], name
