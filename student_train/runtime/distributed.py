"""What differs between one process, DDP, FSDP2 and DeepSpeed, all of them accelerate's.

All average gradients over processes; DeepSpeed also takes the optimizer's step in its backward and
wants to know the batch sizes. Everything else of the loop is the same for all.
"""

import contextlib
import logging
import os
import socket
import time
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, broadcast_object_list, gather_object
from torch import Tensor, nn

from decant.student_train.config.run import TrainConfig
from decant.student_train.runtime.launch import refuse_launch, tell_deepspeed

SHARED_WITHIN_SECONDS = 30.0
"""A new file shows on the other machines of a network file system after so long at most."""


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
        tell_deepspeed(accelerator.state.deepspeed_plugin, config)
    else:
        accelerator.gradient_accumulation_steps = 1  # the loop divides by the targets of a step
    if not accelerator.is_main_process:
        logging.getLogger("decant").setLevel(logging.WARNING)
    return accelerator


def is_deepspeed(accelerator: Accelerator) -> bool:
    """Whether DeepSpeed runs the optimizer."""
    return accelerator.distributed_type == DistributedType.DEEPSPEED


def shards_weights(accelerator: Accelerator) -> bool:
    """Whether no device holds the whole student."""
    if is_deepspeed(accelerator):
        return accelerator.state.deepspeed_plugin.zero_stage == 3
    return accelerator.distributed_type == DistributedType.FSDP


@contextlib.contextmanager
def microbatch(accelerator: Accelerator, model: nn.Module, *, is_last: bool) -> Iterator[None]:
    """Forward and backward of one microbatch: the step's last one exchanges gradients.

    FSDP exchanges them in each: without, every device would collect those of the whole student.
    Accelerate's optimizer takes no step otherwise, and what it goes by is one for the process: a
    trainer that stopped within a step may have left it so.
    """
    accelerator.sync_gradients = is_last
    if is_deepspeed(accelerator) or is_last or shards_weights(accelerator):
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


def refuse_differing(ours: Mapping[str, Any]) -> None:
    """Raise ValueError, on all processes, unless all of them say the same; all have to call it."""
    said = gather_object([(socket.gethostname(), dict(ours))])
    where, first = said[0]
    for process, (host, theirs) in enumerate(said):
        for name in (*first, *(name for name in theirs if name not in first)):
            if first.get(name) != theirs.get(name):
                raise ValueError(
                    f"the processes do not agree: {name} is {first.get(name)!r} for process 0 (on "
                    f"{where}), {theirs.get(name)!r} for process {process} (on {host}). Give all "
                    "of them one config, the same caches, and an output on a disk that they share"
                )


def refuse_unshared(output: Path, accelerator: Accelerator) -> None:
    """Raise ValueError, on all processes, unless all see what the first writes into a folder."""
    if accelerator.num_processes == 1:
        return
    token = output / of_first_process(f".shared-{uuid.uuid4().hex[:8]}")
    if accelerator.is_main_process:
        token.touch()
    accelerator.wait_for_everyone()
    deadline = time.monotonic() + SHARED_WITHIN_SECONDS
    while not (seen := token.exists()) and time.monotonic() < deadline:
        time.sleep(0.2)
    blind = [host for host in gather_object(["" if seen else socket.gethostname()]) if host]
    if accelerator.is_main_process:
        token.unlink()
    if blind:
        raise ValueError(
            f"output {output} is another folder on {blind[0]} than for process 0: give one on a "
            "disk that all machines share, as checkpoints are written by all processes"
        )
