"""Is a cache whole? Hashes, counts, plan coverage and value sanity of every shard."""

import dataclasses
import os
from collections.abc import Callable, Iterator

from schemas import CommitRecord, FormatError, ShardPlan, to_json
from storage import paths
from storage.check import check_rows
from storage.files import Store
from storage.reader import CacheReader


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
    url: str | os.PathLike[str], progress: Callable[[int, int], None] | None = None
) -> VerifyReport:
    """Check everything that can be checked without the teacher; never raises for bad data.

    `progress` is called with (shards done, shards in all). An incomplete cache is a problem.
    """
    try:
        reader = CacheReader(url, allow_incomplete=True)
        reader.plan  # noqa: B018  read here: damage to it is one problem, not an exception later
    except FormatError as error:
        return VerifyReport(str(url), 0, 0, 0, 0, (str(error),))
    store = Store(url)
    problems = list(_cache_problems(store, reader))
    plans = {plan.shard: plan for plan in reader.plan}
    for done, record in enumerate(reader.records):
        if record.shard in plans:
            problems += _shard_problems(store, reader, plans[record.shard], record)
        if progress:
            progress(done + 1, len(reader.records))
    totals = reader.index.totals()
    return VerifyReport(
        url=str(url),
        shards=totals.shards,
        sequences=totals.sequences,
        targets=totals.targets,
        bytes=totals.bytes,
        problems=tuple(problems),
    )


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
        for record in reader.records:
            name = paths.record(record.shard)
            try:
                if store.read_json(name) != to_json(record):
                    yield f"{store.path(name)} differs from the sealed {manifest.records.name}"  # type: ignore[union-attr]
            except FormatError as error:
                yield str(error)
        if manifest.totals != reader.index.totals():
            yield f"{where}: totals are not the sums over the records: {manifest.totals}"
    for name, expected in manifest.tokenizer.files.items():
        path = f"{paths.TOKENIZER}/{name}"
        if not store.exists(path):
            yield f"{store.path(path)} is missing"
        elif (found := store.hash(path)) != expected:
            yield f"{store.path(path)} is damaged: hash {found}, expected {expected}"
    known = {name(p.shard) for p in reader.plan for name in (paths.shard, paths.record)}
    for name in store.names(paths.SHARDS):
        is_temporary = name.startswith(".")  # of a killed or running writer: absent by definition
        if not is_temporary and f"{paths.SHARDS}/{name}" not in known:
            yield f"{store.path(paths.SHARDS)}/{name} belongs to no shard of the plan"


def _shard_problems(
    store: Store, reader: CacheReader, plan: ShardPlan, record: CommitRecord
) -> Iterator[str]:
    name = paths.shard(plan.shard)
    where = store.path(name)
    stated = (record.first_sequence, record.num_sequences, record.rows, record.targets)
    planned = (plan.first_sequence, plan.num_sequences, plan.num_tokens, plan.num_targets)
    if stated != planned:
        yield f"{where}: committed (first, sequences, tokens, targets) {stated}, planned {planned}"
    try:
        size = store.size(name)
    except FileNotFoundError:
        yield f"{where} is missing"
        return
    if size != record.bytes:
        yield f"{where} is damaged: {size} bytes, committed with {record.bytes}"
        return
    found = store.hash(name)
    if found != record.xxh3_128:
        yield f"{where} is damaged: hash {found}, committed with {record.xxh3_128}"
        return
    sequence = record.first_sequence
    for group in reader.index.groups_of(plan.shard):
        try:
            rows = reader.read(group)
        except FormatError as error:
            yield str(error)
            return
        counts = (int(rows.sequence[0]), len(rows), len(rows.input_ids), len(rows.label_logprob))
        expected = (sequence, group.sequences, group.rows, group.targets)
        if counts != expected:
            yield f"{where} row group {group.index}: holds {counts}, committed {expected}"
        sequence += group.sequences
        for problem in check_rows(rows, reader.manifest.layout):
            yield f"{where} row group {group.index}: {problem}"
