"""What a cache holds and how good it is: one pass over the row groups, in bounded memory.

Knows nothing of models: everything is computed from what is stored. Quantiles come from KLL
sketches (exact up to 2,000 values, then within 0.2% of the rank); means are exact.
`docs/format.md` lists the keys of the JSON form.
"""

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasketches import kll_floats_sketch
from numpy.typing import NDArray

from schemas import TeacherInfo, Truncation
from storage.codec import Rows, empty
from storage.reader import CacheReader

SKETCH_SIZE = 2000
"""Of a KLL sketch: a rank error of 0.14%."""
FLOOR = np.float32(-1e4)
"""Log probs below it count as this, so that 0 log 0 is 0."""
RANKS = {"p01": 0.01, "p05": 0.05, "p25": 0.25, "p50": 0.5, "p75": 0.75, "p95": 0.95, "p99": 0.99}


@dataclass(frozen=True, kw_only=True, slots=True)
class Spread:
    """The distribution of one quantity: extremes, quantiles (smallest value at a rank), mean."""

    min: float
    p01: float
    p05: float
    p25: float
    p50: float
    p75: float
    p95: float
    p99: float
    max: float
    mean: float


@dataclass(frozen=True, kw_only=True, slots=True)
class AtTemperature:
    """What is kept of the teacher's distributions at one stored temperature."""

    temperature: float
    retained_mass: Spread
    """1 - exp(log tail) of each target."""
    teacher_entropy: Spread
    """Nats, over the kept entries and the tail as one bucket: at most the full entropy."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """What `inspect` found; everything but the plan's numbers counts committed shards only."""

    url: str
    complete: bool
    """Whether every planned shard is committed and the cache is sealed."""
    cache_id: str
    format_version: int
    teacher: TeacherInfo
    tokenizer_fingerprint: str
    """Empty when the source was ready ids without a tokenizer."""
    shared_vocab_size: int
    truncation: Truncation
    precision: str
    source: dict[str, Any]
    planned_shards: int
    planned_targets: int
    shards: int
    sequences: int
    tokens: int
    targets: int
    sequence_length: Spread | None
    """Tokens per sequence; this and all below is None without targets."""
    bytes: int
    """Of the shard files."""
    bytes_per_target: float | None
    column_bytes: dict[str, int]
    """Compressed bytes of each column; what `bytes` has beyond their sum are the footers."""
    dense_fp16_bytes: int
    """2 V bytes per target: what fp16 logits would take."""
    times_smaller: float | None
    """`dense_fp16_bytes / bytes`."""
    num_kept: Spread | None
    """Entries per target."""
    temperatures: tuple[AtTemperature, ...]
    """One for each stored temperature, in the manifest's order; empty without targets."""
    teacher_ce: float | None
    """Cross-entropy of the teacher on the data's own next tokens: mean of -label_logprob, nats."""
    teacher_perplexity: float | None
    """exp(teacher_ce)."""
    top1_agreement: float | None
    """Share of targets whose most probable kept entry is the actual token."""
    label_kept: float | None
    """Share of targets whose actual token is among the kept entries."""
    kl_error_mean: float | None
    """KL(scored || decoded) as measured while writing, nats; mean over targets."""
    kl_error_max: float | None
    dump_seconds: float
    """Wall time summed over shards."""
    targets_per_second: float | None
    """`targets / dump_seconds`: the rate of one worker."""
    workers: int
    """Processes that committed shards."""


def inspect(
    url: str | os.PathLike[str], progress: Callable[[int, int], None] | None = None
) -> Report:
    """Look at every committed row group of a cache, complete or not.

    `progress` is called with (row groups done, row groups in all). Raises FormatError if the
    cache is absent or damaged.
    """
    reader = CacheReader(url, allow_incomplete=True)
    manifest, records = reader.manifest, reader.records
    totals = _Totals(manifest.temperatures)
    column_bytes: dict[str, int] = {}
    groups = reader.row_groups()
    for done, group in enumerate(groups):
        for name, size in reader.column_bytes(group).items():
            column_bytes[name] = column_bytes.get(name, 0) + size
        totals.add(reader.read(group))
        if progress:
            progress(done + 1, len(groups))
    targets = sum(r.targets for r in records)
    size = sum(r.bytes for r in records)
    seconds = sum(r.seconds for r in records)
    dense = 2 * manifest.shared_vocab_size * targets
    teacher_ce = _ratio(totals.label_nats, targets)
    kl_error = sum(r.kl_error_mean * r.targets for r in records)
    return Report(
        url=str(url),
        complete=manifest.is_final,
        cache_id=manifest.cache_id,
        format_version=manifest.format_version,
        teacher=manifest.teacher,
        tokenizer_fingerprint=manifest.tokenizer.fingerprint,
        shared_vocab_size=manifest.shared_vocab_size,
        truncation=manifest.truncation,
        precision=manifest.precision,
        source=manifest.source,
        planned_shards=manifest.num_shards,
        planned_targets=manifest.num_targets,
        shards=len(records),
        sequences=sum(r.num_sequences for r in records),
        tokens=sum(r.rows for r in records),
        targets=targets,
        sequence_length=totals.length.result(),
        bytes=size,
        bytes_per_target=_ratio(size, targets),
        column_bytes=column_bytes,
        dense_fp16_bytes=dense,
        times_smaller=_ratio(dense, size),
        num_kept=totals.num_kept.result(),
        temperatures=totals.at_temperatures(),
        teacher_ce=teacher_ce,
        teacher_perplexity=None if teacher_ce is None or teacher_ce > 700 else math.exp(teacher_ce),
        top1_agreement=_ratio(totals.top1, targets),
        label_kept=_ratio(totals.label_kept, targets),
        kl_error_mean=_ratio(kl_error, targets),
        kl_error_max=max((r.kl_error_max for r in records), default=None),
        dump_seconds=seconds,
        targets_per_second=_ratio(targets, seconds),
        workers=len({r.worker for r in records}),
    )


def bucket_entropy(
    logprobs: NDArray[np.float32],
    log_z: NDArray[np.float32],
    log_tail: NDArray[np.float32],
    temperature: float,
) -> NDArray[np.float32]:
    """[n] entropy of p_T in nats with everything that is not kept as one class.

    -sum_kept p_T log p_T - r log r, where log p_T = logprobs / T - log_z and r = exp(log_tail);
    the entropy over the vocabulary is larger by r times the entropy inside the tail.
    """
    shape = logprobs.shape
    log_p = np.divide(logprobs, np.float32(temperature), out=empty(shape, np.float32))
    log_p -= log_z[:, None]
    p = np.exp(log_p, out=empty(shape, np.float32))
    kept = np.einsum("nk,nk->n", p, np.maximum(log_p, FLOOR, out=log_p))
    return -(kept + np.exp(log_tail) * np.maximum(log_tail, FLOOR))


class _Quantity:
    """A stream of values of one quantity: a sketch of their ranks and their exact sum."""

    def __init__(self) -> None:
        self._sketch, self._sum = kll_floats_sketch(SKETCH_SIZE), 0.0

    def add(self, values: NDArray) -> None:
        self._sketch.update(np.ascontiguousarray(values, np.float32))
        self._sum += float(values.sum(dtype=np.float64))

    def result(self) -> Spread | None:
        sketch = self._sketch
        if sketch.is_empty():
            return None
        quantiles = sketch.get_quantiles(list(RANKS.values()), True)
        return Spread(
            min=sketch.get_min_value(),
            max=sketch.get_max_value(),
            mean=self._sum / sketch.n,
            **dict(zip(RANKS, quantiles, strict=True)),
        )


class _Totals:
    """Everything that is summed or sketched over the rows."""

    def __init__(self, temperatures: tuple[float, ...]) -> None:
        self._temperatures = temperatures
        self._mass = [_Quantity() for _ in temperatures]
        self._entropy = [_Quantity() for _ in temperatures]
        self.length, self.num_kept = _Quantity(), _Quantity()
        self.label_nats = 0.0
        self.top1 = self.label_kept = 0

    def add(self, rows: Rows) -> None:
        self.length.add(np.diff(rows.row_starts))
        self.num_kept.add((rows.token_ids >= 0).sum(axis=1))
        for i, temperature in enumerate(self._temperatures):
            log_z, log_tail = rows.log_z[:, i], rows.log_tail[:, i]
            self._mass[i].add(-np.expm1(np.minimum(log_tail, 0)))
            self._entropy[i].add(bucket_entropy(rows.logprobs, log_z, log_tail, temperature))
        self.label_nats -= float(rows.label_logprob.sum(dtype=np.float64))
        labels = rows.labels
        self.top1 += int((rows.token_ids[:, 0] == labels).sum())
        self.label_kept += int((rows.token_ids == labels[:, None]).sum())

    def at_temperatures(self) -> tuple[AtTemperature, ...]:
        found = []
        for i, temperature in enumerate(self._temperatures):
            mass, entropy = self._mass[i].result(), self._entropy[i].result()
            if mass is not None and entropy is not None:
                found.append(
                    AtTemperature(
                        temperature=temperature, retained_mass=mass, teacher_entropy=entropy
                    )
                )
        return tuple(found)


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def report_text(report: Report) -> str:
    """The report for a terminal, at most 100 columns wide."""
    lines = [_clip(report.url)]
    add = lines.append
    if report.complete:
        add("complete")
    else:
        add(
            f"NOT COMPLETE: {report.shards} of {report.planned_shards} shards committed; "
            "all figures are of these"
        )
    teacher, truncation = report.teacher, report.truncation
    kept = {
        "topk": f"top {truncation.k}",
        "topp": f"top-p {truncation.p:g}, {truncation.min_k} to {truncation.k} entries",
        "sample": f"{truncation.draws} draws",
        "topk+sample": f"top {truncation.k} + {truncation.draws} draws from the tail",
    }[truncation.method]
    temperatures = ", ".join(f"{at.temperature:g}" for at in report.temperatures)
    for name, value in (
        ("teacher", f"{teacher.name} ({teacher.architecture}, {teacher.dtype}, {teacher.engine})"),
        ("tokenizer", report.tokenizer_fingerprint or "none (ready ids)"),
        ("source", report.source.get("path", "") or "not recorded"),
        ("kept", f"{kept} of {report.shared_vocab_size:,}, stored as {report.precision}"),
        ("temperatures", temperatures),
        (
            "holds",
            f"{report.targets:,} targets in {report.tokens:,} tokens, {report.sequences:,} "
            f"sequences, {report.shards:,} shards",
        ),
        ("dump", _dump_line(report)),
    ):
        add(f"  {name:<13}{_clip(str(value), 85)}")
    if report.bytes_per_target is None:
        return "\n".join(lines)
    add("")
    add(
        f"Size: {_megabytes(report.bytes)}, {report.bytes_per_target:.1f} bytes per target, "
        f"{report.times_smaller:.1f} times smaller than fp16 logits"
    )
    rest = report.bytes - sum(report.column_bytes.values())
    for name, size in sorted(
        [*report.column_bytes.items(), ("(footers)", rest)], key=lambda item: -item[1]
    ):
        share = size / report.bytes
        add(
            f"  {name:<16}{size / report.targets:>9.2f} bytes per target {share:>7.1%}  "
            f"{'#' * round(40 * share)}".rstrip()
        )
    add("")
    add(f"  {'':<24}{'mean':>8}" + "".join(f"{name:>7}" for name in ("min", *RANKS, "max")))
    if report.sequence_length is not None:
        add(_spread_line("tokens per sequence", report.sequence_length, 0))
    if report.num_kept is not None:
        add(_spread_line("entries per target", report.num_kept, 0))
    for at in report.temperatures:
        label = f"T={at.temperature:g}"
        add(_spread_line(f"retained mass {label}", at.retained_mass, 3))
        add(_spread_line(f"teacher entropy* {label}", at.teacher_entropy, 2))
    add("  * nats; kept entries and the tail as one bucket: a lower bound of the full entropy")
    add("")
    add("The teacher on the data's own next tokens")
    perplexity = (
        "" if report.teacher_perplexity is None else f", perplexity {report.teacher_perplexity:.4g}"
    )
    add(f"  cross-entropy {report.teacher_ce:.4f} nats{perplexity}")
    add(f"  most probable kept entry is the token: {report.top1_agreement:.2%} of targets")
    add(f"  the token is among the kept entries:   {report.label_kept:.2%} of targets")
    add(
        f"Decoding error, KL(scored || decoded): mean {report.kl_error_mean:.2g}, "
        f"max {report.kl_error_max:.2g} nats"
    )
    return "\n".join(lines)


def _spread_line(name: str, spread: Spread, digits: int) -> str:
    values = [getattr(spread, rank) for rank in ("min", *RANKS, "max")]
    mean = f"{spread.mean:.{max(digits, 1)}f}"
    return f"  {name:<24}{mean:>8}" + "".join(f"{value:>7.{digits}f}" for value in values)


def _dump_line(report: Report) -> str:
    if report.targets_per_second is None:
        return f"{report.dump_seconds:.0f} s"
    return (
        f"{report.dump_seconds:,.0f} s of {report.workers} worker process"
        f"{'es' if report.workers != 1 else ''}, {report.targets_per_second:,.0f} targets/s each"
    )


def _megabytes(size: int) -> str:
    return f"{size / 1e9:,.2f} GB" if size >= 1e9 else f"{size / 1e6:,.2f} MB"


def _clip(text: str, width: int = 100) -> str:
    text = " ".join(text.split())
    return text if len(text) <= width else text[: width - 3] + "..."
