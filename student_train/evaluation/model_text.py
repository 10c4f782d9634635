"""What was found of models against a cache, for a terminal, at most 100 columns wide."""

import dataclasses
import textwrap
from collections.abc import Callable, Iterator

from decant.storage.cli.terminal import WIDTH, clip, fit, width
from decant.storage.inspect.examples import context_shown, entries_shown, shown
from decant.student_train.evaluation.model_report import ModelReport, ModelsReport

COLUMN = 30
LABEL = 24
Cell = Callable[[ModelReport], str]


def models_text(found: ModelsReport) -> str:
    """The whole report."""
    lines = [clip(f"{name:<9} {text}") for name, text in head_of(found)]
    lines.append("")
    names = [f"{letter} " if len(found.models) > 1 else "" for letter in "AB"]
    heads = [f"{names[i]}{report.model}" for i, report in enumerate(found.models)]
    heads += ["B - A"] if found.differences else []
    lines.append(fit("", LABEL) + "".join(fit(head, COLUMN, right=True) + "  " for head in heads))
    for label, cells, difference in rows_of(found):
        cells = [*cells, difference] if found.differences else cells
        lines.append(
            (fit(label, LABEL) + "".join(f"{cell:<{COLUMN}}  " for cell in cells)).rstrip()
        )
    lines += ["", *(clip(line) for line in notes_of(found))]
    for i, report in enumerate(found.models):
        if report.worst_targets:
            lines += ["", *_worst(report, names[i])]
    return "\n".join(line.rstrip() for line in lines)


def head_of(found: ModelsReport) -> list[tuple[str, str]]:
    """What was compared, as (name, text)."""
    some = f"{found.sequences:,} of {found.of_sequences:,} sequences ({found.chosen})"
    teacher = (
        f"{found.teacher}: cross-entropy {found.teacher_cross_entropy:.4f} nats, perplexity "
        f"{found.teacher_perplexity:.3f}"
    )
    if found.teacher_calibration_error is not None:
        teacher += f", calibration error {found.teacher_calibration_error:.4f}"
    return [
        ("cache", f"{found.cache}: {some}, {found.targets:,} targets, {found.kept}"),
        ("teacher", teacher),
    ]


def rows_of(found: ModelsReport) -> Iterator[tuple[str, list[str], str]]:
    """Each figure: its name, a cell for each model, and the paired difference."""

    def cells(cell: Cell) -> list[str]:
        return [cell(report) for report in found.models]

    def difference(key: str) -> str:
        its = found.differences.get(key)
        if its is None:
            return ""
        if its.interval is None:
            return number(its.mean, "+")
        low, high = (number(end, "+") for end in its.interval)
        return f"{number(its.mean, '+')} [{low}, {high}]"

    def with_interval(key: str, *, bound: str = "") -> Cell:
        def cell(report: ModelReport) -> str:
            value, interval = report.means[key], report.intervals[key]
            if value is None:
                return "-"
            is_bound = report.aligned is not None and key.startswith("kl_")
            said = f"{'>= ' if is_bound else bound}{number(value)}"
            if interval is None:
                return said
            return f"{said} [{number(interval[0])}, {number(interval[1])}]"

        return cell

    def between(low: str, high: str) -> Cell:
        def cell(report: ModelReport) -> str:
            if report.means[low] is None:
                return "-"
            return f"{report.means[low]:.4f} to {report.means[high]:.4f}"

        return cell

    yield "weights", cells(lambda report: f"{report.form}, {report.device}"), ""
    yield "perplexity", cells(lambda report: f"{report.perplexity:.3f}"), ""
    yield (
        "cross-entropy, nats",
        cells(with_interval("cross_entropy")),
        difference("cross_entropy"),
    )
    if any(report.means["bits_per_byte"] is not None for report in found.models):
        yield "  bits per byte", cells(with_interval("bits_per_byte")), difference("bits_per_byte")
    has_entries = any(report.means["kl_reverse"] is not None for report in found.models)
    has_plain = any(report.aligned is None for report in found.models)
    bound = "" if found.exact or found.estimated else ">= "
    if found.of_entries:
        yield (
            "KL(teacher || model)",
            cells(with_interval("kl_forward", bound=bound)),
            difference("kl_forward"),
        )
    if any(report.means["kl_forward_per_byte"] is not None for report in found.models):
        key = "kl_forward_per_byte"
        yield "  per byte", cells(with_interval(key, bound=bound)), difference(key)
    if has_entries and has_plain and not found.exact:
        yield "  and at most", cells(_upper), ""
    for name, quantile in (("  median", "p50"), ("  99%", "p99"), ("  largest", "max")):
        if has_entries:
            yield name, [_quantile(report, quantile) for report in found.models], ""
    if has_entries:
        yield (
            "KL(model || teacher)",
            cells(with_interval("kl_reverse", bound=bound)),
            difference("kl_reverse"),
        )
        agreement = cells(with_interval("top1_agreement"))
        yield "top-1 agreement", agreement, difference("top1_agreement")
        if has_plain and found.exact:
            yield "acceptance", cells(with_interval("acceptance")), difference("acceptance")
        elif has_plain:
            cell = between("acceptance", "acceptance_upper")
            yield "acceptance", cells(cell), difference("acceptance")
    yield (
        "top-1 accuracy",
        cells(with_interval("top1_accuracy")),
        difference("top1_accuracy"),
    )
    yield "calibration error", cells(lambda report: f"{report.calibration_error:.4f}"), ""


def number(value: float, sign: str = "") -> str:
    """Four decimals, or three digits where those would be zeros."""
    return f"{value:{sign}.4f}" if abs(value) >= 0.01 or not value else f"{value:{sign}.3g}"


def _upper(report: ModelReport) -> str:
    value = report.means["kl_forward_upper"]
    return "-" if value is None else f"{value:.4f}"


def _quantile(report: ModelReport, name: str) -> str:
    spread = report.spreads["kl_forward"]
    return "-" if spread is None else f"{getattr(spread, name):.4g}"


def notes_of(found: ModelsReport) -> Iterator[str]:
    """What the figures do not say."""
    for report, letter in zip(found.models, "AB", strict=False):
        yield from aligned_notes(report, f"{letter} " if len(found.models) > 1 else "It ")
    if found.models[0].intervals["cross_entropy"] is not None:
        yield "[ , ]: 95% intervals over sequences, resampled 1,000 times; nats throughout."
    if not found.of_entries:
        yield "The cache keeps no entries: no divergence from the teacher can be had of it."
    elif found.estimated:
        yield "The cache keeps draws: KL(teacher || model) is an unbiased estimate from them."
    plain = [report for report in found.models if report.aligned is None]
    if found.of_entries and not found.estimated and found.exact:
        yield "Every id is kept: the divergences are exact."
    elif found.of_entries and not found.estimated and plain:
        tail = plain[0].means["teacher_tail"]
        outside = ", ".join(f"{report.means['model_tail']:.4f}" for report in plain)
        yield f"Unknown: how the teacher spreads {tail:.4f} of its mass over the ids not kept."
        yield f"There the model has {outside}. Lower bounds take that as one bucket; the upper one"
        yield "gives it to the ids that the model expects least. The other KL has no upper bound."


def aligned_notes(report: ModelReport, name: str) -> Iterator[str]:
    """What the figures of a model of another tokenizer are of."""
    its = report.aligned
    if its is None:
        return
    shares = [
        f"{kind} {count / max(its.chunks, 1):.1%}"
        for kind, count in (
            ("1:1", its.one_to_one),
            ("1:N", its.one_to_many),
            ("M:1", its.many_to_one),
            ("M:N", its.many_to_many),
        )
    ]
    said = (
        f"{name}is of another tokenizer, aligned in {its.chunks:,} chunks ({', '.join(shares)}); "
        f"{its.left_out:,} sequences have none. Cross-entropy, perplexity, accuracy and "
        f"calibration are of its own {its.tokens:,} tokens. A KL is of a chunk and from below: "
        "over what both can say in one step, and all else. Agreement is of 1:1 chunks "
        "where one event outweighs "
        "all else. Upper bounds, acceptance, tails and worst targets are not had. Figures per byte "
        "are what compares tokenizers."
    )
    yield from textwrap.wrap(said, WIDTH)


def _worst(report: ModelReport, name: str) -> Iterator[str]:
    yield f"Where {name or 'it '}is farthest from the teacher: its entries over the model's"
    yield (
        f"  {'KL t,m':>7} {'KL m,t':>7} {'seq.':>7} {'pos.':>5}  {'context':<24} {'token':<10} "
        "top entries"
    )
    for worst in report.worst_targets:
        at = worst.target
        both = (worst.kl_forward, worst.kl_reverse)
        kls = [f"{kl:>7.3g}" if kl is not None else f"{'-':>7}" for kl in both]
        start = (
            f"  {' '.join(kls)} {at.sequence:>7} {at.position:>5}  "
            f"{fit(context_shown(at), 24, right=True)} {fit(shown(at.token, at.token_id), 10)} "
        )
        yield start + entries_shown(at, WIDTH - width(start))
        ours = dataclasses.replace(at, entries=worst.model_entries)
        yield " " * width(start) + entries_shown(ours, WIDTH - width(start))
