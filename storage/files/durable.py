"""A directory is finished or absent: fill it under a temporary name, rename it last. Local only."""

import contextlib
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

TEMPORARY_SUFFIX = ".tmp"
"""Ends the name of what is not finished."""


@contextlib.contextmanager
def staged_directory(target: str | os.PathLike[str]) -> Iterator[Path]:
    """An empty directory beside `target` to fill; it becomes `target` unless an exception passes.

    Raises FileExistsError if there is something at `target`, ValueError if it is a URL.
    """
    if "://" in str(target):
        raise ValueError(f"{target} is a URL: write a local directory, then copy it there")
    final = Path(target).expanduser().absolute()
    if os.path.lexists(final):
        raise FileExistsError(f"{target} exists already: remove it, or choose another place")
    final.parent.mkdir(parents=True, exist_ok=True)
    staging = final.with_name(f".{final.name}.{uuid.uuid4().hex[:8]}{TEMPORARY_SUFFIX}")
    staging.mkdir()
    try:
        yield staging
        sync_tree(staging)
        os.rename(staging, final)
        sync(final.parent)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def sync_tree(folder: Path) -> None:
    """Make a folder and all below it durable."""
    for path in [*folder.rglob("*"), folder]:
        sync(path)


def sync(path: Path) -> None:
    """Make a file, or the names in a folder, durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
