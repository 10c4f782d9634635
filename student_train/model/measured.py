"""Load a model that is only to be measured: any form that transformers reads.

A directory or hub id, with weights quantised as they are saved or to be quantised while loading
(bitsandbytes), a GGUF file, or a PEFT adapter on its base.
"""

import logging
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedModel

from decant.schemas.strict import UnfitError
from decant.storage import CacheReader
from decant.student_train.alignment.aligner import Aligner, refuse_cache
from decant.student_train.config.alignment import AlignConfig
from decant.student_train.config.student import AdapterConfig
from decant.student_train.config.verdict import ModelOptions
from decant.student_train.model.adapters import load_options, put_on
from decant.student_train.model.student import absent_weights, load_tokenizer, student_vocab_size
from decant.student_train.model.tokenizer import check_student_tokenizer

GGUF = ".gguf"
ADAPTER = "adapter_config.json"
DTYPES = ("auto", "float32", "bfloat16", "float16")

log = logging.getLogger(__name__)


def load_measured(
    path: str, options: ModelOptions, reader: CacheReader
) -> tuple[PreTrainedModel, int, Aligner | None]:
    """The model at `path`, in evaluation mode, and how many of its ids its softmax is over.

    Its tokenizer is compared with the cache's; what it has more than that belongs to the tail. The
    third is what aligns the cache with it, if it has another one and `options` allow that.

    Raises FormatError with the first difference if the ids mean something else, ValueError if the
    model cannot be loaded as asked, or not all of its weights are there.
    """
    folder, adapter = path, ""
    if Path(path, ADAPTER).exists():
        folder, adapter = options.base or _base_of(path), path
    elif options.base:
        raise ValueError(f"--base has no effect with {path}, which is no PEFT adapter")
    source = _source(folder)
    looks_local = folder.startswith((".", "/", "~")) or folder.count("/") > 1
    if looks_local and not Path(folder).expanduser().exists():
        raise FileNotFoundError(f"model {folder} cannot be loaded: no such file or directory")
    tokenizer, aligner = _check_tokenizer(folder, source, options, reader)
    device = options.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype: Any = options.dtype if options.dtype == "auto" else getattr(torch, options.dtype)
    more: dict[str, Any] = {"device_map": {"": device}}
    if options.quantization:
        compute = torch.bfloat16 if dtype == "auto" else dtype
        setting = AdapterConfig(r=1, quantization=options.quantization)
        more = load_options(setting, compute, torch.device(device))
    if "gguf_file" in source:
        if options.quantization:
            raise ValueError(f"--quantization has no effect with {folder}, a GGUF file")
        more["quantization_config"] = GgufConfig(dequantize=True)
    if options.attention:
        more["attn_implementation"] = options.attention
    try:
        model, loading = AutoModelForCausalLM.from_pretrained(
            **source,
            dtype=dtype,
            trust_remote_code=options.trust_remote_code,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # refused below, in one line
            **more,
        )
    except Exception as error:  # whatever a device, a weight file or an architecture may raise
        raise ValueError(f"model {folder} cannot be loaded: {error}{_hint(error)}") from error
    if absent := absent_weights(loading):
        raise ValueError(
            f"model {folder}: {len(absent)} tensors that its config.json asks for are not in the "
            f"weights, or have another shape there, first {absent[0]}"
        )
    if adapter:
        model = put_on(model, adapter)
    for module in model.modules():
        # bitsandbytes would repack 4-bit weights on a CPU and round their scales on the way.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # warns of a cast at every forward
    if aligner:
        rows = model.get_output_embeddings().weight.shape[0]
        if rows < aligner.vocab_size:
            raise ValueError(
                f"model {folder} says {rows:,} ids, but its tokenizer has {aligner.vocab_size:,}: "
                "--tokenizer names a directory that has its own"
            )
        return model.eval(), aligner.vocab_size, aligner
    return model.eval(), student_vocab_size(model, tokenizer, reader, "bucket"), None


def form_of(model: PreTrainedModel, path: str) -> str:
    """In which form a model was measured, for people: dtype and quantisation."""
    parameter = next((p for p in model.parameters() if p.is_floating_point()), None)
    dtype = str(parameter.dtype).removeprefix("torch.") if parameter is not None else "unknown"
    settings = getattr(model.config, "quantization_config", None)
    if Path(path).suffix == GGUF:
        return f"{dtype}, unpacked from GGUF"
    if settings is None:
        return dtype
    fields = settings if isinstance(settings, dict) else settings.to_dict()
    bits = " 4bit" if fields.get("load_in_4bit") else " 8bit" if fields.get("load_in_8bit") else ""
    return f"{dtype}, {fields.get('quant_method', 'quantised')}{bits}"


def _source(path: str) -> dict[str, Any]:
    """What every `from_pretrained` is told of where the model is."""
    file = Path(path).expanduser()
    if file.suffix != GGUF:
        return {"pretrained_model_name_or_path": path}
    if not file.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    return {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}


def _base_of(path: str) -> str:
    import json

    try:
        fields = json.loads(Path(path, ADAPTER).read_text())
    except ValueError as error:
        raise ValueError(f"{path}/{ADAPTER} is not JSON: {error}") from None
    base = fields.get("base_model_name_or_path") if isinstance(fields, dict) else None
    if not base:
        raise ValueError(f"{path}/{ADAPTER} names no base model: give it with --base")
    return str(base)


def _check_tokenizer(
    path: str, source: dict[str, Any], options: ModelOptions, reader: CacheReader
) -> tuple[Any | None, Aligner | None]:
    """The model's tokenizer, whose ids are the cache's; None where that is not to be compared.

    With what aligns the two, where they mean something else and that is allowed. Raises FormatError
    where it is not. A cache without a tokenizer cannot say.
    """
    is_aligned = options.tokenizer_mismatch == "align"
    if is_aligned:
        refuse_cache(reader)
    theirs = load_tokenizer(reader)
    if theirs is None:
        log.warning("%s has no tokenizer: that of %s is not compared", reader.url, path)
        return None, None
    if options.tokenizer:
        source = {"pretrained_model_name_or_path": options.tokenizer}
    try:
        own = AutoTokenizer.from_pretrained(**source, trust_remote_code=options.trust_remote_code)
    except Exception as error:  # the readers of GGUF files raise what they like
        raise ValueError(
            f"model {path} has no tokenizer to compare with the cache's: {error}{_hint(error)}; "
            "--tokenizer names a directory that has it"
        ) from error
    if "gguf_file" in source:
        _check_vocabulary(theirs, own, path, reader)
        return None, None
    size = reader.manifest.shared_vocab_size
    try:
        where = options.tokenizer or path
        found, same = check_student_tokenizer(theirs, own, where, reader.url, size)
    except UnfitError as error:
        if is_aligned:
            align = AlignConfig(messages=options.messages)
            share, messages = align.max_left_out, align.messages
            return own, Aligner(reader, own, where=where, max_left_out=share, messages=messages)
        raise UnfitError(
            f"{error} Bits and divergence per byte of a model of another tokenizer are given by "
            f"`decant evaluate --model {path} --cache {reader.url} --tokenizer-mismatch align`"
        ) from error
    if text := same.text():
        log.info("the tokenizer of %s means the same by every id; it differs in: %s", path, text)
    return found, None


def _check_vocabulary(theirs: Any, own: Any, path: str, reader: CacheReader) -> None:
    """Raise FormatError unless every id stands for the same token.

    A GGUF file holds no whole tokenizer: its vocabulary is what can be compared.
    """
    ours = {index: token for token, index in own.get_vocab().items()}
    cached = {index: token for token, index in theirs.get_vocab().items()}
    for index in sorted(cached):
        if index < reader.manifest.shared_vocab_size and ours.get(index) != cached[index]:
            raise UnfitError(
                f"id {index} is {cached[index]!r} in {reader.url} and {ours.get(index)!r} in "
                f"{path}: the model has another tokenizer, of which a GGUF file holds the "
                "vocabulary alone: --tokenizer names a directory that has it whole"
            )


def _hint(error: Exception) -> str:
    text = str(error)
    if "trust_remote_code" in text:
        return ". If you have read that code and trust it: --trust-remote-code"
    if "gguf" in text.lower() and ("install" in text or "No package" in text):
        return " (pip install 'decant[gguf]')"
    return ""
