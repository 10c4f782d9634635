"""Pages of Parquet are weighed before they are unpacked, whatever the footer says of them."""

import contextlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from decant.schemas import FormatError
from decant.storage.cache import paths
from decant.storage.cache.pages import check_pages, pages
from tests.support import FIXTURES, bombs

MOST = 8 << 20


def check(data: bytes, most: int = MOST, strict: bool = True) -> None:
    """Weigh a whole file."""
    metadata = pq.read_metadata(pa.BufferReader(data))
    check_pages(memoryview(data), 0, metadata, most, "file", strict=strict)


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("name", bombs.BOMBS)
def test_what_is_small_and_unpacks_to_much_is_refused(name: str, strict: bool) -> None:
    """A page, a list, a text that occurs again and again."""
    data = bombs.BOMBS[name]()
    assert len(data) < 200_000
    with pytest.raises(FormatError, match=r"file.*(values in|would unpack|by increments)"):
        check(data, strict=strict)


def table() -> pa.Table:
    """Columns of every kind that a cache has."""
    generator = np.random.default_rng(0)
    lists = pa.array([[{"n": i, "text": f"a{i}"}] * (i % 4) for i in range(3000)])
    return pa.table(
        {
            "texts": [f"text {i % 7}" for i in range(3000)],
            "long": [f"{i} " * 50 for i in range(3000)],
            "numbers": generator.integers(0, 9, 3000),
            "floats": generator.normal(size=3000).astype(np.float32),
            "bits": generator.integers(0, 2, 3000).astype(bool),
            "lists": lists,
            "bytes": pa.array([bytes([i % 256] * 16) for i in range(3000)], pa.binary(16)),
        }
    )


@pytest.mark.parametrize("version", ["1.0", "2.0"])
@pytest.mark.parametrize("compression", ["zstd", "snappy", "none"])
@pytest.mark.parametrize("dictionary", [True, False])
def test_what_arrow_writes_is_what_its_footer_says(
    version: str, compression: str, dictionary: bool
) -> None:
    """Pages of both versions, with statistics and checksums, of every kind of column."""
    data = bombs.parquet(
        table(),
        use_dictionary=dictionary,
        compression=compression,
        data_page_version=version,
        data_page_size=5000,
        write_statistics=True,
        write_page_checksum=True,
    )
    check(data)
    column = pq.read_metadata(pa.BufferReader(data)).row_group(0).column(1)
    start = column.dictionary_page_offset or column.data_page_offset
    found = list(pages(memoryview(data), start, start + column.total_compressed_size))
    assert sum(page.values for page in found if page.kind != 2) == 3000
    assert len(found) > 1


def test_shards_of_every_version_pass() -> None:
    """Those of the fixtures."""
    shards = sorted(FIXTURES.glob(f"version-*/*/{Path(paths.shard(0)).parent}/*.parquet"))
    assert len(shards) > 10
    for shard in shards:
        check(shard.read_bytes())


def test_no_changed_byte_of_a_header_is_more_than_a_line() -> None:
    """Every byte of some pages, changed: nothing but what the caller turns into one line."""
    data = bombs.parquet(table().slice(0, 40), use_dictionary=True)
    metadata = pq.read_metadata(pa.BufferReader(data))
    end = metadata.row_group(0).column(0).total_compressed_size + 4
    for at in range(4, end):
        for byte in (0, 1, 0x15, 0x1C, 0x7F, 0x80, 0xFF):
            changed = bytearray(data)
            changed[at] = byte
            with contextlib.suppress(ValueError, LookupError):
                check_pages(memoryview(changed), 0, metadata, MOST, "file")
