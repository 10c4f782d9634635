"""Seconds and peak memory, forward and backward, of a head and its loss: naive, ours, others'.

    python benchmarks/bench_losses.py              both vocabularies: a quarter of an hour, 15 GB
    python benchmarks/bench_losses.py --vocab 32000 --groups loss peers

Every measurement is a process of its own on one thread, on the same data: processor seconds of one
step, and the peak of resident memory above the inputs, gradients included. Ways that are compared
take turns; figures are medians over the rounds, ratios medians of the rounds' ratios to the first
way of their block. What would not fit into memory is left out and listed.

    naive          linear, then sparse_divergence (or cross_entropy) on all [N, V] logits
    checkpointed   the same over chunks of rows, each recomputed in backward
    ours           fused_linear_divergence
    two_losses     fused_linear_divergences: half of the targets with the case's kind, half with rkl
    four_losses    likewise a quarter each with that, rkl, skew_fkl and tvd
    liger_jsd      Liger's chunked LigerFusedLinearJSDLoss, beta 0, not compiled; a dense teacher
    trl            TRL's ChunkedDivergenceFunction, beta 0; a dense teacher
    torch_ce       torch.nn.functional.linear_cross_entropy, chunked

The dense teachers are a head of their own over hidden states as wide as the student's, whose
product is part of the time. Liger's fused cross entropy and fused JSD kernels need a GPU.
"""

import argparse
import csv
import ctypes
import gc
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from common import status_mb
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from decant.student_train.losses import (
    LossPart,
    SparseTargets,
    fused_linear_divergence,
    fused_linear_divergences,
    sparse_divergence,
)
from decant.student_train.losses.fused import CHUNK_BYTES, MIN_CHUNK_ROWS

RESULTS = Path(__file__).parent / "results" / "losses.csv"
CASES = {  # kind, temperature, kd_weight, ce_weight, dtype
    "fkl": ("fkl", 1.0, 1.0, 0.0, torch.float32),
    "akl_t2_ce": ("akl", 2.0, 1.0, 0.5, torch.float32),
    "fkl_bf16": ("fkl", 1.0, 1.0, 0.0, torch.bfloat16),
    "ce": ("fkl", 1.0, 0.0, 1.0, torch.float32),
}
HIDDEN = 256
GROUPS = ("loss", "peers", "slots", "rows", "mixture")
MIXED = {"two_losses": ("rkl",), "four_losses": ("rkl", "skew_fkl", "tvd")}
"""Ways with several losses, and those beside the case's own."""
# Copies of the logits that the naive way holds at its peak, to tell beforehand what cannot fit.
NAIVE_COPIES = 7
COLUMNS = ("vocab", "targets", "slots", "hidden", "case", "way", "seconds", "time_ratio", "mib")


@dataclass(frozen=True)
class Block:
    """Ways that do the same work, measured in turns; ratios are to the first."""

    vocab: int
    targets: int
    slots: int
    hidden: int
    case: str
    ways: tuple[str, ...]
    rounds: int = 1


def blocks_of(vocab: int, groups: list[str], rounds: int) -> list[Block]:
    """What is measured for a vocabulary."""
    blocks = []
    if "loss" in groups:
        trio = ("naive", "checkpointed", "ours")
        blocks += [Block(vocab, 2048, 64, HIDDEN, "fkl", trio, rounds)]
        blocks += [
            Block(vocab, 2048, 64, HIDDEN, case, ("naive", "ours"))
            for case in ("akl_t2_ce", "fkl_bf16")
        ]
        blocks += [Block(vocab, 2048, 64, 1024, "fkl", ("naive", "ours"))]
    if "peers" in groups:
        blocks += [Block(vocab, 2048, 64, HIDDEN, "fkl", ("ours", "liger_jsd", "trl"))]
        blocks += [Block(vocab, 2048, 64, HIDDEN, "ce", ("naive", "torch_ce", "ours"))]
    if "slots" in groups:
        blocks += [Block(vocab, 2048, slots, HIDDEN, "fkl", ("ours",)) for slots in (16, 256)]
    if "rows" in groups:
        blocks += [
            Block(vocab, targets, 64, HIDDEN, "fkl", ("naive", "ours"))
            for targets in (4096, 8192, 16384)
        ]
    if "mixture" in groups:
        blocks += [
            Block(vocab, targets, 64, HIDDEN, "fkl", ("ours", *MIXED), rounds)
            for targets in (2048, 512)
        ]
    return blocks


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--vocab", type=int, nargs="+", default=[32_000, 151_936])
    parser.add_argument("--groups", nargs="+", choices=GROUPS, default=[*GROUPS])
    parser.add_argument("--rounds", type=int, default=3, help="of the first block of a vocabulary")
    parser.add_argument("--append", action="store_true", help="keep the rows of an earlier run")
    parser.add_argument("--chunk", type=int, help="rows per chunk instead of the default")
    parser.add_argument("--measure", nargs=6, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        vocab, targets, slots, hidden = map(int, args.measure[:4])
        block = Block(vocab, targets, slots, hidden, args.measure[4], (args.measure[5],))
        print(*measure(block, args.chunk))
        return
    print(f"{'V':>8}{'N':>7}{'k':>5}{'H':>6}  {'case':<11}{'way':<14}", end="")
    print(f"{'seconds':>9}{'ratio':>7}{'MiB':>8}{'ratio':>7}")
    RESULTS.parent.mkdir(exist_ok=True)
    with open(RESULTS, "a" if args.append else "w", newline="") as file:
        writer = csv.writer(file)
        if not args.append:
            writer.writerow(COLUMNS)
        for vocab in args.vocab:
            for block in blocks_of(vocab, args.groups, args.rounds):
                writer.writerows(run(block, args.chunk))
                file.flush()


def run(block: Block, chunk: int | None) -> list[tuple[object, ...]]:
    """Measure and print a block; what does not fit gets a row without figures."""
    facts = (block.vocab, block.targets, block.slots, block.hidden, block.case)
    ways = [way for way in block.ways if way != "naive" or naive_bytes(block) < free_bytes()]
    found: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
    for _ in range(block.rounds):
        for way in ways:
            found[way].append(run_way(block, way, chunk))
    rows: list[tuple[object, ...]] = []
    for way in block.ways:
        head = f"{block.vocab:>8}{block.targets:>7}{block.slots:>5}{block.hidden:>6}  "
        head += f"{block.case:<11}{way:<14}"
        if way not in ways:
            needed = naive_bytes(block) / 2**30
            print(f"{head} left out: needs about {needed:.0f} GiB", flush=True)
            rows.append((*facts, way, "", "", ""))
            continue
        seconds, mib = (statistics.median(column) for column in zip(*found[way], strict=True))
        pairs = list(zip(found[way], found[ways[0]], strict=True))
        ratios = [statistics.median(own[i] / first[i] for own, first in pairs) for i in (0, 1)]
        print(f"{head}{seconds:>9.2f}{ratios[0]:>7.2f}{mib:>8.0f}{ratios[1]:>7.2f}", flush=True)
        rows.append((*facts, way, round(seconds, 2), round(ratios[0], 3), round(mib)))
    return rows


def naive_bytes(block: Block) -> int:
    """About what the naive way needs."""
    return NAIVE_COPIES * 4 * block.targets * block.vocab


def free_bytes() -> int:
    """Memory that can still be had, with a tenth to spare."""
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return int(fields["MemAvailable"].split()[0]) * 1024 * 9 // 10


def run_way(block: Block, way: str, chunk: int | None) -> tuple[float, float]:
    """Measure in a process of its own, so that peaks do not mix."""
    facts = (block.vocab, block.targets, block.slots, block.hidden, block.case, way)
    command = [sys.executable, __file__, "--measure", *map(str, facts)]
    command += ["--chunk", str(chunk)] if chunk else []
    environment = {**os.environ, "TRL_EXPERIMENTAL_SILENCE": "1"}
    line = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    seconds, mib = map(float, line.stdout.split()[-2:])
    return seconds, mib


def measure(block: Block, chunk: int | None) -> tuple[float, float]:
    """Processor seconds of a step, and its peak of resident memory above the inputs in MiB."""
    torch.set_num_threads(1)
    # A small step first: whatever libraries set up once is not the step's.
    step_of(Block(500, 8, 4, 16, block.case, block.ways), chunk)()
    step = step_of(block, chunk)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # else the step could fill what making the inputs left free
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = status_mb("VmRSS")
    start = time.process_time()
    step()
    return time.process_time() - start, status_mb("VmHWM") - before


def step_of(block: Block, chunk: int | None) -> Callable[[], None]:
    """Return forward and backward of the block's one way, its inputs made."""
    torch.manual_seed(0)
    kind, temperature, kd_weight, ce_weight, dtype = CASES[block.case]
    weight = torch.empty(block.vocab, block.hidden, dtype=dtype).normal_(std=0.02)
    hidden = torch.empty(block.targets, block.hidden, dtype=dtype).normal_()
    targets = random_targets(block.targets, block.slots, block.vocab, temperature)
    labels = targets.token_ids[:, 0].clone()
    rows = chunk or max(MIN_CHUNK_ROWS, CHUNK_BYTES // (4 * block.vocab))
    (way,) = block.ways

    def plain(hidden: Tensor, targets: SparseTargets, labels: Tensor) -> Tensor:
        logits = F.linear(hidden, weight)
        loss = torch.zeros(())
        if kd_weight:
            loss = kd_weight * sparse_divergence(logits, targets, kind, temperature).sum()
        if ce_weight:
            loss = loss + ce_weight * F.cross_entropy(logits.float(), labels, reduction="sum")
        return loss / block.targets

    def naive() -> Tensor:
        return plain(hidden, targets, labels)

    def checkpointed() -> Tensor:
        total = torch.zeros(())
        for start in range(0, block.targets, rows):
            chunk = slice(start, start + rows)
            total = total + checkpoint(
                plain, hidden[chunk], targets[chunk], labels[chunk], use_reentrant=False
            )
        return total

    def ours() -> Tensor:
        return fused_linear_divergence(
            hidden,
            weight,
            targets,
            labels if ce_weight else None,
            kind,
            kd_weight=kd_weight,
            ce_weight=ce_weight,
            temperature=temperature,
            chunk_size=chunk,
        ).loss

    def mixed() -> Tensor:
        kinds = (kind, *MIXED[way])
        size = block.targets // len(kinds)
        parts = [
            LossPart(targets=targets[i * size : (i + 1) * size], kind=one)
            for i, one in enumerate(kinds)
        ]
        source = torch.arange(len(kinds)).repeat_interleave(size)
        weights = torch.linspace(0.5, 1.0, len(kinds)).index_select(0, source)
        return fused_linear_divergences(
            hidden,
            weight,
            parts,
            kd_weight=weights,
            chunk_size=chunk,
            source=source,
            num_sources=len(kinds),
        ).loss

    def torch_ce() -> Tensor:
        return F.linear_cross_entropy(
            hidden, weight, labels, options=torch.nn.LinearCrossEntropyOptions()
        )

    ways: dict[str, Callable[[], Tensor]] = {
        "naive": naive,
        "checkpointed": checkpointed,
        "ours": ours,
        **dict.fromkeys(MIXED, mixed),
        "torch_ce": torch_ce,
    }
    if way in ("liger_jsd", "trl"):
        teacher = (hidden.clone(), torch.empty_like(weight).normal_(std=0.02))
        ways[way] = (
            _liger(hidden, weight, *teacher, labels)
            if way == "liger_jsd"
            else _trl(hidden, weight, *teacher)
        )
    hidden.requires_grad_()
    weight.requires_grad_()
    return lambda: ways[way]().backward()


def _liger(*tensors: Tensor) -> Callable[[], Tensor]:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(0.0, 1.0, beta=0.0, compiled=False)
    return lambda: loss(*tensors)


def _trl(
    hidden: Tensor, weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor
) -> Callable[[], Tensor]:
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    student, teacher = (hidden, weight, None), (teacher_hidden, teacher_weight, None)
    return lambda: ChunkedDivergenceFunction.apply(*student, *teacher, 0.0)[0].mean()


def random_targets(
    num_targets: int, num_slots: int, vocab_size: int, temperature: float
) -> SparseTargets:
    """Distributions over random ids, 5% of each in the tail."""
    ids = torch.empty(num_targets, num_slots, dtype=torch.int64)
    for row in ids:
        row.copy_(torch.randperm(vocab_size)[:num_slots])
    logprobs = (2 * torch.randn(num_targets, num_slots)).log_softmax(1) + math.log(0.95)
    log_tail = torch.full((num_targets,), 0.05).log()
    log_z = (torch.cat([logprobs, log_tail[:, None]], dim=1) / temperature).logsumexp(1)
    return SparseTargets(ids, logprobs, log_z, log_tail / temperature - log_z)


if __name__ == "__main__":
    main()
