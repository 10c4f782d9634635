"""Parquet that is small on disk and unpacks to more than anybody has, with footers that lie."""

import struct
from collections.abc import Callable

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq


def parquet(table: pa.Table, **options: object) -> bytes:
    """A table as one row group."""
    out = pa.BufferOutputStream()
    settings = {"compression": "zstd", "write_statistics": False, "use_dictionary": False}
    pq.write_table(table, out, **(settings | options), row_group_size=max(len(table), 1))
    return bytes(out.getvalue().to_pybytes())


def lying(data: bytes, *numbers: int) -> bytes:
    """The same file whose footer says 1 wherever it said one of these numbers."""
    start = len(data) - 8 - struct.unpack("<I", data[-8:-4])[0]
    footer = data[start:]
    for number in numbers:
        said = _varint(2 * number)
        assert said in footer
        one = bytes([130] + [128] * (len(said) - 2) + [0])  # as many bytes
        footer = footer.replace(said, one)
    return data[:start] + footer


def _varint(number: int) -> bytes:
    digits = []
    while number > 127:
        digits.append(number & 127 | 128)
        number >>= 7
    return bytes([*digits, number])


def sizes(data: bytes, column: int = 0) -> tuple[int, int]:
    """Values, and bytes unpacked, of a column, as the footer says."""
    group = pq.read_metadata(pa.BufferReader(data)).row_group(0)
    return group.column(column).num_values, group.column(column).total_uncompressed_size


def long_page() -> bytes:
    """A text of 16 MB in 600 bytes, of which the footer says that it has one byte."""
    data = parquet(pa.table({"a": ["x" * (16 << 20)]}))
    return lying(data, sizes(data)[1])


def long_list() -> bytes:
    """2 million numbers in 500 bytes, of which the footer says that there is one."""
    count = 2_000_000
    numbers = pa.ListArray.from_arrays(pa.array([0, count], pa.int32()), np.zeros(count, np.int64))
    data = parquet(pa.table({"a": numbers}), use_dictionary=True)
    return lying(data, count)


def long_texts() -> bytes:
    """1,000 times a text of 16 KB, which is stored once."""
    texts = pa.DictionaryArray.from_arrays(np.zeros(1000, np.int32), ["x" * (1 << 14)])
    return parquet(pa.table({"a": texts}), use_dictionary=True)


def growing_texts() -> bytes:
    """1,000 texts of 16 KB, each the one before it and nothing more."""
    texts = pa.array(["x" * (1 << 14)] * 1000)
    encoding = {"a": "DELTA_BYTE_ARRAY"}
    return parquet(pa.table({"a": texts}), column_encoding=encoding)


BOMBS: dict[str, Callable[[], bytes]] = {
    "a page": long_page,
    "a list": long_list,
    "texts": long_texts,
    "texts that go on": growing_texts,
}
