"""From text to a student that loads, through the public commands; and offline equals online."""

import dataclasses
import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from decant.schemas import Truncation
from decant.storage import CacheReader, verify
from decant.student_train import (
    CacheStream,
    Distiller,
    EvalConfig,
    LossConfig,
    OptimizerConfig,
    StudentConfig,
    TrainConfig,
    train,
)
from decant.teacher_dump import DumpConfig, dump
from tests.support import ROOT, models

STUDENT = {
    "model_type": "llama",
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 64,
    "max_position_embeddings": 128,
}


def command(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run `python -m ...` in the project's root."""
    return subprocess.run(
        [sys.executable, "-m", *map(str, arguments)], cwd=ROOT, capture_output=True, text=True
    )


def test_the_four_packages_belong_to_this_distribution() -> None:
    """Names as plain as `storage` could come from elsewhere: they must not."""
    owners = importlib.metadata.packages_distributions()
    for name in ("schemas", "storage", "teacher_dump", "student_train"):
        assert set(owners[name]) == {"decant"}
        assert Path(__import__(name).__file__).parents[1] == ROOT


def test_the_commands_from_text_to_a_student(
    teacher_path: Path, texts_path: Path, tmp_path: Path
) -> None:
    """Dump -> verify -> inspect -> train -> reload, each a process with exit code 0."""
    cache, run = tmp_path / "cache", tmp_path / "run"
    (tmp_path / "dump.yaml").write_text(
        f"output: {cache}\n"
        f"teacher: {{path: {teacher_path}, dtype: float32}}\n"
        f"source: {{path: {texts_path}}}\n"
        "sequences: {max_length: 64}\n"
        "truncation: {k: 8}\n"
    )
    (tmp_path / "train.yaml").write_text(
        f"cache: {cache}\noutput: {run}\nsteps: 3\nbatch_size: 4\n"
        f"student: {{config: {json.dumps(STUDENT)}}}\n"
        "loss: {kind: akl, ce_weight: 0.5}\neval: {heldout_fraction: 0.1}\n"
    )
    for arguments in (
        ("teacher_dump", "plan", "--config", tmp_path / "dump.yaml", "--sample", 4),
        ("teacher_dump", "run", "--config", tmp_path / "dump.yaml"),
        ("storage", "verify", cache),
        ("storage", "inspect", cache),
        ("student_train", "--config", tmp_path / "train.yaml"),
    ):
        done = command(*arguments)
        assert done.returncode == 0, (arguments, done.stderr[-2000:])
    held = json.loads(command("storage", "inspect", cache, "--json").stdout)
    assert held["sequences"] == len(CacheReader(cache)) == 90
    student = AutoModelForCausalLM.from_pretrained(run / "student")
    assert student.config.vocab_size == models.VOCAB_SIZE
    summary = json.loads((run / "summary.json").read_text())
    assert summary["steps"] == 3 and summary["heldout_ce"] > 0


def test_an_unknown_key_is_refused_in_one_line(cache: Path) -> None:
    """Exit code 2 and no traceback."""
    for arguments in (
        ("student_train", "--cache", cache, "--output", "x", "--stepz", 3),
        ("teacher_dump", "run", "--outputt", "x"),
    ):
        done = command(*arguments)
        assert done.returncode == 2
        assert "Traceback" not in done.stderr
        assert "stepz" in done.stderr or "outputt" in done.stderr


@pytest.fixture(scope="module")
def full_cache(dump_config: DumpConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache with k = V: nothing is left out."""
    path = tmp_path_factory.mktemp("full") / "cache"
    truncation = Truncation(k=models.VOCAB_SIZE)
    dump(dataclasses.replace(dump_config, output=str(path), truncation=truncation))
    return path


@pytest.mark.parametrize("kind", ["fkl", "rkl", "akl"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_offline_equals_online(
    full_cache: Path, teacher_path: Path, kind: str, temperature: float
) -> None:
    """With k = V the student's gradient from the cache is the one with the live teacher."""
    stream = CacheStream(full_cache, batch_size=4, temperature=temperature)
    batch = next(iter(stream))
    torch.manual_seed(0)
    student = models.build_model(seed=1, vocab_size=models.VOCAB_SIZE)
    loss = LossConfig(kind=kind, temperature=temperature)
    model = Distiller(student, loss, models.VOCAB_SIZE)
    model(batch).loss.backward()
    offline = {name: p.grad.clone() for name, p in student.named_parameters()}
    student.zero_grad()

    teacher = AutoModelForCausalLM.from_pretrained(teacher_path, dtype=torch.float32)
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    with torch.no_grad():
        theirs = teacher(**inputs).logits[..., : models.VOCAB_SIZE].flatten(0, 1)
    ours = student(**inputs).logits.flatten(0, 1)
    log_p = torch.log_softmax(theirs[batch.predictors] / temperature, dim=-1)
    log_q = torch.log_softmax(ours[batch.predictors] / temperature, dim=-1)
    p, q = log_p.exp(), log_q.exp()
    forward, reverse = p * (log_p - log_q), q * (log_q - log_p)
    if kind == "fkl":
        terms = forward.sum(-1)
    elif kind == "rkl":
        terms = reverse.sum(-1)
    else:  # the head ends before the cumulative teacher mass passes 1/2; rank 1 is always in it
        order = p.argsort(dim=-1, descending=True)
        head = torch.zeros_like(p, dtype=torch.bool)
        head.scatter_(-1, order, p.gather(-1, order).cumsum(-1) <= 0.5)
        head.scatter_(-1, order[:, :1], True)
        gap = (p - q).abs().detach()
        weight = (gap * head).sum(-1) / gap.sum(-1)
        terms = weight * forward.sum(-1) + (1 - weight) * reverse.sum(-1)
    (terms.mean() * temperature**2).backward()
    for name, parameter in student.named_parameters():
        assert torch.allclose(offline[name], parameter.grad, rtol=1e-4, atol=1e-5), name


def test_training_curves_of_a_truncated_cache_stay_with_the_full_one(
    full_cache: Path, dump_config: DumpConfig, tmp_path: Path
) -> None:
    """Keeping 64 of 300 ids with the exact tail trains like keeping all of them."""
    path = tmp_path / "k64"
    measure = tmp_path / "k128"
    for output, k in ((path, 64), (measure, 128)):
        dump(dataclasses.replace(dump_config, output=str(output), truncation=Truncation(k=k)))
    assert verify(path).ok
    curves = []
    for cache in (full_cache, path):
        output = tmp_path / f"run-{cache.parent.name}-{cache.name}"
        train(
            TrainConfig(
                cache=str(cache),
                output=str(output),
                student=StudentConfig(config=STUDENT),
                loss=LossConfig(kind="fkl"),
                steps=60,
                batch_size=8,
                optimizer=OptimizerConfig(lr=1e-2, warmup_steps=5),
                eval=EvalConfig(cache=str(measure), every_steps=10),
            )
        )
        lines = [json.loads(x) for x in (output / "metrics.jsonl").read_text().splitlines()]
        curves.append([x["heldout_divergence"] for x in lines if "heldout_divergence" in x])
    assert len(curves[0]) == 7  # step 0 is the first
    assert curves[0][-1] < 0.9 * curves[0][0], "nothing was learned, so nothing was compared"
    assert curves[1] == pytest.approx(curves[0], rel=0.05)
