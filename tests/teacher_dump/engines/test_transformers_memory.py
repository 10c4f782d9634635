"""Claims about teachers and batches larger than the memory, and about quantised weights."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
)

from decant.teacher_dump.engines.seam import SequenceError
from decant.teacher_dump.engines.transformers.engine import TransformersEngine
from tests.support.scoring import (
    LENGTHS,
    TOLERANCE,
    WIDE,
    dense_logits,
    disagreement,
    open_teacher,
    save,
    sequences_of,
)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path, TransformersEngine]:
    """A Llama, where it is saved, and the engine on it."""
    path = tmp_path_factory.mktemp("llama")
    model = save(path, "llama")
    return model, path, open_teacher(path)


@pytest.mark.parametrize(
    ("architecture", "memory"),
    [("llama", "90KB"), ("llama", "0KB"), ("qwen2", "60KB"), ("gemma2", "70KB")],
)
def test_a_teacher_larger_than_the_memory_scores_the_same(tmp_path, architecture, memory, caplog):
    """Weights that no device holds are read from disk at each forward."""
    model = save(tmp_path / "model", architecture)
    with caplog.at_level("INFO"):
        engine = open_teacher(
            tmp_path / "model",
            device="auto",
            max_memory={"cpu": memory},
            offload_folder=str(tmp_path / "offload"),
        )
    assert "disk" in caplog.text
    assert list((tmp_path / "offload").iterdir()) or list(engine._model.hf_device_map.values())
    assert any(p.device.type == "meta" for p in engine._model.parameters())
    sequences = sequences_of(LENGTHS)
    for sequence, ours in zip(sequences, engine.score(sequences, 0), strict=True):
        assert disagreement(ours, dense_logits(model, sequence)) < TOLERANCE


@pytest.mark.parametrize("saved", [False, True], ids=["while loading", "as saved"])
@pytest.mark.parametrize("quantization", ["bnb-4bit", "bnb-8bit"])
def test_a_quantised_teacher_scores_as_transformers_runs_it(tmp_path, quantization, saved):
    """The numbers are those of transformers' own quantised model, not of the full one."""
    pytest.importorskip("bitsandbytes")
    model, path = save(tmp_path / "full", "llama", **WIDE), tmp_path / "full"
    settings = (
        BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
        )
        if quantization == "bnb-4bit"
        else BitsAndBytesConfig(load_in_8bit=True)
    )
    theirs = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, device_map="cpu", quantization_config=settings
    )
    if saved:
        theirs.save_pretrained(tmp_path / "quantised")
        engine = open_teacher(tmp_path / "quantised")
    else:
        engine = open_teacher(path, quantization=quantization)
    sequences = sequences_of(LENGTHS)
    if quantization == "bnb-4bit":
        scored = list(engine.score(sequences, 0))
    else:  # LLM.int8 treats columns of outliers apart, those of whatever is in the batch
        scored = [ours for sequence in sequences for ours in engine.score([sequence], 0)]
    for sequence, ours in zip(sequences, scored, strict=True):
        assert disagreement(ours, dense_logits(theirs, sequence)) < TOLERANCE
    assert disagreement(scored[1], dense_logits(model, sequences[1])) > 0.1


@contextmanager
def little_memory(tokens: int) -> Iterator[list[int]]:
    """Forwards of more tokens ask for more memory than any machine has; gives their sizes."""
    sizes: list[int] = []

    def ask(module: torch.nn.Module, arguments: tuple) -> None:
        if isinstance(module, torch.nn.Embedding):
            sizes.append(arguments[0].numel())
            if arguments[0].numel() > tokens:
                torch.empty(1 << 60, dtype=torch.uint8)

    handle = torch.nn.modules.module.register_module_forward_pre_hook(ask)
    try:
        yield sizes
    finally:
        handle.remove()


def test_a_batch_that_does_not_fit_the_memory_is_halved(llama, caplog):
    """Again and again until it fits; the smaller size is kept and each halving logged once."""
    model, path, _ = llama
    engine = open_teacher(path, max_batch_tokens=1024)
    sequences = sequences_of([20] * 100)
    with little_memory(300) as sizes:
        scored = list(engine.score(sequences, 0))
    assert sizes[:3] == [1020, 500, 240] and max(sizes[2:]) <= 300
    assert [r.message.split(",")[0] for r in caplog.records] == [
        "out of memory with 51 x 20 tokens",
        "out of memory with 25 x 20 tokens",
    ]
    for index in (0, 50, 99):
        assert disagreement(scored[index], dense_logits(model, sequences[index])) < TOLERANCE


def test_a_sequence_that_alone_does_not_fit_is_named(llama):
    """By its index among those given; the rest can be scored afterwards."""
    _, path, _ = llama
    engine = open_teacher(path)
    sequences = sequences_of([20, 20, 20, 60, 20])
    with little_memory(50):
        with pytest.raises(SequenceError, match="out of memory with sample sample-3 alone") as bad:
            list(engine.score(sequences, 0))
        assert bad.value.index == 3
        assert len(list(engine.score(sequences[:3], 0))) == 3
