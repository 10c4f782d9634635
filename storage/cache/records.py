"""Plan, manifest and commit records: read, sealed, published."""

import dataclasses
import re
from collections.abc import Iterable
from itertools import islice

from decant.schemas import (
    CommitRecord,
    FormatError,
    Manifest,
    Segment,
    ShardPlan,
    from_json,
)
from decant.schemas.manifest import MAX_LISTED
from decant.schemas.strict import UnfitError
from decant.storage.cache import paths
from decant.storage.cache.index import ShardIndex
from decant.storage.cache.lineage import check_said
from decant.storage.files.sealed import (
    publish_segment,
    read_json,
    read_sealed,
    read_segment,
    segment_of,
)
from decant.storage.files.store import Store

RECORD_NAME = re.compile(r"part-\d{6,9}\.json")


class Rewritten(UnfitError):
    """A cache is another than the one that was opened: it was written while it was read."""


def generation(manifest: Manifest) -> int:
    """The number of what a final cache holds: higher each time that it is sealed anew."""
    return paths.number((manifest.records or manifest.plan).name)


def seal(store: Store, manifest: Manifest, records: Iterable[CommitRecord]) -> Manifest:
    """Publish all commit records, in shard order; return the final manifest, not yet published.

    Records that a published manifest names are not touched: those of a final one get another name.
    """
    segment, index = publish_records(store, manifest, records)
    return dataclasses.replace(
        manifest,
        totals=index.totals(),
        records=segment,
        rejected=tuple(islice(index.rejected(), MAX_LISTED)),
    )


def publish_records(
    store: Store, manifest: Manifest, records: Iterable[CommitRecord]
) -> tuple[Segment, ShardIndex]:
    """Publish all commit records, in shard order, as one segment; return it and what it holds."""
    version = manifest.format_version
    number = generation(manifest) + manifest.is_final
    if version == 1:
        known = list(records)
        name = paths.segment(paths.RECORDS, number)
        segment = publish_segment(store, name, [record.to_json(version) for record in known])
        return segment, ShardIndex.of(known, manifest.cache_id)
    name = paths.record_index(number)
    with store.staged(name) as path:
        entries = ShardIndex.write(path, records, version)
        data = path.read_bytes()
    segment = segment_of(name, data, entries)
    return segment, ShardIndex.read(data, manifest.cache_id, store.url, version, entries)


def read_records(store: Store, manifest: Manifest) -> ShardIndex:
    """The sealed commit records of a final cache. Raises FormatError if they are damaged."""
    assert manifest.records is not None
    where = store.path(manifest.records.name)
    version = manifest.format_version
    if version == 1:
        entries = read_segment(store, manifest.records)
        records = [CommitRecord.parse(entry, where, version) for entry in entries]
        index = ShardIndex.of(records, manifest.cache_id)
        index.check_whole(where, manifest.num_sequences)
        return index
    data = read_sealed(store, manifest.records)
    index = ShardIndex.read(data, manifest.cache_id, where, version, manifest.num_shards)
    index.check_whole(where, manifest.num_sequences)
    return index


def committed_shards(store: Store) -> set[int]:
    """The shards that have a commit record; one listing, nothing is opened."""
    return {
        int(name.removeprefix("part-").removesuffix(".json"))
        for name in store.names(paths.SHARDS)
        if RECORD_NAME.fullmatch(name)
    }


def read_manifest(store: Store) -> Manifest:
    """Load and check `manifest.json`. Raises FormatError if it is absent or damaged."""
    where = store.path(paths.MANIFEST)
    try:
        value = read_json(store, paths.MANIFEST)
    except FormatError:
        if store.exists(paths.MANIFEST):
            raise
        raise UnfitError(f"{where} is missing: {store.url} holds no cache") from None
    manifest = Manifest.parse(value, where)
    for field, segment in (("plan", manifest.plan), ("records", manifest.records)):
        if segment and not paths.is_segment(segment.name):
            raise FormatError(f"{where}: {field}.name: {segment.name!r:.100} is no segment")
    if manifest.plan.entries != manifest.num_shards:
        raise FormatError(
            f"{where}: plan.entries is {manifest.plan.entries}, num_shards {manifest.num_shards}"
        )
    if manifest.records and manifest.records.entries != manifest.num_shards:
        raise FormatError(
            f"{where}: records.entries is {manifest.records.entries}, num_shards "
            f"{manifest.num_shards}"
        )
    check_said(manifest, where)
    return manifest


def read_plan(store: Store, manifest: Manifest) -> list[ShardPlan]:
    """The sealed shard plan. Raises FormatError if it is damaged, or does not count up."""
    where = store.path(manifest.plan.name)
    plan: list[ShardPlan] = []
    first = 0
    for index, entry in enumerate(read_segment(store, manifest.plan)):
        line = from_json(ShardPlan, entry, f"{where}: line {index}")
        if (line.shard, line.first_sequence) != (index, first):
            raise FormatError(
                f"{where}: line {index} does not continue the plan: shard {line.shard} from "
                f"sequence {line.first_sequence}, expected {index} from {first}"
            )
        first += line.num_sequences
        plan.append(line)
    return plan


def read_record(
    store: Store, manifest: Manifest, index: int, *, renewed: bool = False
) -> CommitRecord:
    """One commit record. Raises FormatError if it is damaged or belongs to another cache.

    With `renewed` it is that of the shard's replacement, while this has no place of its own yet.
    """
    name = paths.renewed_record(index) if renewed else paths.record(index)
    where = store.path(name)
    record = CommitRecord.parse(read_json(store, name), where, manifest.format_version)
    if record.cache_id != manifest.cache_id or record.shard != index:
        raise FormatError(
            f"{where} is of shard {record.shard} of cache {record.cache_id}, expected shard "
            f"{index} of cache {manifest.cache_id}"
        )
    if record.first_sequence + record.num_sequences > manifest.num_sequences:
        raise FormatError(
            f"{where}: first_sequence {record.first_sequence} and num_sequences "
            f"{record.num_sequences} of {manifest.num_sequences} planned"
        )
    return record
