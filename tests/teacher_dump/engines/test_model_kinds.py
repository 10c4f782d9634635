"""Claims about what may be a teacher: images' models, adapters, GGUF files, and code of others."""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from numpy.typing import NDArray
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    Florence2Config,
    Qwen2Config,
)

from decant.schemas import Truncation
from decant.storage import CacheReader
from decant.teacher_dump import DumpConfig, TeacherConfig, dump
from decant.teacher_dump.engines import EngineError, open_engine
from decant.teacher_dump.engines.transformers.engine import TransformersEngine
from decant.teacher_dump.inputs.records import TokenSequence
from decant.teacher_dump.teacher import describe_teacher, hash_weights
from tests.support import models
from tests.support.commands import command
from tests.support.dumps import save_config
from tests.support.gguf_files import save_gguf

V = models.VOCAB_SIZE
TEXT = {**models.DECODER, "head_dim": 16, "pad_token_id": None}
MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
PATCHES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
SEEING: dict[str, dict[str, Any]] = {
    "mistral3": {
        "text_config": {"model_type": "mistral", **TEXT},
        "vision_config": {"model_type": "pixtral", **PATCHES},
    },
    "qwen2_5_vl": {
        "text_config": {"rope_parameters": MROPE, **TEXT},
        "vision_config": {
            "depth": 1,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 2,
            "out_hidden_size": 32,
            "fullatt_block_indexes": [0],
        },
    },
    "llava": {
        "text_config": {"model_type": "llama", **TEXT},
        "vision_config": {"model_type": "clip_vision_model", "projection_dim": 32, **PATCHES},
    },
    "glm4v": {
        "text_config": {"rope_parameters": {**MROPE, "partial_rotary_factor": 1.0}, **TEXT},
        "vision_config": {
            "depth": 1,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 2,
            "out_hidden_size": 32,
            "image_size": 28,
            "patch_size": 14,
        },
    },
}
"""Checkpoints of images and text that transformers has no class for text alone of."""


def config_of(path: Path, **options: Any) -> TeacherConfig:
    """In float32 on the CPU."""
    settings = {"dtype": "float32", "device": "cpu", "max_batch_tokens": 128} | options
    return TeacherConfig(path=str(path), **settings)


def scores(config: TeacherConfig) -> list[tuple[TokenSequence, Any]]:
    """Sequences of several lengths, scored together."""
    teacher = describe_teacher(config)
    engine = open_engine(
        config,
        teacher.model_path,
        vocab_size=V,
        truncation=Truncation(k=8),
        temperatures=(1.0,),
        max_length=64,
    )
    assert isinstance(engine, TransformersEngine) and engine._head is not None
    rng = np.random.default_rng(0)
    sequences = [
        TokenSequence(str(n), rng.integers(4, V, n).astype(np.int32), np.arange(n) > 0)
        for n in (30, 7, 60, 30, 12)
    ]
    return list(zip(sequences, engine.score(sequences, 0), strict=True))


@torch.inference_mode()
def farthest(config: TeacherConfig, model: Any) -> float:
    """The largest difference of label and kept log probs from a plain forward of the model."""
    far = 0.0
    for sequence, scored in scores(config):
        logits = model(input_ids=torch.tensor(sequence.input_ids).long()[None]).logits[0, :-1, :V]
        plain: NDArray[np.float64] = torch.log_softmax(logits.double(), dim=-1).numpy()
        label = plain[np.arange(len(plain)), sequence.input_ids[1:]]
        kept = np.take_along_axis(plain, scored.token_ids.astype(np.int64), axis=1)
        far = max(far, float(np.abs(label - scored.label_logprob).max()))
        far = max(far, float(np.abs(kept - scored.logprobs).max()))
    return far


def widened(model: Any) -> Any:
    """With weights so wide that distributions are uneven."""
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() >= 2:
                weight.normal_(0, 0.3)
    return model.eval()


@pytest.mark.parametrize("kind", SEEING)
def test_a_model_of_images_and_text_is_a_teacher_of_text(kind: str, tmp_path: Path) -> None:
    """Its numbers are those of its own forward of the text alone, by a head applied apart."""
    torch.manual_seed(0)
    settings = CONFIG_MAPPING[kind](**SEEING[kind])
    model = widened(AutoModelForImageTextToText.from_config(settings, dtype=torch.float32))
    model.save_pretrained(tmp_path)
    models.build_tokenizer().save_pretrained(tmp_path)
    teacher = describe_teacher(config_of(tmp_path))
    assert teacher.info.architecture == type(model).__name__
    assert teacher.max_positions == models.MAX_POSITIONS and teacher.shared_vocab_size == V
    assert farthest(config_of(tmp_path), model) < 1e-4


def test_an_encoder_and_decoder_is_refused_in_one_line(tmp_path: Path) -> None:
    """Whatever class transformers would load it with."""
    Florence2Config().save_pretrained(tmp_path)
    with pytest.raises(EngineError, match=r"\(florence2\) is an encoder and a decoder"):
        open_engine(
            config_of(tmp_path),
            str(tmp_path),
            vocab_size=V,
            truncation=Truncation(k=8),
            temperatures=(1.0,),
            max_length=64,
        )


def save_adapter(folder: Path, base: Any, seed: int = 0, **options: Any) -> Any:
    """Save a random LoRA adapter of a model; returns the model that peft makes of both."""
    torch.manual_seed(seed)
    settings = peft.LoraConfig(r=4, lora_alpha=8, init_lora_weights=False, **options)
    adapted = peft.get_peft_model(base, settings)
    adapted.save_pretrained(folder)
    return adapted.eval()


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj", "v_proj", "down_proj"]},
        {"target_modules": "all-linear", "use_dora": True},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj", "lm_head", "embed_tokens"]},
    ],
)
def test_an_adapter_is_put_on_its_base(options: dict[str, Any], tmp_path: Path) -> None:
    """The numbers are those of peft's own model, and not of the base; so is the fingerprint."""
    models.save_teacher(tmp_path / "base")
    load = AutoModelForCausalLM.from_pretrained
    adapted = save_adapter(tmp_path / "lora", load(tmp_path / "base"), **options)
    plain, config = (
        config_of(tmp_path / "base", adapter=adapter) for adapter in ("", str(tmp_path / "lora"))
    )
    assert farthest(config, adapted) < 1e-3
    assert farthest(config, load(tmp_path / "base").eval()) > 0.1
    prints = {hash_weights(describe_teacher(c)).info.fingerprint for c in (plain, config)}
    save_adapter(tmp_path / "lora", load(tmp_path / "base"), seed=1, **options)
    prints.add(hash_weights(describe_teacher(config)).info.fingerprint)
    assert len(prints) == 3
    assert describe_teacher(config).info.name == f"{config.path} + {config.adapter}"


def test_an_adapted_teacher_is_dumped_and_audited(dump_config: DumpConfig, tmp_path: Path) -> None:
    """By the same option; without the adapter it is another teacher, which the audit says."""
    models.save_teacher(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    save_adapter(tmp_path / "lora", base, target_modules=["q_proj", "v_proj"])
    teacher = dataclasses.replace(
        dump_config.teacher, path=str(tmp_path / "base"), adapter=str(tmp_path / "lora")
    )
    output = str(tmp_path / "cache")
    dump(dataclasses.replace(dump_config, teacher=teacher, output=output))
    options = (output, "--teacher", teacher.path, "--sample", "6")
    done = command("teacher_dump", "audit", *options, "--adapter", teacher.adapter)
    assert done.code == 0, done.stderr + done.stdout
    done = command("teacher_dump", "audit", *options)
    assert done.code == 1 and "another teacher" in done.stdout, done.stderr


def test_an_adapter_stays_beside_quantised_weights(tmp_path: Path) -> None:
    """Which cannot take it in without being rounded again."""
    pytest.importorskip("bitsandbytes")
    models.save_teacher(tmp_path / "base", hidden_size=64, intermediate_size=128)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    save_adapter(tmp_path / "lora", base, target_modules=["q_proj", "v_proj"])
    config = config_of(tmp_path / "base", adapter=str(tmp_path / "lora"), quantization="bnb-4bit")
    settings = TransformersEngine(
        config, config.path, vocab_size=V, truncation=Truncation(k=8), temperatures=(1.0,),
        max_length=64,
    )._model.config.quantization_config  # fmt: skip
    quantised = AutoModelForCausalLM.from_pretrained(
        config.path, dtype=torch.float32, device_map="cpu", quantization_config=settings
    )
    adapted = peft.PeftModel.from_pretrained(quantised, tmp_path / "lora").eval()
    assert farthest(config, adapted) < 2e-4


def test_an_adapter_of_another_model_is_refused(tmp_path: Path) -> None:
    """By what does not fit: more layers, other sizes, tokens before the text, or no adapter."""
    models.save_teacher(tmp_path / "base")
    deep, wide = models.build_model(num_hidden_layers=3), models.build_model(hidden_size=48)
    targets = {"target_modules": ["q_proj"]}
    save_adapter(tmp_path / "deep", deep, **targets)
    save_adapter(tmp_path / "wide", wide, **targets)
    prefix = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    peft.get_peft_model(models.build_model(), prefix).save_pretrained(tmp_path / "prompt")
    for name, message in (
        ("deep", "does not belong to this model: 2 of its tensors"),
        ("wide", "cannot be put on LlamaForCausalLM"),
        ("prompt", "puts tokens before every text"),
        ("base", "holds no PEFT adapter"),
    ):
        with pytest.raises(ValueError, match=message):
            scores(config_of(tmp_path / "base", adapter=str(tmp_path / name)))
    for engine in ("vllm", "http"):
        options = {"path": ""} if engine == "http" else {"path": "x"}
        with pytest.raises(ValueError, match=f"adapter has no effect with engine {engine}"):
            TeacherConfig(
                engine=engine,
                adapter="x",
                endpoints=("http://h",) if engine == "http" else (),
                **options,
            )


@pytest.mark.parametrize("kind", ["F32", "Q8_0"])
def test_a_gguf_file_is_a_teacher(kind: str, tmp_path: Path) -> None:
    """Its numbers are those of the weights that it stands for; the manifest says what they were."""
    pytest.importorskip("gguf")
    sizes = models.DECODER | {"intermediate_size": 64}
    settings = Qwen2Config(**sizes, tie_word_embeddings=False)
    torch.manual_seed(0)
    model = widened(AutoModelForCausalLM.from_config(settings, dtype=torch.float32))
    tokenizer = models.build_tokenizer()
    file = tmp_path / "teacher.gguf"
    model = save_gguf(file, model, tokenizer, kind)
    config = config_of(file)
    teacher = hash_weights(describe_teacher(config))
    assert teacher.info.dtype == f"float32+gguf-{kind.lower()}"
    assert teacher.model_path == str(file) and teacher.info.architecture == "Qwen2ForCausalLM"
    text = "the quick brown fox, and\n a  lazy dog"
    assert teacher.tokenizer is not None
    assert teacher.tokenizer(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert farthest(config, model) < 1e-3
    file.write_bytes(file.read_bytes() + b"x")
    assert hash_weights(describe_teacher(config)).info.fingerprint != teacher.info.fingerprint
    with pytest.raises(ValueError, match="is quantised as it is saved"):
        describe_teacher(config_of(file, quantization="bnb-4bit"))
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(ValueError, match="take the weights it was made from"):
        describe_teacher(config_of(file))


CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM
Path({marker!r}).write_text("ran")
class OwnConfig(LlamaConfig):
    model_type = "its_own"
class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""


def test_code_of_a_model_runs_only_if_it_is_trusted(
    dump_config: DumpConfig, tmp_path: Path
) -> None:
    """Nobody is asked: one line names the option; with it, the code is part of the fingerprint."""
    folder, marker = tmp_path / "teacher", tmp_path / "marker"
    models.save_teacher(folder)
    (folder / "own.py").write_text(CODE.format(marker=str(marker)))
    settings = json.loads((folder / "config.json").read_text())
    settings |= {
        "model_type": "its_own",
        "architectures": ["OwnModel"],
        "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"},
    }
    (folder / "config.json").write_text(json.dumps(settings))
    for trusted in (False, True):
        teacher = dataclasses.replace(
            dump_config.teacher, path=str(folder), trust_remote_code=trusted
        )
        output = tmp_path / f"cache-{trusted}"
        config = dataclasses.replace(dump_config, teacher=teacher, output=str(output))
        done = command("teacher_dump", "run", "--config", save_config(config, tmp_path), first=yes)
        assert marker.exists() == trusted, done.stderr
        assert done.code == (0 if trusted else 2), done.stderr
        if not trusted:
            assert "set teacher.trust_remote_code: true" in done.stderr
            assert done.stderr.count("\n") == 2  # the line, and the hint at --debug
    kept = CacheReader(tmp_path / "cache-True").manifest.teacher.fingerprint
    (folder / "own.py").write_text(CODE.format(marker=str(marker)) + "\nx = 1\n")
    trusting = dataclasses.replace(config.teacher, trust_remote_code=True)
    assert hash_weights(describe_teacher(trusting)).info.fingerprint != kept


def yes() -> None:
    """Answer every question of this process with yes."""
    reading, writing = os.pipe()
    os.write(writing, b"yes\n" * 100)
    os.dup2(reading, 0)


def test_a_tokenizer_that_brings_code_is_refused_too(tmp_path: Path) -> None:
    """With the same line."""
    models.save_teacher(tmp_path)
    marker = tmp_path / "marker"
    (tmp_path / "own.py").write_text(
        f"from pathlib import Path\nPath({str(marker)!r}).write_text('ran')\nclass Own: pass\n"
    )
    file = tmp_path / "tokenizer_config.json"
    settings = json.loads(file.read_text()) | {"tokenizer_class": "Own"}
    settings["auto_map"] = {"AutoTokenizer": ["own.Own", "own.Own"]}
    file.write_text(json.dumps(settings))
    try:
        describe_teacher(config_of(tmp_path))
    except ValueError as error:
        assert "set teacher.trust_remote_code: true" in str(error)
    assert not marker.exists()
