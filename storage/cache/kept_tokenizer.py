"""The tokenizer files of a cache, as data: bounded in size, and none that is not the manifest's."""

from pathlib import Path

import xxhash

from decant.schemas import FormatError, Manifest
from decant.storage.cache import paths
from decant.storage.files.store import Store

MAX_BYTES = 1 << 28
"""Of one file; the largest tokenizers take a tenth."""


def read_file(store: Store, manifest: Manifest, name: str) -> bytes | None:
    """The bytes of a file in `tokenizer/`; None if the manifest names no such file.

    Raises FormatError if it is missing, too large, or not what was put there.
    """
    expected = manifest.tokenizer.files.get(name)
    if expected is None:
        return None
    path = f"{paths.TOKENIZER}/{name}"
    try:
        data = store.read_at_most(path, MAX_BYTES)
    except FileNotFoundError:
        raise FormatError(f"{store.path(path)} is missing") from None
    found = xxhash.xxh3_128(data).hexdigest()
    if found != expected:
        raise FormatError(f"{store.path(path)} is damaged: hash {found}, expected {expected}")
    return data


def unpack(store: Store, manifest: Manifest, folder: Path) -> None:
    """Copy all of them into a local folder. Raises FormatError as `read_file`."""
    for name in manifest.tokenizer.files:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(read_file(store, manifest, name) or b"")
