"""JSON with a hash of itself, and compressed JSON lines whose hash the manifest holds."""

import io
import json
from collections.abc import Iterator
from typing import Any

import xxhash
import zstandard

from decant.schemas import FormatError, Segment
from decant.schemas.strict import canonical, check_depth
from decant.storage.files.store import Store

SEAL = "checksum"
"""The field of a sealed JSON file that holds the xxh3_128 of all the others."""
MAX_JSON = 1 << 26
"""Bytes of a sealed JSON file."""
MAX_SEGMENT = 1 << 30
"""Bytes of a segment on disk."""
MAX_LINE = 1 << 24
"""Bytes of a line of a segment."""
MAX_WINDOW = 1 << 27
"""Bytes that zstd may look back: its own ceiling for streams."""


def sealed(value: dict[str, Any]) -> bytes:
    """The bytes of a JSON file that holds these fields and their hash."""
    assert SEAL not in value
    whole = {**value, SEAL: xxhash.xxh3_128(canonical(value)).hexdigest()}
    return json.dumps(whole, indent=1, ensure_ascii=False).encode() + b"\n"


def publish_json(store: Store, name: str, value: dict[str, Any], *, new: bool = False) -> None:
    """Publish an object with a checksum over its content, so that any changed byte shows."""
    store.publish(name, sealed(value), new=new)


def read_json(store: Store, name: str) -> dict[str, Any]:
    """Read what `publish_json` wrote.

    Raises FormatError if it is absent, not JSON, or if any byte differs from what was sealed.
    """
    where = store.path(name)
    try:
        raw = store.read_at_most(name, MAX_JSON)
        value = json.loads(raw)
    except FileNotFoundError:
        raise FormatError(f"{where} is missing") from None
    except FormatError:
        raise
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{where} is damaged: not JSON ({error})") from None
    check_depth(value, where)
    if not isinstance(value, dict) or SEAL not in value:
        raise FormatError(f"{where} is damaged: no checksum inside")
    found = value.pop(SEAL)
    try:
        again = sealed(value)
    except ValueError as error:  # a NaN or an infinity, which Python's parser lets through
        raise FormatError(f"{where} is damaged: not JSON ({error})") from None
    if again != raw:
        expected = xxhash.xxh3_128(canonical(value)).hexdigest()
        raise FormatError(
            f"{where} is damaged: checksum {str(found)[:32]!r} inside, its content gives {expected}"
        )
    return value


def publish_segment(
    store: Store, name: str, entries: list[dict[str, Any]], *, new: bool = False
) -> Segment:
    """Publish JSON lines, zstd-compressed, and return what the manifest must say of them."""
    text = b"".join(canonical(entry) + b"\n" for entry in entries)
    data = zstandard.ZstdCompressor(level=9, write_checksum=True).compress(text)
    store.publish(name, data, new=new)
    return segment_of(name, data, len(entries))


def segment_of(name: str, data: bytes, entries: int) -> Segment:
    """What the manifest must say of a file with these bytes."""
    digest = xxhash.xxh3_128(data).hexdigest()
    return Segment(name=name, entries=entries, bytes=len(data), xxh3_128=digest)


def read_sealed(store: Store, segment: Segment) -> bytes:
    """The bytes of a segment. Raises FormatError if they are not what the manifest says."""
    where = store.path(segment.name)
    if segment.bytes > MAX_SEGMENT:
        raise FormatError(
            f"{where}: the manifest says {segment.bytes} bytes, at most {MAX_SEGMENT}"
        )
    try:
        data = store.read_range(segment.name, 0, segment.bytes + 1)
    except FileNotFoundError:
        raise FormatError(f"{where} is missing") from None
    found = xxhash.xxh3_128(data).hexdigest()
    if len(data) != segment.bytes or found != segment.xxh3_128:
        raise FormatError(
            f"{where} is damaged: {len(data)} bytes with hash {found}, the manifest says "
            f"{segment.bytes} with {segment.xxh3_128}"
        )
    return data


def read_segment(store: Store, segment: Segment) -> Iterator[Any]:
    """The entries of a segment of JSON lines. Raises FormatError as `read_sealed`."""
    where = store.path(segment.name)
    unpack = zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW)
    count = 0
    try:
        lines = io.BufferedReader(unpack.stream_reader(io.BytesIO(read_sealed(store, segment))))
        while line := lines.readline(MAX_LINE):
            count += 1
            if count > segment.entries or not line.endswith(b"\n"):
                break
            value = json.loads(line)
            check_depth(value, f"{where}: line {count}")
            yield value
    except FormatError:
        raise
    except (ValueError, RecursionError, zstandard.ZstdError) as error:
        raise FormatError(f"{where}: line {count} cannot be read: {error}") from None
    if count != segment.entries or line:
        raise FormatError(
            f"{where}: the manifest says {segment.entries} lines of at most {MAX_LINE} bytes, "
            + ("another or a longer one comes" if line else f"found {count}")
        )
