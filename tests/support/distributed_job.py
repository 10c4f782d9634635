"""One process of several: runs trainings in turn and notes what each saw.

Started by a launcher with the path of a pickled list of jobs. Each process writes what it found
beside it, as JSON.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import shutil
import sys
from pathlib import Path
from typing import Any

os.environ["FORK_LAUNCHED"] = "1"  # keep the process group for the next job

import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from torch.distributed.fsdp import FSDPModule

from decant.student_train import Distiller, TrainConfig, train
from decant.student_train.loop import NotFinite

torch.set_num_threads(1)


@dataclasses.dataclass(frozen=True)
class Job:
    """A training."""

    name: str
    config: TrainConfig
    start_from: str = ""
    """Output of another run, whose first checkpoint this one is to go on from."""
    second: TrainConfig | None = None
    """What the second process is started with in place of `config`."""


def set_up() -> None:
    """Make accelerate heed what it was launched for: it offers FSDP on accelerators alone."""
    AcceleratorState._reset_state()
    state = PartialState(cpu=True)
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        state.distributed_type = DistributedType.MULTI_GPU


def run(job: Job) -> dict[str, Any]:
    """Train; returns the samples of every forward, the units sharded, and the error if any."""
    set_up()
    if job.start_from and os.environ["RANK"] == "0":
        first, *_ = sorted(Path(job.start_from, "checkpoints").iterdir())
        shutil.copytree(first, Path(job.config.output, "checkpoints", first.name))
    PartialState().wait_for_everyone()
    seen: list[str] = []
    units: set[int] = set()

    def note(module: torch.nn.Module, args: Any) -> None:
        if isinstance(module, Distiller) and module.training:
            seen.extend(args[0].content[0].sample_ids)
            units.add(sum(isinstance(part, FSDPModule) for part in module.modules()))

    hook = torch.nn.modules.module.register_module_forward_pre_hook(note)
    error = ""
    try:
        train(job.second if job.second and os.environ["RANK"] == "1" else job.config)
    except (NotFinite, ValueError) as reason:
        error = str(reason)
    finally:
        hook.remove()
    return {"seen": seen, "units": sorted(units), "error": error}


def main() -> None:
    """Run the jobs."""
    path = Path(sys.argv[1])
    found = {job.name: run(job) for job in pickle.loads(path.read_bytes())}
    path.with_suffix(f".{os.environ['RANK']}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    from tests.support.distributed_job import main as importable

    importable()
