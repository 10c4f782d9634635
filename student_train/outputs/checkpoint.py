"""Checkpoints of a run: complete or absent, exact to the sample, refused for another config."""

import contextlib
import json
import logging
import shutil
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import gather_object

from decant.storage.files.durable import filling, publish
from decant.student_train.data.stream import SequenceStream
from decant.student_train.outputs.resuming import refuse_other_batches, refuse_other_config
from decant.student_train.outputs.written import Damaged, reading, writing

log = logging.getLogger(__name__)

CHECKPOINTS = "checkpoints"
STATE = "decant.json"


def step_name(step: int) -> str:
    """Of the folder of a step's checkpoint."""
    return f"step-{step:08d}"


class Checkpoints:
    """The checkpoints in one directory, `step-00000100/` and so on."""

    def __init__(
        self,
        folder: Path,
        config: dict[str, Any],
        batches: dict[str, int],
        accelerator: Accelerator,
        base: str = "",
    ) -> None:
        """Nothing is touched before `save`. `base` is the fingerprint of frozen weights, if any."""
        self.folder, self.config, self.batches, self.base = folder, config, batches, base
        self.accelerator = accelerator

    def resume(self, stream: SequenceStream) -> int:
        """Restore model, optimizer, random state and stream; returns the step, 0 if there is none.

        What is damaged is named and passed over for the one before. Raises ValueError, listing the
        differences, if a checkpoint is of another config, and if all of them are damaged.
        """
        found = sorted(self.folder.glob("step-*"), reverse=True)
        for checkpoint in found:
            damage = ""
            try:
                step = self._load(checkpoint, stream)
            except Damaged as error:
                damage = str(error)
            # One process may read what another cannot: they all go on from the same one.
            if damages := [said for said in gather_object([damage]) if said]:
                log.warning("%s", damages[0])
                continue
            log.info("resumed from %s", checkpoint)
            return step
        if found:
            raise ValueError(
                f"{self.folder}: none of {len(found)} checkpoints can be read, {damages[0]}. "
                "Remove the folder to begin anew, or choose another output"
            )
        return 0

    def _load(self, checkpoint: Path, stream: SequenceStream) -> int:
        """Raises Damaged if it cannot be read, ValueError if it is of another run."""
        with reading(checkpoint):
            state = json.loads((checkpoint / STATE).read_text())
            theirs, batches, where = (state[key] for key in ("config", "batches", "stream"))
            step, _ = int(state["step"]), int(where["consumed"])
        refuse_other_config(theirs, self.config, str(checkpoint))
        refuse_other_batches(batches, self.batches, str(checkpoint))
        if state.get("base", self.base) != self.base:
            raise ValueError(
                f"{checkpoint} is of an adapter on other weights than those of student.path: give "
                "the same base to resume, or use another output"
            )
        with reading(checkpoint):
            self.accelerator.load_state(str(checkpoint))
        stream.load_state_dict(where)
        return step

    def path(self, step: int) -> Path:
        """Where the one of a step goes."""
        return self.folder / step_name(step)

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
                # A later one than this was passed over as damaged: it is none to keep.
                written = [p for p in self.folder.glob("step-*") if p.name <= target.name]
                for old in sorted(written)[:-keep]:
                    shutil.rmtree(old)
        self.accelerator.wait_for_everyone()

    def _save(self, step: int, stream_state: dict[str, Any], target: Path) -> None:
        temporary = target.with_name(f".{target.name}.tmp")
        is_first = self.accelerator.is_main_process
        if is_first:
            for leftover in self.folder.glob(".step-*.tmp"):
                shutil.rmtree(leftover)
        with filling(temporary) if is_first else contextlib.nullcontext():
            self._fill(step, stream_state, temporary)
            if is_first:
                publish(temporary, target)

    def _fill(self, step: int, stream_state: dict[str, Any], temporary: Path) -> None:
        """Write what is in a checkpoint; all processes call it, once the folder is there."""
        self.accelerator.wait_for_everyone()
        self.accelerator.save_state(str(temporary))
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            state = {
                "step": step,
                "config": self.config,
                "batches": self.batches,
                "base": self.base,
                "stream": stream_state,
            }
            (temporary / STATE).write_text(json.dumps(state, indent=1))
