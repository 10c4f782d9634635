"""The only place that touches a file system: whole reads, range reads, publish, sealed JSON.

A published file is finished or absent. Locally: temporary name, fsync, rename, fsync of the
directory. On object stores a PUT is already all or nothing, so the same calls upload.
"""

import contextlib
import fcntl
import io
import json
import os
import tempfile
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePath
from typing import Any

import fsspec
import xxhash
import zstandard
from fsspec.implementations.local import LocalFileSystem

from schemas import FormatError, Segment
from schemas.strict import canonical
from storage import paths

SEAL = "checksum"
"""The field of a sealed JSON file that holds the xxh3_128 of all the others."""


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
            self._fs, root = fsspec.core.url_to_fs(self.url)
        except (ImportError, ValueError) as error:
            raise ValueError(f"cannot open {self.url}: {error}") from error
        self._root = root.rstrip("/")
        self.is_local = isinstance(self._fs, LocalFileSystem)

    def path(self, name: str) -> str:
        """The full path of a file, for messages and for local tools."""
        return f"{self._root}/{name}" if name else self._root

    def exists(self, name: str) -> bool:
        """Whether a file is there."""
        return bool(self._fs.exists(self.path(name)))

    def names(self, folder: str) -> list[str]:
        """Sorted file names directly inside a folder; empty if it is absent."""
        self._fs.invalidate_cache(self.path(folder))  # other processes commit shards too
        try:
            found = self._fs.ls(self.path(folder), detail=False)
        except FileNotFoundError:
            return []
        return sorted(entry.rstrip("/").rsplit("/", 1)[-1] for entry in found)

    def size(self, name: str) -> int:
        """Bytes of a file. Raises FileNotFoundError."""
        return int(self._fs.size(self.path(name)))

    def read(self, name: str) -> bytes:
        """A whole file. Raises FileNotFoundError."""
        return bytes(self._fs.cat_file(self.path(name)))

    def read_range(self, name: str, offset: int, length: int) -> bytes:
        """`length` bytes at `offset`; fewer if the file ends before. Raises FileNotFoundError."""
        if self.is_local:
            with open(self.path(name), "rb", buffering=0) as file:
                return os.pread(file.fileno(), length, offset)
        return bytes(self._fs.cat_file(self.path(name), start=offset, end=offset + length))

    def hash(self, name: str) -> str:
        """xxh3_128 of a whole file, streamed."""
        digest = xxhash.xxh3_128()
        with self._fs.open(self.path(name), "rb") as file:
            while block := file.read(1 << 22):
                digest.update(block)
        return digest.hexdigest()

    def publish(self, name: str, data: bytes) -> None:
        """Write a whole file so that its name appears only when it is complete and durable."""
        with self.staged(name) as temporary:
            temporary.write_bytes(data)

    @contextlib.contextmanager
    def staged(self, name: str) -> Iterator[Path]:
        """A local temporary path to fill; published as `name` unless an exception passes."""
        if self.is_local:
            target = Path(self.path(name))
            target.parent.mkdir(parents=True, exist_ok=True)
            temporary = target.with_name(
                f".{target.name}.{uuid.uuid4().hex[:8]}{paths.TEMPORARY_SUFFIX}"
            )
        else:
            handle, staging = tempfile.mkstemp(suffix=paths.TEMPORARY_SUFFIX)
            os.close(handle)
            temporary = Path(staging)
        try:
            yield temporary
        except OSError as error:  # Arrow names no file, for one on a full disk
            if error.errno is None or error.filename:
                raise
            message = f"{os.strerror(error.errno)} while writing"
            raise OSError(error.errno, message, self.path(name)) from error
        else:
            if self.is_local:
                _sync(temporary)
                os.replace(temporary, target)
                _sync(target.parent)
            else:
                self._fs.put_file(str(temporary), self.path(name))
        finally:
            temporary.unlink(missing_ok=True)

    def copy(self, source: "Store", name: str) -> None:
        """Publish the file of this name of another store here; a hard link where that works."""
        with self.staged(name) as temporary:
            if source.is_local and self.is_local:
                with contextlib.suppress(OSError):  # another file system, or one without links
                    os.link(source.path(name), temporary)
                    return
            source._fs.get_file(source.path(name), str(temporary))

    def remove(self, name: str) -> None:
        """Remove a file, if it is there."""
        with contextlib.suppress(FileNotFoundError):
            self._fs.rm_file(self.path(name))

    def remove_folder(self, folder: str) -> None:
        """Remove a folder and what is in it, if it is there."""
        with contextlib.suppress(FileNotFoundError):  # another worker may be at it too
            self._fs.rm(self.path(folder), recursive=True)

    def remove_temporaries(self, folder: str, files: Iterable[str] | None = None) -> None:
        """Remove what killed writers left in a folder: of these files, or of all.

        Only for who holds the lock that keeps other writers of these files away.
        """
        where = Path(self.path(folder))
        if not self.is_local or not where.is_dir():
            return
        stems = None if files is None else {PurePath(file).name for file in files}
        for leftover in where.glob(f".*{paths.TEMPORARY_SUFFIX}"):
            of = leftover.name.removeprefix(".").rsplit(".", 2)[0]
            if stems is None or of in stems:
                leftover.unlink(missing_ok=True)

    @contextlib.contextmanager
    def lock(self, folder: str = "", *, shared: bool = False, wait: bool = False) -> Iterator[None]:
        """Hold a folder, alone or `shared`; the kernel lets go when the process ends, however.

        Raises Busy if another process holds it in a way that excludes this one, unless told to
        `wait`. Object stores have no lock: there, nothing is held.
        """
        if not self.is_local:
            yield
            return
        Path(self.path(folder)).mkdir(parents=True, exist_ok=True)
        handle = os.open(self.path(folder), os.O_RDONLY)
        how = (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB)
        try:
            try:
                fcntl.flock(handle, how)
            except BlockingIOError:
                raise Busy(
                    f"{self.url} is being written by another process; wait for it or stop it"
                ) from None
            yield
        finally:
            os.close(handle)

    def publish_json(self, name: str, value: dict[str, Any]) -> None:
        """Publish an object with a checksum over its content, so that any changed byte shows."""
        self.publish(name, _sealed(value))

    def read_json(self, name: str) -> dict[str, Any]:
        """Read what `publish_json` wrote.

        Raises FormatError if it is absent, not JSON, or if any byte differs from what was sealed.
        """
        where = self.path(name)
        try:
            raw = self.read(name)
            value = json.loads(raw)
        except FileNotFoundError:
            raise FormatError(f"{where} is missing") from None
        except ValueError as error:
            raise FormatError(f"{where} is damaged: not JSON ({error})") from None
        if not isinstance(value, dict) or SEAL not in value:
            raise FormatError(f"{where} is damaged: no checksum inside")
        found = value.pop(SEAL)
        if _sealed(value) != raw:
            expected = xxhash.xxh3_128(canonical(value)).hexdigest()
            raise FormatError(
                f"{where} is damaged: checksum {found} inside, its content gives {expected}"
            )
        return value

    def publish_segment(self, name: str, entries: list[dict[str, Any]]) -> Segment:
        """Publish JSON lines, zstd-compressed, and return what the manifest must say of them."""
        text = b"".join(canonical(entry) + b"\n" for entry in entries)
        data = zstandard.ZstdCompressor(level=9, write_checksum=True).compress(text)
        self.publish(name, data)
        return Segment(
            name=name,
            entries=len(entries),
            bytes=len(data),
            xxh3_128=xxhash.xxh3_128(data).hexdigest(),
        )

    def read_sealed(self, segment: Segment) -> bytes:
        """The bytes of a segment. Raises FormatError if they are not what the manifest says."""
        where = self.path(segment.name)
        try:
            data = self.read(segment.name)
        except FileNotFoundError:
            raise FormatError(f"{where} is missing") from None
        found = xxhash.xxh3_128(data).hexdigest()
        if found != segment.xxh3_128:
            raise FormatError(
                f"{where} is damaged: hash {found}, the manifest says {segment.xxh3_128}"
            )
        return data

    def read_segment(self, segment: Segment) -> Iterator[dict[str, Any]]:
        """The entries of a segment of JSON lines. Raises FormatError as `read_sealed`."""
        data = io.BytesIO(self.read_sealed(segment))
        reader = zstandard.ZstdDecompressor().stream_reader(data)
        for line in io.TextIOWrapper(reader, encoding="utf-8"):
            yield json.loads(line)


def _sealed(value: dict[str, Any]) -> bytes:
    assert SEAL not in value
    sealed = {**value, SEAL: xxhash.xxh3_128(canonical(value)).hexdigest()}
    return json.dumps(sealed, indent=1, ensure_ascii=False).encode() + b"\n"


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
