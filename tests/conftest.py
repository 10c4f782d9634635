"""One tiny teacher and one cache of it, dumped for real; tests that share them only read."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from decant.schemas import Truncation
from decant.teacher_dump import DumpConfig, SequenceConfig, SourceConfig, TeacherConfig, dump
from tests.support import models


@pytest.fixture(scope="session")
def teacher_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama with a tokenizer; its last output rows are padding."""
    path = tmp_path_factory.mktemp("teacher")
    models.save_teacher(path)
    return path


@pytest.fixture(scope="session")
def other_teacher_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher of another tokenizer."""
    path = tmp_path_factory.mktemp("other")
    models.build_model().save_pretrained(path)
    models.build_tokenizer(280).save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def texts_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """90 short texts of uneven length."""
    path = tmp_path_factory.mktemp("texts") / "texts.jsonl"
    generator = np.random.default_rng(0)
    lines = [
        json.dumps({"id": f"text-{i}", "text": " ".join(generator.choice(models.WORDS, size))})
        for i, size in enumerate(generator.integers(2, 24, 90))
    ]
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="session")
def dump_config(teacher_path: Path, texts_path: Path) -> DumpConfig:
    """What `cache` is dumped with; its output is to be replaced."""
    return DumpConfig(
        output="unset",
        teacher=TeacherConfig(path=str(teacher_path), dtype="float32", max_batch_tokens=512),
        source=SourceConfig(path=str(texts_path)),
        sequences=SequenceConfig(max_length=64),
        truncation=Truncation(k=16),
        temperatures=[1.0, 2.0],
        precision="f32",
        shard_targets=300,
    )


@pytest.fixture(scope="session")
def cache(dump_config: DumpConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole cache of several shards at k=16 and two temperatures. Never write to it."""
    path = tmp_path_factory.mktemp("cache") / "cache"
    dump(dataclasses.replace(dump_config, output=str(path)))
    return path
