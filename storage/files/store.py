"""The only place that touches a file system: whole reads, range reads, publish.

A published file is finished or absent. Locally: temporary name, fsync, rename, fsync of the
directory. On object stores a PUT, of one part or many, is already all or nothing, so the same calls
upload. Nothing is remembered of a store between calls: other processes write to it too.
"""

import contextlib
import errno
import glob
import os
import stat
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePath
from typing import Any

import xxhash
from fsspec.implementations.local import LocalFileSystem

from decant.schemas import FormatError
from decant.storage.files.durable import (
    TEMPORARY_SUFFIX,
    discard,
    move,
    naming,
    sync,
    temporary_for,
)
from decant.storage.files.links import leads_out
from decant.storage.files.locks import Held, is_lock_file, locked
from decant.storage.files.s3 import open_filesystem

FETCHING: dict[str, dict[str, Any]] = {"hf": {"cache_type": "none"}}
"""What a file system needs told to fetch a range and no more."""


class Busy(RuntimeError):
    """Another process holds this cache."""


class Store:
    """A directory of files, local or behind any fsspec URL; names are relative to it."""

    def __init__(self, url: str | os.PathLike[str]) -> None:
        """Open without touching anything.

        Raises ValueError if the URL's protocol is unknown or its package is not installed.
        """
        self.url = str(url)
        try:
            files, root = open_filesystem(self.url)
        except (ImportError, ValueError) as error:
            raise ValueError(f"cannot open {self.url}: {error}") from error
        self._file_systems = {os.getpid(): files}
        self.is_local = isinstance(files, LocalFileSystem)
        root = root.rstrip("/")
        self._root = root if self.is_local else files.unstrip_protocol(root)
        self._how = FETCHING.get(str(files.protocol), {})

    @property
    def _fs(self) -> Any:
        """The file system of this process: after a fork, its parent's has lost its threads.

        The parent's is kept, as closing it would close the parent's connections.
        """
        pid = os.getpid()
        if pid not in self._file_systems:
            self._file_systems[pid], _ = open_filesystem(self.url)
        return self._file_systems[pid]

    @contextlib.contextmanager
    def _reaching(self, name: str) -> Iterator[None]:
        """Turn what an object store's own library raises into an OSError that names the file.

        Links that lead to themselves are a FormatError.
        """
        try:
            if self.is_local:
                with naming(self.path(name)):
                    yield
            else:
                yield
        except Exception as error:
            if isinstance(error, OSError) and error.errno == errno.ELOOP:
                raise FormatError(f"{self.path(name)} is a link that leads to itself") from None
            if self.is_local:
                raise
            kinds = (FileNotFoundError, FileExistsError, PermissionError)
            kind = next((kind for kind in kinds if isinstance(error, kind)), OSError)
            raise kind(f"{self.path(name)}: {error or type(error).__name__}") from error

    def path(self, name: str) -> str:
        """The full path of a file, for messages and for local tools."""
        return f"{self._root}/{name}" if name else self._root

    def exists(self, name: str) -> bool:
        """Whether a file or folder is there; raises OSError if that cannot be found out."""
        try:
            with self._reaching(name):
                self._fs.info(self.path(name))
        except (FileNotFoundError, NotADirectoryError):
            return False
        return True

    def names(self, folder: str) -> list[str]:
        """Sorted file names directly inside a folder; empty if it is absent."""
        return sorted(self._listing(folder, detail=False))

    def sizes(self, folder: str) -> dict[str, int]:
        """Name and bytes of what is directly inside a folder, in one listing; as `names`."""
        return {name: int(entry["size"]) for name, entry in self._listing(folder, True).items()}

    def _listing(self, folder: str, detail: bool) -> dict[str, Any]:
        where = self._fs._strip_protocol(self.path(folder))
        try:
            with self._reaching(folder):
                found = self._fs.ls(self.path(folder), detail=detail)
        except FileNotFoundError:
            return {}
        listed = {(entry["name"] if detail else entry).rstrip("/"): entry for entry in found}
        listed.pop(where, None)  # the empty object that some consoles make to show a folder
        named = {path.rsplit("/", 1)[-1]: entry for path, entry in listed.items()}
        return {name: entry for name, entry in named.items() if not is_lock_file(name)}

    def size(self, name: str) -> int:
        """Bytes of a file. Raises FileNotFoundError."""
        with self._reaching(name):
            return int(self._fs.size(self.path(name)))

    def read(self, name: str) -> bytes:
        """A whole file. Raises FileNotFoundError."""
        return self._fetch(name, 0, None)

    def read_range(self, name: str, offset: int, length: int) -> bytes:
        """`length` bytes at `offset`; fewer if the file ends before. Raises FileNotFoundError."""
        if self.is_local:
            path = self.regular(name)
            with naming(path), open(path, "rb", buffering=0) as file:
                there = max(os.fstat(file.fileno()).st_size - offset, 0)
                return os.pread(file.fileno(), min(length, there), offset) if there else b""
        return self._fetch(name, offset, offset + length)

    def read_at_most(self, name: str, size: int) -> bytes:
        """A whole file. Raises FileNotFoundError; FormatError if it has more bytes than that."""
        data = self.read_range(name, 0, size + 1)
        if len(data) > size:
            raise FormatError(f"{self.path(name)} has more than the {size} bytes it may have")
        return data

    def regular(self, name: str) -> str:
        """The path of a local file to open: no device, no pipe, and nothing outside the folder.

        Raises FileNotFoundError, FormatError. Links are followed inside the folder alone, and from
        a snapshot of the hub's client to its blobs.
        """
        path, parts = self.path(name), name.split("/")
        places = (self.path("/".join(parts[:i])) for i in range(1, len(parts) + 1))
        if ".." in parts or any(os.path.islink(place) for place in places):
            if place := leads_out(path, self._root):
                raise FormatError(
                    f"{self.path(name)} is a link to {place}, outside of {self._root}: copy the "
                    "file here, or open the folder it is in"
                )
            path = os.path.realpath(path)
        try:
            mode = os.stat(path).st_mode
        except NotADirectoryError as error:  # a file has the name of a folder of it
            raise FileNotFoundError(error.errno, error.strerror, path) from None
        except OSError as error:
            if error.errno != errno.ELOOP:
                raise
            raise FormatError(f"{self.path(name)} is a link that leads to itself") from None
        if not stat.S_ISREG(mode):
            raise FormatError(f"{self.path(name)} is no regular file")
        return path

    def _fetch(self, name: str, start: int, end: int | None) -> bytes:
        """One request; a start without an end spares s3fs the one that asks for the size."""
        where = self.regular(name) if self.is_local else self.path(name)
        with self._reaching(name):
            try:
                return bytes(self._fs.cat_file(where, start=start, end=end, **self._how))
            except FileNotFoundError:
                raise
            except (OSError, ValueError):
                if start < self._fs.size(where):
                    raise
                return b""  # stores refuse a range that starts after the end

    def hash(self, name: str) -> str:
        """xxh3_128 of a whole file, streamed."""
        digest = xxhash.xxh3_128()
        where = self.regular(name) if self.is_local else self.path(name)
        with self._reaching(name), self._fs.open(where, "rb") as file:
            while block := file.read(1 << 22):
                digest.update(block)
        return digest.hexdigest()

    def publish(self, name: str, data: bytes, *, new: bool = False) -> None:
        """Write a whole file so that its name appears only when it is complete and durable.

        Raises FileExistsError if it must be `new` and a file of other content has the name.
        """
        try:
            with self.staged(name, new=new) as temporary:
                temporary.write_bytes(data)
        except FileExistsError:
            if not new or self.read(name) != data:  # the same: by another try of this very upload
                raise

    @contextlib.contextmanager
    def staged(self, name: str, *, new: bool = False) -> Iterator[Path]:
        """A local temporary path to fill; published as `name` unless an exception passes.

        Raises FileExistsError if it must be `new` and the name is taken: object stores decide that
        themselves, if they know conditional PUTs; locally it takes the lock to be sure.
        """
        if self.is_local:
            target = Path(self.path(name))
            target.parent.mkdir(parents=True, exist_ok=True)
            temporary = temporary_for(target)
        else:
            handle, staging = tempfile.mkstemp(TEMPORARY_SUFFIX, "decant-")
            os.close(handle)
            temporary = Path(staging)
        where = self.path(name) if self.is_local else f"{temporary}, to be {self.path(name)}"
        try:
            with naming(where, temporary):
                yield temporary
                if self.is_local:
                    sync(temporary)
            if self.is_local:
                if new and target.exists():
                    raise FileExistsError(f"{target} exists already")
                move(temporary, target)
            else:
                with self._reaching(name):
                    self._upload(temporary, self.path(name), new)
        finally:
            discard(temporary)

    def _upload(self, file: Path, where: str, new: bool) -> None:
        if new:
            try:
                return self._fs.put_file(str(file), where, mode="create")
            except OSError as error:
                if error.errno != errno.ENOSYS:  # a store that knows no conditional PUT
                    raise
        self._fs.put_file(str(file), where)

    def copy(self, source: "Store", name: str, new_name: str = "") -> None:
        """Publish a file of another store here, by a `new_name` if one is given.

        It is a hard link where that works.
        """
        where = source.regular(name) if source.is_local else source.path(name)
        with self.staged(new_name or name) as temporary:
            if source.is_local and self.is_local:
                with contextlib.suppress(OSError):  # another file system, or one without links
                    os.link(where, temporary)
                    return
            with source._reaching(name):
                source._fs.get_file(where, str(temporary))

    def remove(self, name: str) -> None:
        """Remove a file, if it is there."""
        with contextlib.suppress(FileNotFoundError), self._reaching(name):
            self._fs.rm_file(self.path(name))

    def remove_folder(self, folder: str) -> None:
        """Remove a folder and what is in it, if it is there."""
        where = self.path(folder)
        if not self.is_local:
            where = glob.escape(where)  # there, fsspec takes it for a pattern
        # Another worker may be at it too.
        with contextlib.suppress(FileNotFoundError), self._reaching(folder):
            self._fs.rm(where, recursive=True)

    def remove_temporaries(self, folder: str, files: Iterable[str] | None = None) -> None:
        """Remove what killed writers left in a folder: of these files, or of all.

        Only for who holds the lock that keeps other writers of these files away.
        """
        where = Path(self.path(folder))
        if not self.is_local or not where.is_dir():
            return
        stems = None if files is None else {PurePath(file).name for file in files}
        for leftover in where.glob(f".*{TEMPORARY_SUFFIX}"):
            of = leftover.name.removeprefix(".").rsplit(".", 2)[0]
            if stems is None or of in stems:
                leftover.unlink(missing_ok=True)

    @contextlib.contextmanager
    def lock(self, folder: str = "", *, shared: bool = False, wait: bool = False) -> Iterator[None]:
        """Hold a folder, alone or `shared`; it is let go when the process ends, however.

        Raises Busy if another process holds it in a way that excludes this one, unless told to
        `wait`. Object stores have no lock: there, nothing is held.
        """
        if not self.is_local:
            yield
            return
        place = Path(self.path(folder))
        place.mkdir(parents=True, exist_ok=True)
        try:
            with locked(place, write=False, shared=shared, wait=wait):
                yield
        except Held:
            raise Busy(
                f"{self.url} is being written by another process; wait for it or stop it"
            ) from None

    @contextlib.contextmanager
    def claim(self, name: str) -> Iterator[bool]:
        """Hold a file alone, if it is there and nobody else holds it; gives whether that is so.

        On an object store it always is.
        """
        if not self.is_local:
            yield True
            return
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(locked(Path(self.path(name)), write=True))
            except (FileNotFoundError, Held):
                yield False
                return
            yield True
