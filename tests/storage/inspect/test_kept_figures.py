"""Samples of a cache, and figures that are kept in it."""

import dataclasses
import os
from pathlib import Path

import pytest

from decant.storage import Store, verify
from decant.storage.files.sealed import publish_json, read_json
from decant.storage.inspect.collect import inspect
from decant.storage.inspect.report import (
    Report,
    Sample,
)
from decant.storage.inspect.text import report_text
from tests.support import caches
from tests.support.inspected import SETTINGS


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve shards of one row group each. Never write to it."""
    path = tmp_path_factory.mktemp("many") / "cache"
    caches.write_cache(path, SETTINGS, caches.random_shards(SETTINGS, num_shards=12))
    return path


def test_a_sample_is_labelled_and_close(many: Path) -> None:
    """Counts and sizes stay exact; the rest comes from the row groups that the seed chooses."""
    whole, half = inspect(many), inspect(many, sample=0.5, seed=3)
    assert half.sample == Sample(row_groups=6, of_row_groups=12, targets=whole.targets // 2, seed=3)
    for name in ("targets", "tokens", "sequences", "bytes", "times_smaller", "kl_error_mean"):
        assert getattr(half, name) == getattr(whole, name)
    assert sum(half.column_bytes.values()) == pytest.approx(sum(whole.column_bytes.values()), abs=9)
    assert whole.teacher_ce is not None
    assert half.teacher_ce == pytest.approx(whole.teacher_ce, rel=0.3)
    assert half.teacher_ce != whole.teacher_ce
    assert half.duplicate_sequences is None and not half.duplicates_exact
    assert "ESTIMATES from" in report_text(half) and "ESTIMATES" not in report_text(whole)
    assert inspect(many, sample=6, seed=3) == half != inspect(many, sample=6, seed=4)
    assert inspect(many, sample=12) == inspect(many, sample=99) == whole
    for wrong in (0, -1, 1.5):
        with pytest.raises(ValueError, match="neither a share"):
            inspect(many, sample=wrong)


def test_figures_are_kept_until_the_cache_changes(
    tmp_path: Path,
) -> None:
    """The second look reads no shard; other content, other code or damage is looked at again."""
    cache = tmp_path / "cache"
    shards = caches.random_shards(SETTINGS)
    caches.write_cache(cache, SETTINGS, shards)
    looked: list[int] = []

    def look() -> tuple[Report, bool]:
        looked.clear()
        report = inspect(cache, lambda done, total: looked.append(done), keep=True)
        return report, bool(looked)

    first, read = look()
    kept = cache / "stats/inspect.json"
    assert read and kept.is_file() and verify(cache).ok
    assert look() == (first, False)
    os.rename(cache, tmp_path / "moved")
    moved = inspect(tmp_path / "moved", keep=True)
    assert moved == dataclasses.replace(first, url=str(tmp_path / "moved"))
    os.rename(tmp_path / "moved", cache)
    kept.write_bytes(kept.read_bytes().replace(b"0.", b"1.", 1))
    assert look() == (first, True)
    value = read_json(Store(cache), "stats/inspect.json")
    value["key"]["version"] += 1
    publish_json(Store(cache), "stats/inspect.json", value)
    assert look()[1] and not look()[1]
    other = tmp_path / "other"
    caches.write_cache(other, SETTINGS, caches.random_shards(SETTINGS, seed=1))
    (other / "stats").mkdir()
    kept.rename(other / "stats/inspect.json")
    cache = other
    assert look()[1] and not look()[1]


def test_nothing_is_kept_where_it_must_not_be(tmp_path: Path) -> None:
    """Of a cache that is not final, of a sample, unless asked, or where nothing can be written."""
    shards = caches.random_shards(SETTINGS)
    writer = caches.start_cache(tmp_path / "cache", SETTINGS, shards)
    caches.write_shard(writer, 0, shards[0])
    inspect(tmp_path / "cache", keep=True)
    assert not (tmp_path / "cache/stats").exists()
    caches.write_shard(writer, 1, shards[1])
    writer.finalize()
    inspect(tmp_path / "cache")
    inspect(tmp_path / "cache", keep=True, sample=1)
    assert not (tmp_path / "cache/stats").exists()
    (tmp_path / "cache/stats").write_text("in the way")
    assert inspect(tmp_path / "cache", keep=True).complete
    assert (tmp_path / "cache/stats").read_text() == "in the way"
