"""What fails while it is written or read is named: one line with its path, whatever the library."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch


class NotWritten(OSError):
    """A file of a run could not be written, or was not what had been written when read back."""


@contextlib.contextmanager
def writing(path: Path, stays: str) -> Iterator[None]:
    """Turn whatever goes wrong in the block into NotWritten, naming `path` and what `stays`.

    Libraries raise what they like: OSError, RuntimeError, ValueError, errors of their own.
    """
    try:
        yield
    except NotWritten:
        raise
    except Exception as error:
        said = " ".join(str(error).split()) or type(error).__name__
        raise NotWritten(f"{path} could not be written: {said}. {stays}") from error


class Damaged(ValueError):
    """A checkpoint cannot be read."""


@contextlib.contextmanager
def reading(checkpoint: Path) -> Iterator[None]:
    """Turn whatever goes wrong in the block into Damaged, naming a checkpoint."""
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError):  # which says nothing about the files
        raise
    except Exception as error:
        said = " ".join(str(error).split()) or type(error).__name__
        raise Damaged(
            f"{checkpoint} is damaged, or not a checkpoint of this run: {said}"
        ) from error
