"""Packing: the same sequences, targets, logits, gradients and loss curve as one sequence a row."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM

from decant.student_train import (
    Batch,
    CacheStream,
    Distiller,
    LossConfig,
    StudentConfig,
    train,
)
from decant.student_train.data.packing import first_fit
from decant.student_train.model.probes import packing_refused
from tests.support import models
from tests.support.trainings import STUDENT, config, losses

STUDENTS: dict[str, dict[str, Any]] = {
    "llama": {},
    "gpt2": {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0},
    "gemma2": {"sliding_window": 4},
}
"""Rotary positions, learned positions, and a window shorter than the sequences."""


def batch_of(cache: Path, size: int, packing: str = "none") -> Batch:
    """The first sequences of a cache in one batch."""
    (batch,) = next(CacheStream(cache, batch_size=size).steps(packing=packing))
    return batch


def sequences_in(batch: Batch) -> dict[str, list[Any]]:
    """Of each sample: its tokens, and of its targets the places, labels and distributions."""
    ids = batch.input_ids.flatten()
    if batch.position_ids is None:
        positions = torch.arange(batch.input_ids.shape[1]).expand_as(batch.input_ids).flatten()
        lengths = batch.attention_mask.sum(1).repeat_interleave(batch.input_ids.shape[1])
    else:
        positions = batch.position_ids.flatten()
        begins = [*torch.where(positions == 0)[0].tolist(), len(ids)]
        sizes = torch.tensor(begins).diff()
        lengths = sizes.repeat_interleave(sizes)
    starts = batch.predictors - positions[batch.predictors]
    found = {}
    for sample, start in zip(batch.sample_ids, starts.unique_consecutive().tolist(), strict=True):
        mine = starts == start
        found[sample] = [
            ids[start : start + int(lengths[start])].tolist(),
            (batch.predictors[mine] - start).tolist(),
            batch.labels[mine].tolist(),
            batch.targets.token_ids[mine].tolist(),
            batch.targets.logprobs[mine].tolist(),
            batch.label_logprob[mine].tolist(),
        ]
    return found


@given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=20), room=st.integers(0, 10))
def test_first_fit_places_every_sequence_once_within_its_row(lengths: list[int], room: int) -> None:
    """No two rows would fit into one half, so at most half of the space is padding on average."""
    capacity = max(lengths) + room
    rows = first_fit(lengths, capacity)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    filled = [sum(lengths[i] for i in row) for row in rows]
    assert max(filled) <= capacity
    assert all(a + b > capacity for i, a in enumerate(filled) for b in filled[:i])


@pytest.mark.parametrize("packing", ["none", "rows", "padding_free"])
def test_a_step_has_the_same_sequences_and_targets_however_it_is_laid_out(
    cache: Path, packing: str
) -> None:
    """Microbatches have one size; every token, place, label and distribution is where it was."""
    before = [batch_of(cache, 12)]
    after = next(CacheStream(cache, batch_size=4).steps(3, packing))
    assert [len(batch.sample_ids) for batch in after] == [4, 4, 4]
    assert sum(batch.num_tokens for batch in after) == before[0].attention_mask.sum()
    expected = {k: v for batch in before for k, v in sequences_in(batch).items()}
    assert {k: v for batch in after for k, v in sequences_in(batch).items()} == expected
    assert sum(batch.num_targets for batch in after) == sum(batch.num_targets for batch in before)


def test_alike_lengths_come_together_and_little_is_padded(cache: Path) -> None:
    """Over a step of several microbatches, sorting and packing each need fewer places."""

    def places(batches: Iterable[Batch]) -> int:
        return sum(batch.input_ids.numel() for batch in batches)

    laid_out = {
        packing: next(CacheStream(cache, batch_size=8).steps(3, packing))
        for packing in ("none", "rows", "padding_free")
    }
    one_by_one = itertools.islice(CacheStream(cache, batch_size=8), 3)
    assert places(laid_out["none"]) < places(one_by_one)
    assert places(laid_out["rows"]) < places(laid_out["none"])
    assert places(laid_out["padding_free"]) == sum(b.num_tokens for b in laid_out["none"])


@pytest.mark.parametrize("packing", ["rows", "padding_free"])
@pytest.mark.parametrize("architecture", STUDENTS)
def test_packed_logits_and_gradients_are_those_of_sequences_alone(
    cache: Path, architecture: str, packing: str
) -> None:
    """Logits in float64 to 1e-9; gradients in training mode with activation checkpointing."""
    student = models.build_model(architecture, **STUDENTS[architecture]).double()
    packed = batch_of(cache, 7, packing)
    assert len(packed.input_ids) < 7
    logits = student(
        input_ids=packed.input_ids, position_ids=packed.position_ids, use_cache=False
    ).logits.flatten(0, 1)[packed.predictors]
    alone = iter(CacheStream(cache, batch_size=1))
    singles = [next(alone) for _ in range(7)]
    expected = torch.cat(
        [student(input_ids=b.input_ids, use_cache=False).logits[0][b.predictors] for b in singles]
    )
    torch.testing.assert_close(logits, expected, rtol=1e-9, atol=1e-9)

    student.gradient_checkpointing_enable()
    model = Distiller(student.float().train(), LossConfig(ce_weight=0.5), models.VOCAB_SIZE)
    gradients = []
    for batches in ([packed], singles):
        model.zero_grad()
        for batch in batches:
            model(batch, float(packed.num_targets)).loss.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        error = (gradient - gradients[1][name]).norm()
        assert error <= 1e-4 * gradients[1][name].norm(), name


@pytest.mark.parametrize("packing", ["rows", "padding_free"])
def test_a_packed_run_has_the_loss_curve_of_an_unpacked_one(
    cache: Path, tmp_path: Path, packing: str
) -> None:
    """The same samples in every step, also over several microbatches."""
    plain = config(cache, tmp_path / "plain", gradient_accumulation=2)
    train(plain)
    train(dataclasses.replace(plain, output=str(tmp_path / "packed"), packing=packing))
    assert losses(tmp_path / "packed") == pytest.approx(losses(tmp_path / "plain"), rel=1e-5)


def student_of(**fields: Any) -> Any:
    """A student as it is initialised: weights so small that sequences hardly see each other."""
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(
        AutoConfig.for_model(**fields), dtype=torch.bfloat16
    ).train()


MAMBA = {"model_type": "mamba", "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}
JAMBA = {
    "model_type": "jamba",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "attn_layer_period": 2,
    "attn_layer_offset": 1,
    "num_experts": 2,
    "mamba_d_state": 4,
    "use_mamba_kernels": False,
}


@pytest.mark.parametrize("packing", ["rows", "padding_free"])
@pytest.mark.parametrize(
    "fields",
    [
        {**MAMBA, "vocab_size": 64},
        {**JAMBA, "vocab_size": 64},
        {"model_type": "bloom", "hidden_size": 32, "n_layer": 2, "n_head": 2, "vocab_size": 64},
    ],
    ids=["recurrent state", "some recurrent layers", "alibi"],
)
def test_a_student_that_mixes_packed_sequences_is_found_out(
    fields: dict[str, Any], packing: str
) -> None:
    """By asking it, also at initialisation and in bf16, where hardly anything shows."""
    student = student_of(**fields)
    refusal = packing_refused(student, packing)
    assert refusal is not None
    assert "a sequence sees the one before it" in str(refusal)
    assert student.training


@pytest.mark.parametrize("architecture", STUDENTS)
def test_a_student_that_keeps_packed_sequences_apart_is_not_refused(architecture: str) -> None:
    """With wide weights, with those of an initialisation, and in bf16."""
    for student in (
        models.build_model(architecture),
        models.build_model(architecture, initializer_range=0.02),
        models.build_model(architecture).bfloat16(),
    ):
        assert packing_refused(student, "rows") is None
        assert packing_refused(student, "padding_free") is None


def test_a_run_that_cannot_be_packed_is_refused(cache: Path, tmp_path: Path) -> None:
    """Before anything is written; the message says what to use instead."""
    student = StudentConfig(config={**MAMBA})
    with pytest.raises(ValueError, match=r"MambaForCausalLM.*Use .*packing: none"):
        train(config(cache, tmp_path / "run", student=student, packing="rows"))
    assert not (tmp_path / "run/metrics.jsonl").exists()


@pytest.mark.slow
def test_a_compiled_student_trains_alike_and_keeps_its_names(cache: Path, tmp_path: Path) -> None:
    """Compiled layers under the fused loss, with packing and activation checkpointing."""
    plain = config(cache, tmp_path / "plain", packing="rows", steps=3, gradient_checkpointing=True)
    train(plain)
    train(dataclasses.replace(plain, output=str(tmp_path / "compiled"), compile=True))
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "plain"), rel=1e-4)
    names = [
        set(AutoModelForCausalLM.from_pretrained(tmp_path / run / "student").state_dict())
        for run in ("plain", "compiled")
    ]
    assert names[0] == names[1]
    assert STUDENT["num_hidden_layers"] == 1


def test_flash_attention_takes_one_row_only() -> None:
    """It heeds position ids in a batch of one row, and would mix sequences in others."""
    student = models.build_model("llama")
    student.config._attn_implementation = "flash_attention_2"
    assert "in one row only" in str(packing_refused(student, "rows"))


def test_flash_attention_is_asked_for_by_name(cache: Path, tmp_path: Path) -> None:
    """Where it is not installed, the config is refused with transformers' reason."""
    student = StudentConfig(config=STUDENT, attention="flash_attention_2")
    with pytest.raises(ValueError, match=r"student\.config does not give a model"):
        train(config(cache, tmp_path / "run", student=student))


def test_eager_attention_packs_like_sdpa(cache: Path, tmp_path: Path) -> None:
    """Both build their masks from the same position ids."""
    curves = []
    for attention in ("sdpa", "eager"):
        student = StudentConfig(config=STUDENT, attention=attention)
        train(config(cache, tmp_path / attention, student=student, packing="rows", steps=3))
        curves.append(losses(tmp_path / attention))
    assert curves[0] == pytest.approx(curves[1], rel=1e-5)
