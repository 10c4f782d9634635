"""Draw `metrics.jsonl`: what a run has learned, at a glance.

matplotlib is imported here alone; without it there is a line in the log and no picture.
"""

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from decant.storage.files.durable import staged_file

log = logging.getLogger(__name__)

PLOT = "metrics.png"
SCHEDULES = "schedules of the loss"
BY_CACHE = "training loss of each cache"
Panels = Sequence[tuple[str, Sequence[str]]]
"""Titles, and the names of the values of each."""
PANELS: Panels = (
    ("training loss, nats per target", ("loss", "kd", "ce")),
    (BY_CACHE, ()),
    (
        "held-out, nats per target",
        ("heldout_ce", "heldout_divergence", "heldout_loss", "teacher_ce"),
    ),
    (
        "held-out, shares",
        ("top1_accuracy", "top1_agreement", "acceptance_lower", "acceptance_upper", "ece"),
    ),
    (
        "mass outside the kept ids",
        ("student_tail", "teacher_tail", "heldout_student_tail", "heldout_teacher_tail"),
    ),
    ("share of targets below mu", ("below_mu", "heldout_below_mu")),
    ("ROUGE", ("rouge1", "rouge2", "rougeL")),
    ("learning rate", ("lr",)),
    ("gradient norm", ("grad_norm",)),
    (SCHEDULES, ()),
    ("targets per second", ("targets_per_s",)),
)
NO_PANEL = ("step", "epoch", "tokens_per_s", "data_wait_share")
"""What else a logged line holds: the rest of it are the loss's scheduled numbers, as configured."""
SMOOTHED = ("loss", "kd", "ce", "grad_norm")


def draw(metrics: Path, target: Path, panels: Panels = PANELS, along: str = "step") -> bool:
    """Draw the lines of a `metrics.jsonl` into a PNG; false if matplotlib is not there.

    `along` is the value of each line that the others are drawn over. Panels without values are left
    out. A file without lines draws nothing.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ImportError:
        log.info("no %s: matplotlib is not installed (pip install 'decant[plots]')", target.name)
        return False
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    named = {name for _, names in panels for name in names} | set(NO_PANEL)
    others = {name: None for line in lines if "lr" in line for name in line if name not in named}
    told = {name: None for name in others if name.startswith(("kd/", "ce/"))}
    free = {SCHEDULES: [name for name in others if name not in told], BY_CACHE: list(told)}
    drawn = [
        (title, present)
        for title, names in panels
        if (
            present := [
                name for name in free.get(title, names) if any(name in line for line in lines)
            ]
        )
    ]
    if not drawn:
        return False
    columns = min(3, len(drawn))
    rows = -(-len(drawn) // columns)
    figure = Figure(figsize=(5.2 * columns, 3.4 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    for place, (title, names) in enumerate(drawn, start=1):
        axes = figure.add_subplot(rows, columns, place)
        for name in names:
            _curve(axes, lines, name, along)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel(along, fontsize=9)
        axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
        axes.grid(alpha=0.3)
        if len(names) > 1 or title in free:
            axes.legend(fontsize=8)
    with staged_file(target) as temporary:
        figure.savefig(temporary, dpi=120, format="png")
    return True


def _curve(axes: Any, lines: list[dict[str, Any]], name: str, along: str) -> None:
    points = [(line[along], line[name]) for line in lines if name in line]
    steps, values = [list(column) for column in zip(*points, strict=True)]
    if name not in SMOOTHED or len(values) < 50:
        axes.plot(steps, values, label=name, marker="o" if len(values) < 50 else None, markersize=3)
        return
    (faint,) = axes.plot(steps, values, alpha=0.25, linewidth=0.8)
    axes.plot(steps, _smooth(values), label=name, color=faint.get_color())


def _smooth(values: list[float]) -> list[float]:
    """Exponential moving average over about a fiftieth of the run, without a bias at its begin."""
    keep = 1 - 1 / max(2.0, len(values) / 50)
    smoothed, total, weight = [], 0.0, 0.0
    for value in values:
        total, weight = keep * total + value, keep * weight + 1
        smoothed.append(total / weight)
    return smoothed
