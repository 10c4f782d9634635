"""More shards for a final cache: filled beside it, then moved in by one step.

`extension/` in a cache is the start of the longer one: its plan begins with the plan of the cache,
whose commit records it takes over without their files. Once it is complete its shards get their
places, the manifest is published over the old one, and the folder goes. Old shards are not touched;
a reader sees the old cache or the new one.
"""

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from decant.schemas import FORMAT_VERSION, CommitRecord, FormatError, Manifest, ShardPlan
from decant.schemas.strict import UnfitError
from decant.storage.cache import paths
from decant.storage.cache.checks import check_rows
from decant.storage.cache.lineage import EXTENSIONS
from decant.storage.cache.reader import CacheReader
from decant.storage.cache.records import (
    committed_shards,
    generation,
    read_manifest,
    read_record,
    read_records,
)
from decant.storage.cache.writer import CacheWriter
from decant.storage.files.sealed import publish_json
from decant.storage.files.store import Store


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """One extension, as the manifest says it."""

    cache_id: str
    """Of the cache before."""
    shards: int
    """Of the cache before: those of the extension follow."""
    sequences: int
    """Of the cache before."""
    source: dict[str, Any]
    """Of the records added."""
    settings: dict[str, Any]
    """How they became sequences."""


def steps_of(manifest: Manifest) -> list[Step]:
    """The extensions of a cache, first to last."""
    return [Step(**step) for step in manifest.source.get(EXTENSIONS, ())]


def inherited(manifest: Manifest) -> int:
    """How many shards a cache in `extension/` takes over."""
    steps = steps_of(manifest)
    return steps[-1].shards if steps else 0


def extension_url(url: str) -> str:
    """Where the extension of a cache is filled."""
    return f"{url.rstrip('/')}/{paths.EXTENSION}"


def draft(base: Manifest, source: dict[str, Any], settings: dict[str, Any]) -> Manifest:
    """The start of the manifest of the longer cache."""
    step = Step(
        cache_id=base.cache_id,
        shards=base.num_shards,
        sequences=base.num_sequences,
        source=source,
        settings=settings,
    )
    steps = [*base.source.get(EXTENSIONS, ()), dataclasses.asdict(step)]
    return base.derived(source={**base.source, EXTENSIONS: steps}, sequences=base.sequences)


def start(url: str, base: CacheReader, manifest: Manifest, plan: list[ShardPlan]) -> CacheWriter:
    """Start the extension of a cache at `url`, with the lines of its plan that are added."""
    number = generation(base.manifest) + 1
    return CacheWriter.create(url, manifest, [*base.plan, *plan], number=number)


def take_over(writer: CacheWriter, base: CacheReader) -> None:
    """Give the extension the commit records of the cache, as they are now."""
    done = committed_shards(writer.store)
    for record in base.index:
        ours = dataclasses.replace(record, cache_id=writer.manifest.cache_id)
        has = record.shard in done and read_record(writer.store, writer.manifest, record.shard)
        if has != ours:  # not there, or of a shard that was scored again since
            _publish(writer.store, record, writer.manifest)


def move_in(store: Store, progress: Callable[[int, int], None] | None = None) -> Manifest:
    """Make the complete extension of the cache in `store` part of it; its manifest.

    Only for who holds the cache alone. What an interrupted call left is completed by the next.
    """
    extension = Store(extension_url(store.url))
    manifest = read_manifest(extension)
    if not manifest.is_final or manifest.records is None:
        raise FormatError(f"{extension.url} is not complete: run the command that fills it again")
    first = inherited(manifest)
    for folder in (paths.SHARDS, paths.PLAN, paths.RECORDS):  # what a killed call left
        store.remove_temporaries(folder)
    store.remove_temporaries("", [paths.MANIFEST])
    published = read_manifest(store)
    if published.cache_id != manifest.cache_id:
        index = read_records(extension, manifest)
        _verify(CacheReader(extension.url), first)
        for record in index:
            if record.shard >= first:
                store.copy(extension, paths.shard(record.shard))
                _publish(store, record, manifest)
            if progress:
                progress(record.shard + 1, len(index))
        number = max(paths.number(manifest.records.name), generation(published) + 1)
        records = dataclasses.replace(manifest.records, name=paths.record_index(number))
        store.copy(extension, manifest.plan.name)
        store.copy(extension, manifest.records.name, records.name)
        published = dataclasses.replace(manifest, records=records)
        publish_json(store, paths.MANIFEST, published.to_json())
    for record in read_records(store, published)[:first]:
        _publish(store, record, manifest)
    for folder in extension.names(""):
        if folder != paths.MANIFEST:  # which says until the end what is left to do
            extension.remove_folder(folder)
    store.remove_folder(paths.EXTENSION)
    return published


def _verify(extension: CacheReader, first: int) -> None:
    """Raise FormatError unless every shard from `first` on reads as it was committed."""
    for group in extension.row_groups():
        if group.shard < first:
            continue
        problems = check_rows(extension.read(group), extension.manifest.layout)
        if problems:
            raise FormatError(f"{extension.url}: shard {group.shard}: {problems[0]}")


def moving(store: Store) -> Manifest | None:
    """The manifest of the extension that is being filled, or moved in; None without one."""
    try:
        return read_manifest(Store(extension_url(store.url)))
    except UnfitError:
        return None


def names_of(manifest: Manifest) -> Iterator[str]:
    """The files that an extension may have put among the shards of its cache already."""
    for shard in range(inherited(manifest), manifest.num_shards):
        yield paths.shard(shard)
        yield paths.record(shard)


def _publish(store: Store, record: CommitRecord, manifest: Manifest) -> None:
    renamed = dataclasses.replace(record, cache_id=manifest.cache_id)
    publish_json(store, paths.record(record.shard), renamed.to_json(FORMAT_VERSION))
