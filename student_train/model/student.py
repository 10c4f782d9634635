"""Load or make the student and its tokenizer, and check that both fit the cache."""

import difflib
import tempfile
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
)

from decant.storage import CacheReader, Store
from decant.storage.cache import paths
from decant.student_train.config.student import StudentConfig
from decant.student_train.model.tokenizer import as_fingerprinted, check_student_tokenizer

OLDER_NAMES = (
    *("rope_theta", "rope_scaling", "partial_rotary_factor", "rope_local_base_freq"),
    *("rotary_pct", "rotary_emb_base"),
)
"""What transformers takes besides a configuration's fields: it makes rope_parameters of them."""


def load_tokenizer(reader: CacheReader) -> Any | None:
    """The teacher's tokenizer as kept in the cache; None if it was dumped from ready ids."""
    files = reader.manifest.tokenizer.files
    if not files:
        return None
    store = Store(reader.url)
    with tempfile.TemporaryDirectory() as folder:
        for name in files:
            path = Path(folder, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(store.read(f"{paths.TOKENIZER}/{name}"))
        tokenizer = AutoTokenizer.from_pretrained(folder)
        return as_fingerprinted(tokenizer, folder, reader.manifest.tokenizer.fingerprint)


def load_student(
    config: StudentConfig, reader: CacheReader, seed: int, **options: Any
) -> tuple[PreTrainedModel, Any | None]:
    """The student and the tokenizer to save with it; `options` are for `from_pretrained`.

    Raises FormatError with the first differing tokens if a pretrained student's tokenizer is not
    the cache's, ValueError if the student cannot be built.
    """
    tokenizer = load_tokenizer(reader)
    dtype = getattr(torch, config.dtype)
    attention = {"attn_implementation": config.attention} if config.attention else {}
    torch.manual_seed(seed)
    if config.path:
        if Path(config.path, "adapter_config.json").exists():
            raise ValueError(
                f"student.path {config.path} holds an adapter alone: merge it into its base first"
            )
        try:
            student = AutoModelForCausalLM.from_pretrained(
                config.path, dtype=dtype, **attention, **options
            )
        except (OSError, ValueError, ImportError, StrictDataclassError) as error:
            raise ValueError(f"student.path {config.path} cannot be loaded: {error}") from error
        if tokenizer is not None:
            try:
                own = AutoTokenizer.from_pretrained(config.path)
            except (OSError, ValueError) as error:
                raise ValueError(
                    f"student.path {config.path} has no tokenizer to compare with the cache's: "
                    f"{error}"
                ) from error
            check_student_tokenizer(tokenizer, own, config.path, reader.url)
        return student, tokenizer
    fields = dict(config.config)
    model_type = fields.pop("model_type")
    fields.setdefault("vocab_size", reader.manifest.shared_vocab_size)
    if tokenizer is not None:
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            token = getattr(tokenizer, name)  # may be an added one, beyond the student's rows
            if token is None or token < fields["vocab_size"]:
                fields.setdefault(name, token)
    try:
        _refuse_unknown(config.config, AutoConfig.for_model(model_type))
        settings = AutoConfig.for_model(model_type, **fields)
        student = AutoModelForCausalLM.from_config(settings, dtype=dtype, **attention)
    except (
        *(ValueError, TypeError, ImportError),
        *(StrictDataclassError, ArithmeticError, RuntimeError),  # transformers' and torch's checks
    ) as error:
        raise ValueError(f"student.config does not give a model: {error}") from error
    return student, tokenizer


def _refuse_unknown(fields: dict[str, Any], defaults: PreTrainedConfig) -> None:
    """Raise ValueError for names that the configuration would keep without any effect."""
    known = {*defaults.to_dict(), *defaults.attribute_map}
    for name in fields:
        if name not in known and name not in OLDER_NAMES and not hasattr(defaults, name):
            close = difflib.get_close_matches(name, known, n=1)
            meant = f", did you mean {close[0]!r}?" if close else ""
            raise ValueError(f"{type(defaults).__name__} has no field {name!r}{meant}")


def compile_layers(student: PreTrainedModel) -> None:
    """Compile the layers that repeat, in place, so that weights keep their names."""
    names = layer_classes(student)
    layers = [module for module in student.modules() if type(module).__name__ in names]
    for module in layers or [student.base_model]:
        module.compile()


def layer_classes(student: torch.nn.Module) -> list[str]:
    """Names of the classes of layers that repeat, as transformers knows them."""
    known = set(getattr(student, "_no_split_modules", None) or ())
    return sorted(known & {type(module).__name__ for module in student.modules()})
