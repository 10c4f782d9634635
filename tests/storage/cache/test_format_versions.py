"""Caches of every format version load for ever; newer ones are refused.

`tests/fixtures/version-N` was written by code of that version and is never written again; each
`.npz` holds what that code decoded from the cache beside it.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from decant.schemas import FORMAT_VERSION, FormatError
from decant.storage import CacheReader, CacheWriter, Store, migrate, verify
from decant.storage.files.sealed import publish_json, read_json
from decant.storage.inspect.collect import inspect
from decant.student_train import CacheStream
from decant.student_train.losses import sparse_divergence
from tests.support import caches
from tests.support.caches import fixture
from tests.support.commands import command

FINISHED = [(1, name) for name in ("compact", "sampled", "half")]
FINISHED += [(2, name) for name in ("compact", "sampled", "half", "drawn")]
FINISHED += [(3, name) for name in ("compact", "sampled", "half", "drawn", "topp")]
PRESENT = ("compact", "half", "topp", "drawn", "sampled", "numbered", "numbered-half")
LOADED = FINISHED + [(4, name) for name in PRESENT]
UNFINISHED = [(1, "unfinished", "compact"), (2, "unfinished", "compact")]
UNFINISHED += [(2, "unfinished-drawn", "drawn")]


def decoded(url: Path) -> dict[str, np.ndarray]:
    reader = CacheReader(url)
    rows = [reader.read(group) for group in reader.row_groups()]
    names = [*rows[0].known(), "input_ids"]
    return {name: np.concatenate([getattr(r, name) for r in rows]) for name in names}


@pytest.mark.parametrize(("version", "name"), LOADED)
def test_an_older_cache_loads_as_it_did(version: int, name: str) -> None:
    """Every decoded value is the one that the code of that format gave; it trains."""
    url = fixture(version, name)
    expected = np.load(url.with_suffix(".npz"))
    assert CacheReader(url).manifest.format_version == version
    found = decoded(url)
    for column in expected.files:
        np.testing.assert_array_equal(found[column], expected[column], err_msg=column)
    assert verify(url).ok
    report = inspect(url)
    assert report.complete and report.format_version == version
    assert report.rejected_sequences == 0 and report.rejected == ()
    assert report.logprob_error_mean is None and report.logprob_error_max is None
    batch = next(iter(CacheStream(url, batch_size=2)))
    logits = torch.zeros(batch.num_targets, report.shared_vocab_size)
    loss = sparse_divergence(logits, batch.targets, kind="fkl")
    assert batch.num_targets > 0 and bool(torch.isfinite(loss).all())


@pytest.mark.parametrize(("version", "name"), FINISHED)
def test_migrating_changes_no_value(version: int, name: str, tmp_path: Path) -> None:
    """The same shards under a manifest of the present version; the old cache stays as it was."""
    url = fixture(version, name)
    before = {p: p.read_bytes() for p in url.rglob("*") if p.is_file()}
    manifest = migrate(url, tmp_path / "new")
    assert manifest.format_version == FORMAT_VERSION
    assert manifest.totals is not None and manifest.totals.rejected == 0
    report = verify(tmp_path / "new")
    assert report.ok, report.problems
    expected = np.load(url.with_suffix(".npz"))
    found = decoded(tmp_path / "new")
    for column in expected.files:
        np.testing.assert_array_equal(found[column], expected[column], err_msg=column)
    assert before == {p: p.read_bytes() for p in url.rglob("*") if p.is_file()}


@pytest.mark.parametrize(("version", "name", "whole"), UNFINISHED)
def test_an_older_dump_is_completed_in_its_own_version(
    version: int, name: str, whole: str, tmp_path: Path
) -> None:
    """The shards still missing get the columns and the code that the committed ones have."""
    shutil.copytree(fixture(version, name), tmp_path / "cache")
    truncation = caches.Truncation(k=6)
    if whole == "drawn":
        truncation = caches.Truncation(method="sample", draws=12, seed=3)
    settings = caches.Settings(
        precision="compact", truncation=truncation, vocab_size=70_000, before_version_3=True
    )
    shards = caches.random_shards(settings, num_shards=2, sequences=2, seed=7, length=6)
    writer = CacheWriter(tmp_path / "cache")
    (missing,) = writer.missing()
    caches.write_shard(writer, missing.shard, shards[missing.shard])
    assert writer.finalize().format_version == version
    assert verify(tmp_path / "cache").ok
    expected = np.load(fixture(version, f"{whole}.npz"))
    for column, values in decoded(tmp_path / "cache").items():
        np.testing.assert_array_equal(values, expected[column], err_msg=column)
    old = fixture(version, whole) / "shards"
    for record in sorted(old.glob("*.json")):
        fields = json.loads(record.read_text())
        assert json.loads((tmp_path / "cache/shards" / record.name).read_text()).keys() == (
            fields.keys()
        )


def test_migrating_an_unfinished_or_present_cache_is_refused(tmp_path: Path) -> None:
    """Each with what to do; nothing is written."""
    with pytest.raises(FormatError, match="not complete: 1 of 2 shards"):
        migrate(fixture(1, "unfinished"), tmp_path / "new")
    present = tmp_path / "present"
    settings = caches.Settings()
    caches.write_cache(present, settings, caches.random_shards(settings))
    with pytest.raises(ValueError, match=f"is of format version {FORMAT_VERSION} already"):
        migrate(present, tmp_path / "new")
    assert not (tmp_path / "new").exists()
    with pytest.raises(FileExistsError, match="is not empty"):
        migrate(fixture(1, "half"), present)


def test_an_interrupted_migration_goes_on(tmp_path: Path) -> None:
    """What an earlier attempt left behind is written again; the manifest comes last."""
    new = tmp_path / "new"
    migrate(fixture(1, "half"), new)
    (new / "manifest.json").unlink()
    (new / "shards" / "part-000001.json").unlink()
    (new / "shards" / ".part-000001.json.0123abcd.tmp").write_bytes(b"{")
    migrate(fixture(1, "half"), new)
    assert verify(new).ok
    assert not list(new.rglob("*.tmp"))


def test_the_command_migrates(tmp_path: Path) -> None:
    """`python -m storage migrate OLD NEW` says what it made; a newer version is refused."""
    done = command("storage", "migrate", str(fixture(1, "compact")), str(tmp_path / "new"))
    assert done.code == 0 and f"format version {FORMAT_VERSION}" in done.stdout, done
    newer = tmp_path / "newer"
    shutil.copytree(fixture(1, "compact"), newer)
    store = Store(newer)
    fields = read_json(store, "manifest.json")
    publish_json(store, "manifest.json", {**fields, "format_version": 5, "colour": "red"})
    refused = command("storage", "verify", str(newer))
    assert refused.code == 1
    assert "format_version 5 cannot be read; this release reads versions 1 to 4" in refused.stdout
