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
from collections.abc import Iterator
from pathlib import Path
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

    def remove_folder(self, folder: str) -> None:
        """Remove a folder and what is in it, if it is there."""
        if self._fs.exists(self.path(folder)):
            self._fs.rm(self.path(folder), recursive=True)

    def remove_temporaries(self) -> None:
        """Remove what a killed writer left behind; only for the holder of the lock."""
        if self.is_local and Path(self._root).is_dir():
            for leftover in Path(self._root).glob(f"*/.*{paths.TEMPORARY_SUFFIX}"):
                leftover.unlink(missing_ok=True)
            for leftover in Path(self._root).glob(f".*{paths.TEMPORARY_SUFFIX}"):
                leftover.unlink(missing_ok=True)

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the directory exclusively; the kernel lets go when the process ends, however.

        Raises Busy if another process holds it. Object stores have no lock: there, start one
        dump per cache.
        """
        if not self.is_local:
            yield
            return
        Path(self._root).mkdir(parents=True, exist_ok=True)
        handle = os.open(self._root, os.O_RDONLY)
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
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

    def read_segment(self, segment: Segment) -> Iterator[dict[str, Any]]:
        """The entries of a sealed segment. Raises FormatError if it is not what was sealed."""
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
        reader = zstandard.ZstdDecompressor().stream_reader(io.BytesIO(data))
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
