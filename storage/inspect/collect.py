"""What a cache holds and how good it is: one pass over the row groups, in bounded memory.

Knows nothing of models: everything is computed from what is stored. Row groups are read by threads
(numpy and Arrow let go of the interpreter) and their statistics merged in plan order. The figures
of a final cache can be kept beside its manifest, under a key that its content decides.
"""

import contextlib
import math
import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import PurePath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from decant.schemas import FormatError, Manifest, from_json, to_json
from decant.storage.cache import paths
from decant.storage.cache.index import RowGroupRef, ShardIndex
from decant.storage.cache.reader import CacheReader
from decant.storage.files.sealed import publish_json, read_json
from decant.storage.files.store import Store
from decant.storage.inspect.curve import bytes_at, curve_of, finite
from decant.storage.inspect.examples import read_tokenizer, with_texts
from decant.storage.inspect.report import AtK, DumpSpeed, Report, Sample, WorkerSpeed
from decant.storage.inspect.statistics import Statistics

VERSION = 3
"""Of the figures: one more whenever a value or key changes, so that kept ones are not used."""
MAX_RATES, MAX_WORKERS, MAX_REJECTED = 60, 32, 20


def inspect(
    url: str | os.PathLike[str],
    progress: Callable[[int, int], None] | None = None,
    *,
    sample: float | None = None,
    seed: int = 0,
    workers: int | None = None,
    keep: bool = False,
) -> Report:
    """Look at the committed row groups of a cache, complete or not.

    `progress` is called with (row groups done, row groups in all). `sample` looks at some row
    groups only, chosen by `seed`: a number of them, or a share if below 1. `workers` threads read,
    by default one for each core. With `keep`, a complete report of a final cache is taken from the
    cache or put there, if it is a directory that can be written to. Raises FormatError if the cache
    is absent or damaged, ValueError for a sample that is none.
    """
    reader = CacheReader(url, allow_incomplete=True)
    key = _key(reader.manifest) if keep and sample is None else None
    if key and (kept := _read_kept(Store(url), key, str(url))) and _is_of(kept, reader):
        return kept
    chosen = _chosen(len(reader.row_groups()), sample, seed)
    report = _report(str(url), reader, chosen, seed, progress, workers or os.cpu_count() or 1)
    if key:
        _keep(Store(url), key, report)
    return report


def _chosen(count: int, sample: float | None, seed: int) -> NDArray[np.intp] | None:
    """The row groups to look at, ascending; None for all."""
    if sample is None:
        return None
    if sample <= 0 or (sample > 1 and sample != int(sample)):
        raise ValueError(
            f"sample {sample:g} is neither a share between 0 and 1 nor a number of row groups"
        )
    size = math.ceil(sample * count) if sample < 1 else int(sample)
    if size >= count:
        return None
    return np.sort(np.random.default_rng(seed).choice(count, size, replace=False))


def _report(
    url: str,
    reader: CacheReader,
    chosen: NDArray[np.intp] | None,
    seed: int,
    progress: Callable[[int, int], None] | None,
    workers: int,
) -> Report:
    manifest, totals, groups = reader.manifest, reader.index.totals(), reader.row_groups()
    order = range(len(groups)) if chosen is None else chosen.tolist()
    statistics = Statistics(manifest)
    column_bytes: dict[str, int] = {}
    refs = (groups[i] for i in order)
    for done, (part, sizes) in enumerate(_parts(reader, refs, workers)):
        statistics.merge(part)
        for name, size in sizes.items():
            column_bytes[name] = column_bytes.get(name, 0) + size
        if progress:
            progress(done + 1, len(order))
    if chosen is not None:  # the records know the bytes of every row group
        scale = _data_bytes(reader.index) / max(sum(column_bytes.values()), 1)
        column_bytes = {name: round(scale * size) for name, size in column_bytes.items()}
    tokenizer = read_tokenizer(reader) if statistics.worst else None
    worst = with_texts(statistics.worst, tokenizer) if tokenizer else statistics.worst
    duplicates, duplicates_exact = statistics.hashes.duplicates()
    means = statistics.truncation_means()
    curve: tuple[AtK, ...] = ()
    if means is not None:
        curve = curve_of(means, bytes_at(reader, order, totals.bytes / totals.targets))
    records, targets, seen = reader.index.table, totals.targets, statistics.targets
    has_logprobs = manifest.layout.has_logprobs
    dense = 2 * manifest.shared_vocab_size * targets
    teacher_ce = _ratio(statistics.label_nats, seen)
    kl_error = _column(reader.index, "kl_error_mean") @ _column(reader.index, "targets")
    logprob_error = _logprob_error(reader.index) if has_logprobs else (None, None)
    return Report(
        url=url,
        complete=manifest.is_final,
        cache_id=manifest.cache_id,
        format_version=manifest.format_version,
        teacher=manifest.teacher,
        tokenizer_fingerprint=manifest.tokenizer.fingerprint,
        shared_vocab_size=manifest.shared_vocab_size,
        truncation=manifest.truncation,
        precision=manifest.precision,
        source=manifest.source,
        records=manifest.sequences.get("counts", {}),
        planned_shards=manifest.num_shards,
        planned_targets=manifest.num_targets,
        shards=totals.shards,
        sequences=totals.sequences,
        tokens=totals.tokens,
        targets=targets,
        rejected_sequences=totals.rejected,
        rejected_targets=sum(entry.targets for entry in reader.rejected),
        rejected=tuple(islice(reader.rejected, MAX_REJECTED)),
        sample=None
        if chosen is None
        else Sample(row_groups=len(chosen), of_row_groups=len(groups), targets=seen, seed=seed),
        sequence_length=statistics.length.result(),
        sequence_length_histogram=statistics.length.histogram() if targets else None,
        duplicate_sequences=duplicates if chosen is None else None,
        duplicates_exact=chosen is None and duplicates_exact,
        bytes=totals.bytes,
        bytes_per_target=_ratio(totals.bytes, targets),
        column_bytes=column_bytes,
        dense_fp16_bytes=dense,
        times_smaller=_ratio(dense, totals.bytes),
        num_kept=statistics.num_kept.result(),
        ids_kept=int(statistics.is_kept.sum()),
        ids_in_data=int(statistics.is_in_data.sum()),
        temperatures=statistics.at_temperatures(),
        worst_targets=tuple(worst),
        teacher_ce=teacher_ce,
        teacher_perplexity=None if teacher_ce is None or teacher_ce > 700 else math.exp(teacher_ce),
        top1_agreement=_ratio(statistics.top1, seen if has_logprobs else 0),
        label_kept=_ratio(statistics.label_kept, seen if manifest.layout.slots else 0),
        top1_probability=statistics.top1_probability.result(),
        calibration_error=statistics.calibration_error(),
        reliability=statistics.reliability_bins(),
        truncation_curve=curve,
        recommended_k=None,
        beyond_k=None if means is None else means.beyond,
        beyond_k_error=None if means is None else finite(means.beyond_error),
        akl_head_size=statistics.akl_head.result(),
        akl_inexact=_ratio(int(statistics.below_mu[0]), seen if has_logprobs else 0),
        kl_error_mean=_ratio(float(kl_error), targets if has_logprobs else 0),
        kl_error_max=(
            float(_column(reader.index, "kl_error_max").max())
            if len(records) and has_logprobs
            else None
        ),
        logprob_error_mean=logprob_error[0],
        logprob_error_max=logprob_error[1],
        dump_seconds=totals.seconds,
        targets_per_second=_ratio(targets, totals.seconds),
        workers=len(records.column("worker").unique()),
        dump_speed=_dump_speed(reader.index),
    )


def _logprob_error(index: ShardIndex) -> tuple[float | None, float | None]:
    """Mean over targets and largest, of the commit records; None unless all of them have it."""
    means, largest = (_column(index, f"logprob_error_{name}") for name in ("mean", "max"))
    targets = _column(index, "targets")
    if not len(index) or np.isnan(means).any() or np.isnan(largest).any():
        return None, None
    return _ratio(float(means @ targets), float(targets.sum())), float(largest.max())


def _parts(
    reader: CacheReader, refs: Iterator[RowGroupRef], workers: int
) -> Iterator[tuple[Statistics, dict[str, int]]]:
    """The statistics and column bytes of each row group, in order, a few ahead of the caller."""

    def part(ref: RowGroupRef) -> tuple[Statistics, dict[str, int]]:
        statistics = Statistics(reader.manifest)
        statistics.add(reader.read(ref))
        return statistics, reader.column_bytes(ref)

    with ThreadPoolExecutor(workers) as pool:
        ahead: deque[Future[tuple[Statistics, dict[str, int]]]] = deque()
        try:
            for ref in refs:
                ahead.append(pool.submit(part, ref))
                if len(ahead) > 2 * workers:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            for future in ahead:
                future.cancel()


def _dump_speed(index: ShardIndex) -> DumpSpeed:
    """From the commit records, which are in shard order."""
    targets, seconds = _column(index, "targets"), _column(index, "seconds")
    runs = np.array_split(np.arange(len(index)), min(MAX_RATES, len(index)) or 1)
    rates = [_ratio(float(targets[run].sum()), float(seconds[run].sum())) for run in runs]
    names, worker = np.unique(index.table.column("worker").to_pylist(), return_inverse=True)
    shards = np.bincount(worker, minlength=len(names))
    worker_targets = np.bincount(worker, targets, len(names))
    worker_seconds = np.bincount(worker, seconds, len(names))
    return DumpSpeed(
        shard_rates=tuple(rate or 0.0 for rate in rates) if len(index) else (),
        by_worker=tuple(
            WorkerSpeed(
                worker=str(names[i]),
                shards=int(shards[i]),
                targets=int(worker_targets[i]),
                seconds=float(worker_seconds[i]),
                targets_per_second=_ratio(float(worker_targets[i]), float(worker_seconds[i])),
            )
            for i in np.argsort(-worker_targets, kind="stable")[:MAX_WORKERS]
        ),
    )


# Figures kept in the cache


def _key(manifest: Manifest) -> dict[str, Any] | None:
    """What decides every figure; None while the cache is not final."""
    if manifest.records is None:
        return None
    return {
        "version": VERSION,
        "cache_id": manifest.cache_id,
        "records": manifest.records.xxh3_128,
    }


def _read_kept(store: Store, key: dict[str, Any], url: str) -> Report | None:
    try:
        value = read_json(store, paths.KEPT_REPORT)
        if value.get("key") == key:
            return from_json(Report, {**value["report"], "url": url}, store.path(paths.KEPT_REPORT))
    except (FormatError, KeyError, TypeError, OSError):  # absent, of another version, or damaged
        pass
    return None


def _is_of(kept: Report, reader: CacheReader) -> bool:
    """Whether kept figures can be of this cache, and can be drawn."""
    manifest, totals = reader.manifest, reader.index.totals()
    counts = (kept.shards, kept.sequences, kept.tokens, kept.targets, kept.bytes)
    expected = (totals.shards, totals.sequences, totals.tokens, totals.targets, totals.bytes)
    said = (kept.teacher, kept.truncation, kept.precision, kept.source, kept.rejected_sequences)
    stated = (manifest.teacher, manifest.truncation, manifest.precision, manifest.source)
    shares = [x for at in kept.reliability for x in (at.confidence, at.accuracy) if x is not None]
    of_entries = (
        *(kept.top1_agreement, kept.label_kept, kept.calibration_error, kept.akl_inexact),
        *(kept.kl_error_mean, kept.kl_error_max),
    )
    sizes, rates = kept.column_bytes.values(), kept.dump_speed.shard_rates
    return (
        counts == expected
        and said == (*stated, totals.rejected)
        and all(0 <= share <= 1 for share in shares)
        and all(at.targets >= 0 for at in kept.reliability)
        and min(sizes, default=0) >= 0
        and sum(sizes) <= totals.bytes
        and min(rates, default=0) >= 0
        and bool(rates) == bool(totals.shards)
        and len(kept.temperatures) in (0, len(manifest.temperatures))
        and None not in (kept.bytes_per_target, kept.times_smaller, kept.teacher_ce)
        and (None not in of_entries or not manifest.layout.has_logprobs)
        and (kept.label_kept is not None or not manifest.layout.slots)
        and (kept.beyond_k is not None or not kept.truncation_curve)
        and len(kept.truncation_curve) <= manifest.layout.slots
        and [at.k for at in kept.truncation_curve] == list(range(1, len(kept.truncation_curve) + 1))
        and kept.recommended_k is None
    )


def _keep(store: Store, key: dict[str, Any], report: Report) -> None:
    if store.is_local:
        with contextlib.suppress(OSError):  # read-only, or full: nothing depends on it
            store.remove_temporaries(str(PurePath(paths.KEPT_REPORT).parent))  # of killed ones
            publish_json(store, paths.KEPT_REPORT, {"key": key, "report": to_json(report)})


def _data_bytes(index: ShardIndex) -> int:
    """Of all row groups, which is what their columns take."""
    groups = index.table.column("row_groups").combine_chunks().flatten()
    return int(groups.field("data").field("length").to_numpy().sum())


def _column(index: ShardIndex, name: str) -> NDArray:
    return index.table.column(name).to_numpy()


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None
