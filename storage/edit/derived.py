"""Make a cache of whole sequences of others: staged, resumed, verified, then published.

A shard that stays as it is becomes a hard link, where the file system has them; any other is
written anew with the bytes that its rows have. Nothing has the new cache's name before all of it is
there and verified: a local one is filled beside its place and moved there, on an object store the
manifest comes last. What a killed run leaves is completed by the same command, and cleared by
another.
"""

import contextlib
import dataclasses
import os
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from decant.schemas import (
    FORMAT_VERSION,
    CommitRecord,
    FormatError,
    Layout,
    Manifest,
    ShardPlan,
    to_json,
)
from decant.storage.cache import paths
from decant.storage.cache.carried import Carried
from decant.storage.cache.integrity import verify
from decant.storage.cache.reader import CacheReader
from decant.storage.cache.records import committed_shards, read_record, seal
from decant.storage.cache.shard_writer import ShardWriter
from decant.storage.files.durable import TEMPORARY_SUFFIX, move
from decant.storage.files.sealed import publish_json, publish_segment
from decant.storage.files.store import Store

MADE = (paths.PLAN, paths.RECORDS, paths.SHARDS, paths.TOKENIZER)
"""Folders that a run may leave unfinished; anything else is somebody's data."""
Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True, eq=False)
class Piece:
    """Sequences of one shard of a cache, in its order."""

    cache: CacheReader
    shard: int
    keep: NDArray[np.bool_] | None
    """[sequences of the shard] which of them; None: all."""
    sequences: int
    tokens: int
    targets: int
    """With those of rejected sequences."""

    @staticmethod
    def whole(cache: CacheReader, plan: ShardPlan) -> "Piece":
        """All of a shard."""
        return Piece(cache, plan.shard, None, plan.num_sequences, plan.num_tokens, plan.num_targets)

    @property
    def record(self) -> CommitRecord:
        """The commit record of the shard it is of."""
        return self.cache.index[self.cache.index.position(self.shard)]

    @property
    def share(self) -> float:
        """Of the shard's rows."""
        return self.tokens / max(self.record.rows, 1)


@dataclass(frozen=True, slots=True, eq=False)
class NewShard:
    """A shard of the new cache, and what it is made of."""

    plan: ShardPlan
    pieces: tuple[Piece, ...]
    is_link: bool
    """Whether its file is that of its only piece."""

    @property
    def bytes(self) -> int:
        """Of its file: known of a link, else estimated."""
        return round(sum(piece.record.bytes * piece.share for piece in self.pieces))


@dataclass(frozen=True, slots=True, eq=False)
class Blueprint:
    """A cache that can be made."""

    draft: Manifest
    """Without its plan."""
    tokenizer_of: CacheReader
    """The cache that has the tokenizer's files."""
    shards: tuple[NewShard, ...]
    files: tuple[str, ...] = ()
    """Other files of that cache that go along."""

    @property
    def origins(self) -> list[CacheReader]:
        """The caches that it is made of."""
        every = [self.tokenizer_of, *(p.cache for shard in self.shards for p in shard.pieces)]
        return list({id(cache): cache for cache in every}.values())

    @property
    def sequences(self) -> int:
        """In all."""
        return sum(shard.plan.num_sequences for shard in self.shards)

    @property
    def targets(self) -> int:
        """In all, with those of rejected sequences."""
        return sum(shard.plan.num_targets for shard in self.shards)

    @property
    def links(self) -> int:
        """Shards that are files of another cache."""
        return sum(shard.is_link for shard in self.shards)

    @property
    def linked_bytes(self) -> int:
        """Of those files."""
        return sum(shard.bytes for shard in self.shards if shard.is_link)

    @property
    def written_bytes(self) -> int:
        """Of the other shards, about."""
        return sum(shard.bytes for shard in self.shards if not shard.is_link)


def new_shards(groups: Sequence[Sequence[Piece]], draft: Manifest) -> tuple[NewShard, ...]:
    """Number the shards of a new cache, each made of some pieces; those without are left out."""
    shards: list[NewShard] = []
    first = 0
    for pieces in filter(None, groups):
        old = pieces[0].record
        is_link = (
            len(pieces) == 1
            and pieces[0].keep is None
            and old.first_sequence == first
            and bytes_of(pieces[0].cache.manifest) == bytes_of(draft)
        )
        plan = ShardPlan(
            shard=len(shards),
            first_sequence=first,
            num_sequences=sum(piece.sequences for piece in pieces),
            num_tokens=sum(piece.tokens for piece in pieces),
            num_targets=sum(piece.targets for piece in pieces),
            input_xxh3_128="",
        )
        shards.append(NewShard(plan, tuple(pieces), is_link))
        first += plan.num_sequences
    return tuple(shards)


def bytes_of(manifest: Manifest) -> Layout:
    """What the bytes of a shard follow from."""
    return dataclasses.replace(manifest.layout, rounded=False)


def make(
    out: str | os.PathLike[str], blueprint: Blueprint, progress: Progress | None = None
) -> Manifest:
    """Make the cache at `out` and return its manifest.

    `progress` is called with (shards done, shards in all), those being verified counted again.
    Raises FileExistsError if something is at `out`, FormatError if a shard of an origin is damaged.
    """
    if not blueprint.shards:
        raise ValueError(f"no sequence is left for {out}: a cache needs at least one")
    _refuse_inside(out, blueprint)
    folders = {name.split("/")[0] for name in blueprint.files}
    with _staging(out, folders) as store:
        manifest = _started(store, blueprint)
        total = 2 * len(blueprint.shards)
        done = _committed(store, manifest)
        for shard in blueprint.shards:
            if shard.plan.shard not in done:
                _fill(store, manifest, shard)
            if progress:
                progress(shard.plan.shard + 1, total)
        numbers = range(len(blueprint.shards))
        records = (read_record(store, manifest, number) for number in numbers)
        final = seal(store, manifest, records)
        for cache in blueprint.origins:
            cache.refuse_rewritten()

        def verified(shards: int, _: int) -> None:
            if progress:
                progress(len(blueprint.shards) + shards, total)

        report = verify(store.path(""), verified, manifest=final)
        if not report.ok:
            store.remove_folder(paths.SHARDS)  # or the next run would take them for done
            raise FormatError(
                f"{out} was not whole when it was read again and is not made: "
                f"{report.problems[0]}. `decant verify` says whether the caches it is made of are"
            )
        publish_json(store, paths.MANIFEST, final.to_json())
    return final


def _refuse_inside(out: str | os.PathLike[str], blueprint: Blueprint) -> None:
    """Raise ValueError for a place inside one of the caches that are read."""
    target = Store(out)
    for url in {piece.cache.url for shard in blueprint.shards for piece in shard.pieces}:
        origin = Store(url)
        if origin.is_local and target.is_local:
            place = Path(target.path("")).resolve()
            if place.is_relative_to(Path(origin.path("")).resolve()):
                raise ValueError(f"{out} lies inside the cache {url}: choose a place elsewhere")


@contextlib.contextmanager
def _staging(out: str | os.PathLike[str], folders: Collection[str]) -> Iterator[Store]:
    """Where the cache is filled, held alone; it has its name when the block ends.

    It has these folders beside those that every cache has.
    """
    target = Store(out)
    if not target.is_local:
        if target.exists(paths.MANIFEST):
            raise FileExistsError(f"{target.url} already holds a cache: choose another")
        foreign = [name for name in target.names("") if name not in MADE and name not in folders]
        if foreign:
            said = ", ".join(foreign[:5])
            raise FileExistsError(f"{target.url} is not empty ({said}): choose another")
        yield target
        return
    final = Path(target.path(""))
    staging = staging_of(final)
    if os.path.lexists(final):
        raise FileExistsError(f"{out} exists already: remove it, or choose another place")
    store = Store(staging)
    with store.lock():
        yield store
        if os.path.lexists(final):
            raise FileExistsError(f"{out} was made by another process meanwhile")
        move(staging, final)


def staging_of(final: Path) -> Path:
    """Where a cache is filled that will be at `final`: the same place each time."""
    return final.with_name(f".{final.name}.edit{TEMPORARY_SUFFIX}")


def _started(store: Store, blueprint: Blueprint) -> Manifest:
    """The manifest with its plan; both and the tokenizer are what the store holds then."""
    plans = [shard.plan for shard in blueprint.shards]
    for folder in {"", *MADE, *(name.split("/")[0] for name in blueprint.files)}:
        store.remove_temporaries(folder)
    segment = publish_segment(store, paths.segment(paths.PLAN), [to_json(plan) for plan in plans])
    manifest = dataclasses.replace(
        blueprint.draft,
        plan=segment,
        num_shards=len(plans),
        num_sequences=blueprint.sequences,
        num_tokens=sum(plan.num_tokens for plan in plans),
        num_targets=blueprint.targets,
    )
    manifest = dataclasses.replace(manifest, cache_id=manifest.identity_hash())
    if committed_shards(store) and not _is_of(store, manifest):
        for folder in (paths.SHARDS, paths.RECORDS, paths.TOKENIZER):
            store.remove_folder(folder)
    store.remove(paths.MANIFEST)  # of a run that was killed before it could move the folder
    origin = Store(blueprint.tokenizer_of.url)
    tokenizer = [f"{paths.TOKENIZER}/{name}" for name in manifest.tokenizer.files]
    for name in [*tokenizer, *blueprint.files]:
        store.copy(origin, name)
    return manifest


def _is_of(store: Store, manifest: Manifest) -> bool:
    """Whether the commit records that lie there are of this very cache."""
    try:
        for shard in committed_shards(store):
            read_record(store, manifest, shard)
    except FormatError:
        return False
    return True


def _committed(store: Store, manifest: Manifest) -> set[int]:
    """The shards that are done: their file has the size that their record says."""
    sizes = store.sizes(paths.SHARDS)
    done = set()
    for shard in committed_shards(store):
        name = paths.shard(shard).rsplit("/", 1)[1]
        if sizes.get(name) == read_record(store, manifest, shard).bytes:
            done.add(shard)
        else:
            store.remove(paths.record(shard))
    return done


def _fill(store: Store, manifest: Manifest, shard: NewShard) -> None:
    """Publish one shard, then its commit record."""
    number = shard.plan.shard
    if shard.is_link:
        (piece,) = shard.pieces
        piece.cache.copy_shard(piece.shard, store, paths.shard(number))
        record = dataclasses.replace(piece.record, shard=number, cache_id=manifest.cache_id)
        publish_json(store, paths.record(number), record.to_json(FORMAT_VERSION))
        return
    with ShardWriter(store, manifest, shard.plan, carried=_carried(shard)) as writer:
        for piece in shard.pieces:
            _copy(piece, writer)


def _copy(piece: Piece, writer: ShardWriter) -> None:
    """Write the kept sequences of a piece, rejected ones as what they are."""
    record = piece.record
    lost = {entry.sequence: entry for entry in record.rejected}
    for group in piece.cache.index.groups_of(piece.shard):
        start = group.first_sequence - record.first_sequence
        chosen: NDArray[np.intp] | range = range(group.sequences)
        if piece.keep is not None:
            chosen = np.flatnonzero(piece.keep[start : start + group.sequences])
        if not len(chosen):
            continue
        rows = piece.cache.read(group)
        for at in chosen:
            entry = lost.get(group.first_sequence + int(at))
            if entry is None:
                writer.write(rows[int(at)])
            else:
                writer.write_rejected(rows[int(at)], entry.targets, entry.reason)


def _carried(shard: NewShard) -> Carried:
    """What was measured when the pieces were scored, by their share of it.

    The decoding error is that of the shards that they are of: its mean is theirs, weighted by the
    pieces' targets, its maximum an upper bound.
    """
    records = [piece.record for piece in shard.pieces]
    targets = np.array([max(piece.targets, 1) for piece in shard.pieces], np.float64)
    shares = [piece.share for piece in shard.pieces]
    means, largest = (
        [value for record in records if (value := getattr(record, name)) is not None]
        for name in ("logprob_error_mean", "logprob_error_max")
    )
    known = len(means) == len(largest) == len(records)
    return Carried(
        kl_error_mean=float(targets @ [r.kl_error_mean for r in records] / targets.sum()),
        kl_error_max=max(record.kl_error_max for record in records),
        logprob_error_mean=float(targets @ means / targets.sum()) if known else None,
        logprob_error_max=max(largest) if known else None,
        seconds=round(sum(r.seconds * s for r, s in zip(records, shares, strict=True)), 3),
        worker=records[int(targets.argmax())].worker,
    )
