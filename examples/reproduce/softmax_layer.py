"""One softmax layer learns another: 64 x 64 weights of rank 2 to 64.

Teacher and student are softmax(x W) on the same Gaussian inputs; the teacher's W has the given
rank. Distances by step: probabilities, mean ‖p - q‖₂ over inputs; weights, ‖W_t - W_s‖_F with every
row centred, since a softmax does not see a constant added to all logits, relative to ‖W_t‖_F.

- The blog's set-up ("On LLM Knowledge Distillation", ICLR blog posts of 2025): W_t is the unscaled
  product of two factors of N(0, 1), so its logits are 11 to 64 nats wide; the student begins as
  torch's linear layer does. The blog gives neither optimizer nor rate; here it is Adam on 64 fresh
  inputs a step, 10,000 steps, at two rates.
- A teacher whose logits are 1 nat wide, gradient descent on 256 inputs at once, and two starts,
  which change who is first: a flat student, all weights 0, and a sharp one, with unrelated logits
  twice as wide as the teacher's. The gradients on a logit say why: FKL's is q - p, RKL's
  q (log q/p - RKL). Where the student gives too much, q log q/p > q - p; where it gives far too
  little, q -> 0, RKL's vanishes and FKL's is -p.

Shape letters: N inputs, H input size, V classes (H = V = 64).
"""

import argparse
from collections.abc import Sequence
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
BLOG_RANKS = (2, 4, 8, 16, 32, 64)
BLOG_RATES = (0.01, 0.1)
BLOG_STEPS, BLOG_BATCH = 10_000, 64
SHOWN = (400, 3000, 10_000)


@dataclass(frozen=True)
class Fit:
    """Distances to the teacher, before the first step and every so many steps."""

    every: int
    probs: list[float]
    weights: list[float]

    def at(self, step: int) -> tuple[float, float]:
        """Distances of probabilities and weights after `step` steps."""
        return self.probs[step // self.every], self.weights[step // self.every]


def centred(weights: Tensor) -> Tensor:
    return weights - weights.mean(1, keepdim=True)


def fit(kind: str, rank: int, init: str, steps: int = 400, optimizer: str = "SGD") -> Fit:
    """A teacher 1 nat wide, from a flat or a sharp student."""
    generator = torch.Generator().manual_seed(0)
    x_NH = torch.randn(256, SIZE, generator=generator)
    factors = torch.randn(2, SIZE, rank, generator=generator)
    teacher_HV = factors[0] @ factors[1].T / (SIZE * rank) ** 0.5
    first_HV = torch.randn(SIZE, SIZE, generator=generator) / SIZE**0.5
    student_HV = (INITS[init] * first_HV).requires_grad_()
    log_p_NV = (x_NH @ teacher_HV).log_softmax(1)
    targets = dense_targets(log_p_NV)
    make, lr = OPTIMIZERS[optimizer]
    descent = make([student_HV], lr=lr)
    result = Fit(1, [], [])
    for _ in range(steps):
        logits_NV = x_NH @ student_HV
        with torch.no_grad():
            measure(result, log_p_NV, logits_NV, teacher_HV, student_HV)
        loss = sparse_divergence(logits_NV, targets, kind=kind).mean()
        descent.zero_grad()
        loss.backward()
        descent.step()
    return result


def blog_fits(
    kind: str, steps: int = BLOG_STEPS, every: int = 100, ranks: Sequence[int] = BLOG_RANKS
) -> dict[tuple[int, float], Fit]:
    """(rank, rate) -> a student of the blog's teacher; all of them train side by side.

    Shape letter: C combinations of rank and rate.
    """
    combinations = list(product(ranks, BLOG_RATES))
    teachers, students = [], []
    for rank, rate in combinations:
        generator = torch.Generator().manual_seed(0)
        factors = torch.randn(2, SIZE, rank, generator=generator)
        teachers.append(factors[0] @ factors[1].T)
        first_HV = (2 * torch.rand(SIZE, SIZE, generator=generator) - 1) / SIZE**0.5
        students.append({"params": [first_HV.requires_grad_()], "lr": rate})
    descent = torch.optim.Adam(students)
    teacher_CHV = torch.stack(teachers)
    looked_at = torch.randn(256, SIZE, generator=torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(2)
    found = {combination: Fit(every, [], []) for combination in combinations}
    for step in range(steps + 1):
        student_CHV = torch.stack([group["params"][0] for group in descent.param_groups])
        if step % every == 0:
            with torch.no_grad():
                for result, theirs, ours in zip(
                    found.values(), teacher_CHV, student_CHV, strict=True
                ):
                    log_p_NV = (looked_at @ theirs).log_softmax(1)
                    measure(result, log_p_NV, looked_at @ ours, theirs, ours)
        if step == steps:
            break
        x_NH = torch.randn(BLOG_BATCH, SIZE, generator=generator)
        targets = dense_targets((x_NH @ teacher_CHV).log_softmax(2).flatten(0, 1))
        logits = (x_NH @ student_CHV).flatten(0, 1)
        loss = sparse_divergence(logits, targets, kind=kind).sum() / BLOG_BATCH
        descent.zero_grad()
        loss.backward()
        descent.step()
    return found


def measure(
    result: Fit, log_p_NV: Tensor, logits_NV: Tensor, teacher_HV: Tensor, student_HV: Tensor
) -> None:
    """Note both distances."""
    gap_NV = log_p_NV.exp() - logits_NV.softmax(1)
    result.probs.append(gap_NV.norm(dim=1).mean().item())
    gap_HV = centred(teacher_HV) - centred(student_HV)
    result.weights.append((gap_HV.norm() / centred(teacher_HV).norm()).item())


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


def plot_blog(fits: dict[tuple[int, float, str], Fit], args: argparse.Namespace) -> None:
    figure, grid = plt.subplots(2, len(BLOG_RANKS), figsize=(15, 5.5), sharex=True, sharey="row")
    for (rank, lr, kind), result in fits.items():
        steps = [result.every * i for i in range(len(result.probs))]
        column, style = BLOG_RANKS.index(rank), "-" if lr == BLOG_RATES[0] else "--"
        for panel, values in zip(grid[:, column], (result.probs, result.weights), strict=True):
            label = f"{LABELS[kind]}, rate {lr:g}"
            panel.semilogy(steps, values, style, color=COLORS[kind], linewidth=1, label=label)
        grid[0, column].set_title(f"rank {rank}", fontsize=10)
        grid[1, column].set_xlabel("step")
    grid[0, 0].set_ylabel("mean ‖p - q‖₂")
    grid[1, 0].set_ylabel("‖W_t - W_s‖ / ‖W_t‖")
    figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="upper center", ncol=6, fontsize=8)
    save(figure, args, top=0.93)


def main() -> None:
    args = arguments(__doc__, "softmax_layer").parse_args()
    steps, rows, fits = 20 if args.fast else 400, [], {}
    ranks = [("SGD", rank) for rank in RANKS] + [("Adam", RANKS[1])]
    for (optimizer, rank), init, kind in product(ranks, INITS, COLORS):
        result = fit(kind, rank, init, steps, optimizer)
        if optimizer == "SGD":
            fits[init, rank, kind] = result
        cells = ["{:.3f}, {:.3f}".format(*result.at(min(i, steps - 1))) for i in (20, 100, 399)]
        rows.append([optimizer, rank, init, LABELS[kind], *cells])
    header = ["optimizer", "rank", "student", "loss"]
    header += [f"L2 of probs, weights, step {i}" for i in (20, 100, 400)]
    print(table(header, rows))
    plot(fits, args)
    args.name = "softmax_layer_blog"
    blog(args)


def blog(args: argparse.Namespace) -> None:
    """FKL and RKL learn the blog's teacher."""
    steps = 20 if args.fast else BLOG_STEPS
    found = {kind: blog_fits(kind, steps) for kind in ("fkl", "rkl")}
    fits = {(rank, lr, kind): fit for kind in found for (rank, lr), fit in found[kind].items()}
    rows = []
    for lr, rank in product(BLOG_RATES, BLOG_RANKS):
        cells = []
        for kind in found:
            shown = [fits[rank, lr, kind].at(min(step, steps)) for step in SHOWN]
            cells += ["{:.3f}, {:.2f}".format(*pair) for pair in shown]
        rows.append([lr, rank, *cells])
    print("\nthe blog's teacher: L2 of probs, weights\n")
    columns = [f"{LABELS[kind]}, step {step:,}" for kind in ("fkl", "rkl") for step in SHOWN]
    print(table(["rate", "rank", *columns], rows))
    plot_blog(fits, args)


if __name__ == "__main__":
    main()
