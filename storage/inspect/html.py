"""The report of `inspect` as one page that opens from disk: no script, no network, plots as SVG."""

import html
from collections.abc import Iterable, Sequence

from decant.storage.cli.terminal import escaped, megabytes
from decant.storage.inspect import curve_text
from decant.storage.inspect import text as report_text
from decant.storage.inspect.curve import shown_ks
from decant.storage.inspect.examples import Target, context_shown, shown
from decant.storage.inspect.precision import logprob_error_warning
from decant.storage.inspect.report import RANKS, Report
from decant.storage.inspect.svg import bar_chart, line_chart, share_bar

STYLE = """
:root{color-scheme:light dark;--back:#fff;--ink:#1b1f24;--soft:#5b6570;--line:#d8dde3;
--one:#1f6fb2;--two:#b3541e;--warn:#9a6700}
@media (prefers-color-scheme:dark){:root{--back:#14181d;--ink:#e6e9ec;--soft:#9aa5b1;
--line:#343c45;--one:#6db3f2;--two:#f2a36d;--warn:#e3b341}}
@media print{:root{color-scheme:light;--back:#fff;--ink:#000;--soft:#444;--line:#bbb;
--one:#1f6fb2;--two:#b3541e;--warn:#000}body{max-width:none;font-size:10pt}
figure,tr,h2{break-inside:avoid}h2{break-after:avoid}.wide{overflow:visible}}
*{box-sizing:border-box}
body{margin:0 auto;padding:1rem;max-width:68rem;background:var(--back);color:var(--ink);
font:16px/1.45 system-ui,sans-serif;overflow-wrap:anywhere}
h1{font-size:1.4rem;margin:.3rem 0}h2{font-size:1.1rem;margin:2rem 0 .4rem;
border-bottom:1px solid var(--line)}p{max-width:44rem;margin:.5rem 0}
.soft,figcaption,small{color:var(--soft)}.warn{color:var(--warn);font-weight:600}
.wide{overflow-x:auto}table{border-collapse:collapse;font-variant-numeric:tabular-nums}
th,td{padding:.15rem .6rem;text-align:right;white-space:nowrap;overflow-wrap:normal;
border-bottom:1px solid var(--line)}th{font-weight:600}
th:first-child,td:first-child,.text td{text-align:left}.text td{white-space:pre-wrap}
.text td:last-child{overflow-wrap:anywhere}.text th{text-align:left}
.text td:nth-child(3){min-width:13rem}.plots td:first-child,.plots th{white-space:normal}
.big{display:grid;grid-template-columns:repeat(auto-fit,minmax(9rem,1fr));gap:.6rem;padding:0}
.big div{border:1px solid var(--line);border-radius:.4rem;padding:.4rem .7rem}
.big b{display:block;font-size:1.25rem}
.plots{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(18rem,100%),1fr));gap:1rem}
figure{margin:0}svg{width:100%;height:auto;display:block}
svg text{fill:var(--soft);font:11px system-ui,sans-serif}
.axis{stroke:var(--line);fill:none}.one{fill:var(--one)}.two{fill:var(--two)}
.line{fill:none;stroke:var(--one);stroke-width:2}.line.two{fill:none;stroke:var(--two)}
.mono{font-family:ui-monospace,monospace;font-size:.85em}
"""
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width,initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<link rel="icon" href="data:,">
<title>{title}</title><style>{style}</style></head><body>
{body}
</body></html>
"""


def escape(text: str) -> str:
    """Text in which nothing is markup, and nothing a control character."""
    return html.escape(escaped(text))


def report_html(report: Report) -> str:
    """The page."""
    title = f"Cache {report.url}"
    body = [f"<h1>{escape(title)}</h1>", _status(report), *_rejected(report), _overview(report)]
    if report.teacher_ce is not None:
        body += [_size(report), _distributions(report), _teacher(report)]
        if report.has_logprobs:
            body += [_truncation(report), _worst(report)]
    if report.dump_speed.shard_rates:
        body.append(_speed(report))
    return PAGE.format(title=escape(title), style=STYLE, body="\n".join(body))


def _status(report: Report) -> str:
    if not report.complete:
        return (
            f'<p class="warn">Not complete: {report.shards} of {report.planned_shards} shards '
            "committed. All figures are of these.</p>"
        )
    if report.sample:
        return (
            f'<p class="warn">Estimates from {report.sample.targets:,} targets in '
            f"{report.sample.row_groups:,} of {report.sample.of_row_groups:,} row groups (seed "
            f"{report.sample.seed}). Counts, sizes, decoding error and dump are exact.</p>"
        )
    return '<p class="soft">Complete; every row group was looked at.</p>'


def _rejected(report: Report) -> list[str]:
    if not report.rejected_sequences:
        return []
    rows = [
        (str(entry.sequence), escape(entry.sample_id), f"{entry.targets:,}", escape(entry.reason))
        for entry in report.rejected
    ]
    return [
        f'<p class="warn">Warning: {escape(report_text.rejected_line(report))}.</p>',
        _table(("sequence", "sample", "targets lost", "reason"), rows, "text"),
    ]


def _overview(report: Report) -> str:
    big = [("targets", f"{report.targets:,}"), ("size", megabytes(report.bytes))]
    if report.bytes_per_target is not None and report.times_smaller is not None:
        big.append(("bytes per target", f"{report.bytes_per_target:.1f}"))
        big.append(("times smaller than fp16 logits", f"{report.times_smaller:.1f}"))
    if report.temperatures and (mass := report.temperatures[0].retained_mass):
        big.append(("retained mass, mean", f"{mass.mean:.4f}"))
    if report.teacher_ce is not None:
        big.append(("cross-entropy, nats", f"{report.teacher_ce:.4f}"))
    if report.top1_agreement is not None:
        big.append(("top-1 is the token", f"{report.top1_agreement:.2%}"))
    tiles = "".join(f"<div><b>{value}</b><small>{name}</small></div>" for name, value in big)
    rows = [(name, escape(value)) for name, value in report_text.overview(report)]
    return f'<div class="big">{tiles}</div><br>{_table((), rows, "text")}'


def _size(report: Report) -> str:
    assert report.bytes_per_target is not None
    rows = [
        (
            f'<span class="mono">{escape(name)}</span>',
            f"{size:,}",
            f"{size / report.targets:.2f}",
            f"{size / report.bytes:.1%}",
            share_bar(size / report.bytes),
        )
        for name, size in report_text.columns_and_rest(report)
    ]
    return "<h2>Size by column</h2>" + _table(("column", "bytes", "per target", "share", ""), rows)


def _distributions(report: Report) -> str:
    names = ("mean", "min", *RANKS, "max")
    rows = [
        (
            escape(name),
            f"{spread.mean:.{max(digits, 1)}f}",
            *(f"{getattr(spread, key):.{digits}f}" for key in names[1:]),
        )
        for name, spread, digits in report_text.spreads(report)
    ]
    plots = [_figure(bar_chart(h, name), name) for name, h in report_text.histograms(report)]
    note = ""
    if report.temperatures:
        note = f'<p class="soft">* {escape(report_text.entropy_note(report))}.</p>'
    return (
        "<h2>Distributions</h2>"
        + _table(("", *names), rows)
        + note
        + f'<div class="plots">{"".join(plots)}</div>'
    )


def _teacher(report: Report) -> str:
    perplexity = report.teacher_perplexity
    rows = [
        ("cross-entropy, nats", f"{report.teacher_ce:.4f}"),
        ("perplexity", "over e^700" if perplexity is None else f"{perplexity:.4g}"),
    ]
    if report.label_kept is not None:
        rows.append(("the token is among the kept entries", f"{report.label_kept:.2%}"))
    title = "<h2>The teacher on the data's own next tokens</h2>"
    if not report.has_logprobs:
        note = report_text.left_out(report)
        return f'{title}{_table((), rows)}<p class="soft">{escape(note)}.</p>'
    rows += [
        ("most probable kept entry is the token", f"{report.top1_agreement:.2%}"),
        ("expected calibration error, 15 bins", f"{report.calibration_error:.4f}"),
        ("decoding error, mean, nats", f"{report.kl_error_mean:.2g}"),
        ("decoding error, max, nats", f"{report.kl_error_max:.2g}"),
    ]
    if report.logprob_error_max is not None:
        rows += [
            ("worst log prob of a target, mean error", f"{report.logprob_error_mean:.2g}"),
            ("worst log prob of a target, max error", f"{report.logprob_error_max:.2g}"),
        ]
    title += "".join(
        f'<p class="warn">Warning: {escape(warning)}.</p>'
        for warning in logprob_error_warning(
            report.precision, report.logprob_error_mean, report.logprob_error_max
        )
    )
    found = [
        (at.confidence, at.accuracy, at.targets)
        for at in report.reliability
        if at.confidence is not None and at.accuracy is not None
    ]
    bins = [(f"{c:.3f}", f"{a:.3f}", f"{count:,}") for c, a, count in found]
    plot = line_chart(
        [("accuracy", [(c, a) for c, a, _ in found])], y_top=1.0, x_range=(0, 1), diagonal=True
    )
    return (
        title
        + '<div class="plots">'
        + _table((), rows)
        + _figure(plot, "Accuracy against top-1 probability; calibrated is the diagonal")
        + _table(("confidence", "accuracy", "targets"), bins)
        + "</div>"
    )


def _truncation(report: Report) -> str:
    curve = report.truncation_curve
    text = "<h2>Fewer entries</h2>"
    if not curve:
        text += f"<p>{escape(curve_text.NO_CURVE)}</p>"
    else:
        marked = shown_ks(len(curve))
        rows = [curve_text.curve_cells(at) for at in curve if at.k in marked]
        plot = line_chart([("forward KL", [(at.k, at.fkl) for at in curve])], log_x=True)
        mass = line_chart(
            [("mass", [(at.k, at.retained_mass) for at in curve])], y_top=1.0, log_x=True
        )
        heads = ("k", "retained mass", "±", "forward KL", "±", "bytes per target")
        text += (
            f'<p class="soft">{escape("; ".join(curve_text.curve_note(report)))}.</p>'
            '<div class="plots">'
            + _table(heads, rows)
            + _figure(plot, "Cost in nats of forward KL against k")
            + _figure(mass, "Retained mass against k")
            + f'</div><p class="soft">{escape(" ".join(curve_text.unknown_lines(report)))}.</p>'
        )
    return text + "".join(f"<p>{escape(line)}.</p>" for line in curve_text.akl_lines(report))


def _worst(report: Report) -> str:
    def entries(found: Target) -> str:
        return ", ".join(
            f'<span class="mono">{escape(shown(e.text, e.token_id))}</span> {e.probability:.3f}'
            for e in found.entries
        )

    rows = [
        (
            f"{1 - (found.tail_mass or 0):.3f}",
            f"{found.sequence}:{found.position}",
            f'<span class="mono">{escape(context_shown(found))}</span>',
            f'<span class="mono">{escape(shown(found.token, found.token_id))}</span> '
            f"{found.probability:.2g}",
            entries(found),
        )
        for found in report.worst_targets
    ]
    heads = ("mass", "sequence:position", "context", "actual token", "teacher's top entries")
    return "<h2>The targets of the least retained mass</h2>" + _table(heads, rows, "text")


def _speed(report: Report) -> str:
    rates = report.dump_speed.shard_rates
    points = [(float(i), rate) for i, rate in enumerate(rates)]
    plot = line_chart([("targets/s", points)], x_ticks=("first shard", "last shard"))
    rows = [
        (
            escape(at.worker),
            f"{at.shards:,}",
            f"{at.targets:,}",
            f"{at.seconds:,.1f}",
            "" if at.targets_per_second is None else f"{at.targets_per_second:,.0f}",
        )
        for at in report.dump_speed.by_worker
    ]
    heads = ("worker", "shards", "targets", "seconds", "targets/s")
    return (
        '<h2>Dump</h2><div class="plots">'
        + _figure(plot, "Targets per second of one worker, shards in plan order")
        + _table(heads, rows)
        + "</div>"
    )


# Pieces


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]], kind: str = "") -> str:
    """A table of HTML cells that scrolls by itself where it is wider than the page."""
    head = "<tr>" + "".join(f"<th>{cell}</th>" for cell in heads) + "</tr>" if heads else ""
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table class="{kind}">{head}{body}</table></div>'


def _figure(svg: str, caption: str) -> str:
    return f"<figure>{svg}<figcaption>{escape(caption)}</figcaption></figure>"
