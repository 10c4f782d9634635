"""Two processes train like one: DDP, FSDP2 and DeepSpeed, launched with the configs in examples/.

Each launch runs several trainings, and the tests read what they left. The batch of a step is the
same 12 sequences throughout: one process takes 6, two take 3 each, twice.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import DeepSpeedPlugin
from transformers import AutoConfig, AutoModelForCausalLM

from decant.schemas import Truncation
from decant.student_train import (
    CacheStream,
    EvalConfig,
    LossConfig,
    OptimizerConfig,
    StudentConfig,
    TrainConfig,
    train,
)
from decant.student_train.config.alignment import AlignConfig
from decant.student_train.config.mixture import CacheShare, OwnLoss
from decant.student_train.runtime.launch import tell_deepspeed
from tests.support import ROOT, alignments, caches
from tests.support.distributed_job import Job
from tests.support.trainings import STUDENT, losses, weights

BART: dict[str, Any] = {
    "student": StudentConfig(
        config={
            "model_type": "bart",
            "d_model": 32,
            "is_decoder": True,
            "decoder_layers": 1,
            "decoder_attention_heads": 2,
            "decoder_ffn_dim": 48,
            "max_position_embeddings": 128,
            "vocab_size": 50,
            "dropout": 0.0,
        }
    ),
    "packing": "none",
}
FIELDS = {**STUDENT, "num_hidden_layers": 2, "vocab_size": 50}
STEPS, SAVED = 6, 3
NUM_SEQUENCES, SEQUENCES_PER_STEP = 36, 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of sequences with ragged numbers of targets."""
    path = tmp_path_factory.mktemp("distributed")
    settings = caches.Settings(truncation=Truncation(k=8))
    shards = caches.random_shards(settings, num_shards=4, sequences=NUM_SEQUENCES // 4)
    caches.write_cache(path / "cache", settings, shards)
    wider = caches.Settings(truncation=Truncation(k=9))
    shards = caches.random_shards(wider, num_shards=2, sequences=NUM_SEQUENCES // 4, seed=7)
    caches.write_cache(path / "heldout", wider, shards)
    return path


def config(folder: Path, name: str, **changes: Any) -> TrainConfig:
    """Two processes' training; a checkpoint stays from the middle of it."""
    base = TrainConfig(
        cache=str(folder / "cache"),
        output=str(folder / name),
        student=StudentConfig(config=FIELDS),
        loss=LossConfig(kind="akl", ce_weight=0.3),
        steps=STEPS,
        batch_size=3,
        gradient_accumulation=2,
        packing="rows",
        optimizer=OptimizerConfig(lr=1e-2, warmup_steps=2, max_grad_norm=0.5),
        eval=EvalConfig(cache=str(folder / "heldout"), batch_size=5),
        log_every_steps=1,
        save_every_steps=SAVED,
    )
    return dataclasses.replace(base, **changes)


@pytest.fixture(scope="module")
def alone(folder: Path) -> Path:
    """The training of one process."""
    train(config(folder, "alone", batch_size=6))
    return folder / "alone"


def launch(folder: Path, kind: str, jobs: list[Job]) -> list[dict[str, Any]]:
    """Run jobs in two processes under `examples/accelerate/KIND.yaml`; what each process found."""
    path = folder / f"{kind}.pickle"
    path.write_bytes(pickle.dumps(jobs))
    command = ["accelerate.commands.launch", "--num_processes", "2"]
    command += ["--config_file", f"examples/accelerate/{kind}.yaml"]
    command += ["-m", "tests.support.distributed_job", str(path)]
    device = "DS_ACCELERATOR" if kind.startswith("deepspeed") else "ACCELERATE_USE_CPU"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", *command],
        cwd=ROOT,
        env={**os.environ, device: "cpu" if device == "DS_ACCELERATOR" else "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(path.with_suffix(f".{rank}.json").read_text()) for rank in (0, 1)]


def seen(found: list[dict[str, Any]], name: str) -> list[str]:
    """The samples that both processes took, sorted."""
    assert all(not process[name]["error"] for process in found), found
    return sorted(sample for process in found for sample in process[name]["seen"])


def samples(folder: Path, first: int, stop: int) -> list[str]:
    """The samples of places in the order that a run takes, sorted."""
    stream = CacheStream(folder / "cache", batch_size=1)
    stream.consumed = first
    batches = iter(stream)
    return sorted(sample for _ in range(first, stop) for sample in next(batches).sample_ids)


def assert_same_run(ours: Path, theirs: Path, first: int = 0) -> None:
    """The same loss curve, figures on held-out data, and weights of the saved student."""
    assert losses(ours) == pytest.approx(losses(theirs)[first:], rel=1e-5)
    figures = [json.loads((run / "summary.json").read_text()) for run in (ours, theirs)]
    assert figures[0]["heldout_ce"] == pytest.approx(figures[1]["heldout_ce"], rel=1e-4)
    expected = weights(theirs)
    found = weights(ours)
    assert found.keys() == expected.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=1e-4)


@pytest.fixture(scope="module")
def aligned(
    folder: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, TrainConfig]:
    """Trainings of a student of another tokenizer, by how many processes take part."""
    tokenizer = tmp_path_factory.mktemp("tokenizer")
    alignments.save(alignments.byte_level(310, digits=True), tokenizer)
    fields = {name: value for name, value in FIELDS.items() if name != "vocab_size"}
    one = config(
        folder,
        "aligned-alone",
        cache=str(cache),
        student=StudentConfig(config=fields, tokenizer=str(tokenizer)),
        tokenizer_mismatch="align",
        align=AlignConfig(max_left_out=0.2),
        eval=EvalConfig(heldout_fraction=0.1),
        batch_size=6,
    )
    two = dataclasses.replace(one, output=str(folder / "ddp-aligned"), batch_size=3)
    return {"one": one, "two": two}


def mixed(folder: Path, name: str, **changes: Any) -> TrainConfig:
    """A training on two caches, each with a loss of its own."""
    own = OwnLoss(kind="skew_fkl", options={"lam": 0.2}, gap=0.05, kd_weight=0.5, ce_weight=0.1)
    shares = [
        CacheShare(cache=str(folder / "cache"), weight=5),
        CacheShare(cache=str(folder / "heldout"), weight=3, loss=own),
    ]
    return config(folder, name, cache="", mixture=shares, eval=EvalConfig(), **changes)


@pytest.fixture(scope="module")
def ddp(folder: Path, alone: Path, aligned: dict[str, TrainConfig]) -> list[dict[str, Any]]:
    """All trainings under DDP."""
    broken = AutoModelForCausalLM.from_config(AutoConfig.for_model(**FIELDS))
    broken.model.norm.weight.data[0] = float("nan")
    broken.save_pretrained(folder / "broken")
    student = StudentConfig(path=str(folder / "broken"))
    return launch(
        folder,
        "ddp",
        [
            Job("ddp", config(folder, "ddp")),
            Job("ddp-aligned", aligned["two"]),
            Job("ddp-on", config(folder, "ddp-on"), start_from=str(alone)),
            Job("ddp-grown", config(folder, "ddp-grown", batch_size=6), start_from=str(alone)),
            Job("ddp-changed", config(folder, "ddp-changed", batch_size=5), str(alone)),
            Job("ddp-broken", config(folder, "ddp-broken", student=student)),
            Job("ddp-bart", config(folder, "ddp-bart", **BART)),
            Job("ddp-mixed", mixed(folder, "ddp-mixed")),
            Job("ddp-apart", config(folder, "ddp-apart"), second=config(folder, "ddp-apart-1")),
            Job(
                "ddp-caches",
                config(folder, "ddp-caches"),
                second=config(folder, "ddp-caches", cache=str(folder / "heldout")),
            ),
            Job("ddp-half", config(folder, "ddp"), second=config(folder, "ddp-half")),
        ],
    )


def test_two_processes_train_like_one(ddp: Any, folder: Path, alone: Path) -> None:
    """Accumulated, packed, with ragged numbers of targets: the same curve, figures and weights."""
    assert_same_run(folder / "ddp", alone)
    assert seen(ddp, "ddp") == samples(folder, 0, STEPS * SEQUENCES_PER_STEP)


def test_two_processes_align_like_one(
    ddp: Any, folder: Path, aligned: dict[str, TrainConfig]
) -> None:
    """A student of another tokenizer: the same curve, figures per byte and weights."""
    assert all(not process["ddp-aligned"]["error"] for process in ddp), ddp
    figures = train(aligned["one"])
    assert_same_run(folder / "ddp-aligned", folder / "aligned-alone")
    found = json.loads((folder / "ddp-aligned/summary.json").read_text())
    for name in ("heldout_bits_per_byte", "heldout_divergence_per_byte"):
        assert found[name] == pytest.approx(figures[name], rel=1e-4)


def test_two_processes_take_the_losses_of_a_mixture_like_one(ddp: Any, folder: Path) -> None:
    """Each cache with its own: the same curve, parts of each cache, gradients and weights."""
    assert all(not process["ddp-mixed"]["error"] for process in ddp), ddp
    train(mixed(folder, "mixed", batch_size=6))
    ours, theirs = (
        [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("ddp-mixed", "mixed")
    )
    names = ("loss", "kd/cache", "kd/heldout", "ce/cache", "ce/heldout", "grad_norm")
    assert len(ours) == len(theirs) == STEPS
    for our, their in zip(ours, theirs, strict=True):
        expected = [their[name] for name in names]
        assert [our[name] for name in names] == pytest.approx(expected, rel=1e-4)
    alone = weights(folder / "mixed")
    for name, value in weights(folder / "ddp-mixed").items():
        torch.testing.assert_close(value, alone[name], rtol=1e-3, atol=1e-4)


def test_one_process_goes_on_as_two(ddp: Any, folder: Path, alone: Path) -> None:
    """With the samples not yet seen, to the same end."""
    assert_same_run(folder / "ddp-on", alone, SAVED)
    first = SAVED * SEQUENCES_PER_STEP
    assert seen(ddp, "ddp-on") == samples(folder, first, STEPS * SEQUENCES_PER_STEP)


def test_two_processes_go_on_as_one(ddp: Any, folder: Path, alone: Path) -> None:
    """The other way round."""
    name = f"checkpoints/step-{SAVED:08}"
    shutil.copytree(folder / "ddp" / name, folder / "shrunk" / name)
    train(config(folder, "shrunk", batch_size=6))
    assert_same_run(folder / "shrunk", alone, SAVED)


def test_more_processes_may_take_larger_steps(ddp: Any, folder: Path) -> None:
    """Twice the processes with the same config: what follows is the order behind the checkpoint."""
    first = SAVED * SEQUENCES_PER_STEP
    stop = first + (STEPS - SAVED) * 2 * SEQUENCES_PER_STEP
    assert seen(ddp, "ddp-grown") == samples(folder, first, stop)


def test_steps_of_another_size_are_refused(ddp: Any) -> None:
    """Where the config changed them; the message says what to keep."""
    for process in ddp:
        assert "steps of 12 sequences" in process["ddp-changed"]["error"]
        assert "Keep batch_size * gradient_accumulation" in process["ddp-changed"]["error"]


def test_samples_of_all_processes_are_named(ddp: Any, folder: Path) -> None:
    """When the loss stops being a number."""
    named = [process["ddp-broken"]["error"] for process in ddp]
    assert all("loss is nan" in error for error in named)
    expected = samples(folder, 0, SEQUENCES_PER_STEP)
    assert all(sample in error for sample in expected for error in named)


def test_a_student_with_parts_that_text_does_not_reach_trains(ddp: Any, folder: Path) -> None:
    """A decoder without the encoder that it could attend to; those weights stay as they are."""
    assert all(not process["ddp-bart"]["error"] for process in ddp), ddp
    train(config(folder, "bart", batch_size=6, **BART))
    assert_same_run(folder / "ddp-bart", folder / "bart")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("ddp-apart", r"ddp-apart(-1)? is another folder on .* than for process 0"),
        ("ddp-caches", "do not agree: the caches' ids is "),
        ("ddp-half", "do not agree: checkpoints in output is .*step-00000003.* for process 0"),
    ],
)
def test_processes_that_see_different_files_stop(ddp: Any, name: str, message: str) -> None:
    """All of them, before they train apart or wait for ever, and each says why."""
    for process in ddp:
        assert re.search(message, process[name]["error"]), process[name]


def test_fsdp2_trains_saves_and_resumes_like_one_process(folder: Path, alone: Path) -> None:
    """Layers are units of their own; the sharded student is saved whole; bf16 stays close."""
    found = launch(
        folder,
        "fsdp2",
        [
            Job("fsdp2", config(folder, "fsdp2")),
            Job("fsdp2-on", config(folder, "fsdp2-on"), start_from=str(folder / "fsdp2")),
            Job("fsdp2-bf16", config(folder, "fsdp2-bf16", mixed_precision="bf16", steps=3)),
        ],
    )
    assert all(process["fsdp2"]["units"] == [1 + FIELDS["num_hidden_layers"]] for process in found)
    assert_same_run(folder / "fsdp2", alone)
    assert_same_run(folder / "fsdp2-on", alone, SAVED)
    first = SAVED * SEQUENCES_PER_STEP
    assert seen(found, "fsdp2-on") == samples(folder, first, STEPS * SEQUENCES_PER_STEP)
    assert len(seen(found, "fsdp2-bf16")) == 3 * SEQUENCES_PER_STEP
    assert losses(folder / "fsdp2-bf16")[0] == pytest.approx(losses(alone)[0], rel=2e-2)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_trains_saves_and_resumes_like_one_process(
    folder: Path, alone: Path, stage: int
) -> None:
    """ZeRO with accumulated gradients, clipping and its own checkpoints; the saved student."""
    pytest.importorskip("deepspeed")
    name = f"zero{stage}"
    found = launch(
        folder,
        f"deepspeed_{name}",
        [
            Job(name, config(folder, name)),
            Job(f"{name}-on", config(folder, f"{name}-on"), start_from=str(folder / name)),
        ],
    )
    assert_same_run(folder / name, alone)
    assert_same_run(folder / f"{name}-on", alone, SAVED)
    first = SAVED * SEQUENCES_PER_STEP
    assert seen(found, f"{name}-on") == samples(folder, first, STEPS * SEQUENCES_PER_STEP)


@pytest.mark.slow
def test_a_deepspeed_config_that_says_otherwise_is_refused(folder: Path) -> None:
    """Ours is what counts, so theirs would have no effect."""
    pytest.importorskip("deepspeed")
    plugin = DeepSpeedPlugin(zero_stage=2, gradient_accumulation_steps=4)
    with pytest.raises(ValueError, match="gradient_accumulation_steps 4, this config gradient_acc"):
        tell_deepspeed(plugin, config(folder, "refused"))
    plugin = DeepSpeedPlugin(zero_stage=2)
    tell_deepspeed(plugin, config(folder, "refused"))
    assert plugin.deepspeed_config["gradient_clipping"] == 0.5
    assert plugin.deepspeed_config["gradient_accumulation_steps"] == 2
