"""Load a teacher with transformers: onto one device, over several, offloaded, or quantised.

Knows nothing of what the model is asked afterwards.
"""

import importlib.util
import logging
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from decant.teacher_dump.engines.config import TeacherConfig
from decant.teacher_dump.engines.seam import EngineError


def load_model(config: TeacherConfig, model_path: str) -> PreTrainedModel:
    """The teacher at local directory `model_path`, in evaluation mode.

    Raises EngineError if it cannot be loaded as asked, or if its weights are not all there.
    """
    device = config.device
    if device == "auto":
        spread = torch.cuda.is_available() or config.max_memory or config.offload_folder
        device = "auto" if spread else "cpu"
    options = _options(config)
    try:
        model, loading = AutoModelForCausalLM.from_pretrained(
            model_path,
            dtype=config.dtype if config.dtype == "auto" else getattr(torch, config.dtype),
            device_map=device,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # refused below, in one line
            **options,
        )
    except Exception as error:  # whatever a device, a weight file or an architecture may raise
        raise EngineError(f"cannot load {model_path} on {device}: {error}") from error
    unlike = [name for name, *_ in loading["mismatched_keys"]]
    if absent := sorted({*loading["missing_keys"], *unlike}):  # they would be random
        raise EngineError(
            f"{model_path}: {len(absent)} tensors that its config.json asks for are not in the "
            f"weights, or have another shape there, first {absent[0]}; copy the model again"
        )
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # warns of a cast at every forward
    return model.eval()


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
    if config.quantization:
        if importlib.util.find_spec("bitsandbytes") is None:
            raise EngineError(
                f"teacher.quantization {config.quantization} needs bitsandbytes: "
                "pip install 'decant[quantised]'"
            )
        from transformers import BitsAndBytesConfig

        compute = torch.bfloat16 if config.dtype == "auto" else getattr(torch, config.dtype)
        options["quantization_config"] = (
            BitsAndBytesConfig(
                load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute
            )
            if config.quantization == "bnb-4bit"
            else BitsAndBytesConfig(load_in_8bit=True)
        )
    return options
