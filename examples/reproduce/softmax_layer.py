"""One softmax layer learns another: 64 x 64 weights of rank 2, 16 or 64.

Teacher and student are softmax(x W) on the same Gaussian inputs; the teacher's W has the given
rank. Distances by step: probabilities, mean ‖p - q‖₂ over inputs; weights, ‖W_t - W_s‖_F relative
to ‖W_t‖_F with every row centred, since a softmax does not see a constant added to all logits.
Gradient descent on all inputs from two initialisations, which change who is first: a flat student,
all weights 0, and a sharp one, with unrelated logits twice as wide as the teacher's. The gradients
on a logit say why: FKL's is q - p, RKL's q (log q/p - RKL). Where the student gives too much,
q log q/p > q - p; where it gives far too little, q -> 0, RKL's vanishes and FKL's is -p.

Shape letters: N inputs, H input size, V classes (H = V = 64).
"""

import argparse
from dataclasses import dataclass
from itertools import product

import matplotlib.pyplot as plt
import torch
from torch import Tensor

from decant.student_train.losses import sparse_divergence
from examples.reproduce.common import COLORS, LABELS, arguments, dense_targets, save, table

SIZE = 64
RANKS = (2, 16, 64)
INITS = {"flat": 0.0, "sharp": 2.0}
"""Standard deviation of the student's first logits; the teacher's is 1."""
OPTIMIZERS = {"SGD": (torch.optim.SGD, 1.0), "Adam": (torch.optim.Adam, 0.02)}


@dataclass(frozen=True)
class Fit:
    """Distances to the teacher by step."""

    probs: list[float]
    weights: list[float]


def centred(weights: Tensor) -> Tensor:
    return weights - weights.mean(1, keepdim=True)


def fit(kind: str, rank: int, init: str, steps: int = 400, optimizer: str = "SGD") -> Fit:
    """Train the student on all inputs at once."""
    generator = torch.Generator().manual_seed(0)
    x_NH = torch.randn(256, SIZE, generator=generator)
    factors = torch.randn(2, SIZE, rank, generator=generator)
    teacher_HV = factors[0] @ factors[1].T / (SIZE * rank) ** 0.5
    first_HV = torch.randn(SIZE, SIZE, generator=generator) / SIZE**0.5
    student_HV = (INITS[init] * first_HV).requires_grad_()
    log_p_NV = (x_NH @ teacher_HV).log_softmax(1)
    p_NV, targets = log_p_NV.exp(), dense_targets(log_p_NV)
    make, lr = OPTIMIZERS[optimizer]
    descent = make([student_HV], lr=lr)
    result = Fit([], [])
    for _ in range(steps):
        logits_NV = x_NH @ student_HV
        with torch.no_grad():
            gap_NV = p_NV - logits_NV.softmax(1)
            result.probs.append(gap_NV.norm(dim=1).mean().item())
            gap_HV = centred(teacher_HV) - centred(student_HV)
            result.weights.append((gap_HV.norm() / centred(teacher_HV).norm()).item())
        loss = sparse_divergence(logits_NV, targets, kind=kind).mean()
        descent.zero_grad()
        loss.backward()
        descent.step()
    return result


def plot(fits: dict[tuple[str, int, str], Fit], args: argparse.Namespace) -> None:
    figure, grid = plt.subplots(2, 6, figsize=(13, 5.5), sharex=True, sharey="row")
    for (init, rank, kind), result in fits.items():
        column = len(RANKS) * list(INITS).index(init) + RANKS.index(rank)
        for panel, values in zip(grid[:, column], (result.probs, result.weights), strict=True):
            panel.semilogy(values, color=COLORS[kind], label=LABELS[kind])
        grid[0, column].set_title(f"{init} student, rank {rank}", fontsize=10)
        grid[1, column].set_xlabel("step")
    grid[0, 0].set_ylabel("mean ‖p - q‖₂")
    grid[1, 0].set_ylabel("‖W_t - W_s‖ / ‖W_t‖")
    grid[0, 0].legend()
    save(figure, args)


def main() -> None:
    args = arguments(__doc__, "softmax_layer").parse_args()
    steps, rows, fits = 20 if args.fast else 400, [], {}
    ranks = [("SGD", rank) for rank in RANKS] + [("Adam", RANKS[1])]
    for (optimizer, rank), init, kind in product(ranks, INITS, COLORS):
        result = fit(kind, rank, init, steps, optimizer)
        if optimizer == "SGD":
            fits[init, rank, kind] = result
        at = [min(i, steps - 1) for i in (20, 100, 399)]
        cells = [f"{result.probs[i]:.3f}, {result.weights[i]:.3f}" for i in at]
        rows.append([optimizer, rank, init, LABELS[kind], *cells])
    header = ["optimizer", "rank", "student", "loss"]
    header += [f"L2 of probs, weights, step {i}" for i in (20, 100, 400)]
    print(table(header, rows))
    plot(fits, args)


if __name__ == "__main__":
    main()
