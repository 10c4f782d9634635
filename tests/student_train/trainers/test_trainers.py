"""transformers' Trainer and TRL's SFTTrainer train as `student_train` does, and resume."""

import dataclasses
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM, TrainingArguments
from trl import SFTConfig

from decant.schemas import FormatError, Truncation
from decant.student_train import CacheStream, Distiller, LossConfig, Schedule, train
from decant.student_train.losses import sparse_divergence
from decant.student_train.trainers import (
    CacheDataset,
    DistillationSFTTrainer,
    DistillationTrainer,
)
from decant.student_train.trainers.distilling import RECORD
from tests.support import ROOT, caches, models, trainings
from tests.support.trainings import LOSS, NUM_SEQUENCES, trainer_arguments

STEPS = 9
SETTINGS = caches.Settings(truncation=Truncation(k=8))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`cache` of 24 sequences with ragged numbers of targets, `other`, and a `student`."""
    path = tmp_path_factory.mktemp("trainers")
    shards = caches.random_shards(SETTINGS, num_shards=4, sequences=NUM_SEQUENCES // 4)
    caches.write_cache(path / "cache", SETTINGS, shards)
    caches.write_cache(path / "other", SETTINGS, shards[:2])
    models.build_model("qwen2", vocab_size=50, initializer_range=0.1).save_pretrained(
        path / "student"
    )
    return path


def student_of(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder / "student")


def trainer_of(folder: Path, output: str, **changes: Any) -> DistillationTrainer:
    return DistillationTrainer(
        student_of(folder),
        trainer_arguments(folder / output, **changes),
        train_dataset=CacheDataset(folder / "cache"),
        eval_dataset=CacheDataset(folder / "cache", part="heldout", heldout_fraction=0.3),
        loss=LOSS,
    )


def curve(history: list[dict[str, Any]]) -> list[float]:
    return [entry["loss"] for entry in history if "loss" in entry]


def assert_same_weights(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-3, atol=1e-4)


@pytest.fixture(scope="module")
def alone(folder: Path) -> DistillationTrainer:
    """A whole training by one process, with checkpoints at steps 4 and 8 and evaluations."""
    trainer = trainer_of(
        folder, "alone", save_strategy="steps", save_steps=4, eval_strategy="epoch"
    )
    trainer.train()
    return trainer


def test_a_trainer_trains_as_student_train_does(folder: Path, alone: Any) -> None:
    """The same curve, weights and held-out figures, on the same data, accumulated, over epochs."""
    config = trainings.config_of_trainer(folder / "cache", folder / "student", folder / "ours")
    train(config)
    ours = trainings.losses(folder / "ours")
    assert len(ours) == STEPS and ours[-1] < ours[0] - 0.2
    assert curve(alone.state.log_history) == pytest.approx(ours, rel=1e-5)
    assert_same_weights(alone.model.state_dict(), trainings.weights(folder / "ours"))


def test_the_loss_is_that_of_the_models_logits(folder: Path) -> None:
    """Value and gradients: of a step's targets, the share of a batch in plain PyTorch."""
    trainer = trainer_of(folder, "logits")
    batch = next(iter(trainer.get_train_dataloader()))
    loss = trainer.compute_loss(trainer.model, batch, num_items_in_batch=100.0)
    loss.backward()
    plain = student_of(folder)
    logits = plain(**batch).logits.flatten(0, 1)[batch.predictors]
    kd = sparse_divergence(logits, batch.targets, "akl").sum()
    ce = torch.nn.functional.cross_entropy(logits, batch.labels, reduction="sum")
    expected = (kd + 0.3 * ce) / 100
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    for ours, theirs in zip(trainer.model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-5)


def test_a_resumed_training_ends_with_the_same_weights(folder: Path, alone: Any) -> None:
    """From the middle of the second epoch, bit for bit, with the rest of the curve."""
    (checkpoint,) = (folder / "alone").glob("checkpoint-4")
    again = trainer_of(folder, "resumed")
    again.train(resume_from_checkpoint=str(checkpoint))
    assert curve(again.state.log_history) == curve(alone.state.log_history)
    for name, value in again.model.state_dict().items():
        assert torch.equal(value, alone.model.state_dict()[name]), name


def test_a_checkpoint_of_other_data_is_refused(folder: Path, alone: Any) -> None:
    """The message names what differs; a checkpoint loads as any student."""
    checkpoint = folder / "alone/checkpoint-8"
    AutoModelForCausalLM.from_pretrained(checkpoint)
    other = DistillationTrainer(
        student_of(folder),
        trainer_arguments(folder / "elsewhere"),
        train_dataset=CacheDataset(folder / "cache", seed=1),
        loss=LOSS,
    )
    with pytest.raises(ValueError, match=r"cannot resume from .*cache: seed was 0, is 1"):
        other.train(resume_from_checkpoint=str(checkpoint))
    assert json.loads((checkpoint / RECORD).read_text())["num_sequences"] == NUM_SEQUENCES


def test_evaluation_is_the_mean_over_targets(folder: Path, alone: Any) -> None:
    """Whatever the batch size, against a loop over the held-out sequences; the best can be kept."""
    found = alone.evaluate()
    dataset = alone.eval_dataset
    sums = np.zeros(3)
    with torch.no_grad():
        for batch in dataset.stream(batch_size=1).one_epoch():
            logits = alone.model(**batch).logits.flatten(0, 1)[batch.predictors]
            kd = sparse_divergence(logits, batch.targets, "akl").sum()
            ce = torch.nn.functional.cross_entropy(logits, batch.labels, reduction="sum")
            sums += [float(kd), float(ce), batch.num_targets]
    assert found["eval_heldout_divergence"] == pytest.approx(sums[0] / sums[2], rel=1e-5)
    assert found["eval_heldout_ce"] == pytest.approx(sums[1] / sums[2], rel=1e-5)
    assert found["eval_loss"] == pytest.approx((sums[0] + 0.3 * sums[1]) / sums[2], rel=1e-5)
    with pytest.raises(ValueError, match=r"call evaluate\(a CacheDataset\)"):
        alone.predict(dataset)
    named = alone.evaluate({"a": dataset})
    assert named["eval_a_loss"] == found["eval_loss"]
    logged = [entry for entry in alone.state.log_history if "eval_loss" in entry]
    assert len(logged) >= 3 and logged[2]["eval_loss"] < logged[0]["eval_loss"]


def test_two_processes_train_like_one(folder: Path, alone: Any) -> None:
    """DDP by torchrun, each with half of each microbatch: the same curve, weights and figures.

    So does the plain loop of `examples/loops`, where rank and world size are said once.
    """
    with socket.socket() as free:
        free.bind(("", 0))
        port = str(free.getsockname()[1])
    command = ["torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    command += ["-m", "tests.support.trainer_job", str(folder), port]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", *command],
        cwd=ROOT,
        env={**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    history = json.loads((folder / "ddp/trainer_state.json").read_text())["log_history"]
    assert curve(history) == pytest.approx(curve(alone.state.log_history), rel=1e-5)
    evaluated = [
        [entry["eval_loss"] for entry in entries if "eval_loss" in entry][:3]
        for entries in (history, alone.state.log_history)
    ]
    assert evaluated[0] == pytest.approx(evaluated[1], rel=1e-4)
    ours = AutoModelForCausalLM.from_pretrained(folder / "ddp").state_dict()
    assert_same_weights(ours, alone.model.state_dict())
    plain = AutoModelForCausalLM.from_pretrained(folder / "ddp-plain").state_dict()
    assert_same_weights(plain, plain_loop(folder, batch_size=8).state_dict())


def plain_loop(folder: Path, batch_size: int) -> Any:
    """What the program of plain PyTorch trains in one process, at another batch size."""
    stream = CacheStream(folder / "cache", batch_size=batch_size)
    student = student_of(folder)
    model = Distiller(student, LossConfig(kind="fkl", ce_weight=0.3), stream.vocab_size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(2):
        for microbatches in stream.epoch_steps(2):
            num_targets = sum(batch.num_targets for batch in microbatches)
            for batch in microbatches:
                model(batch, num_targets).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return student


def sft_arguments(output: Path, **changes: Any) -> SFTConfig:
    """The same for `SFTTrainer`."""
    arguments = trainer_arguments(output).to_dict()
    names = {field.name for field in dataclasses.fields(TrainingArguments) if field.init}
    kept = {name: value for name, value in arguments.items() if name in names}
    return SFTConfig(**{**kept, **changes})


def test_sft_trainer_trains_the_same(folder: Path, alone: Any) -> None:
    """The loss curve of `SFTTrainer` on the same cache, and the same weights."""
    trainer = DistillationSFTTrainer(
        student_of(folder),
        sft_arguments(folder / "sft"),
        train_dataset=CacheDataset(folder / "cache"),
        processing_class=models.build_tokenizer(),
        loss=LOSS,
    )
    trainer.train()
    assert curve(trainer.state.log_history) == pytest.approx(
        curve(alone.state.log_history), rel=1e-5
    )
    assert_same_weights(trainer.model.state_dict(), alone.model.state_dict())


def test_sft_trainer_trains_an_adapter(folder: Path, alone: Any) -> None:
    """LoRA by TRL's `peft_config`: the base stays, the adapter is saved, and loads with it."""
    trainer = DistillationSFTTrainer(
        student_of(folder),
        sft_arguments(folder / "lora", learning_rate=3e-2),
        train_dataset=CacheDataset(folder / "cache"),
        processing_class=models.build_tokenizer(),
        loss=LOSS,
        peft_config=LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    trainer.train()
    trainer.save_model()
    found = curve(trainer.state.log_history)
    assert found[0] == pytest.approx(curve(alone.state.log_history)[0], rel=1e-4)
    assert found[-1] < 0.95 * found[0]
    base = student_of(folder)
    before = {name: value.clone() for name, value in base.state_dict().items()}
    adapted = PeftModel.from_pretrained(base, folder / "lora")
    batch = next(iter(trainer.get_train_dataloader()))
    with torch.no_grad():
        torch.testing.assert_close(adapted(**batch).logits, trainer.model.eval()(**batch).logits)
    trained = adapted.get_base_model().state_dict()
    for name, value in before.items():
        layer, _, field = name.rpartition(".")
        kept = trained[name if name in trained else f"{layer}.base_layer.{field}"]
        assert torch.equal(kept, value), name


def test_schedules_and_packing_are_honoured(folder: Path) -> None:
    """A schedule of the loss runs over the trainer's steps; packed rows give the same loss."""
    schedule = Schedule(values=[1.0, 0.0], at=[0.0, 1.0])
    found = []
    for packing in ("none", "rows"):
        trainer = DistillationTrainer(
            student_of(folder),
            trainer_arguments(folder / f"schedule-{packing}", num_train_epochs=1),
            train_dataset=CacheDataset(folder / "cache"),
            loss=LossConfig(kind="fkl", kd_weight=schedule, ce_weight=0.0001),
            packing=packing,
        )
        trainer.train()
        found.append(curve(trainer.state.log_history))
    assert found[0] == pytest.approx(found[1], rel=1e-4)
    assert found[0][-1] < 0.01 < found[0][0]


def test_a_trainer_without_our_loss_says_what_is_missing(folder: Path) -> None:
    """A plain `Trainer` on the same data does not train without the teacher in silence."""
    from transformers import Trainer

    from decant.student_train.trainers import Collator

    dataset = CacheDataset(folder / "cache")
    plain = Trainer(
        student_of(folder),
        trainer_arguments(folder / "plain"),
        train_dataset=dataset,
        data_collator=Collator(dataset),
    )
    with pytest.raises(ValueError, match="did not return a loss from the inputs"):
        plain.train()


def refusals() -> dict[str, tuple[dict[str, Any], str]]:
    """What `DistillationTrainer` is given, and what it says."""
    return {
        "temperature": ({"loss": LossConfig(temperature=2.0)}, r"temperature=\[2\.0\]"),
        "dataset": ({"train_dataset": [1, 2]}, "must be a CacheDataset, found list"),
        "heldout": ({"eval_dataset": [1, 2]}, "must be a CacheDataset, found list"),
        "compile": ({"torch_compile": True}, "torch_compile=True has no effect"),
        "smoothing": ({"label_smoothing_factor": 0.1}, "label_smoothing_factor=0.1 has no effect"),
        "order": ({"train_sampling_strategy": "sequential"}, "'sequential' has no effect"),
        "packing": ({"packing": "both"}, "packing 'both' is not one of"),
    }


@pytest.mark.parametrize("name", refusals())
def test_what_would_be_passed_over_is_refused(folder: Path, name: str) -> None:
    """Before anything is trained, naming the argument."""
    changes, message = refusals()[name]
    ours = {"loss": LOSS, "packing": "none", "eval_dataset": None}
    ours["train_dataset"] = CacheDataset(folder / "cache")
    arguments = {key: value for key, value in changes.items() if key not in ours}
    ours |= {key: value for key, value in changes.items() if key in ours}
    with pytest.raises(ValueError, match=message):
        DistillationTrainer(
            student_of(folder), trainer_arguments(folder / "refused", **arguments), **ours
        )


def test_sft_settings_for_data_are_refused(folder: Path) -> None:
    """They would be passed over: the cache has the data."""
    for changes, message in (
        ({"packing": True}, "give the trainer packing='rows'"),
        ({"loss_type": "dft"}, "loss_type='dft' has no effect"),
    ):
        with pytest.raises(ValueError, match=message):
            DistillationSFTTrainer(
                student_of(folder),
                sft_arguments(folder / "refused", **changes),
                train_dataset=CacheDataset(folder / "cache"),
            )


def test_sharded_students_are_for_our_own_loop(folder: Path) -> None:
    """FSDP and DeepSpeed are refused before training, and arguments of another trainer."""
    for kind in ("is_fsdp_enabled", "is_deepspeed_enabled"):
        trainer = trainer_of(folder, "sharded")
        setattr(trainer, kind, True)
        with pytest.raises(ValueError, match="for FSDP2 and DeepSpeed: accelerate launch"):
            trainer.distil(trainer.train_dataset, None, LOSS, "none")
    with pytest.raises(ValueError, match="args must be an SFTConfig, found TrainingArguments"):
        DistillationSFTTrainer(
            student_of(folder),
            trainer_arguments(folder / "x"),
            train_dataset=CacheDataset(folder / "cache"),
        )


def test_prompt_tuning_is_refused(folder: Path) -> None:
    """Its tokens would move the places of the targets."""
    tuned = get_peft_model(
        student_of(folder), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    )
    with pytest.raises(ValueError, match="puts tokens of its own before"):
        DistillationTrainer(
            tuned, trainer_arguments(folder / "x"), train_dataset=CacheDataset(folder / "cache")
        )


def test_a_student_of_another_tokenizer_is_refused(
    cache: Path, other_teacher_path: Path, tmp_path: Path
) -> None:
    """By the tokenizer where it came from, or the one that is given; without one it says so."""
    data = {"train_dataset": CacheDataset(cache)}
    arguments = trainer_arguments(tmp_path / "out")
    student = AutoModelForCausalLM.from_pretrained(other_teacher_path)
    with pytest.raises(FormatError, match=r"280.*`decant train` with tokenizer_mismatch: align"):
        DistillationTrainer(student, arguments, **data)
    models.build_model().save_pretrained(tmp_path / "bare")
    bare = AutoModelForCausalLM.from_pretrained(tmp_path / "bare")
    with pytest.raises(ValueError, match="give processing_class"):
        DistillationTrainer(bare, arguments, **data)
    with pytest.raises(FormatError, match="280"):
        DistillationTrainer(bare, arguments, processing_class=models.build_tokenizer(280), **data)
    trainer = DistillationTrainer(
        bare, arguments, processing_class=models.build_tokenizer(), **data
    )
    trainer.save_model()
    assert (tmp_path / "out/tokenizer.json").exists()
