"""Time and memory of AdamW's step: in one kernel, as `student_train` takes it, or tensor by tensor.

    python benchmarks/bench_optimizer.py

A student of 138 M parameters in float32. Each way is a process of its own, in turn; time is
processor time of the steps after the first, memory what the steps add to the process's peak.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from decant.student_train.config.run import OptimizerConfig
from decant.student_train.runtime.optimizer import adamw

WAYS = ("fused", "plain")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--way", choices=WAYS, help="one process's part")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    if args.way:
        print(json.dumps(measure(args.way)))
        return
    found: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    for _ in range(args.rounds):
        for way in WAYS:
            command = [sys.executable, __file__, "--way", way]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            found[way].append(json.loads(done.stdout.splitlines()[-1]))
    for way, runs in found.items():
        seconds, gigabytes = (
            statistics.median(run[name] for run in runs) for name in ("seconds", "gigabytes")
        )
        print(f"{way:<6} {seconds:.2f} s per step, {gigabytes:.2f} GB more than before it")


def measure(way: str) -> dict[str, float]:
    """A few steps of random gradients."""
    torch.set_num_threads(1)
    config = LlamaConfig(
        vocab_size=49_152,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=16,
        num_attention_heads=12,
        num_key_value_heads=4,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer = adamw(model, OptimizerConfig())
    if way == "plain":
        for group in optimizer.param_groups:
            group["fused"] = None
    before = peak_bytes()
    seconds = []
    for _ in range(5):
        started = time.process_time()
        optimizer.step()
        seconds.append(time.process_time() - started)
    return {
        "seconds": statistics.median(seconds[1:]),
        "gigabytes": (peak_bytes() - before) / 1e9,
    }


def peak_bytes() -> int:
    """Of resident memory."""
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


if __name__ == "__main__":
    main()
