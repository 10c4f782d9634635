"""What is written is what earlier releases of the same format version wrote, to the byte.

`tests/fixtures/version-3` was written from the sequences below and is never written again.
"""

from pathlib import Path

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


@pytest.mark.parametrize("name", CASES)
def test_a_cache_has_the_bytes_it_had(name: str, tmp_path: Path) -> None:
    """The same sequences give the same manifest, columns and values; one pyarrow the same bytes."""
    shards = caches.random_shards(CASES[name], num_shards=2, sequences=2, seed=7, length=6)
    caches.write_cache(tmp_path, CASES[name], shards)
    before, now = CacheReader(fixture(3, name)), CacheReader(tmp_path)
    assert verify(fixture(3, name)).ok
    assert now.manifest.cache_id == before.manifest.upgraded().cache_id
    for group, same in zip(before.row_groups(), now.row_groups(), strict=True):
        assert now.read_table(same).equals(before.read_table(group))
    files = [Path(reader.url, "shards/part-000000.parquet") for reader in (before, now)]
    if len({pq.read_metadata(file).created_by for file in files}) == 1:
        for old, new in zip(before.index, now.index, strict=True):
            assert new.row_groups == old.row_groups and new.bytes == old.bytes
