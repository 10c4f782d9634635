"""Trainings in tests: their config, and what they leave."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, TrainingArguments

from decant.student_train import (
    LossConfig,
    OptimizerConfig,
    StudentConfig,
    TrainConfig,
)

STUDENT = {
    "model_type": "llama",
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 64,
    "max_position_embeddings": 128,
    "tie_word_embeddings": True,
}


def config(cache: Path, output: Path, **changes: object) -> TrainConfig:
    base = TrainConfig(
        cache=str(cache),
        output=str(output),
        student=StudentConfig(config=STUDENT),
        loss=LossConfig(kind="fkl", kd_weight=1.0, ce_weight=0.3),
        steps=6,
        batch_size=4,
        optimizer=OptimizerConfig(lr=1e-2, warmup_steps=2),
        log_every_steps=1,
    )
    return dataclasses.replace(base, **changes)


def losses(output: Path) -> list[float]:
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def weights(output: Path) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(output / "student").state_dict()


LOSS = LossConfig(kind="akl", kd_weight=1.0, ce_weight=0.3)
"""What the trainers of others are compared with ours on."""
NUM_SEQUENCES, SEQUENCES_PER_STEP = 24, 8


def trainer_arguments(output: Path, **changes: Any) -> TrainingArguments:
    """Arguments of a `Trainer` that say what `config_of_trainer` says to `train`."""
    base: dict[str, Any] = {
        "output_dir": str(output),
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "num_train_epochs": 3,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "adam_beta2": 0.95,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "bf16": False,
    }
    return TrainingArguments(**{**base, **changes})


def config_of_trainer(cache: Path, student: Path, output: Path) -> TrainConfig:
    """The training of `trainer_arguments` by our loop: three epochs of three steps."""
    return TrainConfig(
        cache=str(cache),
        output=str(output),
        student=StudentConfig(path=str(student)),
        loss=LOSS,
        epochs=3,
        batch_size=4,
        gradient_accumulation=2,
        optimizer=OptimizerConfig(lr=1e-2, schedule="constant"),
        log_every_steps=1,
    )
