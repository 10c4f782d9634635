"""Write a cache: a plan first, then shards in any order, then the seal over all of them.

Decides nothing about what a sequence contains; refuses what `storage.check` refuses.
"""

import dataclasses
import itertools
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

from decant.schemas import (
    CommitRecord,
    FormatError,
    Manifest,
    ScoredSequence,
    ShardPlan,
    to_json,
)
from decant.storage.cache import paths
from decant.storage.cache.plan import plan_of
from decant.storage.cache.records import (
    committed_shards,
    read_manifest,
    read_plan,
    read_record,
    read_records,
    seal,
)
from decant.storage.cache.renewal import read_renewed, settle
from decant.storage.cache.shard_writer import ROW_GROUP_ROWS, ShardWriter
from decant.storage.files.sealed import publish_json, publish_segment
from decant.storage.files.store import Store

RECORDS_AT_ONCE = 16
"""Commit records that are fetched together: on an object store each one is a round trip."""


class CacheWriter:
    """Fills the shards of one cache; `create` starts one, the constructor opens one to go on."""

    def __init__(self, url: str | os.PathLike[str]) -> None:
        """Open a started cache. Raises FormatError if there is none or its plan is damaged."""
        self.store = Store(url)
        self.manifest = read_manifest(self.store)
        self.plan = read_plan(self.store, self.manifest)

    @classmethod
    def create(
        cls,
        url: str | os.PathLike[str],
        draft: Manifest,
        plan: Iterable[ShardPlan],
        *,
        number: int = 0,
    ) -> "CacheWriter":
        """Start a cache: seal the plan, then publish the manifest.

        `number` of the plan's file is another than 0 for one that has taken others' place.

        `draft` is a `Manifest.draft`; its plan, counts and id are filled in here.
        Raises FileExistsError if the directory holds a cache already, or if another process starts
        a different one there at the same time.
        """
        store = Store(url)
        if store.exists(paths.MANIFEST):
            raise FileExistsError(f"{store.url} already holds a cache")
        shards = list(plan)
        entries = [to_json(s) for s in shards]
        segment = publish_segment(store, paths.segment(paths.PLAN, number), entries, new=True)
        manifest = dataclasses.replace(
            draft,
            plan=segment,
            num_shards=len(shards),
            num_sequences=sum(s.num_sequences for s in shards),
            num_tokens=sum(s.num_tokens for s in shards),
            num_targets=sum(s.num_targets for s in shards),
        )
        manifest = dataclasses.replace(manifest, cache_id=manifest.identity_hash())
        publish_json(store, paths.MANIFEST, manifest.to_json(), new=True)
        return cls(url)

    def committed(self, renewed: dict[int, CommitRecord] | None = None) -> Iterator[CommitRecord]:
        """The records of the shards that are complete, in order, read a few at a time.

        Of a shard that was scored again, which `renewed` says, it is the record of the new one.
        Raises FormatError on a damaged record.
        """
        again = self.renewed() if renewed is None else renewed
        done = committed_shards(self.store) | set(again)
        known = [shard.shard for shard in self.plan if shard.shard in done]
        with ThreadPoolExecutor(RECORDS_AT_ONCE) as readers:
            for start in range(0, len(known), RECORDS_AT_ONCE):
                yield from readers.map(
                    lambda shard: again.get(shard) or read_record(self.store, self.manifest, shard),
                    known[start : start + RECORDS_AT_ONCE],
                )

    def renewed(self) -> dict[int, CommitRecord]:
        """The records of shards that were scored again and do not have their places yet."""
        return read_renewed(self.store, self.manifest)

    def record(self, shard: int) -> CommitRecord | None:
        """That of one shard, as `committed`; None if it has none."""
        for name, renewed in ((paths.renewed_record(shard), True), (paths.record(shard), False)):
            if self.store.exists(name):
                return read_record(self.store, self.manifest, shard, renewed=renewed)
        return None

    def missing(self) -> list[ShardPlan]:
        """The shards without a commit record, in order."""
        done = committed_shards(self.store) | set(self.renewed())
        return [shard for shard in self.plan if shard.shard not in done]

    def is_sealed(self) -> bool:
        """Whether the manifest is final and its records are those of all shards, scored again too.

        Raises FormatError as `committed`.
        """
        if not self.manifest.is_final:
            return False
        try:
            sealed = read_records(self.store, self.manifest)
        except FormatError:
            return False
        found = list(self.committed())
        return len(sealed) == len(found) == len(self.plan) and all(
            ours == theirs for ours, theirs in zip(sealed, found, strict=True)
        )

    def shard(
        self, index: int, *, replace: bool = False, row_group_rows: int = ROW_GROUP_ROWS
    ) -> "ShardWriter":
        """A context manager that writes one shard and commits it on a clean exit.

        With `replace` it is to take the place of a committed one, which is valid until `finalize`
        has published a manifest that knows the new one. A row group is closed before it would grow
        beyond so many rows, but never below half of them.
        """
        plan = self.plan[index]
        return ShardWriter(
            self.store, self.manifest, plan, replace=replace, row_group_rows=row_group_rows
        )

    def finalize(self, *, keep_inputs: bool = False) -> Manifest:
        """Seal the commit records into the manifest and drop the inputs, unless told to keep them.

        Of a cache that was final before it makes the next generation: readers see the old one until
        the manifest is published; then shards that were scored again get their places.
        Raises FormatError naming the missing shards if any is not committed.
        """
        missing = [s.shard for s in self.missing()]
        if missing:
            raise FormatError(
                f"{self.store.url}: {len(missing)} of {len(self.plan)} shards are missing, "
                f"first {missing[:5]}; run the dump again to fill them"
            )
        self.manifest = read_manifest(self.store)  # another worker may have sealed it meanwhile
        before = self.manifest.records
        if not self.is_sealed():
            self.manifest = seal(self.store, self.manifest, self.committed())
            publish_json(self.store, paths.MANIFEST, self.manifest.to_json())
            if before is not None:
                self.store.remove(before.name)
        settle(self.store, self.manifest)
        if not keep_inputs:
            self.store.remove_folder(paths.INPUTS)
        return self.manifest


def write_cache(
    url: str | os.PathLike[str],
    draft: Manifest,
    sequences: Iterable[ScoredSequence],
    plan: Iterable[ShardPlan] | None = None,
) -> Manifest:
    """Write a whole cache, one shard after the other, and return its final manifest.

    A plan says how many of the sequences, which are taken in turn, each shard holds; without one
    there is one shard of all. Raises as `CacheWriter.create` and `ShardWriter.write`.
    """
    if plan is None:
        sequences = list(sequences)
        plan = plan_of([sequences])
    writer = CacheWriter.create(url, draft, plan)
    source = iter(sequences)
    for entry in writer.plan:
        with writer.shard(entry.shard) as shard:
            for sequence in itertools.islice(source, entry.num_sequences):
                shard.write(sequence)
    return writer.finalize()
