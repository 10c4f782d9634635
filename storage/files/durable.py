"""A directory is finished or absent: fill it under a temporary name, rename it last. Local only."""

import contextlib
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

from decant.storage.cache import paths


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
    staging = final.with_name(f".{final.name}.{uuid.uuid4().hex[:8]}{paths.TEMPORARY_SUFFIX}")
    staging.mkdir()
    try:
        yield staging
        for path in (*staging.rglob("*"), staging):
            _sync(path)
        os.rename(staging, final)
        _sync(final.parent)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
