"""Claims about the embedded engine, against a plain float32 forward of the same tiny model.

Shapes: L tokens, n targets, V vocabulary.
"""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
)

from decant.schemas import Truncation
from decant.teacher_dump.engines import EngineError
from decant.teacher_dump.engines.seam import SequenceError
from decant.teacher_dump.engines.transformers.engine import WINDOW_BATCHES, TransformersEngine
from decant.teacher_dump.engines.transformers.probes import Sharing
from tests.support import models
from tests.support.scoring import (
    LENGTHS,
    MORE,
    TOLERANCE,
    V,
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


@pytest.mark.parametrize("architecture", [*models.CONFIGS, *MORE, "odd"])
def test_scores_are_those_of_a_plain_forward(architecture, tmp_path):
    """In a ragged batch, whatever comes behind the head (caps, scales, an unknown step)."""
    model = save(tmp_path, architecture)
    engine = open_teacher(tmp_path)
    assert (engine._head is None) == (architecture == "odd")  # else: never the whole [B, L, V]
    assert engine._sharing == Sharing.EVERYTHING
    sequences = sequences_of(LENGTHS)
    scored = list(engine.score(sequences, 0))
    assert [s.sample_id for s in scored] == [s.sample_id for s in sequences]
    for sequence, ours in zip(sequences, scored, strict=True):
        assert disagreement(ours, dense_logits(model, sequence)) < TOLERANCE
        assert np.array_equal(ours.input_ids, sequence.input_ids)


def test_an_off_by_one_would_show(llama):
    """The comparison above is sharp: the row before and the row after disagree everywhere."""
    model, _, engine = llama
    is_target = np.arange(64) > 1  # each has a row before the right one
    sequence = dataclasses.replace(sequences_of([64])[0], is_target=is_target)
    (scored,) = engine.score([sequence], 0)
    assert disagreement(scored, dense_logits(model, sequence)) < TOLERANCE
    for shift in (-2, 0):
        assert disagreement(scored, dense_logits(model, sequence, shift)) > 1


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2, window 8"])
def test_a_sequence_scores_the_same_alone_and_in_a_batch(architecture, attention, tmp_path):
    """Padding and neighbours change nothing beyond rounding, whatever computes the attention."""
    save(tmp_path, architecture)
    engine = open_teacher(tmp_path, attention=attention)
    sequences = sequences_of(LENGTHS)
    together = list(engine.score(sequences, 0))
    for sequence, batched in zip(sequences, together, strict=True):
        (alone,) = engine.score([sequence], 0)
        for name in ("logprobs", "log_z", "log_tail", "label_logprob"):
            np.testing.assert_allclose(
                getattr(alone, name), getattr(batched, name), rtol=0, atol=TOLERANCE
            )
        assert np.mean(alone.token_ids == batched.token_ids) > 0.99


def test_only_targets_are_scored(llama):
    """Positions are the true entries of is_target, and each row is that position's."""
    _, _, engine = llama
    (sequence,) = sequences_of([30])
    (every,) = engine.score([dataclasses.replace(sequence, is_target=np.arange(30) > 0)], 0)
    is_target = np.zeros(30, bool)
    is_target[[1, 7, 8, 29]] = True
    (some,) = engine.score([dataclasses.replace(sequence, is_target=is_target)], 0)
    assert some.positions.tolist() == [1, 7, 8, 29]
    assert some.positions.dtype == np.int32
    chosen = some.positions - 1
    assert np.array_equal(some.token_ids, every.token_ids[chosen])
    np.testing.assert_allclose(some.logprobs, every.logprobs[chosen], atol=1e-5)
    np.testing.assert_allclose(some.label_logprob, every.label_logprob[chosen], atol=1e-5)


def test_order_is_kept_across_length_buckets_and_windows(llama):
    """Sequences come back as they went in, although they are scored by length."""
    model, _, engine = llama
    lengths = np.random.default_rng(1).integers(2, 60, 150).tolist()
    assert sum(lengths) > 2 * WINDOW_BATCHES * 128
    sequences = sequences_of(lengths)
    scored = list(engine.score(sequences, 0))
    assert [s.sample_id for s in scored] == [s.sample_id for s in sequences]
    for index in (0, 40, 41, 99, 149):
        assert disagreement(scored[index], dense_logits(model, sequences[index])) < TOLERANCE


def test_padded_vocabulary_is_cut_before_everything(tmp_path):
    """Output rows beyond the tokenizer take no mass and no place, however large their logits."""
    model = models.build_model("llama")
    with torch.no_grad():
        model.lm_head.weight[V:] *= 20
    model.save_pretrained(tmp_path)
    sequences = sequences_of([20, 31])
    for sequence, ours in zip(sequences, open_teacher(tmp_path).score(sequences, 0), strict=True):
        assert ours.token_ids.max() < V
        assert disagreement(ours, dense_logits(model, sequence)) < TOLERANCE
        mass = np.exp(ours.logprobs).sum(axis=1) + np.exp(ours.log_tail[:, 0])
        np.testing.assert_allclose(mass, 1, atol=1e-5)


@pytest.mark.parametrize("architecture", ["llama", "odd"])
def test_a_nan_names_its_sample(tmp_path, architecture):
    """A teacher that gives NaN for one token is refused with the sample that holds it."""
    model = save(tmp_path, architecture)
    with torch.no_grad():
        model.get_input_embeddings().weight[77] = torch.nan
    model.save_pretrained(tmp_path)
    engine = open_teacher(tmp_path)
    sequences = sequences_of([20] * 6)
    for sequence in sequences:
        sequence.input_ids[sequence.input_ids == 77] = 78
    assert len(list(engine.score(sequences, 0))) == 6
    sequences[4].input_ids[10] = 77
    with pytest.raises(SequenceError, match=r"sample sample-4\b") as caught:
        list(engine.score(sequences, 0))
    assert caught.value.index == 4


def test_draws_belong_to_the_sequence_and_not_to_its_batch(llama):
    """Sampling: a sequence of a plan index draws the same alone and among others."""
    _, path, _ = llama
    engine = open_teacher(path, truncation=Truncation(method="sample", draws=20, seed=5))
    sequences = sequences_of(LENGTHS)
    together = list(engine.score(sequences, 100))
    for index, sequence in enumerate(sequences):
        (alone,) = engine.score([sequence], 100 + index)
        assert np.mean(alone.token_ids == together[index].token_ids) > 0.98
        assert (together[index].draws.sum(axis=1) == 20).all()
    (elsewhere,) = engine.score([sequences[1]], 7)
    assert np.mean(elsewhere.token_ids == together[1].token_ids) < 0.5


def test_read_only_arrays_are_accepted(llama):
    """Tokens as they come out of a file, which numpy may not write to."""
    _, _, engine = llama
    (sequence,) = sequences_of([12])
    sequence.input_ids.flags.writeable = sequence.is_target.flags.writeable = False
    assert len(list(engine.score([sequence], 0))) == 1


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_that_of_a_plain_forward(llama, dtype):
    """The forward runs in the dtype that is asked for; masses are summed in float32."""
    model, path, _ = llama
    half = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype))
    (sequence,) = sequences_of([40])
    (scored,) = open_teacher(path, dtype=dtype).score([sequence], 0)
    logits = dense_logits(half, sequence)
    assert disagreement(scored, logits) < 0.1
    assert 0 < np.abs(logits - dense_logits(model, sequence)).max() < 3
    mass = np.exp(scored.logprobs).sum(axis=1) + np.exp(scored.log_tail[:, 0])
    np.testing.assert_allclose(mass, 1, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vocab_size": models.PADDED_VOCAB_SIZE + 1}, "output rows"),
        ({"truncation": Truncation(k=V + 1)}, "keeps 301 entries of 300 ids"),
        ({"device": "cuda:7"}, "cannot load .* on cuda:7"),
        ({"device": "toaster"}, "cannot load .* on toaster"),
        ({"attention": "none"}, "cannot load"),
    ],
)
def test_what_the_teacher_cannot_give_is_refused(llama, options, message):
    """At loading, by an EngineError, not by a crash in the middle of the job."""
    if options.get("device") == "cuda:7" and torch.cuda.device_count() > 7:
        pytest.skip("there is such a device here")
    with pytest.raises(EngineError, match=message):
        open_teacher(llama[1], **options)


def test_weights_that_are_not_all_there_are_refused(tmp_path):
    """Missing or misshapen tensors would be made up at random: named instead; cut files too."""
    models.build_model("llama").save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    whole = load_file(file)
    name = "model.layers.1.mlp.up_proj.weight"
    save_file({k: v for k, v in whole.items() if k != name}, file, metadata={"format": "pt"})
    with pytest.raises(EngineError, match=f"1 tensors .* first {name}"):
        open_teacher(tmp_path)
    save_file({**whole, name: whole[name][:7].clone()}, file, metadata={"format": "pt"})
    with pytest.raises(EngineError, match=f"1 tensors .* first {name}"):
        open_teacher(tmp_path)
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(EngineError, match="cannot load"):
        open_teacher(tmp_path)
