"""What of a teacher's options cannot work here, told before its weights are read."""

import copy
import importlib.util
import logging
from typing import Any

import torch
from transformers import AutoConfig
from transformers.quantizers.auto import get_hf_quantizer

from decant.teacher_dump.engines.config import TeacherConfig
from decant.teacher_dump.engines.seam import EngineError
from decant.teacher_dump.engines.transformers.model import (
    load_options,
    model_class,
    quantization_config,
)

log = logging.getLogger(__name__)


def check(config: TeacherConfig, model_path: str) -> list[str]:
    """Warnings about device and dtype.

    Raises EngineError for a class, device, attention or quantisation that would fail in loading.
    """
    _check_device(config.device)
    source = load_options(config, model_path)
    settings = AutoConfig.from_pretrained(**source)
    auto = model_class(settings, config)
    if config.adapter and importlib.util.find_spec("peft") is None:
        raise EngineError(f"teacher.adapter {config.adapter} needs peft: pip install '.[peft]'")
    if "gguf_file" not in source:
        try:
            get_hf_quantizer(copy.deepcopy(settings), quantization_config(config), None, True, {})
        except EngineError:
            raise
        except Exception as error:  # a package that is missing, a device that is too old
            raise EngineError(f"{config.path} is quantised, which cannot work: {error}") from error
    if config.attention:
        try:
            with torch.device("meta"):
                auto.from_config(
                    settings,
                    attn_implementation=config.attention,
                    trust_remote_code=config.trust_remote_code,
                )
        except Exception as error:  # unknown, not installed, or not for this architecture
            message = str(error).partition("\n")[0]
            raise EngineError(f"teacher.attention {config.attention}: {message}") from error
    return _warnings(config, settings)


def _check_device(name: str) -> None:
    if name == "auto":
        return
    try:
        device = torch.device(name)
    except RuntimeError as error:
        message = str(error).partition("\n")[0]
        raise EngineError(f"teacher.device {name} is not a device: {message}") from error
    if device.type == "cpu":
        return
    module = getattr(torch, device.type, None)
    if module is None or not module.is_available():
        raise EngineError(
            f"teacher.device {name}: there is no {device.type} here that this torch "
            f"({torch.__version__}) can use: set cpu, or auto"
        )
    if device.index is not None and device.index >= (count := module.device_count()):
        raise EngineError(f"teacher.device {name}: there are {count}, counted from 0")


def _warnings(config: TeacherConfig, settings: Any) -> list[str]:
    """What works here, but slowly."""
    on_cpu = config.device == "cpu" or (
        config.device == "auto" and not torch.accelerator.is_available()
    )
    saved = settings.dtype or settings.get_text_config().dtype
    dtype = str(saved).removeprefix("torch.") if config.dtype == "auto" else config.dtype
    if not on_cpu or dtype != "float16":
        return []
    return [
        "the teacher computes in float16 on a CPU, which takes 3 to 4 times as long as float32: "
        "set teacher.dtype: float32"
    ]
