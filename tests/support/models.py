"""Tiny random teachers and a tiny tokenizer, made on the spot and saved where a test wants them.

Random weights are drawn wide, so that distributions are uneven and an off-by-one shows.
"""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from tokenizers.decoders import ByteLevel
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

torch.set_num_threads(1)  # for models this small, threads cost more than they give

VOCAB_SIZE = 300
"""Ids of the tokenizer."""
PADDED_VOCAB_SIZE = 320
"""Output rows of the models: the last 20 are padding."""
MAX_POSITIONS = 128
SENTENCE = "the quick brown fox jumps over a lazy dog and runs away from hunters in deep woods"
WORDS = SENTENCE.split()
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<|start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content + '<|end|>' }}{% endgeneration %}"
    "{% else %}{{ m.content + '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}"
)
SIZES: dict[str, Any] = {
    "vocab_size": PADDED_VOCAB_SIZE,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
    "initializer_range": 0.4,
}
DECODER: dict[str, Any] = {
    **SIZES,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": MAX_POSITIONS,
}
CONFIGS: dict[str, tuple[type[PreTrainedConfig], dict[str, Any]]] = {
    "llama": (LlamaConfig, {**DECODER, "tie_word_embeddings": False}),
    "qwen2": (Qwen2Config, {**DECODER, "tie_word_embeddings": True}),
    "gpt2": (
        GPT2Config,
        {**SIZES, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": MAX_POSITIONS},
    ),
    "gemma2": (Gemma2Config, {**DECODER, "head_dim": 16, "final_logit_softcapping": 10.0}),
}
"""Architectures by name; Gemma 2 caps its logits behind the head."""


def build_tokenizer(vocab_size: int = VOCAB_SIZE) -> PreTrainedTokenizerFast:
    """A byte-level BPE with `vocab_size` ids, bos, eos and a chat template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.train_from_iterator(
        [SENTENCE] * 2,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=["<s>", "</s>", "<|start|>", "<|end|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
    wrapped.chat_template = CHAT_TEMPLATE
    assert len(wrapped) == vocab_size
    return wrapped


def build_model(architecture: str = "llama", *, seed: int = 0, **options: Any) -> Any:
    """A random float32 model on the CPU; `options` override its configuration."""
    config_class, settings = CONFIGS[architecture]
    config = config_class(**{**settings, **options})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def save_teacher(path: Path, architecture: str = "llama", **options: Any) -> Any:
    """Save a model of `build_model` with the tokenizer beside it; returns the model."""
    model = build_model(architecture, **options)
    model.save_pretrained(path)
    build_tokenizer().save_pretrained(path)
    return model
