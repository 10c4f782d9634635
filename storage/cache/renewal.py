"""Shards of a cache that are scored again: written beside it, sealed, then moved to their places.

`renewal/` holds their files and commit records under the names of the shards. Until a manifest with
their records is published, a reader sees the cache as it was, whole; from then on the new one,
of which it finds a shard in `renewal/` until that has taken the place of the old one in `shards/`.
"""

from pathlib import PurePath

from decant.schemas import CommitRecord, Manifest
from decant.storage.cache import paths
from decant.storage.cache.records import RECORD_NAME, read_record, read_records
from decant.storage.files.sealed import publish_json
from decant.storage.files.store import Store


def read_renewed(store: Store, manifest: Manifest) -> dict[int, CommitRecord]:
    """The commit records of the replacements that are complete, by shard.

    Raises FormatError if one is damaged, or of another cache.
    """
    sizes = store.sizes(paths.RENEWAL)
    found = {}
    for name in sorted(sizes):
        if RECORD_NAME.fullmatch(name):
            shard = _number(name)
            record = read_record(store, manifest, shard, renewed=True)
            if sizes.get(PurePath(paths.renewed_shard(shard)).name) == record.bytes:
                found[shard] = record
    return found


def unsettled(store: Store, manifest: Manifest) -> list[CommitRecord]:
    """Those of the replacements that a final manifest names: their places are not theirs yet.

    Raises FormatError as `read_records` and `read_renewed`.
    """
    if manifest.records is None or not store.exists(paths.RENEWAL):
        return []
    renewed = read_renewed(store, manifest)
    sealed = read_records(store, manifest)
    every = [record for record in renewed.values() if record.shard < len(sealed)]
    return [record for record in every if sealed[record.shard] == record]


def settle(store: Store, manifest: Manifest) -> None:
    """Give the replacements that a published manifest names their places, for good.

    Others stay. Only for who holds the cache alone, or its shards. What an interrupted call left is
    completed by the next. Raises FormatError as `unsettled`.
    """
    if manifest.records is None or not store.exists(paths.RENEWAL):
        return
    for record in unsettled(store, manifest):
        shard = record.shard
        store.copy(store, paths.renewed_shard(shard), paths.shard(shard))
        publish_json(store, paths.record(shard), record.to_json(manifest.format_version))
        store.remove(paths.renewed_shard(shard))
        store.remove(paths.renewed_record(shard))
    number = paths.number(manifest.records.name)
    for name in store.names(paths.RECORDS):
        older = f"{paths.RECORDS}/{name}"
        if paths.is_segment(older) and paths.number(older) < number:
            store.remove(older)
    left = set(store.names(paths.RENEWAL))
    for name in [name for name in left if RECORD_NAME.fullmatch(name)]:
        if PurePath(paths.renewed_shard(_number(name))).name not in left:
            store.remove(f"{paths.RENEWAL}/{name}")  # of a shard that a killed call moved
            left.discard(name)
    if not left:
        store.remove_folder(paths.RENEWAL)


def _number(name: str) -> int:
    return int(PurePath(name).stem.removeprefix("part-"))
