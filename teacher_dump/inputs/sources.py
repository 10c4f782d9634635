"""Where samples come from: JSON, Parquet files, Hugging Face datasets; one record each.

Owns: which files a path means, their order, what identifies a sample (`sample_id`), under which
names its fields are read, and what identifies the whole source (`describe_source`). Reads as a
stream, in memory bounded by one line or one batch of rows, plus one 64-bit hash per sample id.
Knows nothing about tokenizers, nor about which fields of a record matter: that is `kinds.py`.
"""

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import xxhash

from decant.teacher_dump.inputs.cached import cached_records, describe_cache, is_cache
from decant.teacher_dump.inputs.config import SourceConfig
from decant.teacher_dump.inputs.files import hash_file, resolve
from decant.teacher_dump.inputs.json_lines import json_rows
from decant.teacher_dump.inputs.kinds import NAMES
from decant.teacher_dump.inputs.records import Record, Row, SourceError
from decant.teacher_dump.inputs.tables import hf_rows, load_hf, parquet_rows


def iter_records(config: SourceConfig) -> Iterator[Record]:
    """Return the records in the order of the sorted files; the path is checked at once.

    A sample id that occurs twice is a `SourceError` that names both places, but in a cache, whose
    ids are as they are.
    """
    if is_cache(config):
        return itertools.islice(cached_records(config), config.part, None, config.parts)
    source_format, files = resolve(config)
    return _unique(config, source_format, files)


def describe_source(config: SourceConfig) -> dict[str, Any]:
    """Return {"path", "files": [{"name", "bytes", "xxh3_128"}], "rows" (hf only), "fingerprint"}.

    The fingerprint covers the content and the relative names of the files and every option that
    alters what is read, but neither the place nor the times of the files. A dataset from the Hub is
    identified by its own fingerprint (which contains its revision) in place of files, a cache by
    its id and its commit records.
    """
    if is_cache(config):
        return describe_cache(config)
    source_format, files = resolve(config)
    described = [
        {"name": name, "bytes": path.stat().st_size, "xxh3_128": hash_file(path)}
        for name, path in files
    ]
    identity: dict[str, Any] = {
        "format": source_format,
        "id_field": config.id_field,
        "limit": config.limit,
        "files": described,
    }
    description: dict[str, Any] = {"path": config.path, "files": described}
    if config.fields:
        identity["fields"] = config.fields
    if config.parts > 1:
        identity |= {"parts": config.parts, "part": config.part}
        description |= {"parts": config.parts, "part": config.part}
    if source_format == "hf":
        dataset = load_hf(config)
        description["rows"] = len(dataset)
        identity |= {"split": config.split, "subset": config.subset, "rows": len(dataset)}
        if not files:
            identity |= {"dataset": config.path, "dataset_fingerprint": dataset._fingerprint}
    canonical = json.dumps(identity, sort_keys=True).encode()
    description["fingerprint"] = xxhash.xxh3_128(canonical).hexdigest()
    return description


def source_files(config: SourceConfig) -> list[Path]:
    """The local files that are read; none for a dataset of the Hub, nor for a cache."""
    if is_cache(config):
        return []
    return [path for _, path in resolve(config)[1]]


def source_names(config: SourceConfig) -> list[str]:
    """What `Record.where` calls the files that are read, in their order; none for datasets."""
    if is_cache(config):
        return []
    source_format, files = resolve(config)
    return [] if source_format == "hf" else [name for name, _ in files]


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
        rows = hf_rows(config)
    else:
        of_file = json_rows if format_ == "jsonl" else parquet_rows
        rows = itertools.chain.from_iterable(of_file(name, path) for name, path in files)
    unseen = {source for source in config.fields.values() if source}
    read = itertools.islice(rows, config.limit or None)
    for fallback_id, where, fields in itertools.islice(read, config.part, None, config.parts):
        unseen -= fields.keys()
        named = _named(config, where, fields) if config.fields else fields
        yield Record(_sample_id(config, fallback_id, where, fields), named, where)
    if unseen:
        raise SourceError(
            f"no record of {config.path} has {sorted(unseen)}, which source.fields asks for"
        )


def _named(config: SourceConfig, where: str, fields: dict[str, Any]) -> dict[str, Any]:
    """The fields under the names that are read; one that makes a kind must be there."""
    taken = {*config.fields, *config.fields.values()}
    named = {name: value for name, value in fields.items() if name not in taken}
    for name, source in config.fields.items():
        if source in fields:
            named[name] = fields[source]
        elif source and name in NAMES:
            raise SourceError(
                f"{where}: no field {source!r}, which source.fields reads as {name}; the record has"
                f" {sorted(fields)}"
            )
    return named


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
