"""What a machine refuses a command, in one line: which file, what it said, and what to do about it.

A full disk, a quota, a read-only mount, too few open files, too little memory, a disk that cannot
be read. What libraries raise in classes of their own ends here too.
"""

import errno
import io
import os
import re
import resource
import traceback
from collections.abc import Iterable
from pathlib import Path

LEAST_MEMORY = 64 << 20
"""Bytes of address space without which no command begins: a thread that finds none never ends."""
AGAIN = "then run the same command again"
ELSEWHERE = "or choose another place"
NETWORK = f"the connection to the disk was lost: see that it is mounted, {AGAIN}"
WAYS_OUT = {
    errno.ENOSPC: f"make room on that disk, {AGAIN}, {ELSEWHERE}",
    errno.EDQUOT: f"your quota there is used up: make room, {AGAIN}, {ELSEWHERE}",
    errno.EFBIG: f"the file system, or `ulimit -f`, allows no larger file: raise it, {ELSEWHERE}",
    errno.EROFS: "it is mounted to be read alone: choose a place that can be written to",
    errno.EACCES: f"change who may read or write it, {ELSEWHERE}",
    errno.EPERM: f"change who may read or write it, {ELSEWHERE}",
    errno.EIO: f"the disk, or the network that it is behind, fails: see the system's log, {AGAIN}",
    errno.ESTALE: NETWORK,
    errno.ETIMEDOUT: NETWORK,
    errno.ENOTCONN: NETWORK,
    errno.ENFILE: f"the machine has no open file to spare: end other programs, {AGAIN}",
    errno.ENAMETOOLONG: "a name may have 255 bytes, a path 4,095: choose a shorter one",
    errno.ENOTDIR: "a part of the path is a file: choose another place",
    errno.ENOSYS: f"the file system there cannot do this: take one that can, {ELSEWHERE}",
    errno.EOPNOTSUPP: f"the file system there cannot do this: take one that can, {ELSEWHERE}",
    errno.ENOLCK: f"the file system there has no lock to give: mount it with locks, {ELSEWHERE}",
    errno.ENODEV: f"the file system there cannot do this: take one that can, {ELSEWHERE}",
}
"""By what the kernel says."""
KNOWN = (*WAYS_OUT, errno.EMFILE, errno.ENOMEM)
OF_RUST = re.compile(r"\(os error (\d+)\)")
"""How libraries in Rust say what the kernel said."""
OF_THE_LOADER = re.compile("failed to map segment|cannot allocate memory", re.IGNORECASE)
"""What a library that finds no memory to be loaded into is refused with."""


def refusal(error: BaseException) -> str:
    """What the error says, on one line, with the way out where that follows from its kind."""
    said = str(error)
    if isinstance(error, MemoryError):
        return f"memory is used up{f' ({said})' if said else ''}: {_memory_way_out()}"
    if isinstance(error, ImportError) and OF_THE_LOADER.search(said):
        return f"{said}: memory is used up: {_memory_way_out()}"
    if isinstance(error, RuntimeError) and "start new thread" in said:
        return f"{said}: `ulimit -u` allows too few threads, or {_memory_way_out()}"
    number = _number(error, said)
    if number is None:
        return said or type(error).__name__
    if isinstance(error, OSError) and error.errno == number:
        if error.filename is None and (place := _place(error)):
            said = f"{said}: {place!r}"
        return f"{' '.join(said.split())}: {_way_out(number)}"
    return f"{said}; {_way_out(number)}"  # of our own or a library's, which quotes the kernel


def _number(error: BaseException, said: str) -> int | None:
    """What the kernel refused, of what has a way out, where the text of the error says so."""
    causes: BaseException | None = error
    while causes is not None:
        number = causes.errno if isinstance(causes, OSError) else None
        if number in KNOWN and os.strerror(number) in said:
            return number
        causes = causes.__cause__ or causes.__context__
    found = OF_RUST.search(said)
    if found and int(found[1]) in KNOWN:
        return int(found[1])
    return next((number for number in KNOWN if os.strerror(number) in said), None)


def _place(error: BaseException) -> str:
    """The file that a call of Python's own was about, which does not say; "" if none is known."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    for frame in reversed(frames):
        values = list(frame.f_locals.values())
        for value in values:
            if isinstance(value, io.IOBase) and isinstance(
                name := getattr(value, "name", None), str
            ):
                return name
        for value in values:
            if isinstance(value, Path):
                return str(value)
    return ""


def refuse_names(words: Iterable[str]) -> None:
    """Raise ValueError for a word that holds bytes which are no UTF-8: libraries refuse such names.

    They would after hours of work, and none of them says which.
    """
    for word in words:
        try:
            word.encode()
        except UnicodeEncodeError:
            raise ValueError(
                f"{word!a}: a name that is not in UTF-8: rename it, or choose another place"
            ) from None


def refuse_little_memory() -> None:
    """Raise MemoryError where `ulimit -v` leaves a command nothing to work with."""
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    statistics = Path("/proc/self/statm")
    if limit == resource.RLIM_INFINITY or not statistics.exists():
        return
    used = int(statistics.read_text().split()[0]) * resource.getpagesize()
    if limit - used < LEAST_MEMORY:
        raise MemoryError(f"{used >> 20:,} MiB before anything is read")


def is_a_library_s(error: BaseException) -> bool:
    """Whether a library raises this class for what it cannot do; if not, the fault is ours."""
    kind = type(error)
    # tokenizers has no class of its own; nobody here raises a plain Exception.
    return kind is Exception or kind.__module__.partition(".")[0] not in ("builtins", "decant")


def _way_out(number: int) -> str:
    if number == errno.EMFILE:
        limit, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        higher = f"`ulimit -n {most}`" if most > limit else "ask for a higher limit"
        return f"this process may have {limit} files open at a time: {higher}, {AGAIN}"
    return _memory_way_out() if number == errno.ENOMEM else WAYS_OUT[number]


def _memory_way_out() -> str:
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit != resource.RLIM_INFINITY:
        return f"`ulimit -v` allows this process {limit >> 20:,} MiB: raise it, {AGAIN}"
    return f"end other programs, or take a machine with more, {AGAIN}"
