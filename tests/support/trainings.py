"""Trainings in tests: their config, and what they leave."""

import dataclasses
import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

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
