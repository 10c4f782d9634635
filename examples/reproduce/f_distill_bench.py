"""The prompts, caches, students and measures of `f_distill.py`, each made where it is missing.

All of it goes through the project's own paths: `dump` with `source.generate` and `generate.by`,
`train` with the presets of f-DISTILL, `decant rounds`, and what `decant evaluate` measures.
"""

import argparse
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from decant.schemas import Truncation
from decant.storage import CacheReader
from decant.student_train import (
    CacheShare,
    LossConfig,
    OptimizerConfig,
    StudentConfig,
    TrainConfig,
    train,
)
from decant.student_train.evaluation.risks import measure_samples
from decant.student_train.versus import measure_models
from decant.teacher_dump import DumpConfig, SequenceConfig, SourceConfig, TeacherConfig, dump
from decant.teacher_dump.inputs.config import GenerateConfig
from examples.demo.corpus import drawn, write
from examples.reproduce.study import ROOT, command, is_whole, make_student

TEACHER = ROOT / "examples/demo/teacher"
PROMPT = 32
"""Tokens of a prompt of the demo's text."""
BYTES, DRAW_OF_RATES = 250_000, 9
WARM_BYTES, DRAW_OF_WARMUP = 1_000_000, 4
"""Of the text; seeds draw the first parts of BYTES, and the student's warm-up another part."""
CE = LossConfig(kd_weight=0.0, ce_weight=1.0)
VARIANTS: dict[str, tuple[LossConfig, tuple[str, ...]]] = {
    "mle": (CE, ("data",)),
    "seqkd": (CE, ("teacher",)),
    "kl-data": (LossConfig(preset="kl"), ("data",)),
    "kl": (LossConfig(preset="kl"), ("teacher",)),
    "rkl": (LossConfig(preset="rkl"), ("student",)),
    "js": (LossConfig(preset="js"), ("teacher", "student")),
    "tvd": (LossConfig(preset="tvd"), ("teacher", "student")),
    "kl-anew": (LossConfig(preset="kl"), ("teacher-anew",)),
    "rkl-rounds": (LossConfig(preset="rkl"), ()),
}
"""What each minimises, and on whose continuations of the prompts: half and half of two."""
SIDES = {"data": "teacher", "teacher-anew": "teacher"}
"""Whose prefixes a cache is said to hold, where its name does not say so."""
RATE_OF = {"kl-anew": "kl", "rkl-rounds": "rkl"}
"""Variants that take the rate of another one."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """One student; seed -1 is for rates, on prompts of their own."""

    variant: str
    rate: float
    steps: int
    seed: int

    @property
    def name(self) -> str:
        """For folders and for people."""
        of = f"seed{self.seed}" if self.seed >= 0 else "rates"
        return f"{self.variant}_{self.rate:g}_{self.steps}_{of}"


class Bench:
    """Makes and measures the students of one folder."""

    def __init__(self, work: Path, args: argparse.Namespace) -> None:
        self.work, self.args = work, args
        self.teacher = str(args.teacher or TEACHER)
        self.has_data = not args.prompts
        """Whether prompts have a continuation in the data: the demo's text."""

    def measured(self, run: Run) -> dict[str, Any]:
        """Train a student and measure it: on validation prompts for rates, else on held-out."""
        folder = self.work / "runs" / run.name
        caches = {x: self.cache(x, run.seed) for x in VARIANTS[run.variant][1]}
        started = cpu_seconds()
        if run.variant == "rkl-rounds":
            student, found = self.rounds(run, folder)
        else:
            loss = VARIANTS[run.variant][0]
            summary = train(self.training(run, folder, loss, caches))
            student, found = folder / "student", {"passes": summary["epochs"]}
            found["scored"] = sum(targets_of(cache) for cache in caches.values())
        found["train_s"] = round(cpu_seconds() - started, 1)
        found |= self.figures(student, folder, "validation" if run.seed < 0 else "heldout")
        found["cpu_s"] = round(cpu_seconds() - started, 1)
        shutil.rmtree(folder)
        return asdict(run) | found

    def training(
        self, run: Run, output: Path, loss: LossConfig, caches: dict[str, Path]
    ) -> TrainConfig:
        """A training from the warm student, at a constant rate after the warm-up."""
        of_caches: dict[str, Any] = {"cache": str(next(iter(caches.values()), ""))}
        if loss.preset:
            of_caches = {
                "mixture": [
                    CacheShare(cache=str(path), weight=1.0, prefixes=SIDES.get(name, name))
                    for name, path in caches.items()
                ]
            }
        return TrainConfig(
            **of_caches,
            output=str(output),
            student=StudentConfig(path=str(self.warm())),
            loss=loss,
            steps=run.steps,
            batch_size=self.args.batch_size,
            optimizer=OptimizerConfig(lr=run.rate, warmup_ratio=0.1, schedule="constant"),
            seed=max(run.seed, 0),
            log_every_steps=1000,
            plots=False,
        )

    def rounds(self, run: Run, folder: Path) -> tuple[Path, dict[str, Any]]:
        """`decant rounds`: the prompts dealt over the rounds, so that each is answered once."""
        count = self.args.rounds
        output = folder / "rounds"
        sampled = self.dumping(output, self.prompts(run.seed), n=1, seed=max(run.seed, 0))
        block = asdict(sampled)
        source = {"path": block["source"]["path"], "generate": block["source"]["generate"]}
        keys = {
            "output": str(output),
            "rounds": count,
            "prompt_parts": count,
            "plots": False,
            "dump": {
                "teacher": {"path": self.teacher, "dtype": "float32"},
                "source": source,
                "sequences": {"max_length": self.args.max_length},
                "truncation": {"method": "topk", "k": self.args.k},
            },
            "train": {
                "student": {"path": str(self.warm())},
                "loss": {"preset": "rkl"},
                "steps": run.steps // count,
                "batch_size": self.args.batch_size,
                "optimizer": {"lr": run.rate, "warmup_ratio": 0.1, "schedule": "constant"},
                "seed": max(run.seed, 0),
                "plots": False,
            },
        }
        source["generate"].pop("by")
        source["generate"].pop("by_engine")
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / "rounds.yaml"
        file.write_text(yaml.safe_dump(keys))
        command("-m", "decant", "rounds", "--config", file)
        lines = [json.loads(x) for x in (output / "rounds.jsonl").read_text().splitlines()]
        return output / "student", {
            "scored": sum(line["targets"] for line in lines),
            "passes": run.steps * self.args.batch_size / sum(x["sequences"] for x in lines),
        }

    def figures(self, student: Path, folder: Path, split: str) -> dict[str, Any]:
        """The risks and likenesses of a student on the prompts of a split; nats per token."""
        prompts, by = self.split_prompts(split), str(student)
        taught, n = self.split_cache(split, "teacher"), self.args.samples
        sampled = self.made(folder / "samples", prompts, by=by, n=n, method="label")
        of_samples = measure_samples(str(sampled), cache=str(taught))
        coverage = measure_models([by], str(taught), worst=0)
        its = coverage.models[0].means
        found = {
            "likelihood_risk": of_samples.likelihood_risk,
            "coverage_risk": its["cross_entropy"],
            "sequence_kl": (its["cross_entropy"] or 0.0) - coverage.teacher_cross_entropy,
            "sequence_rkl": of_samples.reverse_kl,
            "acceptance": its["acceptance_upper"],
            "distinct_2": (of_samples.distinct or {}).get("distinct_2"),
            "sampled": of_samples.targets,
        }
        if self.has_data:
            data = self.split_cache(split, "data")
            its = measure_models([by], str(data), worst=0).models[0].means
            found["ce"] = its["cross_entropy"]
            found["kl_forward"], found["kl_reverse"] = its["kl_forward"], its["kl_reverse"]
        if split == "heldout":
            greedy = self.made(folder / "greedy", prompts, by=by, temperature=0, method="label")
            like = self.split_cache(split, "greedy")
            rouge = measure_samples(str(greedy), cache=str(like)).rouge or {}
            found["rouge_l"] = rouge.get("rougeL")
            if self.has_data:
                rouge = measure_samples(str(greedy), references=str(prompts)).rouge or {}
                found["rouge_l_data"] = rouge.get("rougeL")
        return {name: x if x is None else round(x, 5) for name, x in found.items()}

    def cache(self, whose: str, seed: int) -> Path:
        """The teacher's word on continuations of a seed's prompts, whoever wrote them."""
        path = self.work / f"cache-{whose}-{'rates' if seed < 0 else seed}"
        prompts, draw = self.prompts(seed), max(seed, 0)
        if whose == "data":
            return self.made(path, prompts, n=0)
        if whose == "teacher-anew":
            passes = self.args.steps * self.args.batch_size / self.args.num_prompts
            return self.made(path, prompts, n=max(1, round(passes)), seed=1000 + draw)
        by = str(self.warm()) if whose == "student" else ""
        return self.made(path, prompts, by=by, seed=draw)

    def split_cache(self, split: str, what: str) -> Path:
        """The teacher's word on a split: its samples, its greedy answers, the data."""
        path, prompts = self.work / f"{split}-{what}", self.split_prompts(split)
        if what == "greedy":
            return self.made(path, prompts, temperature=0, method="label")
        if what == "data":
            return self.made(path, prompts, n=0)
        return self.made(path, prompts, n=self.args.samples, seed=1)

    def made(self, output: Path, prompts: Path, **options: Any) -> Path:
        """A finished cache, dumped now if it is not there."""
        if not is_whole(output):
            dump(self.dumping(output, prompts, **options))
        return output

    def dumping(
        self,
        output: Path,
        prompts: Path,
        *,
        by: str = "",
        n: int = 1,
        temperature: float = 1.0,
        seed: int = 0,
        method: str = "topk",
        batch_tokens: int = 4096,
    ) -> DumpConfig:
        """Answers to prompts, of the teacher or of `by`, as the teacher scores them; n=0: data."""
        generate = GenerateConfig()
        if n:
            generate = GenerateConfig(
                n=n,
                by=by,
                temperature=temperature,
                seed=seed,
                max_new_tokens=self.args.tokens,
            )
        return DumpConfig(
            output=str(output),
            teacher=TeacherConfig(
                path=self.teacher, dtype="float32", max_batch_tokens=batch_tokens
            ),
            source=SourceConfig(path=str(prompts), generate=generate),
            sequences=SequenceConfig(max_length=self.args.max_length, add_eos=bool(n)),
            truncation=Truncation(method="topk", k=self.args.k)
            if method == "topk"
            else Truncation(method="label"),
        )

    def prompts(self, seed: int) -> Path:
        """What students learn to continue: other files of the demo's text for each seed."""
        if self.args.prompts:
            return Path(self.args.prompts)
        draw = DRAW_OF_RATES if seed < 0 else seed
        path = self.work / f"prompts-{draw}.jsonl"
        return self.written(path, drawn("train", BYTES, draw), self.args.num_prompts)

    def split_prompts(self, split: str) -> Path:
        """What students are measured by."""
        if self.args.prompts:
            return Path(self.args.heldout)
        count = self.args.heldout_prompts if split == "heldout" else self.args.heldout_prompts // 2
        return self.written(self.work / f"{split}.jsonl", drawn(split, 10**9), count)

    def written(self, path: Path, texts: list[tuple[str, str]], count: int) -> Path:
        """Records of a prompt and the response that follows it in the text, if not there yet."""
        if not path.exists():
            tokenizer = AutoTokenizer.from_pretrained(self.teacher)
            records = list(windows(tokenizer, texts, self.args.tokens))
            step = max(1, len(records) // count)
            lines = [json.dumps(record) for record in records[::step][:count]]
            path.write_text("\n".join(lines) + "\n")
        return path

    def warm(self) -> Path:
        """The student that all begin from: given, or the demo's cut one, taught by the data."""
        if self.args.student:
            return Path(self.args.student)
        output = self.work / "warm-run"
        if not (output / "summary.json").exists():
            cut, text, cache = (self.work / x for x in ("cut", "warm.jsonl.zst", "cache-warm"))
            if not cut.exists():
                make_student(cut)
            if not is_whole(cache):
                write("train", text, WARM_BYTES, DRAW_OF_WARMUP)
                command("-m", "decant", "dump", "--config", "examples/demo/dump.yaml", "--output",
                        cache, "--source.path", text, "--truncation.method", "label")  # fmt: skip
            train(
                TrainConfig(
                    cache=str(cache),
                    output=str(output),
                    student=StudentConfig(path=str(cut)),
                    loss=CE,
                    steps=self.args.warm_steps,
                    batch_size=8,
                    optimizer=OptimizerConfig(lr=1e-3, warmup_ratio=0.05),
                    log_every_steps=1000,
                    plots=False,
                )
            )
        return output / "student"

    def speed(self) -> dict[str, Any]:
        """CPU seconds per sequence: answering and scoring, in batches of a step, and training.

        Of a large job less a small one, so that what starting takes cancels.
        """
        folder, small, found = self.work / "speed", self.args.batch_size, {}
        large = min(4, self.args.num_prompts // small) * small
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        lines = self.prompts(0).read_text().splitlines(keepends=True)
        for count in (small, large):
            (folder / f"{count}.jsonl").write_text("".join(lines[:count]))
        of_step = small * self.args.max_length
        whose = {"teacher": {}, "student": {"by": str(self.warm())}}
        for name, options in whose.items():
            spent = {}
            for count in (small, large):
                started = cpu_seconds()
                self.made(folder / f"{name}-{count}", folder / f"{count}.jsonl",
                          batch_tokens=of_step, **options)  # fmt: skip
                spent[count] = cpu_seconds() - started
            found[f"{name}_s"] = (spent[large] - spent[small]) / max(1, large - small)
        caches = {"teacher": self.cache("teacher", 0)}
        for steps in (2, 10):
            run = Run(variant="kl", rate=1e-5, steps=steps, seed=0)
            config = self.training(run, folder / str(steps), LossConfig(preset="kl"), caches)
            started = cpu_seconds()
            train(config)
            spent[-steps] = cpu_seconds() - started
        found["train_s"] = (spent[-10] - spent[-2]) / (8 * small)
        shutil.rmtree(folder)
        return {name: round(value, 5) for name, value in found.items()}


def windows(
    tokenizer: PreTrainedTokenizerBase, texts: list[tuple[str, str]], tokens: int
) -> Iterator[dict[str, str]]:
    """Texts cut into prompts of PROMPT tokens and the `tokens` that follow."""
    for name, text in texts:
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        for start in range(0, len(ids) - PROMPT - tokens + 1, PROMPT + tokens):
            middle = start + PROMPT
            prompt = tokenizer.decode(ids[start:middle])
            response = tokenizer.decode(ids[middle : middle + tokens])
            if "�" not in prompt + response:
                yield {"id": f"{name}@{start}", "prompt": prompt, "response": response}


def cpu_seconds() -> float:
    """Of this process and of those that it has waited for."""
    return sum(os.times()[:4])


def targets_of(cache: Path) -> int:
    """Targets that the teacher has scored."""
    totals = CacheReader(str(cache)).manifest.totals
    assert totals is not None
    return totals.targets
