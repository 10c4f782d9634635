"""A student cut out of a teacher: its own layers, in their order, whatever the architecture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from decant.student_train import CutConfig, OptimizerConfig, StudentConfig, train
from decant.student_train.model.cut import cut, spread
from tests.support.trainings import config, weights

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 6,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 50,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 16}


def teacher(model_type: str, **fields: Any) -> Any:
    torch.manual_seed(0)
    settings = AutoConfig.for_model(model_type, **{**SIZES, **fields})
    return AutoModelForCausalLM.from_config(settings).eval()


@pytest.mark.parametrize(
    ("model_type", "fields", "layers"),
    [
        ("llama", {"tie_word_embeddings": True}, [0, 2, 5]),
        ("gpt2", {"n_embd": 32, "n_layer": 6, "n_head": 2}, [1, 4]),
        ("gemma3_text", {"head_dim": 16}, [0, 5]),
        (
            "gpt_neo",
            {"num_layers": 6, "num_heads": 2, "attention_types": [[["global", "local"], 3]]},
            [2, 5],
        ),
        ("qwen3_moe", {**EXPERTS, "mlp_only_layers": [3]}, [0, 3, 5]),
        ("bloom", {"n_layer": 6, "n_head": 2}, [0, 5]),
        ("mamba", {}, [3]),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_the_student_puts_out_what_those_layers_do(
    tmp_path: Path, model_type: str, fields: dict[str, Any], layers: list[int]
) -> None:
    """Compared with the teacher whose other layers do nothing; and so does what is saved of it."""
    whole = teacher(model_type, **fields)
    student = cut(teacher(model_type, **fields), layers, 0).eval()
    kept = whole.get_decoder()
    (blocks,) = (m for m in kept.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == 6)

    def passed(_: Any, args: Any, kwargs: Any, output: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    for number, block in enumerate(blocks):
        if number not in layers:
            block.register_forward_hook(passed, with_kwargs=True)
    tokens = torch.arange(3, 23).unsqueeze(0)
    found = student(input_ids=tokens, use_cache=False).logits
    torch.testing.assert_close(found, whole(input_ids=tokens, use_cache=False).logits)
    student.save_pretrained(tmp_path)
    again: Any = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(again(input_ids=tokens, use_cache=False).logits, found)
    assert again.config.num_hidden_layers == len(layers)


@pytest.mark.parametrize(
    ("model_type", "fields", "layers", "message"),
    [
        ("llama", {}, [0, 6], r"has layers 0 to 5, asked for \[0, 6\]"),
        (
            "qwen3_moe",
            {**EXPERTS, "decoder_sparse_step": 2},
            [0, 1, 5],
            "layer 5 of .* would be another as layer 2: mlp class is Qwen3MoeSparseMoeBlock",
        ),
        (
            "gpt2",
            {"n_embd": 32, "n_layer": 6, "n_head": 2, "scale_attn_by_inverse_layer_idx": True},
            [0, 5],
            "layer 5 of .* would be another as layer 1: attn.scaling",
        ),
    ],
)
def test_what_cannot_be_cut_is_refused(
    model_type: str, fields: dict[str, Any], layers: list[int], message: str
) -> None:
    """A layer that would be another one under its new number, or is not there."""
    with pytest.raises(ValueError, match=message):
        cut(teacher(model_type, **fields), layers, 0)


def test_layers_are_kept_at_even_distances() -> None:
    """The first and the last among them."""
    assert spread(30, 10) == [0, 3, 6, 10, 13, 16, 19, 23, 26, 29]
    assert spread(6, 6) == [0, 1, 2, 3, 4, 5]
    assert spread(6, 1) == [0]


def test_a_training_cuts_its_student_out_of_the_teacher_of_the_cache(
    cache: Path, teacher_path: Path, tmp_path: Path
) -> None:
    """By default the one that the manifest names; what is saved is whole, and loads."""
    student = StudentConfig(from_teacher=CutConfig(layers=[1]))
    still = OptimizerConfig(lr=1e-30)
    train(config(cache, tmp_path / "run", steps=1, student=student, optimizer=still))
    theirs = AutoModelForCausalLM.from_pretrained(teacher_path).state_dict()
    for name, value in weights(tmp_path / "run").items():
        expected = theirs[name.replace("layers.0.", "layers.1.")]
        torch.testing.assert_close(value, expected, rtol=0, atol=1e-6)
    assert 'cut from the teacher: `{"path"' in (tmp_path / "run/student/README.md").read_text()


def test_a_teacher_of_another_tokenizer_is_refused(
    cache: Path, other_teacher_path: Path, tmp_path: Path
) -> None:
    """As any student of another tokenizer is."""
    cut_of_it = CutConfig(path=str(other_teacher_path), keep=1)
    run = config(cache, tmp_path / "run", student=StudentConfig(from_teacher=cut_of_it))
    with pytest.raises(ValueError, match="another tokenizer"):
        train(run)


def test_options_that_contradict_each_other_are_refused() -> None:
    """Layers and their number, layers twice, a path alone, a path of a whole student besides."""
    for fields in (
        {"layers": [0], "keep": 1},
        {"layers": [2, 0]},
        {"layers": [0, 0]},
        {"path": "somewhere"},
    ):
        with pytest.raises(ValueError, match=r"student\.from_teacher"):
            CutConfig(**fields)
    with pytest.raises(ValueError, match="one of path, config and from_teacher"):
        StudentConfig(path="a", from_teacher=CutConfig(keep=1))
