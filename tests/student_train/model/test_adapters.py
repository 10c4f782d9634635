"""LoRA and QLoRA students: gradients, a base that stays, checkpoints, what is saved."""

import dataclasses
import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from decant.student_train import (
    CacheStream,
    Distiller,
    EvalConfig,
    LossConfig,
    OptimizerConfig,
    StudentConfig,
    TrainConfig,
    train,
)
from decant.student_train.config.student import AdapterConfig
from decant.student_train.model.adapters import attach, trainable_weights
from tests.support import models

LORA = AdapterConfig(r=4, alpha=8)
NO_DROPOUT: dict[str, dict[str, float]] = {
    "llama": {},
    "gemma2": {},
    "gpt2": {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0},
}


@pytest.fixture(scope="module")
def base_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pretrained student with the teacher's tokenizer."""
    path = tmp_path_factory.mktemp("base")
    models.save_teacher(path, seed=3)
    return path


def config(cache: Path, base: Path, output: Path, **changes: Any) -> TrainConfig:
    fields: dict[str, Any] = {
        "cache": str(cache),
        "output": str(output),
        "student": StudentConfig(path=str(base)),
        "adapter": LORA,
        "loss": LossConfig(kind="fkl", ce_weight=0.3),
        "steps": 5,
        "batch_size": 4,
        "optimizer": OptimizerConfig(lr=1e-2),
        "log_every_steps": 1,
    }
    return TrainConfig(**{**fields, **changes})


def moved_adapter(student: Any, adapter: AdapterConfig) -> Any:
    """The model of peft with an adapter that does something: B is 0 at first."""
    peft_model = attach(student, adapter)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in student.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1, generator=generator)
    return peft_model


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2"])
def test_gradients_are_those_of_the_merged_weights(
    cache: Path, architecture: str, checkpointing: bool
) -> None:
    """As d loss / dA = scale BᵀG and d loss / dB = scale G Aᵀ, G from dense float64 autograd.

    Nothing else gets a gradient, with the head fused, and with activation checkpointing.
    """
    shared = CacheStream(cache, batch_size=1).reader.manifest.shared_vocab_size
    batch = next(iter(CacheStream(cache, batch_size=3)))
    student = models.build_model(architecture, **NO_DROPOUT[architecture]).train()
    if checkpointing:
        student.gradient_checkpointing_enable()
    moved_adapter(student, LORA)
    model = Distiller(student, LossConfig(kind="rkl", ce_weight=0.5), shared)
    assert model.head is not None, "the head is fused"
    model(batch).loss.backward()
    assert student.get_output_embeddings().weight.grad is None

    dense = models.build_model(architecture, **NO_DROPOUT[architecture]).double().train()
    layers = {name: m for name, m in student.named_modules() if hasattr(m, "lora_A")}
    scale, leaves = LORA.alpha / LORA.r, {}
    for name, layer in layers.items():
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        weight = dense.get_submodule(name).weight
        delta = scale * (b.double() @ a.double())
        weight.data += delta.T if weight.shape != delta.shape or is_conv(dense, name) else delta
        leaves[name] = weight
    logits = dense(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    logits = logits.flatten(0, 1)[batch.predictors][:, :shared]
    log_q, ids = logits.log_softmax(-1), batch.targets.token_ids
    kept = log_q.gather(1, ids)
    rest = log_q.scatter(1, ids, -torch.inf).logsumexp(1, keepdim=True)
    log_q_classes = torch.cat([kept, rest], 1)
    log_p = torch.cat([batch.targets.logprobs, batch.targets.log_tail[:, None]], 1).double()
    rkl = (log_q_classes.exp() * (log_q_classes - log_p.clamp(min=-87))).sum(1).mean()
    ce = torch.nn.functional.nll_loss(log_q, batch.labels)
    (rkl + 0.5 * ce).backward()
    assert len(layers) >= 8
    for name, layer in layers.items():
        gradient = leaves[name].grad.T if is_conv(dense, name) else leaves[name].grad
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        for found, expected in (
            (a.grad, scale * b.double().T @ gradient),
            (b.grad, scale * gradient @ a.double().T),
        ):
            torch.testing.assert_close(found.double(), expected, rtol=2e-3, atol=1e-5, msg=name)
    others = [n for n, p in student.named_parameters() if p.grad is not None and "lora" not in n]
    assert not others


def is_conv(model: Any, name: str) -> bool:
    """GPT-2 stores its linear layers transposed."""
    return type(model.get_submodule(name)).__name__ == "Conv1D"


def test_a_head_with_an_adapter_trains_on_the_models_own_logits(cache: Path) -> None:
    """An adapted head is no plain linear map: it is found out, and its adapter gets gradients."""
    shared = CacheStream(cache, batch_size=1).reader.manifest.shared_vocab_size
    student = models.build_model("llama").train()
    moved_adapter(student, dataclasses.replace(LORA, target_modules=["lm_head", "q_proj"]))
    model = Distiller(student, LossConfig(ce_weight=0.5), shared)
    assert model.head is None
    model(next(iter(CacheStream(cache, batch_size=3)))).loss.backward()
    gradients = {n: p.grad for n, p in student.named_parameters() if p.requires_grad}
    assert any("lm_head" in name for name in gradients)
    assert all(g is not None and g.abs().sum() > 0 for g in gradients.values())


def test_the_merged_student_is_the_one_that_was_trained(
    cache: Path, base_path: Path, tmp_path: Path
) -> None:
    """It loads without peft, scores as reported, and the adapter alone gives the same logits."""
    evaluation = EvalConfig(heldout_fraction=0.2)
    whole = config(cache, base_path, tmp_path / "merged", eval=evaluation)
    summary = train(whole)
    alone = dataclasses.replace(
        whole, output=str(tmp_path / "alone"), adapter=dataclasses.replace(LORA, merge=False)
    )
    assert train(alone)["heldout_ce"] == summary["heldout_ce"]

    files = {path.name for path in (tmp_path / "alone/student").iterdir()}
    assert "adapter_model.safetensors" in files and "model.safetensors" not in files
    saved = json.loads((tmp_path / "alone/student/adapter_config.json").read_text())
    assert saved["base_model_name_or_path"] == str(base_path)
    assert saved["r"] == 4 and saved["lora_alpha"] == 8

    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged/student").eval()
    adapted = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "alone/student").eval()
    assert isinstance(adapted, PeftModel)
    batch = next(iter(CacheStream(cache, batch_size=4)))
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    with torch.no_grad():
        one, other = merged(**inputs).logits, adapted(**inputs).logits
        before = AutoModelForCausalLM.from_pretrained(base_path)(**inputs).logits
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    assert (one - before).abs().max() > 0.1, "nothing was trained"


def test_the_base_stays_bit_for_bit(cache: Path, base_path: Path, tmp_path: Path) -> None:
    """Training moves the adapter alone; checkpoints hold nothing else; a rerun resumes exactly."""
    train(config(cache, base_path, tmp_path / "whole", steps=30))
    part = config(cache, base_path, tmp_path / "part", steps=30)
    metrics = tmp_path / "part" / "metrics.jsonl"

    def interrupt() -> None:
        while not metrics.exists() or len(metrics.read_text().splitlines()) < 3:
            time.sleep(0.005)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        train(part)
    thread.join()
    (checkpoint,) = (tmp_path / "part/checkpoints").iterdir()
    held = load_file(checkpoint / "adapter.safetensors")
    base = models.build_model("llama", seed=3)
    expected = models.build_model("llama", seed=3)
    attach(expected, LORA)
    names = {f"student.{name}" for name in trainable_weights(expected)}
    assert set(held) == names and all("lora_" in name for name in names)
    weights = sum(p.numel() for p in base.parameters()) * 4
    assert sum(f.stat().st_size for f in checkpoint.rglob("*")) < weights
    train(part)
    both = [load_file(tmp_path / name / "student/model.safetensors") for name in ("whole", "part")]
    for name, value in both[0].items():
        assert torch.equal(value, both[1][name]), name
    for name in ("model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"):
        assert torch.equal(both[0][name], base.state_dict()[name]), name


@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_a_quantised_base_trains_and_merges_to_what_was_trained(
    cache: Path, base_path: Path, tmp_path: Path, bits: str
) -> None:
    """The saved student holds the unpacked base plus the adapter, and scores as reported."""
    pytest.importorskip("bitsandbytes")
    lora = dataclasses.replace(LORA, quantization=bits)
    evaluation = EvalConfig(heldout_fraction=0.2)
    summary = train(
        config(cache, base_path, tmp_path / "q", adapter=lora, eval=evaluation, steps=20)
    )
    lines = [json.loads(x) for x in (tmp_path / "q/metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert sum(losses[-5:]) < sum(losses[:5])
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "q/student").eval()
    assert type(student.model.layers[0].mlp.gate_proj) is torch.nn.Linear
    assert student.dtype == torch.float32
    total, count = 0.0, 0
    stream = CacheStream(cache, batch_size=1, part="heldout", heldout_fraction=0.2)
    batches = iter(stream)
    for _ in range(stream.num_sequences):
        batch = next(batches)
        with torch.no_grad():
            logits = student(batch.input_ids).logits[0, :, : models.VOCAB_SIZE]
        total += torch.nn.functional.cross_entropy(
            logits[batch.predictors], batch.labels, reduction="sum"
        ).item()
        count += batch.num_targets
    # 8 bit also rounds activations, which the saved student does not.
    assert summary["heldout_ce"] == pytest.approx(
        total / count, rel=1e-4 if bits == "4bit" else 0.1
    )


@pytest.mark.parametrize(("layer", "name"), [("lm_head", "head"), ("wte", "input embedding")])
def test_a_merge_into_tied_weights_is_refused(layer: str, name: str) -> None:
    """It would change head and embedding, of which the adapter was trained on one."""
    adapter = AdapterConfig(r=2, target_modules=["c_attn", layer])
    with pytest.raises(ValueError, match=f"the {name} is tied to .* a merge would change both"):
        attach(models.build_model("gpt2"), adapter)
    attach(models.build_model("gpt2"), dataclasses.replace(adapter, merge=False))


def test_adapters_that_cannot_be_are_refused(cache: Path, base_path: Path, tmp_path: Path) -> None:
    """Keys without effect, layers that are not there, a base that nothing names."""
    with pytest.raises(ValueError, match="no effect without r"):
        AdapterConfig(alpha=32)
    with pytest.raises(ValueError, match="not one of"):
        AdapterConfig(r=4, quantization="2bit")
    nowhere = dataclasses.replace(LORA, target_modules=["query"])
    with pytest.raises(ValueError, match=r"adapter.target_modules \['query'\]"):
        train(config(cache, base_path, tmp_path / "run", adapter=nowhere))
    fresh = StudentConfig(config={"model_type": "llama"})
    run = config(
        cache,
        base_path,
        tmp_path / "run",
        adapter=AdapterConfig(r=2, target_modules=["q_proj", "query"]),
    )
    with pytest.raises(ValueError, match="no layer 'query' to adapt"):
        train(run)
    with pytest.raises(ValueError, match="give student"):
        config(
            cache,
            base_path,
            tmp_path,
            student=fresh,
            adapter=dataclasses.replace(LORA, merge=False),
        )


def test_all_linear_layers_may_be_named_so() -> None:
    """As in peft: the same layers as without names."""
    adapted = [
        set(trainable_weights(_attached(AdapterConfig(r=2, target_modules=names))))
        for names in ([], ["all-linear"], ["q_proj"])
    ]
    assert adapted[0] == adapted[1] > adapted[2]


def _attached(adapter: AdapterConfig) -> Any:
    student = models.build_model("llama")
    attach(student, adapter)
    return student
