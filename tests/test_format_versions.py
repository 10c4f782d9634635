"""Caches of older format versions load for ever; newer ones are refused.

`tests/fixtures/version-1` was written by release 0.1.0's first format and is never written again;
each `.npz` holds what that release decoded from the cache beside it.
"""

import shutil
from pathlib import Path

import numpy as np
import pytest

from schemas import FORMAT_VERSION, FormatError
from storage import CacheReader, CacheWriter, Store, migrate, verify
from storage.inspect import inspect
from student_train import CacheStream
from tests import caches
from tests.commands import command

FIXTURES = Path(__file__).parent / "fixtures" / "version-1"
FINISHED = ("compact", "sampled", "half")


def decoded(url: Path) -> dict[str, np.ndarray]:
    reader = CacheReader(url)
    rows = [reader.read(group) for group in reader.row_groups()]
    names = ("token_ids", "logprobs", "log_z", "log_tail", "label_logprob", "input_ids")
    return {name: np.concatenate([getattr(r, name) for r in rows]) for name in names}


@pytest.mark.parametrize("name", FINISHED)
def test_a_version_1_cache_loads_as_it_did(name: str) -> None:
    """Every decoded value is the one that the release of that format gave."""
    expected = np.load(FIXTURES / f"{name}.npz")
    assert CacheReader(FIXTURES / name).manifest.format_version == 1
    found = decoded(FIXTURES / name)
    for column in expected.files:
        np.testing.assert_array_equal(found[column], expected[column], err_msg=column)
    assert verify(FIXTURES / name).ok
    report = inspect(FIXTURES / name)
    assert report.complete and report.format_version == 1
    assert next(iter(CacheStream(FIXTURES / name, batch_size=2))).num_targets > 0


@pytest.mark.parametrize("name", FINISHED)
def test_migrating_changes_no_value(name: str, tmp_path: Path) -> None:
    """The same shards under a manifest of the present version; the old cache stays as it was."""
    before = {p: p.read_bytes() for p in FIXTURES.joinpath(name).rglob("*") if p.is_file()}
    manifest = migrate(FIXTURES / name, tmp_path / "new")
    assert manifest.format_version == FORMAT_VERSION
    report = verify(tmp_path / "new")
    assert report.ok, report.problems
    expected = np.load(FIXTURES / f"{name}.npz")
    found = decoded(tmp_path / "new")
    for column in expected.files:
        np.testing.assert_array_equal(found[column], expected[column], err_msg=column)
    assert before == {p: p.read_bytes() for p in FIXTURES.joinpath(name).rglob("*") if p.is_file()}


def test_a_version_1_dump_is_completed_in_its_own_version(tmp_path: Path) -> None:
    """The shards still missing get the code that the committed ones have."""
    shutil.copytree(FIXTURES / "unfinished", tmp_path / "cache")
    settings = caches.Settings(
        precision="compact", truncation=caches.Truncation(k=6), vocab_size=70_000
    )
    shards = caches.random_shards(settings, num_shards=2, sequences=2, seed=7, length=6)
    writer = CacheWriter(tmp_path / "cache")
    (missing,) = writer.missing()
    caches.write_shard(writer, missing.shard, shards[missing.shard])
    assert writer.finalize().format_version == 1
    assert verify(tmp_path / "cache").ok
    expected = np.load(FIXTURES / "compact.npz")
    for column, values in decoded(tmp_path / "cache").items():
        np.testing.assert_array_equal(values, expected[column], err_msg=column)


def test_migrating_an_unfinished_or_present_cache_is_refused(tmp_path: Path) -> None:
    """Each with what to do; nothing is written."""
    with pytest.raises(FormatError, match="not complete: 1 of 2 shards"):
        migrate(FIXTURES / "unfinished", tmp_path / "new")
    present = tmp_path / "present"
    settings = caches.Settings()
    caches.write_cache(present, settings, caches.random_shards(settings))
    with pytest.raises(ValueError, match=f"is of format version {FORMAT_VERSION} already"):
        migrate(present, tmp_path / "new")
    assert not (tmp_path / "new").exists()
    with pytest.raises(FileExistsError, match="is not empty"):
        migrate(FIXTURES / "half", present)


def test_an_interrupted_migration_goes_on(tmp_path: Path) -> None:
    """What an earlier attempt left behind is written again; the manifest comes last."""
    new = tmp_path / "new"
    migrate(FIXTURES / "half", new)
    (new / "manifest.json").unlink()
    (new / "shards" / "part-000001.json").unlink()
    (new / "shards" / ".part-000001.json.0123abcd.tmp").write_bytes(b"{")
    migrate(FIXTURES / "half", new)
    assert verify(new).ok
    assert not list(new.rglob("*.tmp"))


def test_the_command_migrates(tmp_path: Path) -> None:
    """`python -m storage migrate OLD NEW` says what it made; a newer version is refused."""
    done = command("storage", "migrate", str(FIXTURES / "compact"), str(tmp_path / "new"))
    assert done.code == 0 and f"format version {FORMAT_VERSION}" in done.stdout, done
    newer = tmp_path / "newer"
    shutil.copytree(FIXTURES / "compact", newer)
    store = Store(newer)
    fields = store.read_json("manifest.json")
    store.publish_json("manifest.json", {**fields, "format_version": 3, "colour": "red"})
    refused = command("storage", "verify", str(newer))
    assert refused.code == 1
    assert "format_version 3 cannot be read; this release reads versions 1 to 2" in refused.stdout
