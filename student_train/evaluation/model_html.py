"""What was found of models against a cache, as one page that opens from disk."""

from collections.abc import Iterable, Sequence

from decant.storage.inspect.examples import context_shown, shown
from decant.storage.inspect.html import PAGE, STYLE, escape
from decant.storage.inspect.svg import line_chart
from decant.student_train.evaluation.model_report import ModelReport, ModelsReport, WorstTarget
from decant.student_train.evaluation.model_text import head_of, notes_of, rows_of


def models_html(found: ModelsReport) -> str:
    """The page."""
    names = [f"{letter}: " if len(found.models) > 1 else "" for letter in "AB"]
    title = " and ".join(report.model for report in found.models) + " against the teacher"
    heads = ["", *(names[i] + report.model for i, report in enumerate(found.models))]
    heads += ["B - A"] if found.differences else []
    rows = [
        [label.strip(), *cells, *([difference] if found.differences else [])]
        for label, cells, difference in rows_of(found)
    ]
    body = [
        f"<h1>{escape(title)}</h1>",
        _table((), head_of(found), "text"),
        "<h2>Figures</h2>",
        _table(heads, rows, "text"),
        *(f'<p class="soft">{escape(note)}</p>' for note in notes_of(found)),
        "<h2>Calibration</h2>",
        f'<div class="plots">{"".join(map(_reliability, found.models))}</div>',
    ]
    for i, report in enumerate(found.models):
        if report.worst_targets:
            body.append(f"<h2>{escape(names[i])}farthest from the teacher</h2>")
            body.append(_worst(report.worst_targets))
    return PAGE.format(title=escape(title), style=STYLE, body="\n".join(body))


def _reliability(report: ModelReport) -> str:
    points = [(confidence, correct) for n, confidence, correct in report.reliability if n]
    chart = line_chart(
        [(report.model, points)], y_top=1.0, x_range=(0.0, 1.0), x_ticks=("0", "1"), diagonal=True
    )
    caption = f"{report.model}: share of right tokens by the model's confidence in its first"
    return f"<figure>{chart}<figcaption>{escape(caption)}</figcaption></figure>"


def _worst(worst: Sequence[WorstTarget]) -> str:
    rows = []
    for entry in worst:
        at = entry.target
        lists = [
            "  ".join(f"{shown(e.text, e.token_id)} {e.probability:.3f}" for e in entries)
            for entries in (at.entries, entry.model_entries)
        ]
        kls = [
            f"{kl:.3g}" if kl is not None else "-" for kl in (entry.kl_forward, entry.kl_reverse)
        ]
        rows.append(
            [
                *kls,
                f"{at.sequence} / {at.position}",
                context_shown(at),
                shown(at.token, at.token_id),
                *lists,
            ]
        )
    heads = ("KL t,m", "KL m,t", "sequence / position", "context", "token", "teacher", "model")
    return _table(heads, rows, "text")


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]], kind: str) -> str:
    head = "<tr>" + "".join(f"<th>{escape(cell)}</th>" for cell in heads) + "</tr>" if heads else ""
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return f'<div class="wide"><table class="{kind}">{head}{body}</table></div>'
