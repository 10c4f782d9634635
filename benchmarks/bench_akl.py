"""What AKL costs beside forward and reverse KL: time and memory of a loss, and of a head with it.

    OMP_NUM_THREADS=1 python benchmarks/bench_akl.py

Forward and backward over the same targets, at vocabularies of 4,096, 32,000 and 151,936 and caches
of k = 16, 64, 256 entries and of the whole vocabulary. `loss` is the divergence of given logits
(sparse_divergence), `head` the fused head and loss as the trainer runs them, with hidden states of
size 256. The three losses take turns; processor time is the median over the rounds, the ratio the
median of the rounds' ratios to forward KL. Memory is the peak of resident memory above the inputs,
MiB, also a median. A table, and benchmarks/results/akl.csv.

Shape letters: N targets, V vocabulary, K entries, H hidden size.
"""

import argparse
import ctypes
import gc
import math
import statistics
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path

import torch
from common import save, status_mb

from decant.student_train.losses import (
    SparseTargets,
    fused_linear_divergence,
    sparse_divergence,
)

KINDS = ("fkl", "rkl", "akl")
VOCABS = (4096, 32_000, 151_936)
SIZES = (16, 64, 256, 0)
"""Entries of a target; 0 is the whole vocabulary."""
LOGITS = 2**21
"""Logits of a step: N = LOGITS / V."""
HIDDEN = 256
WAYS = ("loss", "head")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--vocab", type=int, nargs="+", default=VOCABS)
    parser.add_argument("--k", type=int, nargs="+", default=SIZES)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(1)
    header = ("V", "k", "N", "way", "FKL, ms", "RKL", "AKL", "AKL/RKL", "MiB: FKL", "RKL", "AKL")
    print(("{:>8}{:>8}{:>6}{:>6}{:>10}" + "{:>9}" * 6).format(*header))
    rows = []
    for vocab, k, way in product(args.vocab, args.k, WAYS):
        steps = steps_of(vocab, k or vocab, way)
        rounds = [{kind: measure(step) for kind, step in steps.items()} for _ in range(args.rounds)]
        rounds = rounds[1:] if len(rounds) > 1 else rounds  # the first sets things up
        seconds = statistics.median(one["fkl"][0] for one in rounds)

        def ratio(kind: str, to: str, rounds: list = rounds) -> float:
            return statistics.median(one[kind][0] / one[to][0] for one in rounds)

        mib = [statistics.median(one[kind][1] for one in rounds) for kind in KINDS]
        row = [vocab, k or vocab, LOGITS // vocab, way, 1e3 * seconds]
        row += [ratio("rkl", "fkl"), ratio("akl", "fkl"), ratio("akl", "rkl"), *mib]
        shown = "{:>8}{:>8}{:>6}{:>6}{:>10.1f}" + "{:>9.3f}" * 3 + "{:>9.0f}" * 3
        print(shown.format(*row), flush=True)
        rows.append(row)
    save(
        "akl.csv",
        ("vocab", "k", "targets", "way", "fkl_ms", "rkl_to_fkl", "akl_to_fkl", "akl_to_rkl",
         "fkl_mib", "rkl_mib", "akl_mib"),
        rows,
    )  # fmt: skip


def steps_of(vocab: int, k: int, way: str) -> dict[str, Callable[[], None]]:
    """Kind -> forward and backward over the same targets."""
    num_targets = LOGITS // vocab
    generator = torch.Generator().manual_seed(0)
    targets = targets_of(num_targets, vocab, k, generator)
    weight_VH = (0.05 * torch.randn(vocab, HIDDEN, generator=generator)).requires_grad_()
    hidden_NH = torch.randn(num_targets, HIDDEN, generator=generator).requires_grad_()
    logits_NV = (hidden_NH @ weight_VH.T).detach().requires_grad_()

    def loss_alone(kind: str) -> None:
        sparse_divergence(logits_NV, targets, kind).mean().backward()
        logits_NV.grad = None

    def with_head(kind: str) -> None:
        fused_linear_divergence(hidden_NH, weight_VH, targets, kind=kind).loss.backward()
        hidden_NH.grad = weight_VH.grad = None

    run = loss_alone if way == "loss" else with_head
    return {kind: lambda kind=kind: run(kind) for kind in KINDS}


def targets_of(num_targets: int, vocab: int, k: int, generator: torch.Generator) -> SparseTargets:
    """The k most probable of distributions over the whole vocabulary, and the rest's mass."""
    log_p_NV = (3 * torch.randn(num_targets, vocab, generator=generator)).log_softmax(1)
    logprobs_NK, ids_NK = log_p_NV.topk(k, dim=1)
    rest_NV = log_p_NV.scatter(1, ids_NK, -math.inf)
    targets = SparseTargets(
        ids_NK, logprobs_NK, log_z=torch.zeros(num_targets), log_tail=rest_NV.logsumexp(1)
    )
    return targets.validate(vocab)


def measure(step: Callable[[], None]) -> tuple[float, float]:
    """Processor seconds of a step, and its peak of resident memory above what was there, MiB."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = status_mb("VmRSS")
    started = time.process_time()
    step()
    return time.process_time() - started, status_mb("VmHWM") - before


if __name__ == "__main__":
    main()
