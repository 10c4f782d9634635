"""The report of `inspect` for a terminal: at most 100 columns wide, with small histograms."""

import math
import textwrap
from collections.abc import Sequence

from decant.schemas import Rejected
from decant.storage.cache.lineage import lineage_text, sampler_text
from decant.storage.cli.terminal import WIDTH, clip, fit, megabytes, width
from decant.storage.inspect.curve_text import fewer_entries
from decant.storage.inspect.examples import Target, context_shown, entries_shown, shown
from decant.storage.inspect.precision import logprob_error_warning
from decant.storage.inspect.report import RANKS, Histogram, Report, Spread

BLOCKS = " ▁▂▃▄▅▆▇█"


def report_text(report: Report) -> str:
    """The report as lines of text."""
    lines = [clip(report.url)]
    if report.complete:
        lines.append("complete")
    else:
        lines.append(
            f"NOT COMPLETE: {report.shards} of {report.planned_shards} shards committed; "
            "all figures are of these"
        )
    lines += rejected_lines(report)
    lines += [f"  {name:<13}{clip(value, 85)}" for name, value in overview(report)]
    if report.bytes_per_target is None:
        return "\n".join(lines)
    if report.sample:
        lines += [
            "",
            f"ESTIMATES from {report.sample.targets:,} targets in {report.sample.row_groups:,} of "
            f"{report.sample.of_row_groups:,} row groups (seed {report.sample.seed});",
            "counts and sizes above, decoding error and dump are exact",
        ]
    sections = [_size, _spreads, _shapes, _teacher, fewer_entries, _worst, _speed]
    if not report.has_logprobs:
        sections = [_size, _spreads, _shapes, _without_logprobs, _speed]
    return "\n".join([*lines, *(line for section in sections for line in ("", *section(report)))])


def rejected_lines(report: Report) -> list[str]:
    """A warning and the first rejected sequences with their reasons; nothing if there are none."""
    if not report.rejected_sequences:
        return []
    lines = [f"WARNING: {rejected_line(report)}"]
    lines += [f"  {clip(rejected_entry(entry), WIDTH - 2)}" for entry in report.rejected[:5]]
    if report.rejected_sequences > 5:
        lines.append(f"  and {report.rejected_sequences - 5:,} more")
    return lines


def rejected_line(report: Report) -> str:
    """How much was lost with sequences that the teacher could not score."""
    share = report.rejected_targets / max(report.targets + report.rejected_targets, 1)
    return (
        f"{report.rejected_sequences:,} of {report.sequences:,} sequences were rejected by the "
        f"teacher: {share:.2%} of targets lost"
    )


def rejected_entry(entry: Rejected) -> str:
    """One rejected sequence and why."""
    return (
        f"sequence {entry.sequence}, sample {entry.sample_id!r}, {entry.targets:,} targets: "
        f"{entry.reason}"
    )


def overview(report: Report) -> list[tuple[str, str]]:
    """What the cache is, as (name, value)."""
    teacher, truncation = report.teacher, report.truncation
    kept = truncation.text()
    if report.has_entries:
        stored = (
            f"stored as {report.precision}" if report.has_logprobs else "stored without log probs"
        )
        kept = f"{kept} of {report.shared_vocab_size:,}, {stored}"
    made, sampled = lineage_text(report.source), sampler_text(report.source)
    return [
        ("teacher", f"{teacher.name} ({teacher.architecture}, {teacher.dtype}, {teacher.engine})"),
        ("tokenizer", report.tokenizer_fingerprint or "none (ready ids)"),
        ("source", str(report.source.get("path", "") or "not recorded")),
        *([("sampled by", sampled)] if sampled else []),
        *([("made by", made)] if made else []),
        ("records", records_line(report)),
        ("kept", kept),
        ("temperatures", ", ".join(f"{at.temperature:g}" for at in report.temperatures) or "1"),
        (
            "holds",
            f"{report.targets:,} targets in {report.tokens:,} tokens, {report.sequences:,} "
            f"sequences, {report.shards:,} shards",
        ),
        ("duplicates", duplicates_line(report)),
        ("ids", ids_line(report)),
        ("dump", dump_line(report)),
    ]


def records_line(report: Report) -> str:
    """How many records the source had, and what became of those not taken as they were."""
    if not report.records:
        return "not recorded"
    named = {
        "truncated_records": "truncated",
        "split_records": "split",
        "empty_records": "empty",
        "duplicate_records": "duplicates",
        "records_without_targets": "without targets",
        "unselected_targets": "targets of lower entropy kept as context",
    }
    parts = [
        f"{report.records[key]:,} {name}" for key, name in named.items() if report.records.get(key)
    ]
    return ", ".join([f"{report.records.get('records', 0):,}", *parts])


def _size(report: Report) -> list[str]:
    assert report.bytes_per_target is not None
    lines = [
        f"Size: {megabytes(report.bytes)}, {report.bytes_per_target:.1f} bytes per target, "
        f"{report.times_smaller:.1f} times smaller than fp16 logits"
    ]
    for name, size in columns_and_rest(report):
        share = size / report.bytes
        lines.append(
            f"  {name:<16}{size / report.targets:>9.2f} bytes per target {share:>7.1%}  "
            f"{'#' * round(40 * share)}".rstrip()
        )
    return lines


def _spreads(report: Report) -> list[str]:
    names = ("min", *RANKS, "max")
    lines = [f"  {'':<26}{'mean':>8}" + "".join(f"{name:>7}" for name in names)]
    for name, spread, digits in spreads(report):
        values = [getattr(spread, rank) for rank in names]
        mean = f"{spread.mean:.{max(digits, 1)}f}"
        lines.append(f"  {name:<26}{mean:>8}" + "".join(f"{v:>7.{digits}f}" for v in values))
    return [*lines, f"  * {entropy_note(report)}"] if report.temperatures else lines


def entropy_note(report: Report) -> str:
    """What the figures of entropy are."""
    if not report.has_logprobs:
        return "nats; of the whole distribution"
    return (
        "nats over the vocabulary; the tail as uneven as the last entry allows, and spread evenly"
    )


def spreads(report: Report) -> list[tuple[str, Spread, int]]:
    """Every spread of the report: name, values, digits after the point."""
    found = [
        ("tokens per sequence", report.sequence_length, 0),
        ("entries per target", report.num_kept, 0),
    ]
    for at in report.temperatures:
        found.append((f"retained mass T={at.temperature:.4g}", at.retained_mass, 3))
        if not report.has_logprobs:
            found.append((f"teacher entropy* T={at.temperature:.4g}", at.teacher_entropy, 2))
            continue
        found.append((f"entropy* at least T={at.temperature:.4g}", at.teacher_entropy_least, 2))
        found.append((f"entropy* at most T={at.temperature:.4g}", at.teacher_entropy_most, 2))
    found.append(("top-1 probability", report.top1_probability, 3))
    found.append(("AKL head, entries", report.akl_head_size, 0))
    return [(name, spread, digits) for name, spread, digits in found if spread is not None]


def _shapes(report: Report) -> list[str]:
    lines = []
    for name, histogram in histograms(report):
        low, high = histogram.edges[0], histogram.edges[-1]
        lines.append(f"  {name:<26}{low:>8.4g} {sparkline(histogram.counts)} {high:.4g}")
    return ["Shapes (bars: share of the fullest bin)", *lines]


def histograms(report: Report) -> list[tuple[str, Histogram]]:
    """Every histogram of the report by name."""
    found = []
    if report.sequence_length_histogram is not None:
        found.append(("tokens per sequence", report.sequence_length_histogram))
    for at in report.temperatures:
        found.append((f"retained mass T={at.temperature:.4g}", at.retained_mass_histogram))
        name = "entropy* at least" if report.has_logprobs else "teacher entropy*"
        found.append((f"{name} T={at.temperature:.4g}", at.teacher_entropy_least_histogram))
    if report.reliability:
        bins = len(report.reliability)
        found.append(
            (
                "top-1 probability",
                Histogram(
                    edges=tuple(i / bins for i in range(bins + 1)),
                    counts=tuple(at.targets for at in report.reliability),
                ),
            )
        )
    return [(name, histogram) for name, histogram in found if histogram.counts]


def sparkline(values: Sequence[float]) -> str:
    """A column of eighths per value; what is not 0 shows at least one."""
    top = max(values) or 1
    return "".join(BLOCKS[math.ceil(8 * value / top)] for value in values)


def _without_logprobs(report: Report) -> list[str]:
    """In place of all that takes log probs."""
    lines = _cross_entropy(report)
    if report.label_kept is not None:
        lines.append(f"  the token is among the drawn ids:      {report.label_kept:.2%} of targets")
    return [*lines, left_out(report)]


def left_out(report: Report) -> str:
    """What a cache without log probs of kept entries does not tell, in one line."""
    if report.has_entries:
        return "Draws without log probs: what takes the probabilities of kept entries is left out"
    return "No kept entries: what takes more than the log prob of the actual token is left out"


def _cross_entropy(report: Report) -> list[str]:
    perplexity = (
        "" if report.teacher_perplexity is None else f", perplexity {report.teacher_perplexity:.4g}"
    )
    return [
        "The teacher on the data's own next tokens",
        f"  cross-entropy {report.teacher_ce:.4f} nats{perplexity}",
    ]


def _teacher(report: Report) -> list[str]:
    lines = [
        *_cross_entropy(report),
        f"  most probable kept entry is the token: {report.top1_agreement:.2%} of targets",
        f"  the token is among the kept entries:   {report.label_kept:.2%} of targets",
        f"  calibration error of the top-1 probability, 15 bins: {report.calibration_error:.4f}",
        "  confidence  accuracy   targets  (o accuracy, | confidence)",
    ]
    for at in report.reliability:
        if at.confidence is None or at.accuracy is None:
            continue
        axis = [" "] * 51
        axis[round(50 * at.confidence)] = "|"
        axis[round(50 * at.accuracy)] = "o"
        figures = f"  {at.confidence:>10.3f}{at.accuracy:>10.3f}{at.targets:>12,}  "
        lines.append(figures + "".join(axis).rstrip())
    return [*lines, *_decoding_error(report)]


def _decoding_error(report: Report) -> list[str]:
    lines = [
        f"Decoding error, KL(scored || decoded): mean {report.kl_error_mean:.2g}, "
        f"max {report.kl_error_max:.2g} nats"
    ]
    if report.logprob_error_max is None:
        return [*lines, "  of single log probs: not measured when this cache was written"]
    lines.append(
        f"  of the worst log prob of a target: mean {report.logprob_error_mean:.2g}, max "
        f"{report.logprob_error_max:.2g} nats: a reverse KL moves by that at most"
    )
    for warning in logprob_error_warning(
        report.precision, report.logprob_error_mean, report.logprob_error_max
    ):
        lines += textwrap.wrap(f"WARNING: {warning}", WIDTH, subsequent_indent="  ")
    return lines


def _worst(report: Report) -> list[str]:
    lines = ["The targets of the least retained mass (decant head shows more)"]
    lines.append(f"  {'mass':>6} {'seq.':>8} {'pos.':>5}  {'context':<28} {'token':<12} entries")
    lines += [worst_line(found) for found in report.worst_targets[:10]]
    return lines


def worst_line(found: Target) -> str:
    """One target and its first entries on one line."""
    line = (
        f"  {1 - (found.tail_mass or 0):>6.3f} {found.sequence:>8} {found.position:>5}  "
        f"{fit(context_shown(found), 28, right=True)} "
        f"{fit(shown(found.token, found.token_id), 12)} "
    )
    return line + entries_shown(found, WIDTH - width(line))


def _speed(report: Report) -> list[str]:
    rates = report.dump_speed.shard_rates
    lines = [
        "Dump: targets/s of one worker, shards in plan order: "
        f"{min(rates):,.0f} to {max(rates):,.0f}",
        f"  {sparkline(rates)}",
    ]
    for at in report.dump_speed.by_worker[:5]:
        rate = "" if at.targets_per_second is None else f"{at.targets_per_second:,.0f} targets/s"
        lines.append(
            f"  {fit(at.worker, 36)}{at.shards:>8,} shards{at.targets:>16,} targets  {rate:>18}"
        )
    return lines


def columns_and_rest(report: Report) -> list[tuple[str, int]]:
    """Bytes of each column and of all that is none, most first."""
    rest = report.bytes - sum(report.column_bytes.values())
    return sorted([*report.column_bytes.items(), ("(footers)", rest)], key=lambda item: -item[1])


def duplicates_line(report: Report) -> str:
    """How many sequences repeat an earlier one."""
    if report.duplicate_sequences is None:
        return "not counted in a sample"
    about = "" if report.duplicates_exact else "about "
    return f"{about}{report.duplicate_sequences:,} sequences repeat the tokens of an earlier one"


def ids_line(report: Report) -> str:
    """How much of the vocabulary occurs."""
    at_least = "at least " if report.sample else ""
    in_data = f"{at_least}{report.ids_in_data:,}"
    if not report.has_entries:
        return f"{in_data} of {report.shared_vocab_size:,} are in the data"
    return (
        f"{at_least}{report.ids_kept:,} of {report.shared_vocab_size:,} are kept somewhere, "
        f"{in_data} are in the data"
    )


def dump_line(report: Report) -> str:
    """How long the dump took."""
    if report.targets_per_second is None:
        return f"{report.dump_seconds:.0f} s"
    return (
        f"{report.dump_seconds:,.0f} s of {report.workers} worker process"
        f"{'es' if report.workers != 1 else ''}, {report.targets_per_second:,.0f} targets/s each"
    )
