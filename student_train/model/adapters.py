"""LoRA students: peft's layers inside the student, small checkpoints, saved alone or merged.

peft is imported here alone, and only when an adapter is asked for. The layers are put into the
transformers model in place, so everything else of the trainer sees a student like any other, most
of whose weights are frozen.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedModel

from decant.student_train.config.student import AdapterConfig
from decant.student_train.model.student import plain_name

WEIGHTS = "adapter.safetensors"
_PREFIX = "base_model.model."


def load_options(config: AdapterConfig, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """What `from_pretrained` takes to hold frozen weights as configured.

    Raises ImportError if bitsandbytes is not installed.
    """
    if not config.quantization:
        return {}
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "adapter.quantization needs bitsandbytes: pip install 'decant[quantised]'"
        ) from error
    if config.quantization == "8bit":
        quantised = BitsAndBytesConfig(load_in_8bit=True)
    else:
        quantised = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    return {"quantization_config": quantised, "device_map": {"": device}}


def attach(student: PreTrainedModel, config: AdapterConfig) -> Any:
    """Put adapters into a student, in place, and freeze the rest; return peft's model around it.

    Raises ImportError if peft is not installed, ValueError if a name asked for is of no layer that
    can have one, or if the adapter could not be merged as it was trained.
    """
    try:
        import peft
    except ImportError as error:
        raise ImportError("adapter needs peft: pip install 'decant[peft]'") from error
    named = [name for name in config.target_modules if name != "all-linear"]
    lora = peft.LoraConfig(
        r=config.r,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=named or "all-linear",
        task_type="CAUSAL_LM",
    )
    for module in student.modules():
        # bitsandbytes would repack 4-bit weights for inference on a CPU at every evaluation,
        # rounding their scales to bfloat16 on the way: the base has to stay as it is.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    try:
        adapter = peft.get_peft_model(student, lora)
    except ValueError as error:
        raise ValueError(f"adapter.target_modules {config.target_modules}: {error}") from error
    adapted = [f".{name}" for name in adapter.targeted_module_names]
    for name in named:
        if not any(path.endswith(f".{name}") for path in adapted):
            raise ValueError(f"adapter.target_modules: the student has no layer {name!r} to adapt")
    if config.merge and getattr(student.config.get_text_config(), "tie_word_embeddings", False):
        tied = {
            "head": student.get_output_embeddings(),
            "input embedding": student.get_input_embeddings(),
        }
        for (name, layer), other in zip(tied.items(), reversed(tied), strict=True):
            if isinstance(layer, peft.tuners.tuners_utils.BaseTunerLayer):
                raise ValueError(
                    f"adapter.target_modules {config.target_modules}: the {name} is tied to the "
                    f"{other}: a merge would change both; leave it out of target_modules, or set "
                    "adapter.merge: false"
                )
    return adapter


def put_on(model: PreTrainedModel, path: str) -> PreTrainedModel:
    """A model with the saved adapter at `path` merged in, or beside its weights if quantised.

    Raises ImportError if peft is not installed, ValueError if the adapter is not one of this model.
    """
    try:
        import peft
    except ImportError as error:
        raise ImportError(f"the adapter {path} needs peft: pip install 'decant[peft]'") from error
    try:
        adapted = peft.PeftModel.from_pretrained(model, path)
        loaded = adapted.load_adapter(path, "default")  # again, for what it says
    except Exception as error:  # whatever peft raises for shapes, names and files
        raise ValueError(
            f"the adapter {path} cannot be put on {type(model).__name__}: {error}"
        ) from error
    stray = [*loaded.missing_keys, *loaded.unexpected_keys]
    if stray:
        raise ValueError(
            f"the adapter {path} does not belong to this model: {len(stray)} of its tensors are "
            f"missing or have no place here, first {stray[0]}"
        )
    if adapted.peft_config["default"].is_prompt_learning:
        raise ValueError(f"the adapter {path} puts tokens before every text: it cannot be measured")
    if getattr(model, "is_quantized", False):
        inner: PreTrainedModel = adapted.base_model.model
        return inner
    merged: PreTrainedModel = adapted.merge_and_unload(safe_merge=True)
    return merged


def checkpoint_adapter_only(accelerator: Accelerator) -> None:
    """Let `save_state` and `load_state` leave out what is frozen.

    Only where accelerate itself writes the weights: not under FSDP and DeepSpeed.
    """

    def save(models: list[nn.Module], weights: list[dict[str, Tensor]], folder: str) -> None:
        weights.clear()  # and nothing is left for accelerate to write
        if accelerator.is_main_process:
            for model in models:
                save_file(trainable_weights(accelerator.unwrap_model(model)), _file(folder))

    def load(models: list[nn.Module], folder: str) -> None:
        while models:
            model = accelerator.unwrap_model(models.pop())
            load_trainable(model, load_file(_file(folder)), where=str(_file(folder)))

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)


def trainable_weights(model: nn.Module) -> dict[str, Tensor]:
    """The weights that are trained, by name, detached and contiguous."""
    return {
        plain_name(name): parameter.detach().contiguous()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


@torch.no_grad()
def load_trainable(model: nn.Module, weights: dict[str, Tensor], *, where: str) -> None:
    """Set the weights that are trained. Raises ValueError unless these are all of them."""
    ours = {plain_name(name): p for name, p in model.named_parameters() if p.requires_grad}
    if differing := sorted(ours.keys() ^ weights.keys()):
        raise ValueError(
            f"{where} holds other weights than the adapter of this run, first {differing[:3]}"
        )
    for name, parameter in ours.items():
        parameter.copy_(weights[name])


def save_adapter(adapter: Any, weights: dict[str, Tensor], folder: Path) -> None:
    """Write the adapter alone: its config, which names the base, and its weights."""
    adapter.save_pretrained(
        folder,
        state_dict={_PREFIX + name: value for name, value in weights.items()},
        save_embedding_layers=False,
    )


def adapter_file_name(name: str) -> str:
    """What a weight of an adapter is called in the file that peft writes."""
    return _PREFIX + name.replace(".default", "")


def merged(
    adapter: Any, weights: dict[str, Tensor], load_base: Callable[[], PreTrainedModel]
) -> PreTrainedModel:
    """The student with the adapter's weights merged into a base loaded anew.

    A quantised base is unpacked first, so the merged student is the one that was trained, not the
    base's unquantised weights with an adapter that never met them.
    """
    import peft

    base = load_base()
    if getattr(base, "is_quantized", False):
        base = base.dequantize()
    config = adapter.peft_config["default"]
    fresh = peft.get_peft_model(base, config)
    ours = {
        _PREFIX + name: value
        for name, value in weights.items()
        if ".lora_" in name  # those of the base are loaded already
    }
    missing = fresh.load_state_dict(ours, strict=False).missing_keys
    assert not [name for name in missing if ".lora_" in name], missing
    return fresh.merge_and_unload()


def _file(folder: str) -> Path:
    return Path(folder) / WEIGHTS
