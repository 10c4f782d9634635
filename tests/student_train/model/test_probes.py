"""What text does not reach in a student stays as it is, and is no part of the optimizer's work."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from decant.student_train.model.probes import freeze_unused
from tests.support.models import VOCAB_SIZE
from tests.support.trainings import STUDENT

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2}
BART = {
    "model_type": "bart",
    "d_model": 32,
    "is_decoder": True,
    "decoder_layers": 1,
    "decoder_attention_heads": 2,
    "decoder_ffn_dim": 48,
    "encoder_layers": 1,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "max_position_embeddings": 128,
}
GEMMA3: dict[str, Any] = {
    "model_type": "gemma3",
    "text_config": {
        **SIZES,
        "num_key_value_heads": 1,
        "num_hidden_layers": 1,
        "head_dim": 16,
        "vocab_size": VOCAB_SIZE,
    },
    "vision_config": {**SIZES, "num_hidden_layers": 1, "image_size": 28, "patch_size": 14},
    "image_token_id": 4,
    "mm_tokens_per_image": 4,
}


@pytest.mark.parametrize(
    ("fields", "unused"),
    [
        (BART, ["encoder_attn"]),
        (GEMMA3, ["vision_tower", "multi_modal_projector"]),
        (
            {**STUDENT, "model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 1},
            [],
        ),
        (STUDENT, []),
    ],
    ids=["bart", "gemma3", "mixtral", "llama"],
)
def test_what_text_does_not_reach_is_frozen(fields: dict[str, Any], unused: list[str]) -> None:
    """All that a backward gives no gradient, and nothing else; experts wait for their tokens."""
    torch.manual_seed(0)
    student: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model(**fields))
    count = freeze_unused(student)
    student(input_ids=torch.arange(5, 25).unsqueeze(0)).logits.sum().backward()
    frozen = {name for name, p in student.named_parameters() if not p.requires_grad}
    assert frozen == {name for name, p in student.named_parameters() if p.grad is None}
    assert bool(frozen) == bool(unused) == bool(count)
    assert all(any(part in name for part in unused) for name in frozen)
