"""Which loss is first, and in which measure: six losses, three students, rates of their own.

    python -m examples.reproduce.loss_order --work build/loss-order --seeds 5 --epochs 1 5

A seed draws the files that the students learn from, and the order of the data; no file is in two
draws. The rate of each loss, student and number of epochs is the one at which the loss makes its
own divergence smallest on the validation files, from a draw of its own: of a grid of factors of 2,
which is extended while its best lies at an edge. Measured is on all held-out files. Every finished
run is a line of `runs.jsonl`, which a rerun skips: few seeds now and more of them later is one
command twice. Tables and plot come from that file alone (`loss_order_report.py`).
"""

import argparse
import json
import logging
import math
import shutil
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from decant.student_train import (
    LossConfig,
    OptimizerConfig,
    StudentConfig,
    TrainConfig,
    train,
)
from examples.demo.corpus import drawn, write
from examples.reproduce import heldout_text
from examples.reproduce.common import arguments
from examples.reproduce.loss_order_report import KINDS, badness, best_rates, report
from examples.reproduce.study import ROOT, command, is_whole, make_student

TEACHER = ROOT / "examples/demo/teacher"
STUDENTS = ("2 of 5 layers", "3 of 5 layers", "narrow")
KEPT_LAYERS = {"2 of 5 layers": (0, 4), "3 of 5 layers": (0, 2, 4)}
TRAIN_BYTES, WARM_BYTES = 70_000, 1_000_000
DRAW_OF_RATES, DRAW_OF_WARMUP = 9, 4
"""Draws of TRAIN_BYTES and of WARM_BYTES; seeds draw the first ones of TRAIN_BYTES."""
WARM_STEPS, WARM_RATE = 300, 2e-3
GRID = (2.5e-4, 5e-4, 1e-3)
LIMITS = (3e-5, 2e-2)
WINDOWS = {"validation": 2, "heldout": 3}
"""Windows of 256 tokens of each file."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """One student: what it is, what it learns by, and on which draw; seed -1 is for rates."""

    student: str
    epochs: int
    kind: str
    rate: float
    seed: int

    @property
    def name(self) -> str:
        """For folders and for people."""
        what = f"{self.student}_{self.epochs}_{self.kind}_{self.rate:g}_seed{self.seed}"
        return what.replace(" ", "-")


class Log:
    """`runs.jsonl`: what is finished."""

    def __init__(self, path: Path) -> None:
        self.path = path
        text = path.read_text() if path.exists() else ""
        self.lines: list[dict[str, Any]] = [json.loads(line) for line in text.splitlines()]

    def find(self, run: Run) -> dict[str, Any] | None:
        """A run's line, if it is finished."""
        wanted = asdict(run)
        return next((x for x in self.lines if wanted.items() <= x.items()), None)

    def add(self, line: dict[str, Any]) -> None:
        """Keep a finished run."""
        self.lines.append(line)
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")


def prepare(work: Path, draw: int) -> None:
    """The text of a draw and its cache, with the project's commands."""
    cache = work / f"cache-{draw}"
    if is_whole(cache):
        return
    source = work / f"train-{draw}.jsonl.zst"
    write("train", source, TRAIN_BYTES, draw)
    command("-m", "decant", "dump", "--config", "examples/demo/dump.yaml", "--output", cache,
            "--source.path", source)  # fmt: skip


def student_path(student: str, work: Path) -> Path:
    """The student before training."""
    path = work / student.replace(" ", "-")
    if path.exists():
        return path
    if student in KEPT_LAYERS:
        make_student(path, KEPT_LAYERS[student])
        return path
    cache, output = work / "cache-warm", work / "warm-run"
    if not is_whole(cache):
        write("train", work / "warm.jsonl.zst", WARM_BYTES, DRAW_OF_WARMUP)
        command("-m", "decant", "dump", "--config", "examples/demo/dump.yaml", "--output", cache,
                "--source.path", work / "warm.jsonl.zst",
                "--truncation.method", "label")  # fmt: skip
    command("-m", "decant", "train", "--config", "examples/demo/train.yaml", "--cache", cache,
            "--output", output, "--loss.kd_weight", 0, "--loss.ce_weight", 1,
            "--optimizer.lr", WARM_RATE, "--steps", WARM_STEPS)  # fmt: skip
    (output / "student").rename(path)
    return path


class Bench:
    """Trains and measures the students of one folder."""

    def __init__(self, work: Path, log: Log) -> None:
        self.work, self.log = work, log
        self.teacher = AutoModelForCausalLM.from_pretrained(TEACHER, dtype=torch.float32).eval()

    def heldout(self, split: str) -> heldout_text.Heldout:
        """What students are measured by."""
        texts = (text for _, text in drawn(split, 10**9))
        path = self.work / f"{split}.pt"
        return heldout_text.kept(path, texts, str(TEACHER), WINDOWS[split])

    def line(self, run: Run) -> dict[str, Any]:
        """A run's line, run now if it is not in the log."""
        found = self.log.find(run)
        if found is None:
            found = self.measured(run)
            self.log.add(found)
            ce = sum(found["ce"]) / sum(found["targets"])
            print(f"{time.strftime('%H:%M:%S')} {run.name}: ce {ce:.4f} in {found['cpu_s']} s",
                  flush=True)  # fmt: skip
        return found

    def measured(self, run: Run) -> dict[str, Any]:
        """Train a student and measure it: on validation files for rates, else on held-out ones."""
        draw = DRAW_OF_RATES if run.seed < 0 else run.seed
        prepare(self.work, draw)
        start = student_path(run.student, self.work)
        heldout = self.heldout("validation" if run.seed < 0 else "heldout")
        started, output = time.process_time(), self.work / "runs" / run.name
        shutil.rmtree(output, ignore_errors=True)
        only_ce = run.kind == "ce"
        summary = train(
            TrainConfig(
                cache=str(self.work / f"cache-{draw}"),
                output=str(output),
                student=StudentConfig(path=str(start)),
                loss=LossConfig(kd_weight=0.0, ce_weight=1.0)
                if only_ce
                else LossConfig(kind=run.kind),
                epochs=run.epochs,
                batch_size=4,
                optimizer=OptimizerConfig(lr=run.rate, warmup_ratio=0.1),
                seed=max(run.seed, 0),
                log_every_steps=1000,
                plots=False,
            )
        )
        trained = time.process_time() - started
        path = output / "student"
        student = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        found = asdict(run) | {"steps": summary["steps"]}
        found |= heldout_text.measure(student, heldout)
        if run.seed >= 0:
            found |= heldout_text.generated(student, self.teacher, heldout)
        found["train_s"] = round(trained, 1)
        found["cpu_s"] = round(time.process_time() - started, 1)
        shutil.rmtree(output)
        return found

    def rate(self, student: str, epochs: int, kind: str) -> float:
        """The rate at which a loss is best by its own lights on validation files.

        The grid follows its best; with more epochs it begins about the best of one.
        """
        tried: dict[float, float] = {}
        of_one = best_rates(self.log.lines).get((student, 1, kind))
        wanted: Iterable[float] = GRID if epochs == 1 or not of_one else (of_one / 2, of_one)
        while wanted:
            for rate in wanted:
                run = Run(student=student, epochs=epochs, kind=kind, rate=rate, seed=-1)
                tried[rate] = badness(self.line(run))
            best = min(tried, key=tried.__getitem__)
            beyond = {min(tried): min(tried) / 2, max(tried): max(tried) * 2}
            further = beyond.get(best)
            wanted = [further] if further and LIMITS[0] <= further <= LIMITS[1] else []
        return best


def main() -> None:
    parser = arguments(__doc__, "loss_order")
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--work", type=Path, default=Path("build/loss-order"))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, nargs="+", default=[1, 5])
    parser.add_argument("--students", nargs="+", choices=STUDENTS, default=STUDENTS)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop after so long")
    parser.add_argument("--report", action="store_true", help="tables and plot of what there is")
    args = parser.parse_args()
    logging.disable(logging.INFO)
    transformers_logging.disable_progress_bar()
    args.work.mkdir(parents=True, exist_ok=True)
    log = Log(args.work / "runs.jsonl")
    finished = args.report or fill(log, args)
    print(report(log.lines, args))
    if not finished:
        print(f"\nstopped after {args.minutes:g} minutes: the same command goes on")


def fill(log: Log, args: argparse.Namespace) -> bool:
    """Run what is missing: rates first, then every seed; whether all of it was."""
    bench = Bench(args.work.resolve(), log)
    until = time.monotonic() + 60 * args.minutes
    if args.fast:
        args.epochs, args.seeds, args.students, args.kinds = [1], 1, STUDENTS[:1], KINDS[:2]
    for epochs in args.epochs:
        for seed in range(args.seeds):
            for student in args.students:
                for kind in args.kinds:
                    if time.monotonic() > until:
                        return False
                    rate = GRID[0] if args.fast else bench.rate(student, epochs, kind)
                    bench.line(Run(student=student, epochs=epochs, kind=kind, rate=rate, seed=seed))
    return True


if __name__ == "__main__":
    main()
