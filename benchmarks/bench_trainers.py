"""Trainer against student_train on one cache: the time of a step, and how far the curves differ.

    python benchmarks/bench_trainers.py --cache build/real/cache-text-train --student build/real/cut

The same student takes the same sequences in the same order through the same optimizer, by
`decant.student_train.train` and by `DistillationTrainer`, in turn, in one process. The time of a
step runs from one step of the optimizer to the next, on the CPU as processor time of the whole
process, reading threads included; the ratio is that of the medians of each round's steps.
"""

import argparse
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from common import save
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers import AutoModelForCausalLM, TrainingArguments

from decant.student_train import LossConfig, OptimizerConfig, StudentConfig, TrainConfig, train
from decant.student_train.trainers import CacheDataset, DistillationTrainer

LOSS = LossConfig(kind="fkl", ce_weight=0.1)
HEADER = ("round", "student_train_s", "trainer_s", "ratio", "curves_apart")
SETTLING = 2
"""Steps of a run that are not counted."""


def ours(options: argparse.Namespace, output: Path) -> list[float]:
    """The loss curve of `student_train`."""
    config = TrainConfig(
        cache=str(options.cache),
        output=str(output),
        student=StudentConfig(path=str(options.student)),
        loss=LOSS,
        steps=options.steps,
        batch_size=options.batch_size,
        packing=options.packing,
        optimizer=OptimizerConfig(lr=1e-4, schedule="constant"),
        mixed_precision=options.mixed_precision,
        log_every_steps=1,
        plots=False,
    )
    train(config)
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def theirs(options: argparse.Namespace, output: Path) -> list[float]:
    """That of `DistillationTrainer`."""
    arguments = TrainingArguments(
        str(output),
        max_steps=options.steps,
        per_device_train_batch_size=options.batch_size,
        learning_rate=1e-4,
        lr_scheduler_type="constant",
        adam_beta2=0.95,
        optim=options.optim,
        bf16=options.mixed_precision == "bf16",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = DistillationTrainer(
        AutoModelForCausalLM.from_pretrained(options.student, dtype=torch.float32),
        arguments,
        train_dataset=CacheDataset(options.cache),
        loss=LOSS,
        packing=options.packing,
    )
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def measured(
    run: Callable[[argparse.Namespace, Path], list[float]], options: argparse.Namespace
) -> tuple[float, list[float]]:
    """Median seconds of a step, and the loss curve."""
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time
    times: list[float] = []
    hook = register_optimizer_step_post_hook(lambda *_: times.append(clock()))
    try:
        with tempfile.TemporaryDirectory() as folder:
            curve = run(options, Path(folder) / "run")
    finally:
        hook.remove()
    steps = [b - a for a, b in itertools.pairwise(times)]
    return statistics.median(steps[SETTLING:]), curve


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--student", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--packing", default="none")
    parser.add_argument("--mixed-precision", default="no")
    parser.add_argument("--optim", default="adamw_torch", help="of the Trainer; ours is AdamW")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    rows = []
    for number in range(options.rounds):
        first, curve = measured(ours, options)
        second, other = measured(theirs, options)
        apart = max(abs(a - b) / a for a, b in zip(curve, other, strict=True))
        rows.append((number, first, second, second / first, apart))
        save("trainers.csv", HEADER, rows)
        print(
            "round {}: student_train {:.3f} s, Trainer {:.3f} s, {:.3f}, {:.1e}".format(*rows[-1])
        )
    ratio = statistics.median(row[3] for row in rows)
    print(f"Trainer over student_train: {ratio:.3f} (median), curves apart {rows[0][4]:.1e}")


if __name__ == "__main__":
    main()
