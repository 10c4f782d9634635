"""Which files a source consists of, their format and their hashes."""

import glob
import itertools
import os
import re
from pathlib import Path

import xxhash

from decant.teacher_dump.inputs.config import SourceConfig, refuse_hf_options
from decant.teacher_dump.inputs.records import SourceError

PACKINGS = ("", ".gz", ".zst")
SUFFIXES = {
    **{name + packed: "jsonl" for name in (".jsonl", ".ndjson", ".json") for packed in PACKINGS},
    ".parquet": "parquet",
}
EXPECTED = ".jsonl, .ndjson, .json (also with .gz or .zst) or .parquet"
PLAIN_JSON = tuple(".json" + packed for packed in PACKINGS)
"""Of these a folder is read only if it holds no other: beside data they describe it."""
ABOUT_DATA = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
"""What libraries write beside data."""


HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


HASH_BYTES = 1 << 20


def resolve(config: SourceConfig) -> tuple[str, list[tuple[str, Path]]]:
    """Return the format read and the sorted (relative name, path) of the files that make it up."""
    path = Path(os.path.expanduser(config.path))
    if "://" in config.path:
        raise SourceError(
            f"source path {config.path!r} is a URL: expected local files or the name of a"
            " Hugging Face dataset; copy the files here first"
        )
    if config.format == "hf" or (config.format == "auto" and is_saved(path)):
        return "hf", _hf_files(path, config.split)

    explicit = not path.is_dir()  # a file or a glob names its files itself, whatever their suffix
    if path.is_file():
        root, found = path.parent, [path]
    elif path.is_dir():
        root, found = path, _visible_files(path)
    elif glob.has_magic(str(path)):
        fixed = itertools.takewhile(lambda part: not glob.has_magic(part), path.parts)
        root = Path(*fixed)
        found = [Path(p) for p in glob.glob(str(path), recursive=True) if Path(p).is_file()]
    elif config.format == "auto" and HUB_NAME.fullmatch(config.path) and not format_of(path):
        return "hf", []
    else:
        raise SourceError(f"source path {config.path!r} does not exist (seen from {os.getcwd()})")

    formats = {p: format_of(p) for p in found}
    if not explicit:
        data = {p for p, known in formats.items() if known and not p.name.endswith(PLAIN_JSON)}
        for p in found:
            if p.name.endswith(PLAIN_JSON) and (data or p.name in ABOUT_DATA):
                formats[p] = ""
    if explicit and config.format != "auto":
        formats = dict.fromkeys(found, config.format)
    elif config.format != "auto":
        formats = {p: known for p, known in formats.items() if known == config.format}
    if explicit and "" in formats.values():
        raise SourceError(
            f"{min(p for p, known in formats.items() if not known)} has no known suffix: expected"
            f" {EXPECTED}; rename it, narrow the path, or set format"
        )
    used = set(formats.values()) - {""}
    if len(used) != 1:
        raise SourceError(
            f"source path {config.path!r} holds {' and '.join(sorted(used)) or 'no'} files that"
            f" format: {config.format} reads: expected files of one kind, {EXPECTED};"
            " narrow the path or set format"
        )
    refuse_hf_options(config)
    return used.pop(), sorted((p.relative_to(root).as_posix(), p) for p in formats if formats[p])


def format_of(path: Path) -> str:
    """The format that a file's name says; empty if none."""
    return next((SUFFIXES[suffix] for suffix in SUFFIXES if path.name.endswith(suffix)), "")


def _visible_files(directory: Path) -> list[Path]:
    """Return the files below, without hidden ones and those of hidden or `_temporary` folders."""
    return sorted(
        path
        for path in directory.rglob("*")
        if path.is_file() and not any(part[0] in "._" for part in path.relative_to(directory).parts)
    )


def hash_file(path: Path) -> str:
    """The xxh3_128 of a file, lower-case hex."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while chunk := file.read(HASH_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def is_saved(path: Path) -> bool:
    """Tell whether `datasets` wrote this directory with `save_to_disk`."""
    return (path / "state.json").is_file() or (path / "dataset_dict.json").is_file()


def _hf_files(path: Path, split: str) -> list[tuple[str, Path]]:
    """Return what identifies a dataset on this disk: its arrow files, or a whole repository."""
    if not path.exists():
        return []
    if (path / "dataset_dict.json").is_file():
        path = path / split
    files = _visible_files(path)
    if is_saved(path):
        files = [file for file in files if file.suffix == ".arrow"]
    return [(file.relative_to(path).as_posix(), file) for file in files]
