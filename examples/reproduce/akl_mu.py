"""AKL's mu on three kinds of text and two teachers: does the place of the cut matter?

    make demo-real                                       # the second teacher, its text and answers
    python -m examples.reproduce.akl_mu --seeds 3
    python -m examples.reproduce.akl_mu --teachers SmolLM2 --seeds 1

arXiv 2404.02657 takes mu = 0.5 and leaves open what others do. Here mu is 0.3 to 0.7, beside
forward and reverse KL and cross-entropy, on code (the standard library), English (its docstrings)
and chat (the answers of SmolLM2-135M-Instruct). The demo's teacher has a student of two of its five
layers, SmolLM2 the student that `make demo-real` leaves. Both see some batches of a text, another
choice and order for each seed, and are measured on held-out targets of the same kind. Every
finished run is a line of `runs.jsonl`, which a rerun skips.
"""

import argparse
import json
import logging
import math
import shutil
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from transformers.utils import logging as transformers_logging

from decant.storage import CacheReader
from decant.storage.cache.tokenizer_files import TokenizerFiles
from decant.student_train import LossConfig, OptimizerConfig, StudentConfig, TrainConfig, train
from decant.student_train.versus import Part, measure_models
from examples.demo import corpus
from examples.real import docstrings
from examples.reproduce.common import arguments, save, table
from examples.reproduce.study import command, is_whole, make_student

TEXTS = ("code", "English", "chat")
MUS = (0.3, 0.4, 0.5, 0.6, 0.7)
SETTINGS = {
    "AKL, mu 0.5": LossConfig(kind="akl"),
    "FKL": LossConfig(kind="fkl"),
    "RKL": LossConfig(kind="rkl"),
    "CE": LossConfig(kd_weight=0.0, ce_weight=1.0),
    **{
        f"AKL, mu {mu}": LossConfig(kind="akl", options={"mu": mu})
        for mu in sorted(MUS, key=lambda mu: -abs(mu - 0.5))
        if mu != 0.5
    },
}
USUAL = "AKL, mu 0.5"
NAMES = {
    "cross_entropy": "cross-entropy",
    "kl_forward": "KL(p‖q), at least",
    "kl_reverse": "KL(q‖p), at least",
    "acceptance_upper": "Σ min(p, q), at most",
    "top1_agreement": "top-1 agreement",
}


@dataclass(frozen=True)
class Task:
    """A teacher, and how its student is trained and measured."""

    bytes_of_text: dict[str, int]
    """Of code and of chat, by split; English is counted in docstrings."""
    docstrings: dict[str, int]
    steps: int
    batch_size: int
    rate: float
    measured: int
    """Held-out sequences."""


TASKS = {
    "demo": Task({"train": 200_000, "heldout": 60_000}, {"train": 160, "heldout": 40},
                 30, 4, 5e-4, 60),
    "SmolLM2": Task({"train": 60_000, "heldout": 24_000}, {}, 12, 2, 2e-4, 16),
}  # fmt: skip


class Texts:
    """The caches of a folder, made where they are missing."""

    def __init__(self, work: Path, real: Path) -> None:
        self.work, self.real = work, real

    def cache(self, teacher: str, text: str, split: str) -> Path:
        """A teacher's cache of a text."""
        if teacher == "SmolLM2" and text != "code":
            return self.real / f"cache-{'text' if text == 'English' else 'chat'}-{split}"
        cache = self.work / f"cache-{teacher}-{text}-{split}"
        if not is_whole(cache):
            source = self.work / f"{teacher}-{text}-{split}.jsonl"
            self.write(source, TASKS[teacher], text, split)
            path = "examples/demo/teacher" if teacher == "demo" else self.real / "teacher"
            config = "demo/dump.yaml" if teacher == "demo" else "real/dump-text.yaml"
            command("-m", "decant", "dump", "--config", f"examples/{config}", "--output", cache,
                    "--source.path", source, "--teacher.path", path)  # fmt: skip
        return cache

    def write(self, path: Path, task: Task, text: str, split: str) -> None:
        """Records of `id` and `text`."""
        if text == "English":
            docstrings.write(path, split == "heldout", task.docstrings[split])
            return
        if text == "code":
            records = corpus.drawn(split, task.bytes_of_text[split])
        else:
            reader = CacheReader(str(self.real / f"cache-chat-{split}"))
            tokenizer = TokenizerFiles.of_cache(reader).backend_tokenizer
            records = [
                (f"answer-{number}", tokenizer.decode(sequence.input_ids.tolist()))
                for number, sequence in enumerate(reader)
            ]
        path.write_text("".join(json.dumps({"id": i, "text": t}) + "\n" for i, t in records))

    def student(self, teacher: str) -> Path:
        """The student before training."""
        if teacher == "SmolLM2":
            return self.real / "student-run/student"
        path = self.work / "student"
        if not path.exists():
            make_student(path)
        return path


def measure(texts: Texts, teacher: str, text: str, setting: str, seed: int) -> dict[str, Any]:
    """Train one student and compare it with its teacher."""
    task, started = TASKS[teacher], time.process_time()
    name = f"{teacher}-{text}-{setting}-{seed}".replace(" ", "-").replace(",", "")
    output = texts.work / "runs" / name
    shutil.rmtree(output, ignore_errors=True)
    train(
        TrainConfig(
            cache=str(texts.cache(teacher, text, "train")),
            output=str(output),
            student=StudentConfig(path=str(texts.student(teacher))),
            loss=SETTINGS[setting],
            steps=task.steps,
            batch_size=task.batch_size,
            optimizer=OptimizerConfig(lr=task.rate, warmup_ratio=0.1),
            seed=seed,
            log_every_steps=1000,
            plots=False,
        )
    )
    heldout = str(texts.cache(teacher, text, "heldout"))
    found = measure_models([str(output / "student")], heldout, part=Part(limit=task.measured))
    (model,) = found.models
    shutil.rmtree(output)
    return {
        **{"teacher": teacher, "text": text, "setting": setting, "seed": seed},
        **{name: model.means[name] for name in NAMES},
        "cpu_s": round(time.process_time() - started, 1),
    }


def groups(lines: list[dict[str, Any]]) -> dict[tuple[str, str], dict[str, dict[int, Any]]]:
    """(teacher, text) -> setting -> seed -> run, on the seeds that all of its settings have."""
    found: dict[tuple[str, str], dict[str, dict[int, Any]]] = {}
    for line in lines:
        by_setting = found.setdefault((line["teacher"], line["text"]), {})
        by_setting.setdefault(line["setting"], {})[line["seed"]] = line
    for by_setting in found.values():
        seeds = set.intersection(*[set(runs) for runs in by_setting.values()])
        for setting, runs in by_setting.items():
            by_setting[setting] = {seed: runs[seed] for seed in sorted(seeds)}
    return {task: runs for task, runs in found.items() if runs.get(USUAL)}


def report(lines: list[dict[str, Any]], args: argparse.Namespace) -> str:
    """Means over seeds, and differences to mu = 0.5 on the same seed, ± their deviation."""
    rows: list[list[object]] = []
    for (teacher, text), by_setting in groups(lines).items():
        for setting in SETTINGS:
            runs = by_setting.get(setting, {})
            if not runs:
                continue
            cells = []
            for name in NAMES:
                if setting == USUAL:
                    cells.append(f"{statistics.mean(run[name] for run in runs.values()):.3f}")
                    continue
                gaps = [run[name] - by_setting[USUAL][seed][name] for seed, run in runs.items()]
                spread = f" ± {statistics.stdev(gaps):.3f}" if len(gaps) > 1 else ""
                cells.append(f"{statistics.mean(gaps):+.3f}{spread}")
            rows.append([teacher, text, setting, len(runs), *cells])
    plot(lines, args)
    return table(["teacher", "text", "loss", "seeds", *NAMES.values()], rows)


def plot(lines: list[dict[str, Any]], args: argparse.Namespace) -> None:
    """Differences to mu = 0.5 against mu, one line per teacher and text."""
    figure, panels = plt.subplots(1, len(NAMES), figsize=(16, 3.6))
    for (teacher, text), by_setting in groups(lines).items():
        usual = by_setting[USUAL]
        for panel, (name, title) in zip(panels, NAMES.items(), strict=True):
            points = {}
            for mu in MUS:
                runs = by_setting.get(f"AKL, mu {mu}", {})
                gaps = [run[name] - usual[seed][name] for seed, run in runs.items()]
                if gaps:
                    points[mu] = statistics.mean(gaps)
            style = "-" if teacher == "demo" else "--"
            color = dict(zip(TEXTS, ("tab:blue", "tab:orange", "tab:green"), strict=True))[text]
            label = f"{teacher}, {text}"
            panel.plot(list(points), list(points.values()), style, marker=".", color=color,
                       label=label)  # fmt: skip
            panel.set_title(f"{title}, minus that at mu 0.5", fontsize=8)
            panel.set_xlabel("mu")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="upper center", ncol=6, fontsize=8)
    save(figure, args, top=0.92)


def main() -> None:
    parser = arguments(__doc__, "akl_mu")
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--work", type=Path, default=Path("build/akl-mu"))
    parser.add_argument("--real", type=Path, default=Path("build/real"), help="of make demo-real")
    parser.add_argument("--teachers", nargs="+", choices=list(TASKS), default=["demo"])
    parser.add_argument("--texts", nargs="+", choices=TEXTS, default=TEXTS)
    parser.add_argument("--settings", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop after so long")
    args = parser.parse_args()
    logging.disable(logging.INFO)
    transformers_logging.disable_progress_bar()
    args.work.mkdir(parents=True, exist_ok=True)
    log = args.work / "runs.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    finished = fill(lines, log, args)
    print(report(lines, args))
    if not finished:
        print(f"\nstopped after {args.minutes:g} minutes: the same command goes on")


def fill(lines: list[dict[str, Any]], log: Path, args: argparse.Namespace) -> bool:
    """Run what is missing, every setting with the first seed, then with the next."""
    texts = Texts(args.work.resolve(), args.real.resolve())
    until = time.monotonic() + 60 * args.minutes
    if args.fast:
        args.seeds, args.texts, args.settings = 1, TEXTS[:1], list(SETTINGS)[:2]
    done = {(x["teacher"], x["text"], x["setting"], x["seed"]) for x in lines}
    for seed in range(args.seeds):
        for teacher in args.teachers:
            for text in args.texts:
                for setting in args.settings:
                    if (teacher, text, setting, seed) in done:
                        continue
                    if time.monotonic() > until:
                        return False
                    lines.append(measure(texts, teacher, text, setting, seed))
                    with log.open("a") as file:
                        file.write(json.dumps(lines[-1]) + "\n")
                    print(f"{teacher}, {text}, {setting}, seed {seed}: "
                          f"{lines[-1]['cpu_s']} s", flush=True)  # fmt: skip
    return True


if __name__ == "__main__":
    main()
