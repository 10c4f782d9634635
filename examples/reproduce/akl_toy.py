"""Head first, tail first: the toy of AKL (arXiv 2404.02657, the authors' notebook).

The teacher is a half Gaussian of width 16 on the 80 points 0, 1.25, ..., normalised; the student 80
free logits, `torch.manual_seed(1); torch.rand(80)`, in float64; Adam, learning rate 0.2, 800 steps;
the loss is the mean over the 80 classes. Head and tail are split by cumulative mass at 0.5, and
the L1 gap Σ|p - q| is measured on each.
"""

import argparse
from dataclasses import dataclass

import matplotlib.pyplot as plt
import torch
from torch import Tensor

from decant.student_train.losses import sparse_divergence
from examples.reproduce.common import COLORS, LABELS, arguments, dense_targets, save, table

NUM_CLASSES = 80
SHOWN = (10, 20)


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


def fit(kind: str, steps: int = 800) -> Fit:
    """Train the 80 logits with one divergence."""
    log_p = teacher()
    p, targets = log_p.exp(), dense_targets(log_p[None])
    is_tail = p.cumsum(0) > 0.5
    parts = {"head": ~is_tail, "tail": is_tail, "far tail": torch.arange(NUM_CLASSES) >= 40}
    torch.manual_seed(1)
    logits = torch.rand(NUM_CLASSES).double().requires_grad_()
    optimizer = torch.optim.Adam([logits], lr=0.2)
    result = Fit([], [], {part: [] for part in parts})
    for _ in range(steps):
        q = logits.detach().softmax(0)
        gap = (p - q).abs()
        result.q.append(q)
        for part, members in parts.items():
            result.gaps[part].append(gap[members].sum().item())
        loss = sparse_divergence(logits[None], targets, kind=kind).sum() / NUM_CLASSES
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        result.losses.append(loss.item())
    return result


def plot(fits: dict[str, Fit], args: argparse.Namespace) -> None:
    figure, (left, *right) = plt.subplots(1, 1 + len(SHOWN), figsize=(13, 4))
    for kind, result in fits.items():
        for part, style in (("head", "-"), ("tail", "--")):
            label = f"{LABELS[kind]}, {part}"
            left.semilogy(result.gaps[part][:61], style, color=COLORS[kind], label=label)
    left.set_xlabel("step")
    left.set_ylabel("L1 gap Σ|p - q|")
    left.legend(fontsize=8)
    for panel, epoch in zip(right, SHOWN, strict=True):
        panel.plot(teacher().exp(), "k-", linewidth=1, label="teacher")
        for kind, result in fits.items():
            panel.plot(result.q[epoch], ".", color=COLORS[kind], markersize=4, label=LABELS[kind])
        panel.set_title(f"after {epoch} steps")
        panel.set_xlabel("class")
        panel.set_ylabel("probability")
        panel.legend(fontsize=8)
    save(figure, args)


def main() -> None:
    args = arguments(__doc__, "akl_toy").parse_args()
    fits = {kind: fit(kind, 60 if args.fast else 800) for kind in COLORS}
    header = ["loss", "final loss"]
    header += [f"{part}, step {epoch}" for epoch in SHOWN for part in fits["fkl"].gaps]
    rows = []
    for kind, result in fits.items():
        gaps = [gap[epoch] for epoch in SHOWN for gap in result.gaps.values()]
        rows.append([LABELS[kind], f"{result.losses[-1]:.3e}", *gaps])
    print(table(header, rows))
    plot(fits, args)


if __name__ == "__main__":
    main()
