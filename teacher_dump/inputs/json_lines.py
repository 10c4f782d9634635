"""Read JSON lines, or one JSON array, plain, gzip or zstd, as a stream; what is bad is named.

Owns: decompression, lines and items, and what counts as one record's JSON. Knows nothing of what
the fields mean.
"""

import codecs
import gzip
import json
import os
import re
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import zstandard

from decant.teacher_dump.inputs.records import Row, SourceError

READ_BYTES = 1 << 16
NO_SPACE = re.compile(r"\S")
LINES = re.compile(r"\.(jsonl|ndjson)(\.gz|\.zst)?$")

Fields = dict[str, Any]


def json_rows(name: str, path: Path) -> Iterator[Row]:
    """Yield the rows of one file: its lines, or the items of the array that it is.

    Raises SourceError naming the line or item that cannot be used.
    """
    index, place = 0, "its start"
    try:
        for place, fields in _items(name, path) if _is_array(path) else _rows(name, path):
            if fields is not None:
                yield f"{name}:{index}", f"{name} {place}", fields
                index += 1
    except (EOFError, zlib.error, OSError, zstandard.ZstdError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # the machine's word
            raise OSError(error.errno, os.strerror(error.errno), str(path)) from error
        raise SourceError(
            f"{path} is damaged or cut short after {place}: {error}; copy or write it again"
        ) from error
    if index == 0:
        raise SourceError(f"{path} is empty: expected at least one record; remove the file")


def _rows(name: str, path: Path) -> Iterator[tuple[str, Fields | None]]:
    """Place and fields of every line; None of a blank one."""
    for number, line in enumerate(_lines(path), start=1):
        where = f"{name} line {number}"
        fields = None if line.isspace() else _parse_line(line, where, first=number == 1)
        yield f"line {number}", fields


def _items(name: str, path: Path) -> Iterator[tuple[str, Fields]]:
    """Place and fields of every item of a JSON array, in memory bounded by the longest."""
    text, index = _Characters(path), 0
    where = f"{name} item 0"
    try:
        text.next()
        text.place += 1
        while (found := text.next()) != "]":
            where = f"{name} item {index}"
            if index and found != ",":
                raise _ArrayError(
                    f"expected a comma, or ] at the end of the array, found {found!r}"
                )
            text.place += bool(index)
            text.next()
            value, written = text.value()
            yield f"item {index}", _checked(value, written, where)
            index += 1
        text.place += 1
        if found := text.next():
            raise _ArrayError(f"expected nothing behind the array, found {found!r}")
    except UnicodeError as error:
        raise SourceError(f"{where}: not valid UTF-8: {error}; convert or repair it") from error
    except (json.JSONDecodeError, RecursionError, _ArrayError) as error:
        raise SourceError(f"{where}: not readable as JSON: {error}; repair the array") from error


class _ArrayError(ValueError):
    pass


class _Characters:
    """The characters of a file, of which only those are held that are being looked at."""

    def __init__(self, path: Path) -> None:
        self.place = 0
        self._text = ""
        self._chunks = _chunks(path)
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self._ended = False

    def next(self) -> str:
        """Go to the next character that is not a space; "" at the end."""
        while True:
            if found := NO_SPACE.search(self._text, self.place):
                self.place = found.start()
                return found[0]
            self.place = len(self._text)
            if not self._read(1):
                return ""

    def value(self) -> tuple[Any, str]:
        """The JSON value that begins here, and how it is written."""
        while True:
            try:
                value, stop = json.JSONDecoder().raw_decode(self._text, self.place)
                break
            except json.JSONDecodeError:  # it may go on
                if not self._read(len(self._text) - self.place):
                    raise
        written = self._text[self.place : stop]
        self.place = stop
        return value, written

    def _read(self, at_least: int) -> bool:
        """Read so many more characters, where there are; False if there are none."""
        parts = [self._text[self.place :]]
        self.place, read = 0, 0
        while read < at_least and not self._ended:
            chunk = next(self._chunks, b"")
            self._ended = not chunk
            parts.append(self._decoder.decode(chunk, final=self._ended))
            read += len(parts[-1])
        self._text = "".join(parts)
        return read > 0


def _parse_line(line: bytes, where: str, *, first: bool) -> Fields:
    try:
        text = line.decode("utf-8-sig" if first else "utf-8")
        return _checked(json.loads(text), text, where)
    except UnicodeError as error:
        raise SourceError(f"{where}: not valid UTF-8: {error}; convert or repair it") from error
    except (json.JSONDecodeError, RecursionError) as error:
        raise SourceError(
            f"{where}: not readable as JSON: {error}; each line must be one whole JSON object"
        ) from error


def _checked(value: Any, written: str, where: str) -> Fields:
    """The fields of a JSON object. Raises UnicodeError for half of a surrogate pair."""
    if "\\ud" in written or "\\uD" in written:  # half of an escaped pair cannot be written as UTF-8
        json.dumps(value, ensure_ascii=False).encode()
    if not isinstance(value, dict):
        raise SourceError(
            f"{where}: expected a JSON object, found {type(value).__name__}"
            f" {written.strip()[:40]!r}"
        )
    return value


def _is_array(path: Path) -> bool:
    """Whether it begins like an array, unless its name says that it holds lines."""
    if LINES.search(path.name):
        return False
    start = next(_chunks(path), b"").removeprefix(codecs.BOM_UTF8).lstrip()
    return start.startswith(b"[")


def _chunks(path: Path) -> Iterator[bytes]:
    """The decompressed bytes."""
    if path.name.endswith(".zst"):
        yield from _zstd_chunks(path)
        return
    with gzip.open(path) if path.name.endswith(".gz") else path.open("rb") as file:
        while chunk := file.read(READ_BYTES):
            yield chunk


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
