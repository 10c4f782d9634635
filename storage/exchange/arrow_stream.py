"""What the batches of an Arrow stream would unpack to, before any is unpacked.

Arrow allocates what the first eight bytes of a compressed buffer ask for. Where the buffers are
is said by flatbuffers (Arrow's `Message.fbs`), of which Arrow checks the form and shows nothing.
"""

from collections.abc import Iterator

import pyarrow as pa

DICTIONARY_BATCH, RECORD_BATCH = 2, 3
"""Kinds of messages with buffers."""


def unpacked_bytes(source: pa.NativeFile) -> Iterator[int]:
    """Of every batch of a stream, 0 where it is not compressed. Raises what Arrow raises."""
    for message in pa.ipc.MessageReader.open_stream(source):
        metadata = memoryview(message.metadata).cast("B")
        root = _number(metadata, 0, 4)
        kind_at, batch = _field(metadata, root, 1), _follow(metadata, root, 2)
        kind = metadata[kind_at] if kind_at else 0
        if kind == DICTIONARY_BATCH and batch:
            batch = _follow(metadata, batch, 1)
        if kind not in (DICTIONARY_BATCH, RECORD_BATCH) or not batch:
            continue
        buffers = _follow(metadata, batch, 2)
        if not buffers or not _follow(metadata, batch, 3):  # no BodyCompression
            yield 0
            continue
        body = memoryview(message.body).cast("B")
        total = 0
        for i in range(_number(metadata, buffers, 4)):
            at = buffers + 4 + 16 * i
            start, size = _number(metadata, at, 8), _number(metadata, at + 8, 8)
            total += max(_number(body, start, 8), size) if size > 8 else 0
        yield total


def _number(data: memoryview, at: int, size: int) -> int:
    """A signed number at a place. Raises ValueError outside of the data."""
    if not 0 <= at <= len(data) - size:
        raise ValueError(f"byte {at} lies outside of a message of {len(data)} bytes")
    return int.from_bytes(data[at : at + size], "little", signed=True)


def _field(data: memoryview, table: int, number: int) -> int:
    """Where a table has a field; 0: it has none."""
    fields = table - _number(data, table, 4)
    if 6 + 2 * number > _number(data, fields, 2):
        return 0
    offset = _number(data, fields + 4 + 2 * number, 2)
    return table + offset if offset else 0


def _follow(data: memoryview, table: int, number: int) -> int:
    """What a field points to; 0: there is none."""
    at = _field(data, table, number)
    return at + _number(data, at, 4) if at else 0
