"""Training for the rounding of low-bit numbers, and the quantised student that comes of it.

torchao is imported here alone. Linear layers but the head round their weights, and perhaps their
inputs, in the forward as a quantised student will; gradients pass as if they did not. The weights
keep their names and their dtype, so everything else of the trainer sees a student like any other.
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel, TorchAoConfig

from decant.student_train.config.student import QatConfig

log = logging.getLogger(__name__)


def fake_quantise(student: PreTrainedModel, config: QatConfig) -> None:
    """Make the linear layers of a student round as configured, in place.

    Raises ImportError if torchao is not installed, ValueError if a layer cannot be cut into groups.
    """
    settings = _settings(config)  # before what follows: it says what to install
    from torchao.quantization import quantize_
    from torchao.quantization.qat import QATConfig

    layers = _layers(student)
    if config.scheme.endswith("int4"):
        for name, layer in layers.items():
            if layer.in_features % config.group_size:
                raise ValueError(
                    f"student.qat.group_size {config.group_size} does not divide the "
                    f"{layer.in_features} inputs of {name}: give one that does"
                )
    if not layers:
        raise ValueError(f"student.qat: {type(student).__name__} has no linear layers to quantise")
    quantize_(student, QATConfig(settings, step="prepare"), lambda _, name: name in layers)
    rounded = sum(layer.weight.numel() for layer in layers.values())
    log.info(
        "%d linear layers, %.0f %% of the student's weights, round as %s",
        len(layers),
        100 * rounded / student.num_parameters(),
        config.scheme,
    )


def save_quantised(
    source: Path,
    target: Path,
    config: QatConfig,
    student: nn.Module,
    weights: Mapping[str, Tensor],
    *,
    trust_remote_code: bool = False,
) -> None:
    """Write the student saved in `source` into a folder, its layers as they rounded in training.

    `student` is the one that was trained, `weights` its weights by name. Raises ValueError unless
    what is read back has the same layers rounded, to the same numbers.
    """
    layers = {
        name: module
        for name, module in student.named_modules()
        if hasattr(module, "weight_fake_quantizer")
    }
    left = [
        name
        for name, module in student.named_modules()
        if isinstance(module, nn.Linear) and name not in layers
    ]
    settings = TorchAoConfig(_settings(config), modules_to_not_convert=left)
    loading: dict[str, Any] = {"dtype": "auto", "trust_remote_code": trust_remote_code}
    made = AutoModelForCausalLM.from_pretrained(source, quantization_config=settings, **loading)
    made.save_pretrained(target)
    found = AutoModelForCausalLM.from_pretrained(target, **loading)
    rounded = {
        name.removesuffix(".weight"): tensor
        for name, tensor in found.named_parameters()
        if hasattr(tensor, "dequantize") and type(tensor) is not nn.Parameter
    }
    if differing := sorted(rounded.keys() ^ layers.keys()):
        raise ValueError(
            f"{len(rounded)} layers are quantised where {len(layers)} were trained for it, first "
            f"{differing[0]}"
        )
    for name, layer in layers.items():
        weight = weights[f"{name}.weight"].cpu()
        expected = layer.weight_fake_quantizer(weight)
        if not torch.equal(rounded[name].dequantize().to(expected.dtype), expected):
            raise ValueError(f"{name} is rounded otherwise than in training")


def _layers(student: PreTrainedModel) -> dict[str, nn.Linear]:
    """The linear layers but the head, by name."""
    head = student.get_output_embeddings()
    return {
        name: module
        for name, module in student.named_modules()
        if type(module) is nn.Linear and module is not head
    }


def _settings(config: QatConfig) -> Any:
    """What torchao calls a scheme, of which training and saving are both made."""
    for chatty in ("torchao", "torch.utils._pytree"):  # of kernels that this machine cannot use
        logging.getLogger(chatty).setLevel(logging.ERROR)
    try:
        from torchao.quantization import (
            Int8DynamicActivationIntxWeightConfig,
            IntxWeightOnlyConfig,
            PerAxis,
            PerGroup,
        )
    except ImportError as error:
        raise ImportError("student.qat needs torchao: pip install 'decant[qat]'") from error
    groups = PerGroup(config.group_size)
    four_bits: torch.dtype = vars(torch)["int4"]  # of which the type checker knows nothing
    if config.scheme == "int4":
        return IntxWeightOnlyConfig(weight_dtype=four_bits, granularity=groups)
    if config.scheme == "int8_dynamic":
        return Int8DynamicActivationIntxWeightConfig(
            weight_dtype=torch.int8, weight_granularity=PerAxis(0)
        )
    return Int8DynamicActivationIntxWeightConfig(weight_dtype=four_bits, weight_granularity=groups)
