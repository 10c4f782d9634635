"""A file or a directory is finished or absent: the product's only fsync and rename. Local only.

What is to be published is filled under a temporary name beside its place, and moved there last.
"""

import contextlib
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

TEMPORARY_SUFFIX = ".tmp"
"""Ends the name of what is not finished."""


def temporary_for(target: Path) -> Path:
    """A name beside `target` that no other writer uses."""
    return target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}{TEMPORARY_SUFFIX}")


def publish(temporary: Path, target: Path) -> None:
    """Give a file, or a directory and all in it, its name, once it is on disk.

    It takes the place of a file of that name, and of a directory, which is removed just before.
    """
    if temporary.is_dir():
        sync_tree(temporary)
        shutil.rmtree(target, ignore_errors=True)
    else:
        sync(temporary)
    move(temporary, target)


def publish_bytes(target: Path, data: bytes) -> None:
    """Publish a file of these bytes."""
    temporary = temporary_for(target)
    try:
        temporary.write_bytes(data)
        publish(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


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
    staging = temporary_for(final)
    staging.mkdir()
    try:
        yield staging
        sync_tree(staging)
        move(staging, final)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def move(temporary: Path, target: Path) -> None:
    """Give what is on disk already its name, durably."""
    os.replace(temporary, target)
    sync(target.parent)


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
