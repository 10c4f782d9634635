"""Seconds and peak memory of the fused head against the plain one, forward and backward.

    python benchmarks/bench_losses.py              V=32,000 and 151,936: some minutes, 12 GB
    python benchmarks/bench_losses.py --vocab 32000 --cases fkl

One process per measurement, one thread; CPU seconds, the best of some runs; memory is the peak
above the inputs, the gradients included. "Plain" is linear, sparse_divergence and cross_entropy.
"""

import argparse
import csv
import math
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from student_train.losses import SparseTargets, fused_linear_divergence, sparse_divergence

RESULTS = Path(__file__).parent / "results"
CASES = {  # kind, temperature, ce_weight, dtype
    "fkl": ("fkl", 1.0, 0.0, torch.float32),
    "akl_t2_ce": ("akl", 2.0, 0.5, torch.float32),
    "fkl_bf16": ("fkl", 1.0, 0.0, torch.bfloat16),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--vocab", type=int, nargs="+", default=[32_000, 151_936])
    parser.add_argument("--targets", type=int, default=2048)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--slots", type=int, default=64)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=[*CASES])
    parser.add_argument("--chunk", type=int, help="rows per chunk instead of the default")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--mode", choices=("plain", "fused"), help="measure this here, one line")
    args = parser.parse_args()
    if args.mode:
        print(*measure(args, args.vocab[0], args.cases[0]))
        return
    print(f"{'V':>8} {'case':<10}{'plain s':>9}{'fused s':>9}{'ratio':>7}", end="")
    print(f"{'plain MiB':>11}{'fused MiB':>11}{'ratio':>7}")
    rows = []
    for vocab_size in args.vocab:
        for case in args.cases:
            seconds, mib = zip(
                *(run(mode, vocab_size, case) for mode in ("plain", "fused")), strict=True
            )
            rows.append((vocab_size, case, *seconds, *mib))
            print(f"{vocab_size:>8} {case:<10}{seconds[0]:>9.2f}{seconds[1]:>9.2f}", end="")
            print(f"{seconds[1] / seconds[0]:>7.2f}{mib[0]:>11.0f}{mib[1]:>11.0f}", end="")
            print(f"{mib[1] / mib[0]:>7.2f}", flush=True)
    RESULTS.mkdir(exist_ok=True)
    with open(RESULTS / "losses.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("vocab", "case", "plain_s", "fused_s", "plain_mib", "fused_mib"))
        writer.writerows(rows)


def run(mode: str, vocab_size: int, case: str) -> tuple[float, float]:
    """Measure in a process of its own, so that peaks do not mix."""
    command = [sys.executable, *sys.argv, "--mode", mode]
    command += ["--vocab", str(vocab_size), "--cases", case]
    line = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    seconds, mib = map(float, line.split())
    return seconds, mib


def measure(args: argparse.Namespace, vocab_size: int, case: str) -> tuple[float, float]:
    """Best CPU seconds of a step, and the peak of resident memory above the inputs in MiB."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    kind, temperature, ce_weight, dtype = CASES[case]
    weight = torch.empty(vocab_size, args.hidden, dtype=dtype).normal_(std=0.02).requires_grad_()
    hidden = torch.empty(args.targets, args.hidden, dtype=dtype).normal_().requires_grad_()
    targets = random_targets(args.targets, args.slots, vocab_size, temperature)
    labels = targets.token_ids[:, 0].clone()

    def step() -> None:
        weight.grad = hidden.grad = None
        if args.mode == "fused":
            loss = fused_linear_divergence(
                hidden,
                weight,
                targets,
                labels if ce_weight else None,
                kind,
                temperature=temperature,
                ce_weight=ce_weight,
                chunk_size=args.chunk,
            ).loss
        else:
            logits = F.linear(hidden, weight)
            loss = sparse_divergence(logits, targets, kind, temperature).mean()
            if ce_weight:
                loss = loss + ce_weight * F.cross_entropy(logits.float(), labels)
        loss.backward()

    before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    seconds = []
    for _ in range(args.repeats):
        start = time.process_time()
        step()
        seconds.append(time.process_time() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return min(seconds), (peak - before) / 2**20


def random_targets(
    num_targets: int, num_slots: int, vocab_size: int, temperature: float
) -> SparseTargets:
    """Distributions over random ids, 5% of each in the tail."""
    ids = torch.stack([torch.randperm(vocab_size)[:num_slots] for _ in range(num_targets)])
    logprobs = (2 * torch.randn(num_targets, num_slots)).log_softmax(1) + math.log(0.95)
    log_tail = torch.full((num_targets,), 0.05).log()
    log_z = (torch.cat([logprobs, log_tail[:, None]], dim=1) / temperature).logsumexp(1)
    return SparseTargets(ids, logprobs, log_z, log_tail / temperature - log_z)


if __name__ == "__main__":
    main()
