"""FKL, RKL and AKL in the long run, and their order at few epochs.

arXiv 2404.02657 argues that all of them end at the teacher, since each is 0 there alone, and differ
only on the way. True of a student that can be the teacher. So: a two-layer teacher, and two
students of its form, one as wide as the teacher and one too narrow to represent it. Distances in
total variation, ½ Σ|p - q|, mean over the training inputs.

The order at few epochs depends on the learning rate, so there each loss has its own: of RATES, the
best with a seed that is not measured. After 5 epochs and after 20 as in the paper, alone and, as in
the paper, half of it with half a cross-entropy of labels drawn from the teacher.

Shape letters: N inputs, H features, V classes.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn

from decant.student_train.losses import sparse_divergence
from examples.reproduce.common import COLORS, LABELS, arguments, dense_targets, save, table

NUM_INPUTS, NUM_FEATURES, NUM_CLASSES, TEACHER_WIDTH, BATCH = 1024, 16, 64, 32, 64
WIDTHS = {"as wide as the teacher": 32, "too narrow": 3}
SHOWN = (1, 5, 20, 100, 400)
PAIRS = (("fkl", "rkl"), ("fkl", "akl"), ("rkl", "akl"))
RATES = (0.005, 0.01, 0.02, 0.04, 0.08, 0.16)
SEEDS, SEED_OF_RATES = range(5), 99


@dataclass(frozen=True)
class Fit:
    """The student's distributions after each epoch of SHOWN, and its distance by epoch."""

    q: dict[int, Tensor]
    distances: list[float]


def total_variation(p: Tensor, q: Tensor) -> float:
    return 0.5 * (p - q).abs().sum(1).mean().item()


def network(width: int, seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(NUM_FEATURES, width), nn.Tanh(), nn.Linear(width, NUM_CLASSES))


def task() -> tuple[Tensor, Tensor]:
    """Inputs [N, H] and the teacher's log p [N, V], logits three nats wide."""
    teacher = network(TEACHER_WIDTH, seed=1000)
    x_NH = torch.randn(NUM_INPUTS, NUM_FEATURES)
    with torch.no_grad():
        logits_NV = teacher(2 * x_NH)
    return x_NH, (3 * logits_NV / logits_NV.std()).log_softmax(1)


def fit(
    kind: str,
    width: int,
    seed: int = 0,
    epochs: int = SHOWN[-1],
    lr: float = 0.01,
    ce_weight: float = 0.0,
    decay: int = SHOWN[-1],
) -> Fit:
    """Train one student with Adam, its learning rate falling to 0 by a cosine over `decay` epochs.

    The loss is (1 - ce_weight) · divergence + ce_weight · cross-entropy of labels ~ p.
    """
    x_NH, log_p_NV = task()
    p_NV = log_p_NV.exp()
    student = network(width, seed)
    optimizer = torch.optim.Adam(student.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, decay)
    order = torch.Generator().manual_seed(seed)
    labels_N = p_NV.multinomial(1, generator=torch.Generator().manual_seed(seed))[:, 0]
    result = Fit({}, [])
    for epoch in range(1, epochs + 1):
        shuffle = torch.randperm(NUM_INPUTS, generator=order)
        x, shuffled, labels = x_NH[shuffle], dense_targets(log_p_NV[shuffle]), labels_N[shuffle]
        for start in range(0, NUM_INPUTS, BATCH):
            rows = slice(start, start + BATCH)
            logits = student(x[rows])
            loss = sparse_divergence(logits, shuffled[rows], kind=kind).mean()
            if ce_weight:
                ce = nn.functional.cross_entropy(logits, labels[rows])
                loss = (1 - ce_weight) * loss + ce_weight * ce
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()
        with torch.no_grad():
            q_NV = student(x_NH).softmax(1)
        result.distances.append(total_variation(p_NV, q_NV))
        if epoch in SHOWN:
            result.q[epoch] = q_NV
    return result


def at_best_rate(
    kind: str, epochs: int, ce_weight: float, seeds: Sequence[int] = SEEDS
) -> tuple[float, list[float]]:
    """The rate of RATES that ends nearest to the teacher, and how near every seed gets with it."""

    def end(rate: float, seed: int) -> float:
        found = fit(kind, TEACHER_WIDTH, seed, epochs, rate, ce_weight, decay=epochs)
        return found.distances[-1]

    ends = {rate: end(rate, SEED_OF_RATES) for rate in RATES}
    best = min(ends, key=ends.__getitem__)
    return best, [end(best, seed) for seed in seeds]


def plot(fits: dict[str, dict[str, Fit]], args: argparse.Namespace) -> None:
    figure, panels = plt.subplots(1, len(fits), figsize=(11, 4))
    for panel, (name, by_kind) in zip(panels, fits.items(), strict=True):
        for kind, result in by_kind.items():
            epochs = range(1, len(result.distances) + 1)
            label = f"{LABELS[kind]} to teacher"
            panel.loglog(epochs, result.distances, color=COLORS[kind], label=label)
        for (a, b), style in zip(PAIRS, ("--", ":", "-."), strict=True):
            apart = [total_variation(by_kind[a].q[e], q) for e, q in by_kind[b].q.items()]
            label = f"{LABELS[a]} to {LABELS[b]}"
            panel.plot(list(by_kind[a].q), apart, "k" + style, linewidth=1, label=label)
        panel.set_title(f"student {name}")
        panel.set_xlabel("epoch")
        panel.set_ylabel("total variation")
        panel.legend(fontsize=8)
    save(figure, args)


def main() -> None:
    args = arguments(__doc__, "convergence").parse_args()
    epochs = SHOWN[1] if args.fast else SHOWN[-1]
    fits = {
        name: {kind: fit(kind, width, epochs=epochs) for kind in COLORS}
        for name, width in WIDTHS.items()
    }
    rows: list[list[object]] = []
    for name, by_kind in fits.items():
        at = [e for e in SHOWN if e <= epochs]
        for kind, result in by_kind.items():
            cells = [f"{result.distances[e - 1]:.3f}" for e in at]
            rows.append([name, f"{LABELS[kind]} to teacher", *cells])
        for a, b in PAIRS:
            cells = [f"{total_variation(by_kind[a].q[e], by_kind[b].q[e]):.3f}" for e in at]
            rows.append([name, f"{LABELS[a]} to {LABELS[b]}", *cells])
    header = ("student", "total variation", *[f"epoch {e}" for e in SHOWN if e <= epochs])
    print(table(header, rows), "\n")
    few = [(SHOWN[1], 0.0)] if args.fast else list(product((5, 20), (0.0, 0.5)))
    rows = []
    for epochs, ce_weight in few:
        for kind in COLORS:
            rate, ends = at_best_rate(kind, epochs, ce_weight, SEEDS[:1] if args.fast else SEEDS)
            loss = f"½ {LABELS[kind]} + ½ CE" if ce_weight else LABELS[kind]
            mean = f"{sum(ends) / len(ends):.3f}"
            rows.append([epochs, loss, rate, mean, f"{min(ends):.3f} to {max(ends):.3f}"])
    print(table(("epochs", "loss", "best rate", "to teacher, mean", "over seeds"), rows))
    plot(fits, args)


if __name__ == "__main__":
    main()
