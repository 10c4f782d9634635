"""What the pages of a Parquet file would unpack to, read from their headers before any is unpacked.

Arrow allocates what the header of a page asks for, whatever the footer says of the column: bounds
taken from the footer alone bound nothing. Headers are Thrift's compact protocol
(parquet-format, `PageHeader`).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from decant.schemas import FormatError

MAX_HEADER = 1 << 15
"""Bytes of a page's header: statistics of more than 4 KB each are left out of it."""
MAX_NESTING = 8
"""Structs in structs of a header."""
DATA, DICTIONARY, DATA_V2 = 0, 2, 3
"""Kinds of pages."""
WIDTHS = {"BOOLEAN": 1, "INT32": 4, "INT64": 8, "INT96": 12, "FLOAT": 4, "DOUBLE": 8}
"""Bytes of a value in memory, by physical type."""
INCREMENTAL, LENGTHS = 7, 6
"""Encodings of texts: each is the one before it with another end; lengths, then all the bytes."""


class Bytes(Protocol):
    """The bytes of a file, in memory or not."""

    def __len__(self) -> int:
        """How many there are."""
        ...

    def __getitem__(self, part: slice, /) -> bytes | memoryview:
        """Some of them."""
        ...


@dataclass(frozen=True, slots=True)
class Page:
    """What a header says, and where the page behind it is in the data."""

    kind: int
    unpacked: int
    values: int
    encoding: int
    start: int
    end: int


def check_pages(
    data: Bytes,
    offset: int,
    metadata: pq.FileMetaData,
    most: int,
    where: str,
    *groups: int,
    strict: bool = True,
) -> None:
    """Raise FormatError if row groups of a file, or all, would unpack to more than `most` bytes.

    That is the pages, unpacked, and what their values take in memory. `data` has the bytes of the
    file from `offset` on. `strict`: the pages are what the footer says, as where Arrow wrote them.
    Raises LookupError or ValueError on bytes that are no pages.
    """
    total = 0
    for i in groups or range(metadata.num_row_groups):
        group = metadata.row_group(i)
        for j in range(group.num_columns):
            column = group.column(j)
            what = f"{where}: column {column.path_in_schema}"
            total += _unpacked(data, offset, column, metadata.schema.column(j), most, what, strict)
    if total > most:
        raise FormatError(f"{where}: its columns would unpack to {total} bytes, at most {most}")


def _unpacked(
    data: Bytes,
    offset: int,
    column: pq.ColumnChunkMetaData,
    kind: pq.ColumnSchema,
    most: int,
    what: str,
    strict: bool,
) -> int:
    """Bytes of a column in memory."""
    start = column.data_page_offset
    if column.has_dictionary_page:
        start = min(start, column.dictionary_page_offset)
    start -= offset
    end = start + column.total_compressed_size
    if not 0 <= start <= end <= len(data):
        raise FormatError(f"{what}: its pages lie outside of the row group")
    unpacked = values = 0
    dictionary: Page | None = None
    for page in pages(data, start, end):
        unpacked += page.unpacked
        if page.kind == DICTIONARY:
            dictionary = page
        elif page.encoding == INCREMENTAL or (strict and page.encoding == LENGTHS):
            raise FormatError(f"{what}: encoded by increments: write it plain or with a dictionary")
        else:
            values += page.values
    if strict and (values != column.num_values or unpacked > column.total_uncompressed_size):
        raise FormatError(
            f"{what}: its pages hold {values} values in {unpacked} bytes, the footer says "
            f"{column.num_values} in {column.total_uncompressed_size}"
        )
    if kind.physical_type != "BYTE_ARRAY":
        width = WIDTHS.get(kind.physical_type, kind.length)
        return max(unpacked, values * width)
    if dictionary and dictionary.unpacked * values > most >= dictionary.unpacked:
        longest = _longest(data[dictionary.start : dictionary.end], dictionary, column.compression)
        if longest * values > most:
            raise FormatError(
                f"{what}: {values} values of up to {longest} bytes would unpack to more than {most}"
            )
    return unpacked


def _longest(packed: bytes | memoryview, page: Page, compression: str) -> int:
    """Bytes of the longest text of a dictionary."""
    whole = bytes(packed)
    if compression != "UNCOMPRESSED":
        codec = pa.Codec(compression.lower())
        whole = codec.decompress(whole, page.unpacked, asbytes=True)
    at = longest = 0
    while at < len(whole):
        size = int.from_bytes(whole[at : at + 4], "little")
        longest = max(longest, size)
        at += 4 + size
    return longest


def pages(data: Bytes, start: int, end: int) -> Iterator[Page]:
    """The pages of a column, which lie one behind the other from `start` to `end`.

    Raises LookupError or ValueError on bytes that are none.
    """
    while start < end:
        header = data[start : min(start + MAX_HEADER, end)]
        fields, size = _struct(header, 0, 0)
        kind, unpacked, packed = (_count(fields.get(i), "header") for i in (1, 2, 3))
        inner = fields.get({DATA: 5, DICTIONARY: 7, DATA_V2: 8}.get(kind, 0))
        if not isinstance(inner, dict) or start + size + packed > end:
            raise ValueError(f"a page of kind {kind} and {packed} bytes, which is none or too long")
        values = _count(inner.get(1), "values")
        encoding = _count(inner.get(4 if kind == DATA_V2 else 2), "encoding")
        start += size + packed
        yield Page(kind, unpacked, values, encoding, start - packed, start)


def _count(value: Any, name: str) -> int:
    if type(value) is not int or not 0 <= value < 1 << 31:
        raise ValueError(f"a page without a {name} that is a number of 31 bits")
    return value


def _varint(data: bytes | memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
        shift += 7
        if shift > 63:
            raise ValueError("a number of more than 64 bits")


def _struct(data: bytes | memoryview, at: int, depth: int) -> tuple[dict[int, Any], int]:
    """The numbers of 32 bits and the structs of a struct by field, and where it ends."""
    if depth > MAX_NESTING:
        raise ValueError(f"a page's header is nested deeper than {MAX_NESTING} levels")
    fields: dict[int, Any] = {}
    number = 0
    while byte := data[at]:
        at += 1
        if byte >> 4:
            number += byte >> 4
        else:
            zigzag, at = _varint(data, at)
            number = (zigzag >> 1) ^ -(zigzag & 1)
        value, at = _value(data, at, byte & 15, depth)
        if number in fields:  # a reader may take either
            raise ValueError(f"field {number} occurs twice in a page's header")
        fields[number] = value
    return fields, at + 1


def _value(data: bytes | memoryview, at: int, kind: int, depth: int) -> tuple[Any, int]:
    """A value of a type of Thrift's compact protocol, and where it ends; of other types None.

    Readers overlook a field whose type is not the one they expect.
    """
    if kind in (1, 2):
        return None, at
    if kind == 3:
        return None, at + 1
    if kind in (4, 5, 6):
        zigzag, at = _varint(data, at)
        return ((zigzag >> 1) ^ -(zigzag & 1)) if kind == 5 else None, at
    if kind == 7:
        return None, at + 8
    if kind == 8:
        size, at = _varint(data, at)
        return None, at + size
    if kind == 12:
        return _struct(data, at, depth + 1)
    raise ValueError(f"type {kind} in a page's header")
