"""Read JSON lines, plain, gzip or zstd, as a stream; a bad line or a cut file is named.

Owns: decompression, lines, and what counts as one record's JSON. Knows nothing of what the fields
mean.
"""

import gzip
import json
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import zstandard

from decant.teacher_dump.inputs.records import Row, SourceError

READ_BYTES = 1 << 16


def jsonl_rows(name: str, path: Path) -> Iterator[Row]:
    """Yield the rows of one file. Raises SourceError naming the line that cannot be used."""
    number, index = 0, 0
    try:
        for number, line in enumerate(_lines(path), start=1):
            if line.isspace():
                continue
            where = f"{name} line {number}"
            yield f"{name}:{index}", where, _parse_line(line, where, first=number == 1)
            index += 1
    except (EOFError, zlib.error, OSError, zstandard.ZstdError) as error:
        raise SourceError(
            f"{path} is damaged or cut short after line {number}: {error}; copy or write it again"
        ) from error
    if index == 0:
        raise SourceError(f"{path} is empty: expected at least one record; remove the file")


def _parse_line(line: bytes, where: str, *, first: bool) -> dict[str, Any]:
    try:
        text = line.decode("utf-8-sig" if first else "utf-8")
        fields = json.loads(text)
        if (
            "\\ud" in text or "\\uD" in text
        ):  # half of an escaped surrogate pair cannot be written as UTF-8
            json.dumps(fields, ensure_ascii=False).encode()
    except UnicodeError as error:
        raise SourceError(f"{where}: not valid UTF-8: {error}; convert or repair it") from error
    except (ValueError, RecursionError) as error:
        raise SourceError(
            f"{where}: not readable as JSON: {error}; each line must be one whole JSON object"
        ) from error
    if not isinstance(fields, dict):
        raise SourceError(
            f"{where}: expected a JSON object, found {type(fields).__name__} {text.strip()[:40]!r}"
        )
    return fields


def _lines(path: Path) -> Iterator[bytes]:
    if path.name.endswith(".gz"):
        with gzip.open(path) as file:
            yield from file
    elif path.name.endswith(".zst"):
        yield from _split_lines(_zstd_chunks(path))
    else:
        with path.open("rb") as file:
            yield from file


def _zstd_chunks(path: Path) -> Iterator[bytes]:
    """Decompress every frame; EOFError if the last has no end (`stream_reader` does not tell)."""
    decompressor = zstandard.ZstdDecompressor(max_window_size=2**31)
    frame = None
    with path.open("rb") as file:
        while data := file.read(READ_BYTES):
            while data:
                if frame is None:
                    frame = decompressor.decompressobj()
                yield frame.decompress(data)
                data = frame.unused_data if frame.eof else b""
                if frame.eof:
                    frame = None
    if frame is not None:
        raise EOFError("the last frame has no end")


def _split_lines(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """Cut after each newline, like a file; a line over many chunks is joined once."""
    started: list[bytes] = []
    for chunk in chunks:
        *lines, rest = chunk.split(b"\n")
        for line in lines:
            yield b"".join((*started, line, b"\n"))
            started.clear()
        if rest:
            started.append(rest)
    if started:
        yield b"".join(started)
