"""Claims about teachers that read a text otherwise at another length, and about what is refused.

The reference is always a plain float32 forward of one sequence alone, by a freshly loaded model.
"""

import copy
import dataclasses
import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BertConfig,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    Llama4TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    Phi3Config,
    RwkvConfig,
    XLNetConfig,
)

from decant.schemas import Truncation
from decant.teacher_dump.engines import EngineError, TeacherConfig, open_engine
from decant.teacher_dump.engines.opening import open_generator
from decant.teacher_dump.engines.seam import Prompt, Sampling
from decant.teacher_dump.engines.transformers.probes import Sharing
from decant.teacher_dump.inputs.records import TokenSequence
from tests.support.services import http_config, unreliable

V = 256
ORIGINAL = 64
MIXED = [50, 60, 200, 40, 63, 64, 65, 30, 90, 200, 128]
"""Around the boundary and on both sides of it."""
SIZES: dict[str, Any] = {
    "vocab_size": V,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "initializer_range": 0.2,
}
FACTORS = [1.0, 1.1, 1.5, 2.0, 4.0, 8.0, 16.0, 32.0]
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 8,
    "long_factor": FACTORS,
    "original_max_position_embeddings": ORIGINAL,
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 8.0}
CHANGING: dict[str, Any] = {
    "longrope": Phi3Config(
        **SIZES, original_max_position_embeddings=ORIGINAL, rope_parameters=LONGROPE
    ),
    "dynamic": LlamaConfig(
        **SIZES | {"max_position_embeddings": ORIGINAL},
        rope_parameters=DYNAMIC,
    ),
    "dynamic in some layers": Gemma3TextConfig(
        **SIZES | {"max_position_embeddings": ORIGINAL},
        head_dim=16,
        sliding_window=16,
        layer_types=["sliding_attention", "full_attention"],
        rope_parameters={
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            "full_attention": DYNAMIC,
        },
    ),
}
"""Teachers whose rotary factors follow from the longest sequence of a batch."""
REACHING: dict[str, Any] = {
    "a sliding window": MistralConfig(**SIZES, sliding_window=ORIGINAL),
    "chunked attention": Llama4TextConfig(
        **SIZES,
        head_dim=16,
        intermediate_size_mlp=96,
        num_local_experts=2,
        attention_chunk_size=ORIGINAL,
        no_rope_layers=[1, 0],
    ),
}
"""Teachers whose attention changes beyond a length, whatever shares the batch."""


class LengthyConfig(GPT2Config):
    """A GPT-2 that reads longer texts otherwise, which its configuration does not say."""

    model_type = "lengthy"


class LengthyModel(GPT2LMHeadModel):
    """Its embeddings grow with the length of the batch."""

    config_class = LengthyConfig

    def __init__(self, config: Any) -> None:
        """Scale what goes into the first layer."""
        super().__init__(config)
        self.transformer.drop.register_forward_hook(
            lambda module, given, out: out * (1 + 0.01 * out.shape[1])
        )


class PeekingConfig(LlamaConfig):
    """A Llama that sees later tokens in long texts alone."""

    model_type = "peeking"
    sliding_window: int = 48


class PeekingModel(LlamaForCausalLM):
    """Beyond its window, every state holds some of the last one."""

    config_class = PeekingConfig

    def __init__(self, config: Any) -> None:
        """Hook the last layer norm."""
        super().__init__(config)

        def peek(module: Any, given: Any, out: torch.Tensor) -> torch.Tensor:
            return out + out[:, -1:] if out.shape[1] > self.config.sliding_window else out

        self.model.norm.register_forward_hook(peek)


for configuration, kind in ((LengthyConfig, LengthyModel), (PeekingConfig, PeekingModel)):
    AutoConfig.register(configuration.model_type, configuration)
    AutoModelForCausalLM.register(configuration, kind)


def save(path: Path, config: Any) -> None:
    """Random weights of this architecture."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() >= 2:
                weight.normal_(0, 1.0 if "embed" in name or "wte" in name else 0.2)
    model.save_pretrained(path)


def sequences_of(lengths: list[int]) -> list[TokenSequence]:
    """Random tokens, all targets but the first."""
    rng = np.random.default_rng(0)
    return [
        TokenSequence(str(i), rng.integers(3, V, n).astype(np.int32), np.arange(n) > 0)
        for i, n in enumerate(lengths)
    ]


@functools.lru_cache(1)
def loaded(path: Path) -> Any:
    """The model that is saved there."""
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


@torch.inference_mode()
def plain_logprobs(path: Path, ids: NDArray[np.int32]) -> NDArray[np.float64]:
    """[L, V] of a forward of these ids alone, by a model that has read nothing before."""
    model = copy.deepcopy(loaded(path))  # dynamic scaling leaves its mark on a model
    logits = model(torch.from_numpy(ids).long()[None], use_cache=False).logits[0].double()
    return torch.log_softmax(logits, dim=-1).numpy()


def open_teacher(path: Path, max_length: int = 256, **options: Any) -> Any:
    """The transformers engine, with batches of up to 600 tokens."""
    settings = {"dtype": "float32", "device": "cpu", "max_batch_tokens": 600} | options
    return open_engine(
        TeacherConfig(path=str(path), **settings),
        str(path),
        vocab_size=V,
        truncation=Truncation(k=8),
        temperatures=(1.0,),
        max_length=max_length,
    )


def open_sampler(path: Path, *, max_length: int = 256, temperature: float = 0.0) -> Any:
    """The transformers generator, with batches of up to 600 tokens."""
    return open_generator(
        TeacherConfig(path=str(path), dtype="float32", device="cpu", max_batch_tokens=600),
        str(path),
        sampling=Sampling(temperature=temperature, top_p=1.0, stop_ids=(2,), vocab_size=V),
        max_length=max_length,
    )


def prompts_of(lengths: list[int], new: int) -> list[Prompt]:
    """Random prompts, each with room for `new` tokens."""
    return [
        Prompt(token_ids=s.input_ids, max_new_tokens=new, seed=index)
        for index, s in enumerate(sequences_of(lengths))
    ]


@pytest.mark.parametrize("name", [*CHANGING, *REACHING])
def test_a_sequence_is_scored_as_it_is_alone_whatever_shares_its_batch(name, tmp_path):
    """Short beside long, in any order, and after long ones have been read."""
    save(tmp_path, {**CHANGING, **REACHING}[name])
    engine = open_teacher(tmp_path)
    assert engine._sharing == Sharing.EVERYTHING
    sequences = sequences_of(MIXED)
    for given in (sequences, sequences[::-1], sequences):
        for sequence, scored in zip(given, engine.score(given, 0), strict=True):
            expected = plain_logprobs(tmp_path, sequence.input_ids)[:-1]
            labels = expected[np.arange(len(expected)), sequence.input_ids[1:]]
            np.testing.assert_allclose(scored.label_logprob, labels, atol=2e-3)
            kept = np.take_along_axis(expected, scored.token_ids.astype(np.int64), axis=1)
            np.testing.assert_allclose(scored.logprobs, kept, atol=2e-3)


@pytest.mark.parametrize("name", ["longrope", "dynamic"])
def test_a_service_scores_each_sequence_as_it_is_alone(name, tmp_path):
    """However a client's requests mix them."""
    save(tmp_path, CHANGING[name])
    with unreliable(tmp_path, max_length=256, tokenizer="none") as service:
        config = http_config(service.url, max_batch_tokens=600)
        settings = {"vocab_size": V, "truncation": Truncation(k=8), "temperatures": (1.0,)}
        engine = open_engine(config, "", max_length=256, **settings)
        sequences = sequences_of(MIXED)
        for sequence, scored in zip(sequences, engine.score(sequences, 0), strict=True):
            expected = plain_logprobs(tmp_path, sequence.input_ids)[:-1]
            labels = expected[np.arange(len(expected)), sequence.input_ids[1:]]
            np.testing.assert_allclose(scored.label_logprob, labels, atol=2e-3)
        engine.close()


@pytest.mark.parametrize("name", CHANGING)
def test_mixing_lengths_would_show(name, tmp_path):
    """The comparison above is sharp: as part of a longer text, a short one scores otherwise."""
    save(tmp_path, CHANGING[name])
    (long,) = sequences_of([200])
    alone = plain_logprobs(tmp_path, long.input_ids[:50])
    inside = plain_logprobs(tmp_path, long.input_ids)[:50]
    assert np.abs(alone - inside).max() > 0.1


@pytest.mark.parametrize("name", [*CHANGING, *REACHING])
def test_a_response_is_what_plain_forwards_of_the_text_so_far_choose(name, tmp_path):
    """Across the boundary, on either side of it, and beside prompts of the other side."""
    save(tmp_path, {**CHANGING, **REACHING}[name])
    generator = open_sampler(tmp_path)
    prompts = prompts_of([60, 20, 100, 63, 64, 65, 57], 12)
    for prompt, response in zip(prompts, generator.generate(prompts), strict=True):
        text = prompt.token_ids
        for token in response.token_ids:
            logprobs = plain_logprobs(tmp_path, text)[-1]
            assert logprobs[token] > logprobs.max() - 1e-3
            text = np.append(text, token)
        assert response.finish_reason == ("stop" if text[-1] == 2 else "length")
        assert response.finish_reason == "stop" or len(response.token_ids) == 12


@pytest.mark.parametrize("name", CHANGING)
def test_draws_go_on_across_the_boundary(name, tmp_path):
    """A response is the same alone and among others that cross the boundary elsewhere."""
    save(tmp_path, CHANGING[name])
    generator = open_sampler(tmp_path, temperature=1.0)
    prompts = prompts_of([60, 20, 100, 58], 12)
    together = generator.generate(prompts)
    for prompt, response in zip(prompts, together, strict=True):
        (alone,) = generator.generate([prompt])
        assert alone.token_ids.tolist() == response.token_ids.tolist()


def test_a_length_that_the_configuration_does_not_tell_is_tried_out(tmp_path):
    """A teacher that changes with the padding is scored with sequences of one length at a time."""
    save(tmp_path, LengthyConfig(vocab_size=V, n_embd=32, n_layer=2, n_head=2, n_positions=256))
    engine = open_teacher(tmp_path)
    assert engine._sharing == Sharing.EQUAL_LENGTHS
    sequences = sequences_of([30, 50, 30, 200, 31, 50])
    for sequence, scored in zip(sequences, engine.score(sequences, 0), strict=True):
        expected = plain_logprobs(tmp_path, sequence.input_ids)[:-1]
        labels = expected[np.arange(len(expected)), sequence.input_ids[1:]]
        np.testing.assert_allclose(scored.label_logprob, labels, atol=1e-3)


SEEING: dict[str, Any] = {
    "BERT": BertConfig(
        vocab_size=V,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        is_decoder=False,
    ),
    "XLNet": XLNetConfig(vocab_size=V, d_model=32, n_layer=2, n_head=2, d_inner=48),
    "beyond a window alone": PeekingConfig(**SIZES),
}


@pytest.mark.parametrize("name", SEEING)
def test_a_teacher_that_sees_later_tokens_is_refused(name, tmp_path):
    """When it is loaded to score or to sample, with what to look at."""
    save(tmp_path, SEEING[name])
    for opened in (open_teacher, open_sampler):
        with pytest.raises(EngineError, match=r"sees later tokens.*is_decoder"):
            opened(tmp_path)
    if name == "beyond a window alone":
        open_teacher(tmp_path, max_length=40).close()  # no text is that long


def test_the_same_architecture_as_a_decoder_is_accepted(tmp_path):
    """What is refused is what a model does, not its name."""
    save(tmp_path, dataclasses.replace(SEEING["BERT"], is_decoder=True))
    engine = open_teacher(tmp_path)
    (sequence,) = sequences_of([40])
    (scored,) = engine.score([sequence], 0)
    expected = plain_logprobs(tmp_path, sequence.input_ids)[:-1]
    labels = expected[np.arange(len(expected)), sequence.input_ids[1:]]
    np.testing.assert_allclose(scored.label_logprob, labels, atol=1e-3)


def test_a_teacher_that_reads_padding_samples_one_prompt_at_a_time(tmp_path, caplog):
    """RWKV takes padding for text and mixes the states of a batch: prompts are answered alone."""
    config = RwkvConfig(
        vocab_size=V, hidden_size=32, attention_hidden_size=32, num_hidden_layers=2,
        intermediate_size=48, context_length=256,
    )  # fmt: skip
    save(tmp_path, config)
    sequences = sequences_of([40, 9, 40, 70])
    for sequence, scored in zip(sequences, open_teacher(tmp_path).score(sequences, 0), strict=True):
        expected = plain_logprobs(tmp_path, sequence.input_ids)[:-1]
        labels = expected[np.arange(len(expected)), sequence.input_ids[1:]]
        np.testing.assert_allclose(scored.label_logprob, labels, atol=1e-3)
    generator = open_sampler(tmp_path)
    assert "changes with what shares a batch: nothing" in caplog.text
    prompts = prompts_of([20, 7, 33, 20], 6)
    for prompt, response in zip(prompts, generator.generate(prompts), strict=True):
        text = prompt.token_ids
        for token in response.token_ids:
            logprobs = plain_logprobs(tmp_path, text)[-1]
            assert logprobs[token] > logprobs.max() - 1e-3
            text = np.append(text, token)
