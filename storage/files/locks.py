"""Keeping other processes off a folder or a file: by the kernel, or by lock files where it cannot.

`flock` is let go by the kernel when a process ends, however. File systems without it (Lustre
mounted without `flock`, some FUSE) get a lock file beside what is held, which says who holds it and
is touched every few seconds; one that is not, or whose process on this machine is gone, is stale
and may be taken over. Locks of one kind do not see those of the other: all machines that write to
one place have to mount it alike.
"""

import contextlib
import errno
import fcntl
import json
import logging
import os
import re
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

_TOKEN = uuid.uuid4().hex
"""Of this process."""

WITHOUT_FLOCK = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)
BEAT_SECONDS = 10.0
STALE_SECONDS = 120.0
"""A lock file that was not touched for so long is nobody's."""
WAIT_SECONDS = 0.5


class Held(Exception):
    """Another process holds it in a way that excludes this one."""


@contextlib.contextmanager
def locked(path: Path, *, write: bool, shared: bool = False, wait: bool = False) -> Iterator[None]:
    """Hold a folder or, to `write`, a file: alone or `shared`. Both must exist.

    Raises Held if another process holds it in a way that excludes this one, unless told to `wait`;
    FileNotFoundError if it is not there.
    """
    how = (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB)
    handle = os.open(path, os.O_RDWR if write else os.O_RDONLY)  # NFS: only what could be written
    try:
        with _flock(handle, path, how) or _lock_file(_name(path), shared=shared, wait=wait):
            yield
    finally:
        with contextlib.suppress(OSError):  # it is let go, and nothing was written through it
            os.close(handle)


def _flock(handle: int, path: Path, how: int) -> contextlib.AbstractContextManager[None] | None:
    """The kernel's lock, held until the handle is closed; None where there is none to be had."""
    try:
        fcntl.flock(handle, how)
    except BlockingIOError:
        raise Held from None
    except OSError as error:
        if error.errno not in WITHOUT_FLOCK:
            raise
        _say_once(path, error)
        return None
    return contextlib.nullcontext()


def forget_lock(folder: Path) -> None:
    """Remove the lock file of a folder that was held, and moved meanwhile."""
    with contextlib.suppress(OSError):
        _name(folder).unlink()


def is_lock_file(name: str) -> bool:
    """Whether a file is one of these, and no content of its folder."""
    return re.fullmatch(r"\..*lock(\.shared-[0-9a-f]+)?(\.breaking)?", name) is not None


def _name(path: Path) -> Path:
    """Of a folder's lock file, inside it; of a file's, beside it. Hidden, like temporary files."""
    return path / ".lock" if path.is_dir() else path.with_name(f".{path.name}.lock")


@contextlib.contextmanager
def _lock_file(lock: Path, *, shared: bool, wait: bool) -> Iterator[None]:
    """A file of its own for each who shares; one that all name alike for who is alone."""
    own = lock.with_name(f"{lock.name}.shared-{uuid.uuid4().hex}") if shared else lock
    while not _taken(own, lock, shared=shared):
        if not wait:
            raise Held
        time.sleep(WAIT_SECONDS)
    ended = threading.Event()
    beat = threading.Thread(target=_beat, args=(own, ended), daemon=True, name="lock")
    beat.start()
    try:
        yield
    finally:
        ended.set()
        beat.join()
        if _holder(own).get("token") == _TOKEN:  # it could have been taken for abandoned
            own.unlink(missing_ok=True)


def _taken(own: Path, lock: Path, *, shared: bool) -> bool:
    """Whether our file could be made and nothing excludes it; else it is not there."""
    if not _made(own):
        _remove_stale(own)
        if not _made(own):
            return False
    others = [lock] if shared else sorted(lock.parent.glob(f"{lock.name}.shared-*"))
    for other in others:
        _remove_stale(other)
    if any(other.exists() for other in others):
        own.unlink(missing_ok=True)
        return False
    return True


def _made(path: Path) -> bool:
    """Make a lock file that says who we are; false if there is one."""
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    except FileExistsError:
        return False
    with os.fdopen(handle, "w") as file:
        json.dump({**_here(), "token": _TOKEN}, file)
    return True


def _holder(path: Path) -> dict[str, Any]:
    """Who a lock file says holds it; nothing if it is being written, or gone."""
    try:
        said = json.loads(path.read_text())
    except (ValueError, OSError):
        return {}
    return said if isinstance(said, dict) else {}


def _here() -> dict[str, str | int]:
    """This process, and the machine on which its number means it."""
    try:
        space = os.readlink("/proc/self/ns/pid")
    except OSError:
        space = ""
    return {"host": socket.gethostname(), "space": space, "pid": os.getpid()}


def _remove_stale(path: Path) -> None:
    """Remove a lock file that nobody holds any more.

    One process at a time looks and removes, or it could be the new file of another that is removed.
    """
    guard = path.with_name(f"{path.name}.breaking")
    if not _made(guard):
        with contextlib.suppress(FileNotFoundError):  # of a process that was killed meanwhile
            if time.time() - guard.stat().st_mtime > STALE_SECONDS:
                guard.unlink()
        return
    try:
        # Both times are the file system's: clocks of machines differ.
        age = guard.stat().st_mtime - path.stat().st_mtime
        if age > STALE_SECONDS or _is_dead(path):
            path.unlink()
    except FileNotFoundError:
        pass
    finally:
        guard.unlink(missing_ok=True)


def _is_dead(path: Path) -> bool:
    """Whether a lock file is of a process of this machine that has ended."""
    holder, here = _holder(path), _here()
    if any(holder.get(name) != here[name] for name in ("host", "space")):
        return False
    try:
        os.kill(int(holder["pid"]), 0)
    except ProcessLookupError:
        return True
    except PermissionError:  # of another user
        return False
    return False


def _beat(path: Path, ended: threading.Event) -> None:
    """Touch a lock file until the end."""
    while not ended.wait(BEAT_SECONDS):
        with contextlib.suppress(OSError):
            os.utime(path)


_said: set[str] = set()


def _say_once(path: Path, error: OSError) -> None:
    """Which file system it is that cannot lock, once for each folder."""
    where = str(path if path.is_dir() else path.parent)
    if where not in _said:
        _said.add(where)
        log.warning(
            "%s is on a file system that cannot lock files (%s): lock files stand in, of which one "
            "that is %d s old is taken for abandoned. Mounting it with flock is safer",
            where,
            error.strerror,
            STALE_SECONDS,
        )
