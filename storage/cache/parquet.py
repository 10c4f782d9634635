"""Parquet's options for a shard, where the bytes of a row group are, and reading them alone."""

import contextlib
import io
from collections.abc import Iterator

import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from decant.schemas import ByteRange, FormatError

ZSTD_LEVEL = 1


DENSE = 0.9
"""Share of rows that are targets from which a shard counts as dense."""


NOISE_SLOTS = 64
"""So many entries make the low bytes of the ids noise: zstd gains 2 % in a fifth of the reading."""


def parquet_options(schema: pa.Schema, dense: bool) -> dict:
    """The physical choices of a shard, `dense` where nearly every row of it is a target.

    `docs/measurements.md` says what each one is worth.
    """
    blobs = [f.name for f in schema if pa.types.is_fixed_size_binary(f.type)]
    floats = [f.name for f in schema if f.type == pa.float32()]
    split = floats  # every reader of Parquet has this encoding for floats, not all for blobs
    if "num_kept" not in schema.names and "topk_logprob" in schema.names:
        split = ["topk_logprob", *floats]  # columns of versions before 4
    full = "topk_mid" in schema.names and "num_kept" not in schema.names
    noise = full and dense and schema.field("topk_lo").type.byte_width >= NOISE_SLOTS
    plain = {"topk_lo"} if noise else set()
    squeezed = [name for name in schema.names if name not in plain]
    return {
        "compression": {name: "none" if name in plain else "zstd" for name in schema.names},
        "compression_level": dict.fromkeys(squeezed, ZSTD_LEVEL),
        "use_dictionary": ["sequence", "sample_id"],
        "column_encoding": {
            **{name: "BYTE_STREAM_SPLIT" for name in split},
            "position": "DELTA_BINARY_PACKED",
        },
        "write_statistics": [f.name for f in schema if f.name not in blobs],
        "write_page_checksum": True,
    }


def extent(group: pq.RowGroupMetaData) -> tuple[int, int]:
    """First and last byte + 1 of a row group in its file."""
    starts, ends = [], []
    for i in range(group.num_columns):
        column = group.column(i)
        start = column.data_page_offset
        if column.has_dictionary_page:
            start = min(start, column.dictionary_page_offset)
        starts.append(start)
        ends.append(start + column.total_compressed_size)
    return min(starts), max(ends)


def byte_range(whole: memoryview, start: int, end: int) -> ByteRange:
    """The range of these bytes, with their hash."""
    digest = xxhash.xxh3_128(whole[start:end]).hexdigest()
    return ByteRange(offset=start, length=end - start, xxh3_128=digest)


UNREADABLE = (
    *(OSError, ValueError, LookupError, ArithmeticError, MemoryError, TypeError),
    pa.ArrowException,
)
"""What Arrow raises on bytes that are no Parquet, or ask for more memory than there is."""


@contextlib.contextmanager
def reading(what: str) -> Iterator[None]:
    """Turn whatever Arrow raises on bytes that are no Parquet into a FormatError on `what`.

    An OSError with a number is the machine's word, not on the bytes, and passes.
    """
    try:
        yield
    except FormatError:
        raise
    except UNREADABLE as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise FormatError(f"{what} cannot be read: {' '.join(str(error).split())}") from error


def differences(expected: pa.Schema, found: pa.Schema) -> str:
    """In which columns two schemas differ, in one line; the first few."""

    def kind(schema: pa.Schema, name: str) -> str:
        at = schema.get_all_field_indices(name)
        kinds = [str(schema.field(i)).partition(": ")[2] for i in at]
        return " ".join(" and ".join(kinds).split())[:80] or "none"

    names = dict.fromkeys([*expected.names, *found.names])
    parts = [
        f"{name[:80]!r}: expected {kind(expected, name)}, found {kind(found, name)}"
        for name in names
        if kind(expected, name) != kind(found, name)
    ]
    more = f" and {len(parts) - 3} more" if len(parts) > 3 else ""
    return "; ".join(parts[:3]) + more if parts else "other order or metadata of columns"


class Window(io.RawIOBase):
    """A seekable file of `size` bytes of which only one verified run can be read."""

    def __init__(self, offset: int, data: bytes, size: int) -> None:
        super().__init__()
        self._offset, self._data, self._size, self._at = offset, memoryview(data), size, 0

    def readable(self) -> bool:
        """It is."""
        return True

    def seekable(self) -> bool:
        """It is."""
        return True

    def tell(self) -> int:
        """The place of the next byte."""
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go to a place."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        self._at = base + offset
        return self._at

    def read(self, size: int = -1) -> memoryview:
        """Bytes of the run; raises OSError for any other."""
        start = self._at - self._offset
        stop = len(self._data) if size < 0 else start + size
        if start < 0 or stop > len(self._data):
            raise OSError(
                f"bytes {self._at}+{size} lie outside the verified run at {self._offset} of "
                f"{len(self._data)}"
            )
        self._at += stop - start
        return self._data[start:stop]
