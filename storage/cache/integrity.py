"""Is a cache whole? Hashes, counts, plan coverage and value sanity of every shard."""

import dataclasses
import os
from collections.abc import Callable, Iterator
from itertools import islice

import numpy as np
import xxhash

from decant.schemas import CommitRecord, FormatError, Manifest, Rejected, ShardPlan
from decant.schemas.manifest import MAX_LISTED
from decant.storage.cache import kept_tokenizer, paths
from decant.storage.cache.checks import check_rows, message_problems
from decant.storage.cache.extension import moving, names_of
from decant.storage.cache.reader import CacheReader
from decant.storage.cache.records import Rewritten, read_manifest
from decant.storage.cache.rows import Rows
from decant.storage.files.sealed import read_json
from decant.storage.files.store import Store

TRIES = 5
"""How often a cache is verified that is rewritten each time."""


@dataclasses.dataclass(frozen=True, slots=True)
class VerifyReport:
    """What `verify` looked at and what it found wrong."""

    url: str
    shards: int
    sequences: int
    targets: int
    bytes: int
    problems: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems


def verify(
    url: str | os.PathLike[str],
    progress: Callable[[int, int], None] | None = None,
    *,
    manifest: Manifest | None = None,
) -> VerifyReport:
    """Check everything that can be checked without the teacher; never raises for bad data.

    `progress` is called with (shards done, shards in all). An incomplete cache is a problem.
    `manifest` is taken for the cache's own where that is not published yet. A cache that is
    rewritten meanwhile is looked at again as it is then; raises Rewritten if that never ends.
    """
    for _ in range(TRIES):
        report, looked_at = _verify(url, progress, manifest)
        if report.ok or manifest or looked_at is None or _is_current(url, looked_at):
            return report
    raise Rewritten(
        f"{url} was rewritten {TRIES} times while it was verified: run the command again when what "
        "writes it has ended"
    )


def _is_current(url: str | os.PathLike[str], manifest: Manifest) -> bool:
    """Whether a cache still has the manifest that it was opened with."""
    try:
        return read_manifest(Store(url)) == manifest
    except FormatError:
        return True


def _verify(
    url: str | os.PathLike[str],
    progress: Callable[[int, int], None] | None,
    manifest: Manifest | None,
) -> tuple[VerifyReport, Manifest | None]:
    """The report, and the manifest of the cache that it is of, if it could be opened."""
    store = Store(url)
    try:
        hashes = _WholeHash(store)
        reader = CacheReader(url, allow_incomplete=True, listener=hashes.take, manifest=manifest)
        hashes.place_of = reader.place_of
        reader.plan  # noqa: B018  read here: damage to it is one problem, not an exception later
    except FormatError as error:
        return VerifyReport(str(url), 0, 0, 0, 0, (str(error),)), None
    problems: list[str] = []
    try:
        problems += _cache_problems(store, reader)
    except FormatError as error:
        problems.append(str(error))
    plans = {plan.shard: plan for plan in reader.plan}
    for done, record in enumerate(reader.index):
        if record.shard in plans:
            problems += _shard_problems(store, reader, plans[record.shard], record, hashes)
        if progress:
            progress(done + 1, len(reader.index))
    totals = reader.index.totals()
    report = VerifyReport(
        url=str(url),
        shards=totals.shards,
        sequences=totals.sequences,
        targets=totals.targets,
        bytes=totals.bytes,
        problems=tuple(problems),
    )
    return report, reader.manifest


def _cache_problems(store: Store, reader: CacheReader) -> Iterator[str]:
    manifest = reader.manifest
    committed = set(reader.index.shards.tolist())
    missing = [plan.shard for plan in reader.plan if plan.shard not in committed]
    if missing:
        yield (
            f"{store.url} is not complete: {len(missing)} of {len(reader.plan)} shards missing, "
            f"first {missing[:5]}"
        )
    elif not manifest.is_final:
        yield (
            f"{store.path(paths.MANIFEST)} is not final, though every shard is committed: run the "
            "dump again, which seals the cache"
        )
    planned = {plan.shard for plan in reader.plan}
    for shard in sorted(committed - planned):
        yield f"{store.path(paths.record(shard))} belongs to no shard of the plan"
    first = 0
    for index, plan in enumerate(reader.plan):
        if plan.shard != index or plan.first_sequence != first:
            yield f"{store.path(manifest.plan.name)}: line {index} does not continue the plan"
            return
        first += plan.num_sequences
    where = store.path(paths.MANIFEST)
    num_tokens = sum(p.num_tokens for p in reader.plan)
    num_targets = sum(p.num_targets for p in reader.plan)
    sums = (len(reader.plan), first, num_tokens, num_targets)
    stated = (
        manifest.num_shards,
        manifest.num_sequences,
        manifest.num_tokens,
        manifest.num_targets,
    )
    if sums != stated:
        yield f"{where}: the plan sums to {sums}, the manifest says {stated}"
    if manifest.is_final:
        for record in reader.index:
            yield from _record_problems(store, manifest, record)
        if manifest.totals != reader.index.totals():
            yield f"{where}: totals are not the sums over the records: {manifest.totals}"
        if manifest.rejected != tuple(islice(reader.rejected, MAX_LISTED)):
            yield f"{where}: rejected sequences are not those of the records"
    tokenizer = {f"{paths.TOKENIZER}/{name}": of for name, of in manifest.tokenizer.files.items()}
    for path, expected in (tokenizer | manifest.source.get("generated", {})).items():
        if not store.exists(path):
            yield f"{store.path(path)} is missing"
        elif path in tokenizer and (size := store.size(path)) > kept_tokenizer.MAX_BYTES:
            most = kept_tokenizer.MAX_BYTES
            yield f"{store.path(path)} has {size} bytes, a tokenizer's file at most {most}"
        elif (found := store.hash(path)) != expected:
            yield f"{store.path(path)} is damaged: hash {found}, expected {expected}"
    known = {name(p.shard) for p in reader.plan for name in (paths.shard, paths.record)}
    names = store.names(paths.SHARDS)
    extension = moving(store)
    known |= set(names_of(extension)) if extension else set()
    for name in names:
        is_temporary = name.startswith(".")  # of a killed or running writer: absent by definition
        if not is_temporary and f"{paths.SHARDS}/{name}" not in known:
            yield f"{store.path(paths.SHARDS)}/{name} belongs to no shard of the plan"


def _record_problems(store: Store, manifest: Manifest, record: CommitRecord) -> Iterator[str]:
    """Whether the sealed record of a shard is the one beside it, or beside its replacement."""
    expected = record.to_json(manifest.format_version)
    usual = paths.record(record.shard)
    problem = ""
    for name in (usual, paths.renewed_record(record.shard), usual):
        try:
            beside = read_json(store, name)
        except FormatError as error:
            problem = str(error) if name == usual else problem
            continue
        if beside == expected:
            return
        # While an extension is moved in, records are those of either cache.
        if {**beside, "cache_id": manifest.cache_id} == expected and moving(store):
            return
        if name == usual:
            assert manifest.records is not None
            problem = f"{store.path(name)} differs from the sealed {manifest.records.name}"
    yield problem


class _WholeHash:
    """The hash of a whole shard from the byte ranges that are read of it, each fetched once.

    Row groups come in ascending order; the footer, which comes after them, when it is needed.
    """

    def __init__(self, store: Store) -> None:
        self._store, self._shard = store, -1
        self.place_of: Callable[[int], str] = paths.shard

    def take(self, shard: int, offset: int, data: bytes) -> None:
        """What was fetched of a shard."""
        if shard != self._shard:
            self._shard, self._at, self._digest = shard, 0, xxhash.xxh3_128()
            self._footer = offset, data
        else:
            self._add(offset, data)

    def result(self, shard: int) -> str:
        """Once every row group of a shard was read, or of one that has none."""
        if shard != self._shard:
            return self._store.hash(self.place_of(shard))
        self._add(*self._footer)
        return self._digest.hexdigest()

    def _add(self, offset: int, data: bytes) -> None:
        name = self.place_of(self._shard)
        if offset > self._at:  # the leading magic
            self._digest.update(self._store.read_range(name, self._at, offset - self._at))
        self._digest.update(data)
        self._at = offset + len(data)


def _shard_problems(
    store: Store, reader: CacheReader, plan: ShardPlan, record: CommitRecord, hashes: _WholeHash
) -> Iterator[str]:
    where = store.path(paths.shard(plan.shard))
    targets = record.targets + sum(rejected.targets for rejected in record.rejected)
    stated = (record.first_sequence, record.num_sequences, record.rows, targets)
    planned = (plan.first_sequence, plan.num_sequences, plan.num_tokens, plan.num_targets)
    if stated != planned:
        yield (
            f"{where}: committed (first, sequences, tokens, targets stored and lost) {stated}, "
            f"planned {planned}"
        )
    lost = [rejected.sequence for rejected in record.rejected]
    last = plan.first_sequence + plan.num_sequences - 1
    if sorted(set(lost)) != lost or any(not plan.first_sequence <= i <= last for i in lost):
        yield f"{where}: rejected sequences {lost} are not some of {plan.first_sequence} to {last}"
    try:
        size = store.size(reader.place_of(plan.shard))
    except FormatError as error:
        yield str(error)
        return
    except FileNotFoundError:
        yield f"{where} is missing"
        return
    if size != record.bytes:
        yield f"{where} is damaged: {size} bytes, committed with {record.bytes}"
        return
    sequence = record.first_sequence
    for group in reader.index.groups_of(plan.shard):
        try:
            table = reader.read_table(group)
            rows = reader.decode(group, table)
        except FormatError as error:
            yield str(error)
            return
        counts = (int(rows.sequence[0]), len(rows), len(rows.input_ids), len(rows.label_logprob))
        expected = (sequence, group.sequences, group.rows, group.targets)
        if counts != expected:
            yield f"{where} row group {group.index}: holds {counts}, committed {expected}"
        sequence += group.sequences
        for problem in _rejected_problems(rows, record.rejected):
            yield f"{where} row group {group.index}: {problem}"
        for problem in check_rows(rows, reader.manifest.layout) + message_problems(table, rows):
            yield f"{where} row group {group.index}: {problem}"
    try:
        found = hashes.result(plan.shard)
    except (FormatError, FileNotFoundError) as error:
        yield f"{where}: {error}"
        return
    if found != record.xxh3_128:
        yield f"{where} is damaged: hash {found}, committed with {record.xxh3_128}"


def _rejected_problems(rows: Rows, rejected: tuple[Rejected, ...]) -> Iterator[str]:
    """Whether the rejected sequences among these rows are the ones named, without targets."""
    targets = np.diff(rows.target_starts)
    first = int(rows.sequence[0])
    for entry in rejected:
        at = entry.sequence - first
        if not 0 <= at < len(rows):
            continue
        if targets[at]:
            yield f"the rejected sequence {entry.sequence} has {targets[at]} targets"
        if rows.sample_ids[at] != entry.sample_id:
            yield (
                f"the rejected sequence {entry.sequence} is of sample {rows.sample_ids[at]!r}, "
                f"committed as {entry.sample_id!r}"
            )
