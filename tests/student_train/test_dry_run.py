"""A dry run tells what a run needs and writes nothing; the example configs are tried with it."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from decant.storage.cli.config import parse_config
from decant.student_train import AdapterConfig, StudentConfig, TrainConfig, train
from decant.student_train.__main__ import main
from decant.student_train.dry_run import dry_run
from tests.support import ROOT, models
from tests.support.trainings import STUDENT, config

EXAMPLES = ROOT / "examples/train"


def parsed(path: Path, *arguments: str) -> TrainConfig:
    """What the command line makes of an example."""
    (run,) = parse_config([TrainConfig], ["--config", str(path), *arguments])
    return run


def figure(report: str, name: str) -> str:
    """The first line of a report about something."""
    (found,) = re.findall(rf"^{name}  +(.*)$", report, re.MULTILINE)
    return found


def test_a_dry_run_counts_and_writes_nothing(cache: Path, tmp_path: Path) -> None:
    """Parameters, memory, steps and tokens are those of the run that follows."""
    run = config(cache, tmp_path / "run", steps=5, gradient_accumulation=2)
    report = dry_run(run)
    assert not (tmp_path / "run").exists()
    train(run)
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "run/student")
    count = sum(p.numel() for p in student.parameters())
    assert figure(report, "parameters") == f"{count:,} held"
    assert f"{count:,} trained" in report
    assert figure(report, "weights") == f"{4 * count / 1e6:.2f} MB per process"
    moments = 8 * count + 4 * len(list(student.parameters()))
    assert figure(report, "optimizer") == f"{moments / 1e6:.2f} MB"
    assert figure(report, "steps") == "5 of 8 sequences: 4 x 2 x 1"
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").open()]
    assert figure(report, "epochs") == f"{lines[-1]['epoch']:.2f}"


def test_the_command_prints_the_report(
    cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 0, with an adapter: what is trained is a part of what is held."""
    models.save_teacher(tmp_path / "base", seed=3)
    fields = {
        "cache": str(cache),
        "output": str(tmp_path / "run"),
        "epochs": 2,
        "student": {"path": str(tmp_path / "base")},
        "adapter": {"r": 2},
    }
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(fields))
    assert main(["--config", str(tmp_path / "train.yaml"), "--dry-run"]) == 0
    report = capsys.readouterr().out
    held, trained = re.findall(r"([\d,]+) (?:held|trained)", report)
    assert 0 < int(trained.replace(",", "")) < int(held.replace(",", "")) / 5
    assert report.endswith("nothing was written\n")
    assert not (tmp_path / "run").exists()


def test_a_dry_run_finds_what_is_wrong(cache: Path, tmp_path: Path) -> None:
    """What training would refuse is refused."""
    small = StudentConfig(config={**STUDENT, "vocab_size": 64})
    with pytest.raises(ValueError, match="64 output rows"):
        dry_run(config(cache, tmp_path / "run", student=small))


def test_the_tiny_example_trains(cache: Path, tmp_path: Path) -> None:
    """As it stands, to a student that learned something."""
    run = parsed(
        EXAMPLES / "tiny-cpu.yaml", "--cache", str(cache), "--output", str(tmp_path / "run")
    )
    summary = train(run)
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").open()]
    found = [line["heldout_divergence"] for line in lines if "heldout_divergence" in line]
    assert summary["heldout_divergence"] == min(found)
    assert (tmp_path / "run/student/README.md").exists()


@pytest.mark.parametrize("name", ["one-gpu.yaml", "eight-gpus-fsdp2.yaml", "on-policy.yaml"])
def test_the_large_examples_are_built_with_a_tiny_student(
    cache: Path, tmp_path: Path, name: str
) -> None:
    """Every key is known and fits the others; on a CPU a step is taken."""
    run: Any = parsed(EXAMPLES / name)
    assert run.student.path and run.eval.every_steps and run.mixed_precision == "bf16"
    changes: dict[str, Any] = {
        "output": str(tmp_path / "run"),
        "student": StudentConfig(config={**STUDENT, "max_position_embeddings": 256}),
        "mixed_precision": "no",  # one process has one precision
        "eval": dataclasses.replace(run.eval, heldout_fraction=0.2),
        "optimizer": dataclasses.replace(run.optimizer, warmup_steps=0),  # of so few steps
    }
    if run.mixture:
        changes["mixture"] = [
            dataclasses.replace(
                s,
                cache=str(cache),
                loss=s.loss and dataclasses.replace(s.loss, clip=None),  # it has no sampler
            )
            for s in run.mixture
        ]
    else:
        changes["cache"] = str(cache)
    report = dry_run(dataclasses.replace(run, **changes))
    assert "one step" in report and not (tmp_path / "run").exists()


def test_the_adapter_block_of_an_example_is_valid() -> None:
    """The lines that are commented out are YAML that makes configs."""
    text = (EXAMPLES / "one-gpu.yaml").read_text()
    lines = [line[2:] for line in text.splitlines() if line.startswith(("# student:", "# adapter"))]
    fields = yaml.safe_load("\n".join(lines))
    assert AdapterConfig(**fields["adapter"]).quantization == "4bit"
    assert getattr(torch, StudentConfig(**fields["student"]).dtype) == torch.bfloat16
