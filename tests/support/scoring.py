"""Engines on tiny teachers, and what a plain forward of one sequence says beside them.

Shapes: L tokens, n targets, V vocabulary.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GraniteConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
)

from decant.schemas import ScoredSequence, Truncation
from decant.teacher_dump.engines import TeacherConfig, open_engine
from decant.teacher_dump.engines.transformers.engine import TransformersEngine
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
