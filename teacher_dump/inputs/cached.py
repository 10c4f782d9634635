"""The sequences of a cache as records: ready ids with their targets, to be scored again.

What the teacher of the cache says of them is not read; their sampler's log probs go along.
Sequences without targets, as those that the teacher could not score, come as they are: what becomes
of a record without targets is decided elsewhere.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from decant.schemas.strict import canonical
from decant.storage import CacheReader, Store
from decant.storage.cache import paths
from decant.storage.cache.lineage import source_of
from decant.teacher_dump.inputs.config import SourceConfig
from decant.teacher_dump.inputs.files import format_of
from decant.teacher_dump.inputs.records import Record, SourceError


def is_cache(config: SourceConfig) -> bool:
    """Whether the path of a source is that of a cache."""
    if config.format != "auto":
        return config.format == "cache"
    if "://" in config.path:  # a file of records is not asked for: it would be refused as a URL
        return not format_of(Path(config.path)) and Store(config.path).exists(paths.MANIFEST)
    folder = Path(os.path.expanduser(config.path))
    return (folder / paths.MANIFEST).is_file() and (folder / paths.SHARDS).is_dir()


def open_cache(config: SourceConfig) -> CacheReader:
    """The cache that is the source. Raises SourceError for options that have no effect on it."""
    if config.fields or config.id_field != "id" or config.split != "train" or config.subset:
        raise SourceError(
            f"source.fields, id_field, split and subset have no effect on {config.path}, a cache: "
            "leave them out"
        )
    return CacheReader(os.path.expanduser(config.path))


def cached_records(config: SourceConfig) -> Iterator[Record]:
    """Each sequence of the cache, in its order, by its sample id."""
    reader = open_cache(config)
    left = config.limit or len(reader)
    for group in reader.row_groups():
        if left <= 0:
            return
        rows = reader.read_stored(group)
        for index, sample_id in enumerate(rows.sample_ids[:left]):
            span = slice(int(rows.row_starts[index]), int(rows.row_starts[index + 1]))
            ids = rows.token_id[span]
            fields = {
                "input_ids": ids,
                "loss_mask": rows.is_target[span].astype(np.int8),
                "attention_mask": np.ones(len(ids), np.int8),
            }
            where = f"{config.path} sequence {group.first_sequence + index}"
            said = rows.messages[index] if rows.messages else ""
            sampler = rows.sampler_logprobs
            yield Record(sample_id, fields, where, said, None if sampler is None else sampler[span])
        left -= len(rows)


def describe_cache(config: SourceConfig) -> dict[str, Any]:
    """What identifies the sequences of a cache as a source, and the lineage that they bring."""
    reader = open_cache(config)
    manifest = reader.manifest
    assert manifest.records is not None
    identity = {
        "cache_id": manifest.cache_id,
        "records": manifest.records.xxh3_128,
        "limit": config.limit,
    }
    options: dict[str, Any] = {"limit": config.limit or ""}
    if config.parts > 1:
        part = {"parts": config.parts, "part": config.part}
        identity, options = identity | part, options | part
    described = source_of("rescore", options, [(config.path, manifest)], meaning=False)
    return {**described, "fingerprint": xxhash.xxh3_128(canonical(identity)).hexdigest()}
