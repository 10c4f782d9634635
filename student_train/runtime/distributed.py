"""What differs between one process, DDP, FSDP2 and DeepSpeed, all of them accelerate's.

All average gradients over processes; DeepSpeed also takes the optimizer's step in its backward and
wants to know the batch sizes. Everything else of the loop is the same for all.
"""

import contextlib
import logging
import os
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, broadcast_object_list
from torch import Tensor, nn
from transformers.integrations import unset_hf_deepspeed_config

from decant.student_train.config.run import TrainConfig

SPLITS_OF_A_MODEL = {
    "PARALLELISM_CONFIG_TP_SIZE": "tensor",
    "PARALLELISM_CONFIG_CP_SIZE": "context",
    "PARALLELISM_CONFIG_SP_SIZE": "sequence",
}
"""Variables of `accelerate launch` that split one sequence or one matrix over devices."""


def start_accelerator(config: TrainConfig) -> Accelerator:
    """The accelerator of this process; the other processes than the first only speak of trouble.

    Raises ValueError for trackers that cannot be had, where accelerate's or DeepSpeed's own
    configuration says otherwise than ours, and for processes that know nothing of each other.
    """
    refuse_launch(config, os.environ)
    accelerator = Accelerator(
        mixed_precision=config.mixed_precision,
        log_with=config.trackers or None,
        project_dir=config.output,
    )
    launched = int(os.environ.get("WORLD_SIZE", "1")) if "LOCAL_RANK" in os.environ else 1
    if launched > 1 and accelerator.num_processes == 1:
        raise ValueError(
            f"{launched} processes were launched, but accelerate finds no GPUs for them: on the "
            "CPU, launch with --cpu"
        )
    available = {getattr(tracker, "value", tracker) for tracker in accelerator.log_with}
    if absent := sorted(set(config.trackers) - available):
        raise ValueError(f"trackers {absent} are unknown or not installed; pip install them")
    if is_deepspeed(accelerator):
        tell_deepspeed(accelerator, config)
    else:
        accelerator.gradient_accumulation_steps = 1  # the loop divides by the targets of a step
    if not accelerator.is_main_process:
        logging.getLogger("decant").setLevel(logging.WARNING)
    return accelerator


def refuse_launch(config: TrainConfig, environment: Mapping[str, str]) -> None:
    """Raise ValueError if what `accelerate launch` or its saved config asks for has no effect here.

    It comes as variables of the environment, which accelerate heeds by itself.
    """

    def asked(name: str, default: str) -> str:
        return environment.get(name, default).lower() or default

    precision = asked("ACCELERATE_MIXED_PRECISION", "no")
    if precision not in ("no", config.mixed_precision):
        raise ValueError(
            f"accelerate was launched with mixed_precision {precision}, this config has "
            f"{config.mixed_precision}: set mixed_precision here, and no (or the same) there"
        )
    accumulation = asked("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    if accumulation not in ("1", str(config.gradient_accumulation)):
        raise ValueError(
            f"accelerate was launched with gradient_accumulation_steps {accumulation}, this config "
            f"has {config.gradient_accumulation}: set gradient_accumulation here, and leave it out "
            "there"
        )
    if asked("ACCELERATE_USE_MEGATRON_LM", "false") == "true":
        raise ValueError("accelerate was launched for Megatron-LM: use DDP, FSDP2 or DeepSpeed")
    if asked("ACCELERATE_USE_PARALLELISM_CONFIG", "false") == "true":
        for name, meaning in SPLITS_OF_A_MODEL.items():
            if asked(name, "1") != "1":
                raise ValueError(
                    f"accelerate was launched with {meaning} parallelism ({name}="
                    f"{environment[name]}), which the loss is not made for: use DDP, FSDP2 or "
                    "DeepSpeed alone"
                )


def is_deepspeed(accelerator: Accelerator) -> bool:
    """Whether DeepSpeed runs the optimizer."""
    return accelerator.distributed_type == DistributedType.DEEPSPEED


def shards_weights(accelerator: Accelerator) -> bool:
    """Whether no device holds the whole student."""
    if is_deepspeed(accelerator):
        return accelerator.state.deepspeed_plugin.zero_stage == 3
    return accelerator.distributed_type == DistributedType.FSDP


def tell_deepspeed(accelerator: Accelerator, config: TrainConfig) -> None:
    """Put our numbers into DeepSpeed's configuration.

    The student is loaded whole, and cut up by ZeRO-3 only when it was compared with the cache.
    """
    unset_hf_deepspeed_config()
    plugin: Any = accelerator.state.deepspeed_plugin
    for key, name, value in (
        ("batch_size", "train_micro_batch_size_per_gpu", config.batch_size),
        ("gradient_accumulation", "gradient_accumulation_steps", config.gradient_accumulation),
        ("optimizer.max_grad_norm", "gradient_clipping", config.optimizer.max_grad_norm),
    ):
        found = plugin.deepspeed_config.get(name, "auto")
        if found not in ("auto", 1, value):  # 1 is what accelerate fills in
            raise ValueError(
                f"DeepSpeed's config has {name} {found}, this config {key} {value}: leave it out "
                "there, or auto"
            )
        plugin.deepspeed_config[name] = value
    if plugin.zero_stage == 3:  # without, there would be no student to save
        zero = plugin.deepspeed_config.setdefault("zero_optimization", {})
        zero["stage3_gather_16bit_weights_on_model_save"] = True


@contextlib.contextmanager
def microbatch(accelerator: Accelerator, model: nn.Module, *, is_last: bool) -> Iterator[None]:
    """Forward and backward of one microbatch: the step's last one exchanges gradients.

    FSDP exchanges them in each: without, every device would collect those of the whole student.
    """
    if is_deepspeed(accelerator):
        accelerator.sync_gradients = is_last
        yield
    elif is_last or shards_weights(accelerator):
        yield
    else:
        with accelerator.no_sync(model):
            yield


def backward(accelerator: Accelerator, loss: Tensor) -> None:
    """Add the gradients of a loss that was divided by all targets of the step.

    Under DeepSpeed, the last microbatch of a step also clips the gradients and takes the step.
    """
    averaged = loss * accelerator.num_processes  # undoes the mean of gradients over processes
    if is_deepspeed(accelerator):
        accelerator.backward(averaged, scale_wrt_gas=False)
    else:
        accelerator.backward(averaged)


def sum_over_processes(accelerator: Accelerator, value: float) -> float:
    """The sum; all processes have to call it."""
    if accelerator.num_processes == 1:
        return float(value)
    number = torch.tensor(float(value), device=accelerator.device)
    return float(accelerator.reduce(number, reduction="sum").item())


def of_first_process(value: Any) -> Any:
    """What the first process says; all processes have to call it."""
    return broadcast_object_list([value])[0]
