"""What truncation does to calibration: the point of Sparse Logit Sampling (arXiv 2503.16870).

128 classes, each a Gaussian in 32 dimensions; the teacher is the exact posterior, which is a linear
softmax of the input, so the student, one linear layer, can be the teacher, and what is wrong
with its confidence comes from the truncation alone. The classes overlap so much that the best
accuracy is 0.30. Every student sees the same fresh inputs; what it gets of the teacher differs.

Shape letters: N inputs, H dimensions, V classes, K kept classes.
"""

import argparse

import matplotlib.pyplot as plt
import torch
from torch import Tensor

from decant.student_train.losses import SparseTargets, sparse_divergence
from examples.reproduce.common import arguments, calibration, save, table, topk_targets

NUM_CLASSES, NUM_FEATURES = 128, 32
SPREAD = 0.377
"""Standard deviation of the class centres; that of each class is 1."""
TOP_K, NUM_DRAWS = 4, 50

MODES = {
    "whole distribution": ("dense", "bucket"),
    "top-k, teacher renormalised": ("topk", "teacher_renormalize"),
    "top-k, both renormalised": ("topk", "renormalize"),
    "top-k, uniform tail": ("topk", "uniform"),
    "top-k, bucket": ("topk", "bucket"),
    "draws": ("sample", "bucket"),
    "top-k head + draws": ("topk+sample", "bucket"),
}


def centres() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return SPREAD * torch.randn(NUM_CLASSES, NUM_FEATURES, generator=generator)


def inputs(num: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Points [N, H], their classes [N], and the teacher's log p [N, V]."""
    centres_VH = centres()
    labels_N = torch.randint(NUM_CLASSES, (num,), generator=generator)
    x_NH = centres_VH[labels_N] + torch.randn(num, NUM_FEATURES, generator=generator)
    log_p_NV = (x_NH @ centres_VH.T - centres_VH.square().sum(1) / 2).log_softmax(1)
    return x_NH, labels_N, log_p_NV


def truncate(log_p_NV: Tensor, method: str, generator: torch.Generator) -> SparseTargets:
    """What a cache would hold of the teacher."""
    if method == "dense":
        return topk_targets(log_p_NV, NUM_CLASSES)
    if method == "topk":
        return topk_targets(log_p_NV, TOP_K)
    head = TOP_K if method == "topk+sample" else 0
    return sampled_targets(log_p_NV, head, NUM_DRAWS - head, generator)


def sampled_targets(
    log_p_NV: Tensor, num_head: int, num_draws: int, generator: torch.Generator
) -> SparseTargets:
    """An exact head of `num_head` classes, and draws with replacement from the rest."""
    top_NK = log_p_NV.topk(num_head, dim=1).indices
    proposal_NV = log_p_NV.exp().scatter(1, top_NK, 0.0)
    drawn = proposal_NV.multinomial(num_draws, replacement=True, generator=generator)
    counts_NV = torch.zeros_like(log_p_NV, dtype=torch.long)
    counts_NV.scatter_add_(1, drawn, torch.ones_like(drawn))
    kept_NV = counts_NV > 0
    kept_NV.scatter_(1, top_NK, True)
    slots = int(kept_NV.sum(1).max())
    is_kept_NK, ids_NK = kept_NV.int().sort(dim=1, descending=True, stable=True)
    is_kept_NK, ids_NK = is_kept_NK[:, :slots].bool(), ids_NK[:, :slots]
    rest = log_p_NV.masked_fill(kept_NV, -torch.inf)
    return SparseTargets(
        token_ids=torch.where(is_kept_NK, ids_NK, -1),
        logprobs=torch.where(is_kept_NK, log_p_NV.gather(1, ids_NK), -torch.inf),
        log_z=torch.zeros(len(log_p_NV)),
        log_tail=rest.logsumexp(1),
        draws=torch.where(is_kept_NK, counts_NV.gather(1, ids_NK), 0),
    )


def fit(method: str, tail: str, steps: int = 1000, batch: int = 256) -> torch.nn.Linear:
    """Train the linear student with the forward KL."""
    student = torch.nn.Linear(NUM_FEATURES, NUM_CLASSES)
    torch.nn.init.zeros_(student.weight)
    torch.nn.init.zeros_(student.bias)
    optimizer = torch.optim.Adam(student.parameters(), lr=0.02)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    data, draws = torch.Generator().manual_seed(1), torch.Generator().manual_seed(2)
    for _ in range(steps):
        x_NH, _, log_p_NV = inputs(batch, data)
        targets = truncate(log_p_NV, method, draws)
        loss = sparse_divergence(student(x_NH), targets, kind="fkl", tail=tail).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return student


@torch.no_grad()
def evaluate(student: torch.nn.Linear, num: int = 50_000) -> dict[str, float]:
    """Calibration on held-out inputs and KL(p‖q), nats."""
    x_NH, labels_N, log_p_NV = inputs(num, torch.Generator().manual_seed(3))
    log_q_NV = student(x_NH).log_softmax(1)
    kl = (log_p_NV.exp() * (log_p_NV - log_q_NV)).sum(1).mean().item()
    return {**calibration(log_q_NV, labels_N), "kl": kl}


def plot(results: dict[str, dict[str, float]], args: argparse.Namespace) -> None:
    figure, panel = plt.subplots(figsize=(8, 3.6))
    rows = range(len(results))
    for offset, name in ((-0.2, "confidence"), (0.2, "accuracy")):
        values = [result[name] for result in results.values()]
        panel.barh([row + offset for row in rows], values, height=0.38, label=f"mean {name}")
    panel.set_yticks(rows, [f"{n} (ECE {r['ece']:.3f})" for n, r in results.items()])
    panel.invert_yaxis()
    panel.set_xlabel("probability")
    panel.legend()
    save(figure, args)


def main() -> None:
    args = arguments(__doc__, "calibration_toy").parse_args()
    steps = 100 if args.fast else 1000
    results = {name: evaluate(fit(*mode, steps)) for name, mode in MODES.items()}
    header = ("student learns from", "confidence", "accuracy", "ECE", "KL(p‖q), nats")
    names = ("confidence", "accuracy", "ece", "kl")
    print(table(header, [[k, *[round(r[n], 4) for n in names]] for k, r in results.items()]))
    plot(results, args)


if __name__ == "__main__":
    main()
