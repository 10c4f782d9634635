"""What a file of another tool may ask of this machine: none is opened or unpacked without bounds.

The files may be a stranger's: sizes are compared with what is there, pipes, devices and links that
lead out of a folder are not opened, and whatever a library raises on their bytes is one line.
"""

import contextlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from decant.storage.cache.parquet import UNREADABLE
from decant.storage.exchange.foreign import ForeignError
from decant.storage.files.links import leads_out

MAX_LINE = 1 << 28
"""Bytes of a line of JSON."""
MAX_DESCRIPTION = 1 << 24
"""Bytes of a small file that says what the others are."""
MAX_UNPACKED = 1 << 32
"""Bytes that a row group of Parquet, or a compressed member of an archive, may unpack to."""


def regular(file: Path, folder: Path | None = None) -> Path:
    """The same file, if it can be opened: no pipe, no device, and not outside of a given folder.

    Raises ForeignError.
    """
    if folder is not None and (place := leads_out(str(file), str(folder))):
        raise ForeignError(f"{file} leads to {place}, outside of {folder}: copy the file there")
    try:
        if not stat.S_ISREG(os.stat(file).st_mode):
            raise ForeignError(f"{file} is no regular file")
    except OSError as error:
        raise ForeignError(f"{file} cannot be opened: {error.strerror}") from error
    return file


def read_whole(file: Path, most: int) -> bytes:
    """The bytes of a file. Raises ForeignError if it is none to open, or has more than so many."""
    with open(regular(file), "rb") as source:
        data = source.read(most + 1)
    if len(data) > most:
        raise ForeignError(f"{file} has more than the {most} bytes that it may have")
    return data


class FileBytes:
    """The bytes of an open file, read where they are asked for."""

    def __init__(self, file: BinaryIO) -> None:
        """Of a regular file."""
        self._file = file.fileno()
        self._size = os.fstat(self._file).st_size

    def __len__(self) -> int:
        """How many there are."""
        return self._size

    def __getitem__(self, part: slice) -> bytes:
        """Some of them."""
        start, stop, _ = part.indices(self._size)
        return os.pread(self._file, stop - start, start)


@contextlib.contextmanager
def refusing(path: str, file_format: str) -> Iterator[list[str]]:
    """Turn whatever is raised on bytes that are not of a format into one ForeignError.

    Gives a list whose last item, if any, is the place of the record that was read last.
    """
    seen: list[str] = []
    try:
        yield seen
    except ForeignError:
        raise
    except (*UNREADABLE, AttributeError, AssertionError, RecursionError, EOFError) as error:
        if isinstance(error, OSError) and error.filename:
            raise
        behind = f", behind {seen[-1]}" if seen else ""
        said = str(error) or type(error).__name__
        raise ForeignError(f"{path}{behind} cannot be read as {file_format}: {said}") from error
