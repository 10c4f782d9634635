"""The toys of AKL (arXiv 2404.02657), the authors' two notebooks.

Head first, tail first: the teacher is a half Gaussian of width 16 on the 80 points 0, 1.25, ...,
normalised; the student 80 free logits, `torch.manual_seed(1); torch.rand(80)`, in float64; Adam,
learning rate 0.2, 800 steps; the loss is the mean over the 80 classes. Head and tail are split by
cumulative mass at 0.5, and the L1 gap Σ|p - q| is measured on each.

Neither mean-seeking nor mode-seeking: 50 free logits learn three teachers on the points 0, 2, ...,
98 (two humps of different heights, one Gaussian, two wide humps), Adam at 0.1, after 1 and after
200 steps. The components of a teacher have one width, as in the notebook.
"""

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib.pyplot as plt
import torch
from torch import Tensor

from decant.student_train.losses import sparse_divergence
from examples.reproduce.common import COLORS, LABELS, arguments, dense_targets, save, table

NUM_CLASSES = 80
SHOWN = (1, 5, 10, 300)
"""Steps after which the paper shows the distributions."""
MEASURED = (1, 5, 10, 20, 300)
FREE_STEPS = 200
TEACHERS = {
    "humps at 25 and 75, width 10": (25, 75, 10),
    "one at 50, width 15": (50, 50, 15),
    "humps at 25 and 74, width 15": (25, 74, 15),
}
"""Means of two components of weights 0.3 and 0.5, and their width."""


@dataclass(frozen=True)
class Fit:
    """One student's history; entry e is after e steps."""

    losses: list[float]
    """Of the step that follows; the last is the final one."""
    q: list[Tensor]
    gaps: dict[str, list[float]]
    """Σ|p - q| on the head, the tail, and the tail's far end: the classes from 40 on."""


def teacher() -> Tensor:
    """The teacher's log p of the 80 classes."""
    x = 1.25 * torch.arange(NUM_CLASSES, dtype=torch.float64)
    return (-(x**2) / (2 * 16**2)).log_softmax(0)


def two_humps(first: float, second: float, width: float) -> Tensor:
    """The log p of the 50 classes of the second notebook."""
    x = 2.0 * torch.arange(50, dtype=torch.float64)
    parts = [
        math.log(weight) - (x - mean) ** 2 / (2 * width**2)
        for weight, mean in ((0.3, first), (0.5, second))
    ]
    return torch.stack(parts).logsumexp(0).log_softmax(0)


def free_softmax(log_p: Tensor, first: Tensor, kind: str, steps: int, lr: float) -> Fit:
    """Train free logits with one divergence; the loss is averaged over the classes."""
    targets = dense_targets(log_p[None])
    logits = first.clone().requires_grad_()
    optimizer = torch.optim.Adam([logits], lr=lr)
    result = Fit([], [], {})
    for _ in range(steps):
        result.q.append(logits.detach().softmax(0))
        loss = sparse_divergence(logits[None], targets, kind=kind).sum() / len(log_p)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        result.losses.append(loss.item())
    result.q.append(logits.detach().softmax(0))
    return result


def fit(kind: str, steps: int = 800) -> Fit:
    """The first notebook: head first, tail first."""
    log_p = teacher()
    p = log_p.exp()
    torch.manual_seed(1)
    result = free_softmax(log_p, torch.rand(NUM_CLASSES).double(), kind, steps, lr=0.2)
    is_tail = p.cumsum(0) > 0.5
    parts = {"head": ~is_tail, "tail": is_tail, "far tail": torch.arange(NUM_CLASSES) >= 40}
    for part, members in parts.items():
        result.gaps[part] = [(p - q).abs()[members].sum().item() for q in result.q]
    return result


def total_variations(kind: str, name: str, steps: int = FREE_STEPS) -> list[float]:
    """The second notebook: ½ Σ|p - q| by step, for one of TEACHERS."""
    log_p = two_humps(*TEACHERS[name])
    torch.manual_seed(1)
    first = torch.rand(len(TEACHERS), len(log_p)).double()[list(TEACHERS).index(name)]
    history = free_softmax(log_p, first, kind, steps, lr=0.1).q
    return [0.5 * (log_p.exp() - q).abs().sum().item() for q in history]


def plot(fits: dict[str, Fit], args: argparse.Namespace) -> None:
    shown = [step for step in SHOWN if step < len(fits["fkl"].q)]
    figure, (left, *right) = plt.subplots(1, 1 + len(shown), figsize=(16, 3.6))
    for kind, result in fits.items():
        for part, style in (("head", "-"), ("tail", "--")):
            label = f"{LABELS[kind]}, {part}"
            left.semilogy(result.gaps[part][:61], style, color=COLORS[kind], label=label)
    left.set_xlabel("step")
    left.set_ylabel("L1 gap Σ|p - q|")
    left.legend(fontsize=7)
    for panel, epoch in zip(right, shown, strict=True):
        panel.plot(teacher().exp(), "k-", linewidth=1, label="teacher")
        for kind, result in fits.items():
            panel.plot(result.q[epoch], ".", color=COLORS[kind], markersize=3, label=LABELS[kind])
        panel.set_title(f"epoch {epoch}")
        panel.set_xlabel("class")
        panel.set_ylim(-0.003, 0.07)
    right[0].set_ylabel("probability")
    right[0].legend(fontsize=8)
    save(figure, args)


def main() -> None:
    args = arguments(__doc__, "akl_toy").parse_args()
    fits = {kind: fit(kind, 60 if args.fast else 800) for kind in COLORS}
    at = [step for step in MEASURED if step <= len(fits["fkl"].losses)]
    rows = [
        [LABELS[kind], part, *[gap[step] for step in at]]
        for kind, result in fits.items()
        for part, gap in result.gaps.items()
    ]
    print(table(["loss", "Σ|p - q| on", *[f"step {step}" for step in at]], rows), "\n")
    ends = [[LABELS[kind], f"{result.losses[-1]:.3e}"] for kind, result in fits.items()]
    print(table(["loss", "final loss"], ends), "\n")
    print(table(["teacher", *_columns(("1", str(FREE_STEPS)))], free_rows()))
    plot(fits, args)


def _columns(steps: Sequence[str]) -> list[str]:
    return [f"{LABELS[kind]}, step {step}" for kind in COLORS for step in steps]


def free_rows() -> list[list[object]]:
    """Total variation to each teacher of the second notebook."""
    rows: list[list[object]] = []
    for name in TEACHERS:
        cells = []
        for kind in COLORS:
            distances = total_variations(kind, name)
            cells += [f"{distances[1]:.3f}", f"{distances[FREE_STEPS]:.5f}"]
        rows.append([name, *cells])
    return rows


if __name__ == "__main__":
    main()
