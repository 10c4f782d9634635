"""What a machine refuses a command, in one line: which file, what it said, and what to do about it.

A full disk, a quota, a read-only mount, too few open files, too little memory, a disk that cannot
be read. What libraries raise in classes of their own ends here too.
"""

import errno
import re
import resource
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
OF_THE_LOADER = re.compile("failed to map segment|cannot allocate memory", re.IGNORECASE)
"""What a library that finds no memory to be loaded into is refused with."""


def refusal(error: BaseException) -> str:
    """What the error says, on one line, with the way out where that follows from its kind."""
    number = error.errno if isinstance(error, OSError) else None
    said = " ".join(str(error).split()) if number else str(error)
    if isinstance(error, MemoryError):
        return f"memory is used up{f' ({said})' if said else ''}: {_memory_way_out()}"
    if isinstance(error, ImportError) and OF_THE_LOADER.search(said):
        return f"{said}: memory is used up: {_memory_way_out()}"
    if isinstance(error, RuntimeError) and "start new thread" in said:
        return f"{said}: `ulimit -u` allows too few threads, or {_memory_way_out()}"
    if number is None or number not in (*WAYS_OUT, errno.EMFILE, errno.ENOMEM):
        return said or type(error).__name__
    return f"{said}: {_way_out(number)}"


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
