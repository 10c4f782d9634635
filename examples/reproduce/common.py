"""What the experiments share: dense teachers as sparse targets, calibration, tables, figures.

A dense teacher is the sparse one with k = V and no tail, so every loss here is the project's own
`sparse_divergence`.

Shape letters: N targets, V classes, K kept classes.
"""

import argparse
import io
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from decant.student_train.losses import SparseTargets

matplotlib.use("Agg")

COLORS = {"fkl": "tab:blue", "rkl": "tab:red", "akl": "tab:green"}
LABELS = {"fkl": "FKL", "rkl": "RKL", "akl": "AKL"}


def dense_targets(log_p_NV: Tensor) -> SparseTargets:
    """The whole distributions as targets: k = V, log_tail = -inf."""
    return topk_targets(log_p_NV, log_p_NV.shape[1])


def topk_targets(log_p_NV: Tensor, k: int) -> SparseTargets:
    """The k largest entries of each distribution, and the exact log mass of the rest."""
    logprobs, ids = log_p_NV.topk(k, dim=1)
    rest = log_p_NV.scatter(1, ids, -torch.inf)
    zeros = torch.zeros_like(log_p_NV[:, 0])
    targets = SparseTargets(ids, logprobs, log_z=zeros, log_tail=rest.logsumexp(1))
    return targets.validate(log_p_NV.shape[1])  # once, not in every call of a loss


def calibration(log_q_NV: Tensor, labels_N: Tensor, num_bins: int = 15) -> dict[str, float]:
    """Mean top-1 confidence, accuracy, and the expected calibration error.

    ECE = Σ_b n_b / N · |accuracy_b - confidence_b| over bins of equal width.
    """
    confidence, predicted = log_q_NV.exp().max(dim=1)
    confidence, correct = confidence.double(), (predicted == labels_N).double()
    bins = (confidence * num_bins).long().clamp(max=num_bins - 1)
    gaps = torch.zeros(num_bins, dtype=torch.float64).index_add(0, bins, correct - confidence)
    return {
        "confidence": confidence.mean().item(),
        "accuracy": correct.mean().item(),
        "ece": gaps.abs().sum().item() / len(labels_N),
    }


def arguments(description: str | None, name: str) -> argparse.ArgumentParser:
    """The options of every experiment."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--out", type=Path, default=Path("build/reproduce"), help="for the plot")
    parser.add_argument("--fast", action="store_true", help="seconds, for tests; other figures")
    parser.set_defaults(name=name)
    return parser


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table; floats to four significant digits."""
    cells = [[f"{c:.4g}" if isinstance(c, float) else str(c) for c in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(header, *cells, strict=True)]
    lines = [header, ["-" * width for width in widths], *cells]
    return "\n".join(
        "| " + " | ".join(f"{c:<{w}}" for c, w in zip(line, widths, strict=True)) + " |"
        for line in lines
    )


def save(figure: Figure, args: argparse.Namespace, top: float = 1.0) -> None:
    """Write the experiment's plot as `<out>/<name>.png`; axes end at `top` of its height."""
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"{args.name}.png"
    figure.tight_layout(rect=(0, 0, 1, top))
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=90)
    Image.open(buffer).convert("RGB").quantize(64).save(path, optimize=True)
    print(f"\n{path}")
