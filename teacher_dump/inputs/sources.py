"""Where samples come from: JSON lines, Parquet files, Hugging Face datasets; one record each.

Owns: which files a path means, their order, what identifies a sample (`sample_id`) and what
identifies the whole source (`describe_source`). Reads as a stream, in memory bounded by one line
or one batch of rows, plus one 64-bit hash per sample id. Knows nothing about tokenizers, nor about
which fields of a record matter: that is `sequences.py`.
"""

import dataclasses
import glob
import itertools
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from decant.teacher_dump.inputs.json_lines import jsonl_rows
from decant.teacher_dump.inputs.records import Record, Row, SourceError

FORMATS = ("auto", "jsonl", "parquet", "hf")
SUFFIXES = {
    ".jsonl": "jsonl",
    ".jsonl.gz": "jsonl",
    ".jsonl.zst": "jsonl",
    ".parquet": "parquet",
}
HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
PARQUET_BATCH_ROWS = 256
HASH_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True)  # no slots: jsonargparse reads defaults through vars()
class GenerateConfig:
    """Responses of the teacher's own, in place of a text that is given."""

    n: int = 0
    """Responses to sample for each record's prompt or messages; 0 = score the given text."""

    temperature: float = 1.0
    """Divides the logits before sampling; 0 = always the most probable token."""

    top_p: float = 1.0
    """Sample from the smallest set of most probable tokens with this mass."""

    max_new_tokens: int = 512
    """Longest response; a prompt with its response never exceeds sequences.max_length."""

    seed: int = 0
    """Of the sampling; a response depends on it, the prompt's number and its own."""

    part_prompts: int = 256
    """Prompts whose responses are kept, or lost by an interruption, together: one file."""

    def __post_init__(self) -> None:
        """Refuse what cannot be sampled, and settings without effect."""
        for name, least in (("n", 0), ("max_new_tokens", 1), ("part_prompts", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}: expected at least {least}")
        if self.temperature != 0 and not 1e-4 <= self.temperature <= 1e4:
            raise ValueError(f"temperature is {self.temperature}: expected 0, or 1e-4 to 1e4")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}: expected a mass in (0, 1]")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed is {self.seed}: expected 0 to 2^63 - 1")
        given = [f.name for f in dataclasses.fields(self) if getattr(self, f.name) != f.default]
        if self.n == 0 and given:
            raise ValueError(f"source.generate: {given} have no effect with n: 0: set n")
        if self.temperature == 0 and (self.n > 1 or self.top_p < 1):
            raise ValueError(
                "temperature: 0 gives the same response every time: n must be 1 and top_p 1"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceConfig:
    """Which records to read."""

    path: str
    """File, directory, glob, or the name or local path of a Hugging Face dataset."""

    format: str = "auto"
    """auto, jsonl (also .gz and .zst), parquet, or hf."""

    split: str = "train"
    """Split of a Hugging Face dataset."""

    subset: str = ""
    """Configuration of a Hugging Face dataset ("" is its only one, or its default)."""

    id_field: str = "id"
    """Field that names a sample; without an "id", samples are called "<file name>:<index>"."""

    limit: int = 0
    """Read only this many records from the start (0 = all)."""

    generate: GenerateConfig = field(default_factory=GenerateConfig)
    """Let the teacher answer the records, and score what it says."""

    def __post_init__(self) -> None:
        """Refuse what cannot be right for any source."""
        if not self.path:
            raise ValueError("source path is empty: give a file, directory, glob or dataset name")
        if self.format not in FORMATS:
            raise ValueError(f"source format is {self.format!r}: expected one of {FORMATS}")
        if self.limit < 0:
            raise ValueError(f"source limit is {self.limit}: expected 0 (all records) or more")
        if not self.id_field or not self.split:
            raise ValueError("source id_field and split must not be empty")
        if self.format in ("jsonl", "parquet"):
            _refuse_hf_options(self)


def iter_records(config: SourceConfig) -> Iterator[Record]:
    """Return the records in the order of the sorted files; the path is checked at once.

    A sample id that occurs twice is a `SourceError` that names both places.
    """
    source_format, files = _resolve(config)
    return _unique(config, source_format, files)


def describe_source(config: SourceConfig) -> dict[str, Any]:
    """Return {"path", "files": [{"name", "bytes", "xxh3_128"}], "rows" (hf only), "fingerprint"}.

    The fingerprint covers the content and the relative names of the files and every option that
    alters what is read, but neither the place nor the times of the files. A dataset from the Hub is
    identified by its own fingerprint (which contains its revision) in place of files.
    """
    source_format, files = _resolve(config)
    described = [
        {"name": name, "bytes": path.stat().st_size, "xxh3_128": _hash_file(path)}
        for name, path in files
    ]
    identity: dict[str, Any] = {
        "format": source_format,
        "id_field": config.id_field,
        "limit": config.limit,
        "files": described,
    }
    description: dict[str, Any] = {"path": config.path, "files": described}
    if source_format == "hf":
        dataset = _load_hf(config)
        description["rows"] = len(dataset)
        identity |= {"split": config.split, "subset": config.subset, "rows": len(dataset)}
        if not files:
            identity |= {"dataset": config.path, "dataset_fingerprint": dataset._fingerprint}
    canonical = json.dumps(identity, sort_keys=True).encode()
    description["fingerprint"] = xxhash.xxh3_128(canonical).hexdigest()
    return description


def source_files(config: SourceConfig) -> list[Path]:
    """The local files that are read; none for a dataset of the Hub."""
    return [path for _, path in _resolve(config)[1]]


def source_names(config: SourceConfig) -> list[str]:
    """What `Record.where` calls the files that are read, in their order; none for datasets."""
    source_format, files = _resolve(config)
    return [] if source_format == "hf" else [name for name, _ in files]


def _resolve(config: SourceConfig) -> tuple[str, list[tuple[str, Path]]]:
    """Return the format read and the sorted (relative name, path) of the files that make it up."""
    path = Path(os.path.expanduser(config.path))
    if "://" in config.path:
        raise SourceError(
            f"source path {config.path!r} is a URL: expected local files or the name of a"
            " Hugging Face dataset; copy the files here first"
        )
    if config.format == "hf" or (config.format == "auto" and _is_saved(path)):
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
    elif config.format == "auto" and HUB_NAME.fullmatch(config.path) and not _format_of(path):
        return "hf", []
    else:
        raise SourceError(f"source path {config.path!r} does not exist (seen from {os.getcwd()})")

    formats = {p: _format_of(p) for p in found}
    if explicit and config.format != "auto":
        formats = dict.fromkeys(found, config.format)
    elif config.format != "auto":
        formats = {p: known for p, known in formats.items() if known == config.format}
    if explicit and "" in formats.values():
        raise SourceError(
            f"{min(p for p, known in formats.items() if not known)} has no known suffix: expected"
            f" {', '.join(SUFFIXES)}; rename it, narrow the path, or set format"
        )
    used = set(formats.values()) - {""}
    if len(used) != 1:
        raise SourceError(
            f"source path {config.path!r} holds {' and '.join(sorted(used)) or 'no'} files that"
            f" format: {config.format} reads: expected files of one kind, {', '.join(SUFFIXES)};"
            " narrow the path or set format"
        )
    _refuse_hf_options(config)
    return used.pop(), sorted((p.relative_to(root).as_posix(), p) for p in formats if formats[p])


def _refuse_hf_options(config: SourceConfig) -> None:
    if config.split != "train" or config.subset:
        raise SourceError(
            f"split={config.split!r}, subset={config.subset!r} are for Hugging Face datasets and"
            f" have no effect on the files of {config.path!r}: leave them out, or set format: hf"
        )


def _format_of(path: Path) -> str:
    return next((SUFFIXES[suffix] for suffix in SUFFIXES if path.name.endswith(suffix)), "")


def _visible_files(directory: Path) -> list[Path]:
    """Return the files below, without hidden ones and those of hidden or `_temporary` folders."""
    return sorted(
        path
        for path in directory.rglob("*")
        if path.is_file() and not any(part[0] in "._" for part in path.relative_to(directory).parts)
    )


def _hash_file(path: Path) -> str:
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while chunk := file.read(HASH_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def _unique(config: SourceConfig, format_: str, files: list[tuple[str, Path]]) -> Iterator[Record]:
    seen: set[int] = set()
    for record in _records(config, format_, files):
        key = xxhash.xxh3_64_intdigest(record.sample_id.encode())
        if key in seen:  # rare: the first place is found by reading again, not by keeping every id
            for earlier in _records(config, format_, files):
                if earlier.where == record.where:
                    break
                if earlier.sample_id == record.sample_id:
                    raise SourceError(
                        f"sample id {record.sample_id!r} occurs twice, {earlier.where} and"
                        f" {record.where}, but ids must be unique: drop one of the two, or set"
                        " id_field to a field without repetitions"
                    )
        seen.add(key)
        yield record


def _records(config: SourceConfig, format_: str, files: list[tuple[str, Path]]) -> Iterator[Record]:
    rows: Iterator[Row]
    if format_ == "hf":
        rows = _hf_rows(config)
    else:
        read = jsonl_rows if format_ == "jsonl" else _parquet_rows
        rows = itertools.chain.from_iterable(read(name, path) for name, path in files)
    for fallback_id, where, fields in itertools.islice(rows, config.limit or None):
        yield Record(_sample_id(config, fallback_id, where, fields), fields, where)


def _sample_id(config: SourceConfig, fallback: str, where: str, fields: dict[str, Any]) -> str:
    value = fields.get(config.id_field)
    if value is None and config.id_field == "id":
        return fallback
    if value is None:
        raise SourceError(
            f"{where}: no field {config.id_field!r}, which id_field asks for; the record has"
            f" {sorted(fields)}"
        )
    if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
        raise SourceError(
            f"{where}: {config.id_field!r} is {value!r}: expected a non-empty string or an integer;"
            " set id_field to another field"
        )
    return str(value)


def _parquet_rows(name: str, path: Path) -> Iterator[Row]:
    index = 0
    try:
        with pq.ParquetFile(path, pre_buffer=False) as file:
            for batch in file.iter_batches(batch_size=PARQUET_BATCH_ROWS):
                for fields in batch.to_pylist():
                    yield f"{name}:{index}", f"{name} row {index}", fields
                    index += 1
    except (pa.ArrowException, OSError, UnicodeError) as error:
        raise SourceError(
            f"{path} is not readable as Parquet after {index} rows: {error}; write it again"
        ) from error
    if index == 0:
        raise SourceError(f"{path} is empty: expected at least one row; remove the file")


def _is_saved(path: Path) -> bool:
    """Tell whether `datasets` wrote this directory with `save_to_disk`."""
    return (path / "state.json").is_file() or (path / "dataset_dict.json").is_file()


def _hf_files(path: Path, split: str) -> list[tuple[str, Path]]:
    """Return what identifies a dataset on this disk: its arrow files, or a whole repository."""
    if not path.exists():
        return []
    if (path / "dataset_dict.json").is_file():
        path = path / split
    files = _visible_files(path)
    if _is_saved(path):
        files = [file for file in files if file.suffix == ".arrow"]
    return [(file.relative_to(path).as_posix(), file) for file in files]


def _hf_rows(config: SourceConfig) -> Iterator[Row]:
    index = -1
    for index, fields in enumerate(_load_hf(config)):
        yield f"{config.split}:{index}", f"{config.path} split {config.split} row {index}", fields
    if index < 0:
        raise SourceError(f"{config.path} split {config.split} is empty: expected at least one row")


def _load_hf(config: SourceConfig) -> Any:
    path = os.path.expanduser(config.path)
    try:
        import datasets

        if not _is_saved(Path(path)):
            return datasets.load_dataset(path, config.subset or None, split=config.split)
        dataset = datasets.load_from_disk(path)
    except Exception as error:  # whatever a Hub client, a builder or a cache may raise
        raise SourceError(
            f"{config.path!r} (subset {config.subset!r}, split {config.split!r}) is neither a local"
            f" file nor a Hugging Face dataset that can be loaded: {error}; check the name"
        ) from error
    splits = list(dataset) if isinstance(dataset, datasets.DatasetDict) else ["train"]
    if config.subset or config.split not in splits:
        raise SourceError(
            f"{config.path} was saved with splits {splits} and no subsets: expected split, found"
            f" split={config.split!r}, subset={config.subset!r}"
        )
    return dataset[config.split] if isinstance(dataset, datasets.DatasetDict) else dataset
