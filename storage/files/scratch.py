"""A temporary folder: what cannot be written into it says where it is, whatever the library."""

import contextlib
import shutil
import tempfile
from collections.abc import Iterator

from decant.storage.files.durable import naming


@contextlib.contextmanager
def scratch_folder() -> Iterator[str]:
    """A folder that is gone when the block ends.

    Raises OSError, with the way out, where this machine has no place for one.
    """
    try:
        folder = tempfile.TemporaryDirectory(prefix="decant-", ignore_cleanup_errors=True)
    except FileNotFoundError as error:
        raise OSError(
            f"{error.strerror}: choose a folder that can be written to, export TMPDIR=FOLDER"
        ) from error
    try:
        with folder as path, naming(path):
            yield path
    finally:
        shutil.rmtree(folder.name, ignore_errors=True)  # a disk that fails may do so once
