"""Conversations of samples from a file of JSON lines, for a cache that does not hold them.

A line is an object of `id`, the sample id, `messages`, and where there are any `tools` and
`chat_template_kwargs`: what `decant messages` writes. The file is read once for its ids and stays
on disk; memory is 24 bytes a line.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from decant.schemas import Conversation, FormatError

COMPRESSED = (".gz", ".zst", ".bz2", ".xz")


class GivenMessages:
    """The conversations of a file, by sample id; any number of threads may ask."""

    def __init__(self, path: str | os.PathLike[str], *, windows: bool = False) -> None:
        """Read the ids of all lines.

        `windows`: the samples "id#1", "id#2", ... of a cache are windows of the record "id", as
        `sequences.overlong: split` makes them. Raises FormatError for a line that is no such
        object, ValueError for a file that cannot be looked into.
        """
        self.path, self._windows = Path(path).expanduser(), windows
        if self.path.suffix in COMPRESSED:
            raise ValueError(
                f"{path} is compressed, so no line of it can be looked up: decompress it first"
            )
        self._file = os.open(self.path, os.O_RDONLY)
        keys, places = [], []
        for number, offset, line in _lines(self.path):
            fields = _fields(line, f"{path} line {number}")
            keys.append(xxhash.xxh3_64_intdigest(fields["id"].encode()))
            places.append((offset, len(line)))
        order = np.argsort(np.array(keys, np.uint64), kind="stable")
        self._keys = np.array(keys, np.uint64)[order]
        self._places = np.array(places, np.int64).reshape(-1, 2)[order]
        twice = np.flatnonzero(self._keys[1:] == self._keys[:-1])
        if len(twice):
            sample_id = self._read(int(twice[0]))["id"]
            raise FormatError(f"{path}: the id {sample_id!r} occurs twice: remove one of the two")

    def __len__(self) -> int:
        return len(self._keys)

    def of(self, sample_id: str) -> str | None:
        """The conversation of a sample as `ScoredSequence.messages` has it; None without one.

        Raises FormatError, naming the file, if it is no conversation.
        """
        found = self._find(sample_id)
        record, _, number = sample_id.rpartition("#")
        if found is None and self._windows and number.isdecimal():
            found = self._find(record)
        return found

    def _find(self, sample_id: str) -> str | None:
        key = np.uint64(xxhash.xxh3_64_intdigest(sample_id.encode()))
        at = int(np.searchsorted(self._keys, key))
        if at == len(self._keys) or self._keys[at] != key:
            return None
        fields = self._read(at)
        if fields.pop("id") != sample_id:
            return None
        where = f"{self.path}, id {sample_id}"
        return Conversation.of_text(json.dumps(fields, ensure_ascii=False), where).to_text()

    def _read(self, at: int) -> dict[str, Any]:
        offset, length = self._places[at].tolist()
        return _fields(os.pread(self._file, length, offset), f"{self.path} at byte {offset}")

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            os.close(self._file)


def _lines(path: Path) -> Iterator[tuple[int, int, bytes]]:
    """Number, offset and bytes of every line that is not blank."""
    offset = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.isspace():
                yield number, offset, line
            offset += len(line)


def _fields(line: bytes, where: str) -> dict[str, Any]:
    try:
        fields = json.loads(line)
    except ValueError as error:
        raise FormatError(f"{where}: no JSON: {error}") from error
    if not isinstance(fields, dict) or not isinstance(fields.get("id"), str):
        raise FormatError(
            f"{where}: {line[:60]!r}: expected an object with an id, a string, and messages, as "
            "`decant messages` writes them"
        )
    return fields
