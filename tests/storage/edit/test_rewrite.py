"""Older caches with their shards in the present form: the same values, readable by everyone."""

import dataclasses
import functools
from pathlib import Path

import duckdb
import numpy as np
import pytest

from decant.schemas import FORMAT_VERSION, FormatError, Truncation
from decant.storage import CacheReader, CacheWriter, Store, migrate, verify
from decant.storage.cache import paths
from decant.storage.cache.carried import refuse_changed
from decant.storage.cache.logprobs import of_planes
from decant.storage.cache.plan import plan_of
from decant.storage.edit.derived import make, staging_of
from decant.storage.edit.rewrite import rewrite
from tests.support import caches
from tests.support.caches import fixture
from tests.support.commands import Command, command, end_before

FINISHED = [(1, name) for name in ("compact", "sampled", "half")]
FINISHED += [(2, name) for name in ("compact", "sampled", "half", "drawn")]
FINISHED += [(3, name) for name in ("compact", "sampled", "half", "drawn", "topp")]


def assert_same_values(new: Path, old: Path) -> None:
    """Row for row: all that is decoded, the stored codes, and what the records say."""
    ours, theirs = CacheReader(new), CacheReader(old)
    assert len(ours) == len(theirs)
    for found, expected in zip(ours, theirs, strict=True):
        caches.assert_equal(found, expected)
        for name, values in expected.known().items():
            assert getattr(found, name).tobytes() == values.tobytes(), name
    for cache, other in ((ours, theirs), (theirs, ours)):
        assert [s.sample_id for s in cache] == [s.sample_id for s in other]
    if ours.manifest.precision == "compact":
        np.testing.assert_array_equal(codes(ours), codes(theirs))
    assert list(ours.rejected) == list(theirs.rejected)
    assert ours.plan == theirs.plan
    for now, before in zip(ours.index, theirs.index, strict=True):
        kept = (now.kl_error_max, now.seconds, now.worker, now.targets)
        assert kept == (before.kl_error_max, before.seconds, before.worker, before.targets)


def codes(cache: CacheReader) -> np.ndarray:
    """[n, K] the steps of the compact codes of all targets, zero in unused slots."""
    found = []
    for rows in map(cache.read_stored, cache.row_groups()):
        columns = [column[rows.target_rows] for column in rows.topk_logprob or ()]
        steps = of_planes(columns, cache.manifest.layout.slots, compact=True)
        found.append(steps)
    return np.concatenate(found)


@pytest.mark.parametrize(("version", "name"), FINISHED)
def test_a_rewritten_cache_has_every_value(version: int, name: str, tmp_path: Path) -> None:
    """Of every older form: bit for bit, whole, in the present form, open to DuckDB."""
    old, new = fixture(version, name), tmp_path / "new"
    manifest = make(new, rewrite(CacheReader(old)))
    before = CacheReader(old).manifest
    assert manifest.format_version == FORMAT_VERSION and manifest.compact == before.compact
    assert (manifest.source, manifest.sequences) == (before.source, before.sequences)
    assert_same_values(new, old)
    rows = duckdb.sql(f"select * from '{new}/shards/*.parquet'").to_arrow_table()
    assert len(rows) == manifest.num_tokens
    if manifest.precision != "none":
        assert manifest.ids == "ranked" and "topk_logprob" not in rows.column_names
    with pytest.raises(ValueError, match="nothing is to be rewritten"):
        rewrite(CacheReader(new))


def version_3(url: Path, *, precision: str = "compact") -> Path:
    """Two shards of enough sequences for a numbering, one rejected, of answers of the teacher."""
    settings = caches.Settings(
        truncation=Truncation(k=16), vocab_size=3_000, precision=precision, version_3=True
    )
    store = Store(url)
    with store.staged(paths.generated(0)) as answers:
        answers.write_bytes(b"what the teacher answered")
    generated = {paths.generated(0): store.hash(paths.generated(0))}
    draft = dataclasses.replace(settings.draft(), source={"generated": generated})
    shards = caches.random_shards(settings, sequences=5, length=30, favoured=range(0, 3_000, 15))
    writer = CacheWriter.create(url, draft, plan_of(shards))
    for number, sequences in enumerate(shards):
        with writer.shard(number, row_group_rows=100) as shard:
            for at, sequence in enumerate(sequences):
                if (number, at) == (1, 3):
                    tokens = sequence.input_ids, sequence.is_target
                    shard.reject(sequence.sample_id, *tokens, "out of memory")
                else:
                    shard.write(sequence)
    writer.finalize()
    return url


@pytest.mark.parametrize("precision", ["compact", "f16", "f32"])
def test_every_value_is_kept_and_takes_fewer_bytes(precision: str, tmp_path: Path) -> None:
    """Numbered ids, two temperatures, a rejected sequence, answers that the manifest pins."""
    old, new = version_3(tmp_path / "old", precision=precision), tmp_path / "new"
    before = {p: p.read_bytes() for p in old.rglob("*") if p.is_file()}
    manifest = make(new, rewrite(CacheReader(old)))
    assert_same_values(new, old)
    assert any(CacheReader(new).read_stored(g).numbering for g in CacheReader(new).row_groups())
    was = CacheReader(old).manifest.totals
    assert manifest.totals and was and manifest.totals.bytes < was.bytes
    assert {p: p.read_bytes() for p in old.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize("step", [10, 30])
def test_a_killed_rewriting_goes_on(step: int, tmp_path: Path) -> None:
    """The same command completes it; nothing has the new name before."""
    old, new = version_3(tmp_path / "old"), tmp_path / "new"
    words = ("migrate", str(old), str(new), "--rewrite")
    killed = functools.partial(end_before, step, str(tmp_path))
    before = Command("decant", *words, first=killed).result()
    assert before.code == -9 and not new.exists(), before.stderr
    assert staging_of(new).exists()
    again = command("decant", *words)
    assert again.code == 0 and "format version 4" in again.stdout, again
    assert_same_values(new, old)
    assert verify(new).ok and not staging_of(new).exists()


def test_a_migrated_cache_can_be_rewritten_still(tmp_path: Path) -> None:
    """One of the present version whose shards have an older form; a dry run writes nothing."""
    old, linked = version_3(tmp_path / "old"), tmp_path / "linked"
    migrate(old, linked)
    assert verify(linked).ok
    words = ("migrate", str(linked), str(tmp_path / "new"), "--rewrite")
    done = command("decant", *words, "--dry-run")
    assert done.code == 0 and "2 of them to be written anew" in done.stdout, done
    assert not (tmp_path / "new").exists()
    make(tmp_path / "new", rewrite(CacheReader(linked)))
    assert_same_values(tmp_path / "new", old)


def test_damage_is_not_carried_along(tmp_path: Path) -> None:
    """A flipped bit of the old shard ends it, with the file's name; no cache is made."""
    old = version_3(tmp_path / "old")
    shard = old / paths.shard(1)
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    with pytest.raises(FormatError, match=r"part-000001\.parquet is damaged"):
        make(tmp_path / "new", rewrite(CacheReader(old)))
    assert not (tmp_path / "new").exists()


def test_a_value_that_would_change_is_refused(tmp_path: Path) -> None:
    """Whatever makes a cache of others compares what it stores with what it was given."""
    rows = CacheReader(fixture(3, "compact")).read(
        CacheReader(fixture(3, "compact")).row_groups()[0]
    )
    given = list(rows)
    refuse_changed(given, rows)
    moved = given[0].label_logprob + np.float32(1e-6)
    with pytest.raises(FormatError, match=f"{given[0].sample_id}: label_logprob would not be"):
        refuse_changed([dataclasses.replace(given[0], label_logprob=moved), *given[1:]], rows)
