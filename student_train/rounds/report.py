"""What rounds come to, for people: a line when one is done, a table at the end, panels to draw."""

from collections.abc import Sequence
from pathlib import Path

from decant.storage.cli.terminal import megabytes
from decant.student_train.rounds.config import group
from decant.student_train.rounds.places import STUDENT, Places
from decant.student_train.rounds.records import Round

PANELS: tuple[tuple[str, tuple[str, ...]], ...] = (
    (
        "held-out, nats per target",
        ("heldout_ce", "heldout_divergence", "heldout_loss", "teacher_ce"),
    ),
    (
        "held-out, shares",
        ("top1_accuracy", "top1_agreement", "acceptance_lower", "acceptance_upper", "ece"),
    ),
    ("ROUGE", ("rouge1", "rouge2", "rougeL")),
    ("teacher's nats per target of the answers", ("samples_teacher_ce",)),
    ("targets of the round's cache", ("targets",)),
    ("seconds", ("dump_s", "training_s")),
)
"""Of the plot over rounds."""

COLUMNS = (
    ("heldout_ce", "held-out CE", "{:.4f}"),
    ("heldout_divergence", "divergence", "{:.4f}"),
    ("top1_agreement", "agreement", "{:.2%}"),
    ("rougeL", "ROUGE-L", "{:.4f}"),
)
"""Of the table, where the trainings have evaluated them."""


def round_line(record: Round, rounds: int) -> str:
    """What a finished round came to."""
    found = [
        f"{label} {form.format(record.figures[name])}"
        for name, label, form in COLUMNS
        if name in record.figures
    ]
    took = sum(record.seconds.values())
    return (
        f"round {record.number} of {rounds} is done in {took:.0f} s: {record.targets:,} targets, "
        f"{megabytes(record.bytes)}, teacher's CE of the answers {record.samples_nll:.4f}"
        + "".join(f", {text}" for text in found)
    )


def closing_text(output: Path, records: Sequence[Round]) -> str:
    """Where the student is, and a table: a row per round, the first student before them."""
    last = records[-1]
    steps = sum(record.steps for record in records)
    scored = sum(record.targets for record in records)
    lines = [
        f"student  {output / STUDENT} -> {Places(output, last.number).student}",
        f"steps    {steps:,} in {len(records)} rounds, {scored:,} targets scored",
    ]
    present = [
        column
        for column in COLUMNS
        if any(column[0] in record.figures or column[0] in record.before for record in records)
    ]
    rows = [
        (
            "round",
            "targets",
            "bytes",
            "teacher's CE of answers",
            *(label for _, label, _ in present),
        )
    ]
    if records[0].before:
        rows.append(("start", "", "", "", *_cells(records[0].before, present)))
    for record in records:
        rows.append(
            (
                str(record.number),
                f"{record.targets:,}",
                megabytes(record.bytes),
                f"{record.samples_nll:.4f}",
                *_cells(record.figures, present),
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines.append("")
    lines += ["  ".join(map(str.rjust, row, widths)).rstrip() for row in rows]
    if not present:
        lines.append("no held-out figures: give train.eval.cache, the same for all rounds")
    elif not group(group(last.config, "train"), "train.eval").get("cache"):
        lines.append(
            "held out of each round's own cache, so rounds are not measured on the same targets; "
            "give train.eval.cache"
        )
    return "\n".join(lines)


def _cells(figures: dict[str, float], columns: Sequence[tuple[str, str, str]]) -> tuple[str, ...]:
    return tuple(form.format(figures[name]) if name in figures else "" for name, _, form in columns)
