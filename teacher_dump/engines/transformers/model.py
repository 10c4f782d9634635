"""Load a teacher with transformers: onto one device, over several, offloaded, or quantised.

Knows nothing of what the model is asked afterwards.
"""

import importlib.util
import logging
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    GgufConfig,
    PreTrainedModel,
)

from decant.teacher_dump.engines.config import TeacherConfig
from decant.teacher_dump.engines.seam import EngineError
from decant.teacher_dump.engines.weights import GGUF, custom_code, locate_adapter

CLASSES = (AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM)
"""In the order in which they are tried: those of images and sound read texts as well."""


def load_model(config: TeacherConfig, model_path: str) -> PreTrainedModel:
    """The teacher at local directory or GGUF file `model_path`, in evaluation mode.

    Raises EngineError if it cannot be loaded as asked, or if its weights are not all there.
    """
    device = config.device
    if device == "auto":
        spread = torch.cuda.is_available() or config.max_memory or config.offload_folder
        device = "auto" if spread else "cpu"
    source = load_options(config, model_path)
    options = _options(config)
    if "gguf_file" in source:
        options["quantization_config"] = GgufConfig(dequantize=True)
    try:
        settings = AutoConfig.from_pretrained(**source)
        model, loading = model_class(settings, config).from_pretrained(
            **source,
            dtype=config.dtype if config.dtype == "auto" else getattr(torch, config.dtype),
            device_map=device,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # refused below, in one line
            **options,
        )
    except EngineError:
        raise
    except Exception as error:  # whatever a device, a weight file or an architecture may raise
        raise EngineError(f"cannot load {model_path} on {device}: {error}") from error
    unlike = [name for name, *_ in loading["mismatched_keys"]]
    if absent := sorted({*loading["missing_keys"], *unlike}):  # they would be random
        raise EngineError(
            f"{model_path}: {len(absent)} tensors that its config.json asks for are not in the "
            f"weights, or have another shape there, first {absent[0]}; copy the model again"
        )
    if adapter := locate_adapter(config.adapter):
        model = _with_adapter(model, adapter)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # warns of a cast at every forward
    return model.eval()


def load_options(config: TeacherConfig, model_path: str) -> dict[str, Any]:
    """What every `from_pretrained` of transformers is told of where the teacher is."""
    path = Path(model_path)
    options: dict[str, Any] = {"trust_remote_code": config.trust_remote_code}
    if path.suffix != GGUF:
        return {"pretrained_model_name_or_path": model_path, **options}
    return {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name, **options}


def model_class(settings: Any, config: TeacherConfig) -> Any:
    """The class of transformers that loads this configuration for text. Raises EngineError."""
    kind = settings.model_type
    if getattr(settings, "is_encoder_decoder", False):
        raise EngineError(
            f"{config.path} ({kind}) is an encoder and a decoder; a teacher is a decoder alone"
        )
    custom = getattr(settings, "auto_map", None) or {}
    for auto in CLASSES:
        if type(settings) in auto._model_mapping or (
            config.trust_remote_code and auto.__name__ in custom
        ):
            return auto
    if CLASSES[0].__name__ in custom:
        raise EngineError(custom_code(config))
    raise EngineError(f"{config.path} ({kind}) is not a model that predicts the next token")


def _with_adapter(model: PreTrainedModel, adapter: Path) -> PreTrainedModel:
    """The model with a PEFT adapter merged into its weights, or beside them if those are quantised.

    Raises EngineError if the adapter is not one of this model.
    """
    if importlib.util.find_spec("peft") is None:
        raise EngineError(f"teacher.adapter {adapter} needs peft: pip install '.[peft]'")
    import peft

    where = f"teacher.adapter {adapter}"
    if any(weight.device.type == "meta" for weight in model.parameters()):
        raise EngineError(f"{where} cannot be merged into weights on disk: give them more memory")
    try:
        settings = peft.PeftConfig.from_pretrained(str(adapter))
        if settings.is_prompt_learning:
            raise EngineError(
                f"{where} ({settings.peft_type.value}) puts tokens before every text; only "
                "adapters of weights, such as LoRA, can be put on a teacher"
            )
        adapted = peft.PeftModel.from_pretrained(model, str(adapter), config=settings)
        loaded = adapted.load_adapter(str(adapter), "default")  # again, for what it says
        stray = [*loaded.missing_keys, *loaded.unexpected_keys]
        if loaded.missing_keys or loaded.unexpected_keys:
            raise EngineError(
                f"{where} does not belong to this model: {len(stray)} of its tensors are missing "
                f"or have no place here, first {stray[0]}"
            )
        if getattr(model, "is_quantized", False):
            return adapted.base_model.model
        return adapted.merge_and_unload(safe_merge=True)
    except EngineError:
        raise
    except Exception as error:  # whatever peft raises for shapes, names and files
        raise EngineError(f"{where} cannot be put on {type(model).__name__}: {error}") from error


def refuse_too_few_rows(model: PreTrainedModel, vocab_size: int) -> None:
    """Raise EngineError if the output layer has fewer rows than ids are asked for."""
    linear = model.get_output_embeddings()
    if linear is not None and (rows := linear.weight.shape[0]) < vocab_size:
        raise EngineError(f"the teacher has {rows} output rows, fewer than {vocab_size} ids")


def input_device(model: PreTrainedModel) -> torch.device:
    """Where token ids go: the device that the first layer computes on, wherever its weights are."""
    device = model.get_input_embeddings().weight.device
    if device.type != "meta":
        return device
    used = [d for d in getattr(model, "hf_device_map", {}).values() if d not in ("cpu", "disk")]
    return torch.device(used[0]) if used else torch.device("cpu")


def placement(model: PreTrainedModel) -> str:
    """The devices the weights lie on, for a person."""
    devices = getattr(model, "hf_device_map", {}).values() or [model.device]
    return " + ".join(dict.fromkeys(str(torch.device(d) if d != "disk" else d) for d in devices))


def is_out_of_memory(error: Exception) -> bool:
    """Whether a device or the machine had no memory left."""
    text = str(error).lower()
    said = ("out of memory", "can't allocate memory", "not enough memory")
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and any(words in text for words in said)
    )


def _options(config: TeacherConfig) -> dict[str, Any]:
    options: dict[str, Any] = {}
    if config.attention:
        options["attn_implementation"] = config.attention
    if config.max_memory:
        options["max_memory"] = {
            int(device) if device.isdigit() else device: size
            for device, size in config.max_memory.items()
        }
    if config.offload_folder:
        options["offload_folder"] = config.offload_folder
    if (quantised := quantization_config(config)) is not None:
        options["quantization_config"] = quantised
    return options


def quantization_config(config: TeacherConfig) -> Any:
    """What transformers is told of a quantisation while loading; None for none.

    Raises EngineError if its package is not installed.
    """
    if not config.quantization:
        return None
    if importlib.util.find_spec("bitsandbytes") is None:
        raise EngineError(
            f"teacher.quantization {config.quantization} needs bitsandbytes: "
            "pip install 'decant[quantised]'"
        )
    from transformers import BitsAndBytesConfig

    if config.quantization == "bnb-8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    compute = torch.bfloat16 if config.dtype == "auto" else getattr(torch, config.dtype)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute
    )
