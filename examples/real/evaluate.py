"""Score models on held-out caches: cross-entropy, divergence from the cached teacher, agreement.

A plain forward per sequence, full logits, float32: nothing is shared with the trainer but the
definition of the divergence. The teacher itself, scored so, shows what the cache is worth: its
divergence is what the stored precision loses, and its time is that of a bare forward.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from decant.schemas import ScoredSequence
from decant.storage import CacheReader
from decant.student_train.losses import SparseTargets, sparse_divergence


def targets_of(sequence: ScoredSequence) -> SparseTargets:
    """The stored distributions of a sequence at T=1, as the losses take them."""
    return SparseTargets(
        token_ids=torch.tensor(sequence.token_ids, dtype=torch.long),
        logprobs=torch.tensor(sequence.logprobs),
        log_z=torch.tensor(sequence.log_z[:, 0]),
        log_tail=torch.tensor(sequence.log_tail[:, 0]),
    )


@torch.no_grad()
def evaluate(model: Any, cache: Path) -> dict[str, float]:
    """Means over the targets of a cache, in nats, and the CPU time of the forwards per token."""
    sums = {"ce": 0.0, "teacher_ce": 0.0, "kl": 0.0, "agreement": 0.0}
    targets = tokens = 0
    cpu = 0.0
    for sequence in CacheReader(cache):
        ids = torch.tensor(sequence.input_ids, dtype=torch.long)[None]
        before = time.process_time()
        logits = model(input_ids=ids).logits[0].float()
        cpu += time.process_time() - before
        rows = logits[
            torch.tensor(sequence.positions, dtype=torch.long) - 1
        ]  # predict those tokens
        labels = torch.tensor(sequence.labels, dtype=torch.long)
        best = torch.tensor(sequence.token_ids[:, 0], dtype=torch.long)  # in descending probability
        sums["ce"] += float(torch.nn.functional.cross_entropy(rows, labels, reduction="sum"))
        sums["teacher_ce"] -= float(sequence.label_logprob.astype("float64").sum())
        sums["kl"] += float(sparse_divergence(rows, targets_of(sequence), kind="fkl").sum())
        sums["agreement"] += float((rows.argmax(1) == best).sum())
        targets, tokens = targets + len(rows), tokens + len(logits)
    means = {name: value / targets for name, value in sums.items()}
    return {**means, "targets": targets, "tokens": tokens, "forward_cpu_ms": 1e3 * cpu / tokens}


def table(figures: dict[str, dict[str, dict[str, float]]]) -> str:
    """`figures[cache][model]` as text."""
    width = max(len(name) for models in figures.values() for name in models)
    lines = []
    for cache, models in figures.items():
        first = next(iter(models.values()))
        lines.append(
            f"{cache}: {first['targets']:,} held-out targets, the teacher's cross-entropy in the "
            f"cache is {first['teacher_ce']:.4f} nats"
        )
        lines.append(f"  {'':<{width}}  cross-entropy  KL to teacher  same top token")
        for name, its in models.items():
            row = f"{its['ce']:13.4f}  {its['kl']:13.5f}  {its['agreement']:14.1%}"
            lines.append(f"  {name:<{width}}  {row}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--caches", type=Path, nargs="+", required=True)
    parser.add_argument("--models", type=Path, nargs="+", required=True)
    parser.add_argument("--json", type=Path, help="also write the figures into this file")
    args = parser.parse_args()
    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()
    figures: dict[str, dict[str, dict[str, float]]] = {cache.name: {} for cache in args.caches}
    for path in args.models:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        for cache in args.caches:
            figures[cache.name][str(path)] = evaluate(model, cache)
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2) + "\n")
    print(table(figures))


if __name__ == "__main__":
    main()
