"""Mean-seeking, mode-seeking: Gaussians fitted to a mixture of two Gaussians.

The teacher is ½ N(-3, 0.8²) + ½ N(3, 0.8²). Fitting one Gaussian, the optimum of the forward KL is
the one with the mixture's moments (0, √(9 + 0.8²) = 3.105); that of the reverse KL sits on one mode
and pays ln 2. Fitting a mixture of two, both can reach 0. Densities live on a grid, as classes.

Shape letters: G grid points, C components.
"""

import argparse
import math
from dataclasses import dataclass

import matplotlib.pyplot as plt
import torch
from torch import Tensor

from decant.student_train.losses import sparse_divergence
from examples.reproduce.common import COLORS, LABELS, arguments, dense_targets, save, table

GRID = torch.linspace(-15, 15, 601, dtype=torch.float64)
REACHED = 1e-3
"""A fit has converged when its forward KL is below this, in nats: the same yardstick for all."""
INITS = {
    "narrow, between the modes": [(-0.5, 0.5), (0.5, 0.5)],
    "wide, beyond the modes": [(-6.0, 2.0), (4.0, 2.0)],
}
"""Mean and width of two components; their weights start equal."""


@dataclass(frozen=True)
class Fit:
    """One fit: its components, and by step its loss and its forward KL."""

    means: list[float]
    widths: list[float]
    losses: list[float]
    forward_kl: list[float]
    log_q: Tensor

    @property
    def steps(self) -> int | None:
        """Steps until the forward KL was below REACHED; None if it never was."""
        return next((i for i, kl in enumerate(self.forward_kl) if kl < REACHED), None)


def log_mixture(means_C: Tensor, log_widths_C: Tensor, log_weights_C: Tensor) -> Tensor:
    """Log density of a mixture on the grid, up to a constant, [1, G]."""
    z_CG = (GRID - means_C[:, None]) / log_widths_C.exp()[:, None]
    each_CG = (log_weights_C.log_softmax(0) - log_widths_C)[:, None] - z_CG**2 / 2
    return each_CG.logsumexp(0)[None]


def teacher() -> Tensor:
    """The teacher's log p on the grid, [1, G]."""
    means = torch.tensor([-3.0, 3.0], dtype=torch.float64)
    return log_mixture(means, torch.full_like(means, math.log(0.8)), 0 * means).log_softmax(1)


def fit(kind: str, init: list[tuple[float, float]], steps: int = 1500, lr: float = 0.02) -> Fit:
    """Fit components that start at (mean, width) with Adam: means, log widths, log weights."""
    means = torch.tensor([m for m, _ in init], dtype=torch.float64, requires_grad=True)
    log_widths = torch.tensor([math.log(s) for _, s in init], dtype=torch.float64)
    log_weights = torch.zeros_like(log_widths)
    parameters = [means, log_widths.requires_grad_(), log_weights.requires_grad_()]
    optimizer = torch.optim.Adam(parameters, lr=lr)
    targets = dense_targets(teacher())
    losses, forward_kl = [], []
    for _ in range(steps):
        logits = log_mixture(*parameters)
        loss = sparse_divergence(logits, targets, kind=kind).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        forward_kl.append(sparse_divergence(logits.detach(), targets, kind="fkl").item())
    log_q = log_mixture(*parameters).detach().log_softmax(1)
    return Fit(means.tolist(), log_widths.exp().tolist(), losses, forward_kl, log_q)


def plot(
    single: dict[str, Fit], double: dict[str, dict[str, Fit]], args: argparse.Namespace
) -> None:
    figure, (left, *right) = plt.subplots(1, 3, figsize=(13, 4))
    step = (GRID[1] - GRID[0]).item()
    left.plot(GRID, teacher()[0].exp() / step, "k-", linewidth=1, label="teacher")
    for kind, result in single.items():
        density = result.log_q[0].exp() / step
        label = f"{LABELS[kind]}: m = {result.means[0]:.2f}, σ = {result.widths[0]:.2f}"
        left.plot(GRID, density, color=COLORS[kind], label=label.replace("-0.00", "0.00"))
    left.set_xlim(-9, 9)
    left.set_title("one Gaussian, from m = -1, σ = 1")
    left.set_xlabel("x")
    left.set_ylabel("density")
    left.legend(fontsize=8)
    for panel, (name, fits) in zip(right, double.items(), strict=True):
        for kind, result in fits.items():
            panel.semilogy(result.forward_kl, color=COLORS[kind], label=LABELS[kind])
        panel.axhline(REACHED, color="gray", linewidth=0.8)
        panel.set_ylim(1e-8, 20)
        panel.set_title(f"two Gaussians, from {name}", fontsize=10)
        panel.set_xlabel("step")
        panel.set_ylabel("KL(p‖q) (nats)")
        panel.legend(fontsize=8)
    save(figure, args)


def main() -> None:
    args = arguments(__doc__, "gaussians").parse_args()
    steps = 50 if args.fast else 1000
    single = {kind: fit(kind, [(-1.0, 1.0)], steps) for kind in COLORS}
    rows = [
        [LABELS[kind], round(f.means[0], 3) + 0.0, round(f.widths[0], 3), f.losses[-1]]
        for kind, f in single.items()
    ]
    print(table(("one Gaussian", "mean", "width", "loss (nats)"), rows), "\n")
    double = {
        name: {kind: fit(kind, init, steps) for kind in COLORS} for name, init in INITS.items()
    }
    rows = [
        [name, LABELS[kind], f.steps, f"{f.forward_kl[-1]:.1e}"]
        for name, fits in double.items()
        for kind, f in fits.items()
    ]
    header = ("two Gaussians, from", "loss", f"steps to KL(p‖q) < {REACHED:g}", "last KL(p‖q)")
    print(table(header, rows))
    plot(single, double, args)


if __name__ == "__main__":
    main()
