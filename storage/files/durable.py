"""A file or a directory is finished or absent: the product's only fsync and rename. Local only.

What is to be published is filled under a temporary name beside its place, and moved there last.
"""

import contextlib
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

from decant.storage.files.locks import Held, forget_lock, locked

OF_RUST = re.compile(r"\(os error (\d+)\)")
"""How libraries in Rust say what the kernel said."""
TEMPORARY_SUFFIX = ".tmp"
"""Ends the name of what is not finished."""


class Unfinished(OSError):
    """A file could not be completed, and the library does not say why."""


@contextlib.contextmanager
def naming(path: str | os.PathLike[str], *instead_of: str | os.PathLike[str]) -> Iterator[None]:
    """Give an OSError of the block that names no file this one; or one of these, temporary ones.

    The kernel says of a descriptor that it cannot be written or read, and nobody adds whose.
    """
    try:
        yield
    except OSError as error:
        named = None if error.filename is None else os.fspath(error.filename)
        if named is not None and named not in [os.fspath(other) for other in instead_of]:
            if error.errno is None or os.sep in named or not os.path.isdir(path):
                raise
            # Python removes what is in a folder by bare names, relative to a descriptor of it.
            whole = os.path.join(path, named)
            raise OSError(error.errno, os.strerror(error.errno), whole) from error
        if error.errno is None and type(error) is not OSError:  # our own, with all there is to say
            raise
        if number := _number(error):
            raise OSError(number, os.strerror(number), os.fspath(path)) from error
        raise Unfinished(
            f"{os.fspath(path)}: {error}: see that the disk has room and no fault, then run the "
            "same command again"
        ) from error
    except Exception as error:
        if found := OF_RUST.search(str(error)):  # tokenizers and safetensors raise their own
            number = int(found[1])
            raise OSError(number, os.strerror(number), os.fspath(path)) from error
        raise


def _number(error: BaseException | None) -> int | None:
    """What the kernel said first: Arrow forgets it when it closes a file that it cannot write."""
    while error is not None:
        if isinstance(error, OSError) and error.errno is not None:
            return error.errno
        error = error.__cause__ or error.__context__
    return None


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
    with staged_file(target) as temporary:
        temporary.write_bytes(data)


def discard(temporary: Path) -> None:
    """Remove a temporary file, if it is there; where that fails, what else failed matters more."""
    with contextlib.suppress(OSError):
        temporary.unlink()


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
    clear_left(final)
    staging = temporary_for(final)
    staging.mkdir()
    try:
        with locked(staging, write=False), naming(final, staging):
            yield staging
            sync_tree(staging)
            move(staging, final)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


@contextlib.contextmanager
def filling(temporary: Path) -> Iterator[None]:
    """Begin a directory anew; it goes, with what is in it, if an exception passes.

    For who holds the place: the name is the same each time, and what was left there is removed.
    """
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        yield
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


@contextlib.contextmanager
def staged_file(target: Path) -> Iterator[Path]:
    """A file beside `target` to fill; it becomes `target` unless an exception passes.

    What a killed process has left of its try at the same file is removed.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    clear_left(target)
    temporary = temporary_for(target)
    try:
        with naming(target, temporary):
            temporary.touch(exist_ok=False)
            with locked(temporary, write=True):
                yield temporary
                publish(temporary, target)
    finally:
        discard(temporary)


def clear_left(target: Path) -> None:
    """Remove what killed processes have left of a file or directory: what nobody holds."""
    name = re.compile(rf"\.{re.escape(target.name)}\.[0-9a-f]{{8}}{re.escape(TEMPORARY_SUFFIX)}")
    with contextlib.suppress(OSError):  # a folder that may be written to, and not listed
        beside = [left for left in target.parent.iterdir() if name.fullmatch(left.name)]
        for left in beside:
            with contextlib.suppress(OSError, Held), locked(left, write=left.is_file()):
                shutil.rmtree(left) if left.is_dir() else left.unlink()


def move(temporary: Path, target: Path) -> None:
    """Give what is on disk already its name, durably."""
    is_new = not os.path.lexists(target)
    with naming(target, temporary):
        os.replace(temporary, target)
    try:
        sync(target.parent)
    except OSError:
        if is_new:  # what is refused is absent; what stood in its place cannot be had again
            with contextlib.suppress(OSError):
                os.replace(target, temporary)
        raise
    if target.is_dir():
        forget_lock(target)


def sync_tree(folder: Path) -> None:
    """Make a folder and all below it durable."""
    for path in [*folder.rglob("*"), folder]:
        sync(path)


def sync(path: Path) -> None:
    """Make a file, or the names in a folder, durable."""
    with naming(path):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
