"""A fifth or half of the targets: what selecting them saves and costs, on the study's setting.

Dumps the study's text with every target and with the fifth of which the teacher's entropy is
highest, and trains the study's student on all targets, on a part of each microbatch chosen by
either entropy or by the loss, and from the smaller cache. Every finished run is a line of
`selection.jsonl`, which a rerun skips; the table comes from that file.
"""

import dataclasses
import json
import logging
import shutil
import time
from pathlib import Path
from typing import Any

from transformers.utils import logging as transformers_logging

from decant.storage import CacheReader
from decant.student_train import LossConfig, OptimizerConfig, StudentConfig, TrainConfig, train
from decant.student_train.config.selection import SelectionConfig
from examples.reproduce.common import arguments, table
from examples.reproduce.study import CACHES, command, evaluate, is_whole, make_student

SHARE = 0.2
STEPS, FEW = 24, 4
RUNS = {
    "all targets": ("whole", "", 1.0),
    "teacher's entropy": ("whole", "teacher_entropy", SHARE),
    "student's entropy": ("whole", "student_entropy", SHARE),
    "loss": ("whole", "loss", SHARE),
    "teacher's entropy, at the dump": ("fifth", "", 1.0),
    "half, by teacher's entropy": ("whole", "teacher_entropy", 0.5),
    "half, by student's entropy": ("whole", "student_entropy", 0.5),
    "half, by loss": ("whole", "loss", 0.5),
}
"""Name -> cache, what targets are selected by at each step, and how many."""


def prepare(work: Path, fast: bool) -> None:
    """Write the text and dump it, with the project's commands; reruns resume."""
    sizes = ("20000", "20000") if fast else ("100000", "60000")
    if not (work / "heldout.jsonl.zst").exists():
        command("examples/demo/corpus.py", "--out", work, "--train-bytes", sizes[0],
                "--heldout-bytes", sizes[1])  # fmt: skip
    dumps = {
        "whole": ("train", "topk-64", 1.0),
        "fifth": ("train", "topk-64", SHARE),
        "heldout": ("heldout", "topk-16", 1.0),
    }
    for name, (source, truncation, share) in dumps.items():
        options = [f"--truncation.{key}={value}" for key, value in CACHES[truncation].items()]
        if not is_whole(work / f"cache-{name}"):
            command("-m", "decant", "dump", "--config", "examples/demo/dump.yaml",
                    "--output", work / f"cache-{name}",
                    "--source.path", work / f"{source}.jsonl.zst",
                    "--sequences.target_share", share, *options)  # fmt: skip
    if not (work / "student").exists():
        make_student(work / "student")


def measure(name: str, work: Path, steps: int, seed: int) -> dict[str, Any]:
    """Train one student, time it and evaluate it."""
    cache, by, share = RUNS[name]
    output = work / "runs" / f"selection-{list(RUNS).index(name)}-{seed}"
    config = TrainConfig(
        cache=str(work / f"cache-{cache}"),
        output=str(output),
        student=StudentConfig(path=str(work / "student")),
        loss=LossConfig(kind="fkl"),
        selection=SelectionConfig(by=by, share=share) if by else SelectionConfig(),
        steps=steps,
        batch_size=4,
        optimizer=OptimizerConfig(lr=1e-3, warmup_steps=3),
        seed=seed,
        log_every_steps=steps,
        plots=False,
    )
    cpu_s = []
    for number in (min(steps, FEW), steps):  # what comes before and after the steps cancels
        shutil.rmtree(output, ignore_errors=True)
        started = time.process_time()
        train(dataclasses.replace(config, steps=number))
        cpu_s.append(time.process_time() - started)
    totals = CacheReader(config.cache).manifest.totals
    assert totals is not None
    result = {
        "name": name,
        "seed": seed,
        "steps": steps,
        "cache_bytes": totals.bytes,
        "cache_targets": totals.targets,
        "step_s": (cpu_s[1] - cpu_s[0]) / max(steps - FEW, 1),
        **evaluate(output / "student", work / "cache-heldout"),
    }
    shutil.rmtree(output)
    return result


def main() -> None:
    """Run what is missing, print the table."""
    args = arguments(__doc__, "selection").parse_args()
    transformers_logging.set_verbosity_error()
    logging.getLogger("decant").setLevel(logging.WARNING)
    work = args.out / "study"
    work.mkdir(parents=True, exist_ok=True)
    prepare(work, args.fast)
    file = work / "selection.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    for name in RUNS:
        if name not in [line["name"] for line in lines]:
            lines.append(measure(name, work, 4 if args.fast else STEPS, seed=0))
            with file.open("a") as out:
                out.write(json.dumps(lines[-1]) + "\n")
    whole = next(line for line in lines if line["name"] == "all targets")
    shown = table(
        ["targets", "cache, bytes", "CPU s per step", "CE", "ECE", "agreement"],
        [
            [
                line["name"],
                f"{line['cache_bytes']:,} ({line['cache_bytes'] / whole['cache_bytes']:.2f})",
                f"{line['step_s']:.3f} ({line['step_s'] / whole['step_s']:.2f})",
                f"{line['ce']:.3f}",
                f"{line['ece']:.3f}",
                f"{line['agreement']:.3f}",
            ]
            for line in lines
        ],
    )
    print(shown)


if __name__ == "__main__":
    main()
