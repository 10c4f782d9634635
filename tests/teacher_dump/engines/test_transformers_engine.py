"""Claims about the embedded engine, against a plain float32 forward of the same tiny model.

Shapes: L tokens, n targets, V vocabulary.
"""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    CohereConfig,
    Gemma2Config,
    GraniteConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
)

from decant.schemas import ScoredSequence, Truncation
from decant.teacher_dump.engines import EngineError, TeacherConfig, open_engine
from decant.teacher_dump.engines.seam import SequenceError
from decant.teacher_dump.engines.transformers.engine import WINDOW_BATCHES, TransformersEngine
from decant.teacher_dump.engines.transformers.probes import Sharing
from decant.teacher_dump.inputs.records import TokenSequence
from tests.support import models

K, V = 12, models.VOCAB_SIZE
TEMPERATURES = (1.0, 2.0)
LENGTHS = [5, 64, 33, 2, 64, 17, 40, 3, 9]
TOLERANCE = 2e-4
WIDE = {"hidden_size": 64, "intermediate_size": 128}
"""Multiples of the 64 weights that bitsandbytes quantises together."""
MORE: dict[str, Any] = {
    "cohere": (CohereConfig, {**models.DECODER, "logit_scale": 0.25}),
    "granite": (GraniteConfig, {**models.DECODER, "logits_scaling": 4.0}),
    "mistral, window 8": (MistralConfig, {**models.DECODER, "sliding_window": 8}),
    "gemma2, window 8": (
        Gemma2Config,
        {**models.DECODER, "head_dim": 16, "final_logit_softcapping": 10.0, "sliding_window": 8},
    ),
}
"""Beyond `models.CONFIGS`: other final steps and sliding windows."""


class OddConfig(LlamaConfig):
    """A Llama of a step of its own behind the head."""

    model_type = "odd_llama"


class OddModel(LlamaForCausalLM):
    """Its logits are not what its head says."""

    config_class = OddConfig

    def forward(self, *arguments: Any, **options: Any) -> Any:
        """Shift every second id."""
        out = super().forward(*arguments, **options)
        out.logits = out.logits + 0.7 * (torch.arange(out.logits.shape[-1]) % 2)
        return out


AutoConfig.register("odd_llama", OddConfig)
AutoModelForCausalLM.register(OddConfig, OddModel)


def sequences_of(lengths: list[int], seed: int = 0) -> list[TokenSequence]:
    """Random tokens, about two thirds of them targets, at least the last."""
    rng = np.random.default_rng(seed)
    made = []
    for number, length in enumerate(lengths):
        is_target = rng.random(length) < 0.67
        is_target[0], is_target[-1] = False, True
        ids = rng.integers(4, V, length).astype(np.int32)
        made.append(TokenSequence(f"sample-{number}", ids, is_target))
    return made


def open_teacher(path: Path, vocab_size: int = V, **options: Any) -> TransformersEngine:
    """The engine on this model; batches of at most 128 tokens unless told."""
    truncation = options.pop("truncation", Truncation(k=K))
    options = {"dtype": "float32", "device": "cpu", "max_batch_tokens": 128} | options
    engine = open_engine(
        TeacherConfig(path=str(path), **options),
        str(path),
        vocab_size=vocab_size,
        truncation=truncation,
        temperatures=TEMPERATURES,
        max_length=64,
    )
    assert isinstance(engine, TransformersEngine)
    return engine


def save(folder: Path, architecture: str, **options: Any) -> Any:
    """Save a model and return it."""
    if architecture in MORE:
        kind, settings = MORE[architecture]
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(kind(**settings), dtype=torch.float32).eval()
    elif architecture == "odd":
        torch.manual_seed(0)
        model = OddModel(OddConfig(**models.DECODER)).eval()
    else:
        model = models.build_model(architecture, **options)
    model.save_pretrained(folder)
    return model


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path, TransformersEngine]:
    """A Llama, where it is saved, and the engine on it."""
    path = tmp_path_factory.mktemp("llama")
    model = save(path, "llama")
    return model, path, open_teacher(path)


@torch.inference_mode()
def dense_logits(model: Any, sequence: TokenSequence, shift: int = -1) -> NDArray[np.float64]:
    """[n, V] of a forward of this sequence alone: row t - 1 predicts the token t."""
    logits = model(torch.tensor(sequence.input_ids).long()[None]).logits[0]
    rows = np.flatnonzero(sequence.is_target) + shift
    return logits[rows, :V].double().numpy()


def disagreement(scored: ScoredSequence, logits: NDArray[np.float64]) -> float:
    """The largest difference of any stored number from the dense distribution, in nats."""
    logp = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
    ids = scored.token_ids.astype(np.int64)
    each = np.arange(len(logp))
    rest = logp.copy()
    np.put_along_axis(rest, ids, -np.inf, axis=1)
    pairs = [
        (scored.logprobs, np.take_along_axis(logp, ids, axis=1)),
        (scored.logprobs, -np.sort(-logp, axis=1)[:, :K]),  # the K largest, in this order
        (scored.label_logprob, logp[each, scored.labels]),
    ]
    for i, temperature in enumerate(TEMPERATURES):
        log_z = np.logaddexp.reduce(logp / temperature, axis=1)
        pairs += [
            (scored.log_z[:, i], log_z),
            (scored.log_tail[:, i], np.logaddexp.reduce(rest / temperature, axis=1) - log_z),
        ]
    return max(float(np.abs(ours - theirs).max()) for ours, theirs in pairs)


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
