"""Shards are plain Parquet: other readers give every column as it is stored.

Spark's reader needs a Java machine and is tried by hand (docs/format.md).
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import duckdb
import pandas
import polars
import pyarrow.parquet as pq
import pytest
from datasets import load_dataset

from decant.schemas import Truncation
from tests.support import caches

Columns = dict[str, list[Any]]
BASE = caches.Settings(truncation=Truncation(k=64), vocab_size=58_000)
CASES = {
    "topk-f32": dataclasses.replace(BASE, precision="f32"),
    "topk-f16": dataclasses.replace(BASE, precision="f16"),
    "topk-compact": dataclasses.replace(BASE, precision="compact"),
    "topk-two-bytes": dataclasses.replace(BASE, precision="compact", vocab_size=3_000),
    "topp": dataclasses.replace(
        BASE, precision="compact", truncation=Truncation(method="topp", k=9, p=0.8)
    ),
    "topk+sample": dataclasses.replace(
        BASE, precision="f16", truncation=Truncation(method="topk+sample", k=5, draws=4)
    ),
    "sample": dataclasses.replace(BASE, truncation=Truncation(method="sample", draws=7)),
    "label": dataclasses.replace(BASE, truncation=Truncation(method="label")),
}


@pytest.fixture(scope="module", params=CASES)
def shard(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Parquet file of a cache whose rows are nearly all targets, in several row groups."""
    settings = CASES[request.param]
    url = tmp_path_factory.mktemp("readers")
    (sequences,) = caches.random_shards(
        settings, num_shards=1, sequences=2, length=30, favoured=range(0, settings.vocab_size, 97)
    )
    writer = caches.start_cache(url, settings, [sequences])
    caches.write_shard(writer, 0, sequences, row_group_rows=30)
    writer.finalize()
    return url / "shards/part-000000.parquet"


def by_duckdb(path: Path) -> Columns:
    table = duckdb.sql(f"select * from '{path}'").to_arrow_table()
    return dict(table.to_pydict())


def by_polars(path: Path) -> Columns:
    frame = polars.read_parquet(path)
    scanned = polars.scan_parquet(path).filter(polars.col("is_target")).collect()
    assert scanned.equals(frame.filter(polars.col("is_target")))
    return frame.to_dict(as_series=False)


def by_pandas(path: Path) -> Columns:
    frame = pandas.read_parquet(path)
    return {str(name): frame[name].tolist() for name in frame.columns}


def by_datasets(path: Path) -> Columns:
    folder = str(path.parent / "datasets")
    rows = load_dataset("parquet", data_files=str(path), split="train", cache_dir=folder)
    return dict(rows.to_dict())


@pytest.mark.parametrize("read", [by_duckdb, by_polars, by_pandas, by_datasets])
def test_another_reader_gives_every_column(read: Callable[[Path], Columns], shard: Path) -> None:
    """Of every method and precision, value for value what Arrow gives."""
    expected = pq.ParquetFile(shard, page_checksum_verification=True).read().to_pydict()
    found = read(shard)
    assert list(found) == list(expected)
    for name, values in expected.items():
        assert found[name] == values, name
