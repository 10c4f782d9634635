"""Checkpoints of a run: complete or absent, exact to the sample, refused for another config."""

import dataclasses
import json
import logging
import math
import shutil
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from decant.storage.files.durable import publish
from decant.student_train.config.run import TrainConfig
from decant.student_train.data.stream import SequenceStream
from decant.student_train.outputs.written import reading, writing

log = logging.getLogger(__name__)

CHECKPOINTS = "checkpoints"
FREE_TO_CHANGE = (
    "output",
    "log_every_steps",
    "save_every_steps",
    "keep_checkpoints",
    "trackers",
    "batch_size",
    "gradient_accumulation",
    "packing",
    "compile",
    "gradient_checkpointing",
    "plots",
    "push_to_hub",
    "hub_private",
    "student.trust_remote_code",
    "eval.batch_size",
    "eval.generation.batch_size",
)
"""Fields that do not change what is computed, so a resumed run may differ in them. Of the sizes of
batches only the product counts: `refuse_other_batches`."""

ADDED: dict[str, Any] = {"optimizer.warmup_ratio": 0.0}
"""Options that a checkpoint may be too old to know, and what they were before they existed."""


def config_record(config: TrainConfig) -> dict[str, Any]:
    """The fields that a checkpoint is only good for, as plain JSON values."""
    fields = json.loads(json.dumps(dataclasses.asdict(config)))
    for name in FREE_TO_CHANGE:
        *groups, last = name.split(".")
        group = fields
        for key in groups:
            group = group[key]
        del group[last]
    return fields


def leaves(record: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values of a nested record by their dotted names; what is no mapping is a value.

    Members of a list of mappings are named by their place in it.
    """
    found: dict[str, Any] = {}
    for name, value in record.items():
        if isinstance(value, list) and value and all(isinstance(one, dict) for one in value):
            value = {str(place): one for place, one in enumerate(value)}
        if isinstance(value, dict):
            found |= leaves(value, f"{prefix}{name}.")
        else:
            found[prefix + name] = value
    return found


def refuse_other_config(theirs: dict[str, Any], ours: dict[str, Any], where: str) -> None:
    """Raise ValueError, listing the differing options, unless both configs compute the same.

    An option that the checkpoint is too old to know is taken as in `ADDED`.
    """
    was, now = ADDED | leaves(theirs), leaves(ours)
    differing = [
        f"  {name}: was {was.get(name)!r}, this run gives {now.get(name)!r}"
        for name in sorted(was.keys() | now.keys())
        if was.get(name) != now.get(name) and name not in FREE_TO_CHANGE
    ]
    if differing:
        raise ValueError(
            f"{where} is of another config; differing:\n"
            + "\n".join(differing)
            + "\nUse the same config to resume, or another output."
        )


def batch_record(config: TrainConfig, num_processes: int) -> dict[str, int]:
    """How many sequences make a step."""
    return {
        "batch_size": config.batch_size,
        "gradient_accumulation": config.gradient_accumulation,
        "num_processes": num_processes,
    }


def refuse_other_batches(theirs: dict[str, int], ours: dict[str, int], where: str) -> None:
    """Raise ValueError if a step has another number of sequences by a change of config.

    With another number of processes alone it is a warning: a run must be able to go on.
    """
    was, now = math.prod(theirs.values()), math.prod(ours.values())
    if was == now:
        return
    found = f"{where} is of steps of {was} sequences ({theirs}), this run has {now} ({ours})"
    if {**theirs, "num_processes": 0} != {**ours, "num_processes": 0}:
        raise ValueError(
            f"{found}. Keep batch_size * gradient_accumulation * processes, or use another output"
        )
    log.warning("%s; it goes on with the samples that were not seen", found)


class Checkpoints:
    """The checkpoints in one directory, `step-000100/` and so on."""

    def __init__(
        self,
        folder: Path,
        config: dict[str, Any],
        batches: dict[str, int],
        accelerator: Accelerator,
    ) -> None:
        """Nothing is touched before `save`."""
        self.folder, self.config, self.batches = folder, config, batches
        self.accelerator = accelerator

    def resume(self, stream: SequenceStream) -> int:
        """Restore model, optimizer, random state and stream; returns the step, 0 if there is none.

        Raises ValueError, listing the differences, if the checkpoint is of another config.
        """
        steps = sorted(self.folder.glob("step-*"))
        if not steps:
            return 0
        latest = steps[-1]
        with reading(latest):
            state = json.loads((latest / "decant.json").read_text())
            theirs, batches, stream_state = (state[key] for key in ("config", "batches", "stream"))
        refuse_other_config(theirs, self.config, str(latest))
        refuse_other_batches(batches, self.batches, str(latest))
        with reading(latest):
            self.accelerator.load_state(str(latest))
        stream.load_state_dict(stream_state)
        log.info("resumed from %s", latest)
        return int(state["step"])

    def path(self, step: int) -> Path:
        """Where the one of a step goes."""
        return self.folder / f"step-{step:08d}"

    def remove(self, step: int) -> None:
        """Drop the one of a step, on the first process, once what it was kept for is done."""
        shutil.rmtree(self.path(step), ignore_errors=True)

    def save(self, step: int, stream_state: dict[str, Any], keep: int) -> None:
        """Write a checkpoint under a temporary name, rename it, drop the oldest beyond `keep`.

        Raises NotWritten if it cannot be; those that were written before stay.
        """
        target = self.path(step)
        with writing(target, "Older checkpoints stay"):
            self._save(step, stream_state, target)
            if self.accelerator.is_main_process:
                for old in sorted(self.folder.glob("step-*"))[:-keep]:
                    shutil.rmtree(old)
        self.accelerator.wait_for_everyone()

    def _save(self, step: int, stream_state: dict[str, Any], target: Path) -> None:
        temporary = target.with_name(f".{target.name}.tmp")
        if self.accelerator.is_main_process:
            for leftover in self.folder.glob(".step-*.tmp"):
                shutil.rmtree(leftover)
            temporary.mkdir(parents=True)
        self.accelerator.wait_for_everyone()
        self.accelerator.save_state(str(temporary))
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            state = {
                "step": step,
                "config": self.config,
                "batches": self.batches,
                "stream": stream_state,
            }
            (temporary / "decant.json").write_text(json.dumps(state, indent=1))
            publish(temporary, target)
