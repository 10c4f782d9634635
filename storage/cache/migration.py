"""An older cache under a manifest of the present format version, in a directory of its own."""

import dataclasses
import os
from collections.abc import Callable

from decant.schemas import FORMAT_VERSION, Manifest
from decant.storage.cache import paths
from decant.storage.cache.reader import CacheReader
from decant.storage.cache.records import committed_shards, seal
from decant.storage.files.sealed import publish_json
from decant.storage.files.store import Store

MADE = (paths.PLAN, paths.RECORDS, paths.SHARDS, paths.TOKENIZER)


def migrate(
    url: str | os.PathLike[str],
    out: str | os.PathLike[str],
    progress: Callable[[int, int], None] | None = None,
) -> Manifest:
    """Make the cache at `url` again at `out`; the old one is only read.

    Shards are copied byte for byte (hard links within one file system), so no value changes; the
    records and the manifest are written new, the manifest last. What an interrupted call left is
    completed by the next. `progress` is called with (shards done, shards in all).
    Raises FormatError if the old cache is not whole, ValueError if it is of this version already,
    FileExistsError if `out` holds something else.
    """
    reader = CacheReader(url)
    old = reader.manifest
    refuse_present(reader)
    generated = list(old.source.get("generated", ()))
    folders = {*MADE, *(name.split("/")[0] for name in generated)}
    source, target = Store(url), Store(out)
    with target.lock():
        target.remove_temporaries("", [paths.MANIFEST])
        foreign = [name for name in target.names("") if name not in folders]
        if foreign:
            raise FileExistsError(f"{out} is not empty ({', '.join(foreign[:5])}): choose another")
        for folder in folders:
            target.remove_temporaries(folder)
        new = old.upgraded()
        tokenizer = [f"{paths.TOKENIZER}/{name}" for name in old.tokenizer.files]
        for name in [old.plan.name, *tokenizer, *generated]:
            target.copy(source, name)
        done = committed_shards(target)
        for record in reader.index:
            if record.shard not in done:
                reader.copy_shard(record.shard, target, paths.shard(record.shard))
                renamed = dataclasses.replace(record, cache_id=new.cache_id)
                publish_json(target, paths.record(record.shard), renamed.to_json(FORMAT_VERSION))
            if progress:
                progress(record.shard + 1, len(reader.index))
        records = (dataclasses.replace(r, cache_id=new.cache_id) for r in reader.index)
        new = seal(target, new, records)
        reader.refuse_rewritten()
        publish_json(target, paths.MANIFEST, new.to_json())
    return new


def refuse_present(cache: CacheReader) -> None:
    """Raise ValueError for a cache of the present format version."""
    if cache.manifest.format_version == FORMAT_VERSION:
        raise ValueError(f"{cache.url} is of format version {FORMAT_VERSION} already")
