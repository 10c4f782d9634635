"""FKL, RKL and AKL on the demo's language model, over k, tail modes and seeds.

Dumps one text several ways (top-k with k = 4, 16, 64 and the whole vocabulary, draws, a head with
draws), trains one small student from scratch per (cache, loss, tail, seed) through the project's
own commands and `train`, and measures it on held-out text. Every finished run is a line of
`runs.jsonl`, which a rerun skips; the plot and the tables come from that file alone.
"""

import argparse
import json
import logging
import shutil
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from decant.schemas import FormatError
from decant.storage import CacheReader
from decant.student_train import (
    CacheStream,
    LossConfig,
    OptimizerConfig,
    StudentConfig,
    TrainConfig,
    train,
)
from decant.student_train.data.heldout import heldout_batches
from examples.reproduce.common import COLORS, LABELS, arguments, calibration, save, table

ROOT = Path(__file__).resolve().parents[2]
VOCAB = 4096
CACHES = {
    **{f"topk-{k}": {"method": "topk", "k": k} for k in (4, 16, 64, VOCAB)},
    **{f"sample-{n}": {"method": "sample", "draws": n} for n in (16, 64)},
    "topk-8+sample-8": {"method": "topk+sample", "k": 8, "draws": 8},
    "topk-16+sample-48": {"method": "topk+sample", "k": 16, "draws": 48},
}
NUM_EVAL_BATCHES = 2
"""Of 16 sequences: 8,160 held-out targets."""
KEPT_LAYERS = (0, 4)
"""The teacher's layers that the student starts with, out of five."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """One student: what it learns from, and how."""

    cache: str
    kind: str
    tail: str
    seed: int

    @property
    def name(self) -> str:
        """A name for files and for --only."""
        return f"{self.cache}_{self.kind}_{self.tail}_seed{self.seed}"


def runs(seeds: int) -> Iterator[Run]:
    """All runs: every configuration with the first seed, then with the next."""
    sizes, kinds = ("topk-4", "topk-16", "topk-64"), ("fkl", "rkl", "akl")
    grid = [("topk-64", "ce", "none")]
    grid += [(cache, kind, "bucket") for cache in sizes for kind in kinds]
    grid += [(cache, "fkl", "teacher_renormalize") for cache in sizes]
    grid += [(cache, "fkl", "bucket") for cache in CACHES if "sample" in cache]
    grid += [(cache, "fkl", tail) for tail in ("renormalize", "uniform") for cache in sizes]
    grid += [(f"topk-{VOCAB}", kind, "bucket") for kind in kinds]
    grid += [("topk-16", k, t) for k in ("rkl", "akl") for t in ("renormalize", "uniform")]
    for seed in range(seeds):
        for cache, kind, tail in grid:
            yield Run(cache=cache, kind=kind, tail=tail, seed=seed)


def prepare(work: Path, fast: bool) -> None:
    """Write the text and dump it into every cache, with the project's commands; reruns resume."""
    sizes = ("20000", "20000") if fast else ("100000", "60000")
    if not (work / "heldout.jsonl.zst").exists():
        command("examples/demo/corpus.py", "--out", work, "--train-bytes", sizes[0],
                "--heldout-bytes", sizes[1])  # fmt: skip
    caches = {"topk-16": CACHES["topk-16"]} if fast else CACHES
    for name, truncation in {**caches, "heldout": CACHES["topk-16"]}.items():
        source = work / f"{'heldout' if name == 'heldout' else 'train'}.jsonl.zst"
        options = [f"--truncation.{key}={value}" for key, value in truncation.items()]
        if is_whole(work / f"cache-{name}"):
            continue
        command("-m", "teacher_dump", "run", "--config", "examples/demo/dump.yaml",
                "--output", work / f"cache-{name}", "--source.path", source,
                "--precision=f16", *options)  # fmt: skip
    if not (work / "student").exists():
        make_student(work / "student")


def make_student(path: Path, kept: Sequence[int] = KEPT_LAYERS) -> None:
    """The student before training: some of the teacher's layers."""
    teacher = ROOT / "examples/demo/teacher"
    student = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32)
    student.model.layers = torch.nn.ModuleList(student.model.layers[i] for i in kept)
    for i, layer in enumerate(student.model.layers):
        layer.self_attn.layer_idx = i
    student.config.num_hidden_layers = len(kept)
    student.config.layer_types = None
    student.save_pretrained(path)
    AutoTokenizer.from_pretrained(teacher).save_pretrained(path)


def is_whole(cache: Path) -> bool:
    """Whether a dump has finished."""
    try:
        CacheReader(str(cache))
    except FormatError:
        return False
    return True


def command(*words: object) -> None:
    """Run `python ...` from the project's root."""
    print("$ python", *words, flush=True)
    subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, check=True)


def measure(run: Run, work: Path, steps: int) -> dict[str, Any]:
    """Train one student and evaluate it."""
    started, output = time.process_time(), work / "runs" / run.name
    shutil.rmtree(output, ignore_errors=True)
    only_ce = run.kind == "ce"
    config = TrainConfig(
        cache=str(work / f"cache-{run.cache}"),
        output=str(output),
        student=StudentConfig(path=str(work / "student")),
        loss=LossConfig(kd_weight=0.0, ce_weight=1.0)
        if only_ce
        else LossConfig(kind=run.kind, tail=run.tail),
        steps=steps,
        batch_size=4,
        optimizer=OptimizerConfig(lr=1e-3, warmup_steps=3),
        seed=run.seed,
        log_every_steps=steps,
    )
    summary = train(config)
    result = {**asdict(run), "steps": steps, "epochs": summary["epochs"]}
    result |= evaluate(output / "student", work / "cache-heldout")
    result["cpu_s"] = round(time.process_time() - started, 1)
    shutil.rmtree(output)
    return result


@torch.no_grad()
def evaluate(student_path: Path, cache: Path) -> dict[str, float]:
    """Held-out cross-entropy (nats), calibration of the top-1, agreement with the teacher's."""
    student = AutoModelForCausalLM.from_pretrained(student_path, dtype=torch.float32).eval()
    log_q, labels, teacher = [], [], []
    batches = heldout_batches(CacheStream(cache, batch_size=16))
    for batch, _ in islice(batches, NUM_EVAL_BATCHES):
        logits = student(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
        log_q.append(logits.flatten(0, 1)[batch.predictors].log_softmax(1))
        labels.append(batch.labels)
        teacher.append(batch.targets.token_ids[:, 0])
    log_q_NV, labels_N = torch.cat(log_q), torch.cat(labels)
    agrees = log_q_NV.argmax(1) == torch.cat(teacher)
    ce = -log_q_NV.gather(1, labels_N[:, None]).mean()
    return {
        "ce": ce.item(),
        **calibration(log_q_NV, labels_N),
        "agreement": agrees.double().mean().item(),
    }


def summarise(lines: list[dict[str, Any]]) -> list[list[object]]:
    """Mean ± standard deviation over seeds for each (cache, kind, tail)."""
    groups = defaultdict(list)
    for line in lines:
        groups[line["cache"], line["kind"], line["tail"]].append(line)

    def spread(group: list[dict[str, Any]], name: str, digits: int) -> str:
        values = [line[name] for line in group]
        deviation = statistics.stdev(values) if len(values) > 1 else 0.0
        return f"{statistics.mean(values):.{digits}f} ± {deviation:.{digits}f}"

    return [
        [
            *(cache, kind, tail, len(group)),
            spread(group, "ce", 3),
            spread(group, "ece", 3),
            f"{statistics.mean(line['confidence'] - line['accuracy'] for line in group):+.3f}",
            spread(group, "agreement", 3),
        ]
        for (cache, kind, tail), group in groups.items()
    ]


def plot(lines: list[dict[str, Any]], args: argparse.Namespace) -> None:
    """Held-out CE, ECE and agreement against k, one line per loss and tail mode."""
    styles = {"bucket": "-", "renormalize": ":", "uniform": "-.", "teacher_renormalize": "--"}
    values = defaultdict(list)
    for line in lines:
        values[line["cache"], line["kind"], line["tail"]].append(line)
    figure, panels = plt.subplots(1, 3, figsize=(13, 4.6))
    names = {
        "ce": "held-out cross-entropy (nats)",
        "ece": "ECE, 15 bins",
        "agreement": "top-1 agreement with the teacher",
    }
    for panel, (metric, label) in zip(panels, names.items(), strict=True):
        for kind in COLORS:
            for tail, style in styles.items():
                points = []
                for k in (4, 16, 64, VOCAB):
                    group = values.get((f"topk-{k}", kind, "bucket" if k == VOCAB else tail))
                    if group:
                        points.append((k, [line[metric] for line in group]))
                if not any(k < VOCAB for k, _ in points):
                    continue
                panel.errorbar(
                    [k for k, _ in points],
                    [statistics.mean(v) for _, v in points],
                    [statistics.stdev(v) if len(v) > 1 else 0 for _, v in points],
                    color=COLORS[kind], linestyle=style, marker=".", capsize=2,
                    label=f"{LABELS[kind]}, {tail}",
                )  # fmt: skip
        for cache, k, marker in (
            ("sample-16", 16, "x"),
            ("sample-64", 64, "x"),
            ("topk-8+sample-8", 16, "*"),
            ("topk-16+sample-48", 64, "*"),
        ):
            if group := values.get((cache, "fkl", "bucket")):
                panel.plot(k, statistics.mean(line[metric] for line in group), marker, color="k",
                           markersize=8, label={16: None}.get(k, f"FKL, {cache[:-3]}"))  # fmt: skip
        if group := values.get(("topk-64", "ce", "none")):
            panel.axhline(statistics.mean(line[metric] for line in group), color="gray",
                          linewidth=1, label="cross-entropy alone")  # fmt: skip
        panel.set_xscale("log", base=2)
        panel.set_xticks([4, 16, 64, VOCAB], ["4", "16", "64", f"V={VOCAB}"])
        panel.set_xlabel("entries kept per target, k")
        panel.set_ylabel(label)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="upper center", ncol=5, fontsize=7.5)
    save(figure, args, top=0.84)


def main() -> None:
    parser = arguments(__doc__, "study")
    parser.add_argument("--work", type=Path, default=Path("build/study"), help="caches and runs")
    parser.add_argument("--steps", type=int, default=24, help="optimizer steps of each student")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", default="", help="only runs whose name contains this")
    args = parser.parse_args()
    logging.disable(logging.INFO)
    transformers_logging.disable_progress_bar()
    work, log = args.work.resolve(), args.work / "runs.jsonl"
    prepare(work, args.fast)
    lines = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    done = {Run(**{name: line[name] for name in Run.__annotations__}).name for line in lines}
    chosen = [run for run in runs(1 if args.fast else args.seeds) if args.only in run.name]
    if args.fast:
        chosen = [run for run in chosen if run.cache == "topk-16"][:2]
    for i, run in enumerate(chosen):
        if run.name in done:
            continue
        result = measure(run, work, 3 if args.fast else args.steps)
        lines.append(result)
        with log.open("a") as file:
            file.write(json.dumps(result) + "\n")
        print(f"{i + 1} of {len(chosen)}: {run.name} ce {result['ce']:.3f} ece "
              f"{result['ece']:.3f} in {result['cpu_s']} s", flush=True)  # fmt: skip
    header = ("cache", "loss", "tail", "seeds", "CE", "ECE", "conf. - acc.", "agreement")
    print("\n" + table(header, summarise(lines)))
    plot(lines, args)


if __name__ == "__main__":
    main()
