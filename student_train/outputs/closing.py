"""What a run ends with, for people: where the student is, how far it came, what it took."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from decant.storage.cli.terminal import megabytes
from decant.student_train.config.evaluation import ROUGE
from decant.student_train.outputs.progress import duration
from decant.student_train.outputs.save import QUANTISED, STUDENT

ROWS = (
    ("heldout_ce", "cross-entropy, nats", "{:.4f}"),
    ("heldout_perplexity", "perplexity", "{:,.2f}"),
    ("heldout_divergence", "divergence, nats", "{:.4f}"),
    ("heldout_bits_per_byte", "bits per byte", "{:.4f}"),
    ("heldout_divergence_per_byte", "divergence, nats per byte", "{:.4f}"),
    ("heldout_loss", "loss, nats", "{:.4f}"),
    ("top1_accuracy", "top-1 accuracy", "{:.2%}"),
    ("top1_agreement", "top-1 agreement", "{:.2%}"),
    ("acceptance_lower", "acceptance, at least", "{:.2%}"),
    ("acceptance_upper", "acceptance, at most", "{:.2%}"),
    ("ece", "calibration error", "{:.4f}"),
    ("heldout_student_tail", "mass outside the kept ids", "{:.4f}"),
    ("heldout_below_mu", "kept mass below akl's mu", "{:.2%}"),
    *((name, f"ROUGE-{name.removeprefix('rouge')}", "{:.4f}") for name in ROUGE),
)


def closing_text(summary: Mapping[str, Any], output: Path) -> str:
    """A few lines and, if the student was evaluated, a table: before, after, the teacher."""
    steps = f"{summary['steps']:,} ({summary['epochs']:.2f} epochs)"
    if best := summary.get("best_step"):
        steps += f"; saved is the best, step {best:,}"
    facts = [("student", str(output / STUDENT)), ("steps", steps)]
    if summary.get("quantised"):
        facts.insert(1, ("", f"{output / QUANTISED}  ({summary['quantised']})"))
    if "wall_s" in summary:
        took = duration(summary["wall_s"])
        if summary["resumed_at"]:
            took += f" since it was resumed at step {summary['resumed_at']:,}"
        facts.append(("time", took))
    facts.append(("memory", f"{megabytes(int(summary['peak_memory_mb'] * 1e6))} at most"))
    lines = [f"{name:<9}{text}" for name, text in facts]
    return "\n".join([*lines, *_table(summary)])


def _table(summary: Mapping[str, Any]) -> list[str]:
    before = summary.get("before") or {}
    teacher: dict[str, Any] = {}
    if "teacher_ce" in summary:
        ce = summary["teacher_ce"]
        teacher = {"heldout_ce": ce, "heldout_perplexity": math.exp(min(ce, 700.0))}
        teacher["heldout_student_tail"] = summary.get("heldout_teacher_tail")
    rows = [
        (label, *(_shown(found.get(name), form) for found in (before, summary, teacher)))
        for name, label, form in ROWS
        if name in summary
    ]
    if not rows:
        return [
            "held out  nothing: give eval.heldout_fraction or eval.cache to see what it learned"
        ]
    rows = [("on held-out data", "before", "after", "teacher"), *rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "",
        *(
            "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip()
            for row in rows
        ),
    ]


def _shown(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)
