"""What is written is what earlier releases of the same format version wrote, to the byte.

`tests/fixtures/version-3` and `version-4` were written from the sequences below and are never
written again.
"""

import dataclasses
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from decant.schemas import Truncation
from decant.storage import CacheReader, verify
from tests.support import caches
from tests.support.caches import Settings, fixture

CASES = {
    "compact": Settings(precision="compact", truncation=Truncation(k=6), vocab_size=70_000),
    "half": Settings(precision="f16", truncation=Truncation(k=8)),
    "topp": Settings(truncation=Truncation(method="topp", k=8, p=0.9, min_k=2)),
    "drawn": Settings(truncation=Truncation(method="sample", draws=12, seed=3), vocab_size=70_000),
    "sampled": Settings(
        precision="compact", truncation=Truncation(method="topk+sample", k=4, draws=6, seed=3)
    ),
}
NUMBERED = {
    "numbered": Settings(precision="compact", truncation=Truncation(k=31), vocab_size=9_000),
    "numbered-half": Settings(precision="f16", truncation=Truncation(k=31), vocab_size=60_000),
}
VERSIONED = [(3, name) for name in CASES] + [(4, name) for name in (*CASES, *NUMBERED)]


def write(url: Path, version: int, name: str) -> None:
    """The cache of the fixture of this name."""
    settings = dataclasses.replace({**CASES, **NUMBERED}[name], version_3=version == 3)
    more: dict[str, Any] = {"length": 6}
    if name in NUMBERED:
        more = {"length": 30, "favoured": range(7, settings.vocab_size, settings.vocab_size // 300)}
    shards = caches.random_shards(settings, num_shards=2, sequences=2, seed=7, **more)
    caches.write_cache(url, settings, shards)


@pytest.mark.parametrize(("version", "name"), VERSIONED)
def test_a_cache_has_the_bytes_it_had(version: int, name: str, tmp_path: Path) -> None:
    """The same sequences give the same manifest, columns and values; one pyarrow the same bytes."""
    write(tmp_path, version, name)
    before, now = CacheReader(fixture(version, name)), CacheReader(tmp_path)
    assert verify(fixture(version, name)).ok
    assert now.manifest.cache_id == before.manifest.cache_id
    for group, same in zip(before.row_groups(), now.row_groups(), strict=True):
        assert now.read_table(same).equals(before.read_table(group))
        numbered = before.read_stored(group).numbering, now.read_stored(same).numbering
        assert [n is not None for n in numbered] == [name in NUMBERED] * 2
    files = [Path(reader.url, "shards/part-000000.parquet") for reader in (before, now)]
    if len({pq.read_metadata(file).created_by for file in files}) == 1:
        for old, new in zip(before.index, now.index, strict=True):
            assert new.row_groups == old.row_groups and new.bytes == old.bytes
