"""Checkpoints of a run: complete or absent, exact to the sample, refused for another config."""

import dataclasses
import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from student_train.config import TrainConfig
from student_train.stream import CacheStream

log = logging.getLogger(__name__)

FREE_TO_CHANGE = ("output", "log_every_steps", "save_every_steps", "keep_checkpoints", "trackers")
"""Fields that do not change what is computed, so a resumed run may differ in them."""


def config_record(config: TrainConfig) -> dict[str, Any]:
    """The fields that a checkpoint is only good for, as plain JSON values."""
    fields = dataclasses.asdict(config)
    for name in FREE_TO_CHANGE:
        del fields[name]
    return json.loads(json.dumps(fields))


def refuse_other_config(theirs: dict[str, Any], ours: dict[str, Any], where: str) -> None:
    """Raise ValueError, listing the differences, unless both configs compute the same."""
    differing = [
        f"  {name}: was {theirs.get(name)!r}, this run gives {ours.get(name)!r}"
        for name in sorted(theirs.keys() | ours.keys())
        if theirs.get(name) != ours.get(name)
    ]
    if differing:
        raise ValueError(
            f"{where} is of another config; differing:\n"
            + "\n".join(differing)
            + "\nUse the same config to resume, or another output."
        )


class Checkpoints:
    """The checkpoints in one directory, `step-000100/` and so on."""

    def __init__(self, folder: Path, config: dict[str, Any], accelerator: Accelerator) -> None:
        """Nothing is touched before `save`."""
        self.folder, self.config, self.accelerator = folder, config, accelerator

    def resume(self, stream: CacheStream) -> int:
        """Restore model, optimizer, random state and stream; returns the step, 0 if there is none.

        Raises ValueError, listing the differences, if the checkpoint is of another config.
        """
        steps = sorted(self.folder.glob("step-*"))
        if not steps:
            return 0
        latest = steps[-1]
        state = json.loads((latest / "decant.json").read_text())
        refuse_other_config(state["config"], self.config, str(latest))
        self.accelerator.load_state(str(latest))
        stream.load_state_dict(state["stream"])
        log.info("resumed from %s", latest)
        return int(state["step"])

    def save(self, step: int, stream: CacheStream, keep: int) -> None:
        """Write a checkpoint under a temporary name, rename it, drop the oldest beyond `keep`."""
        temporary, target = self.folder / f".step-{step:08d}.tmp", self.folder / f"step-{step:08d}"
        if self.accelerator.is_main_process:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        self.accelerator.wait_for_everyone()
        self.accelerator.save_state(str(temporary))
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            state = {"step": step, "config": self.config, "stream": stream.state_dict()}
            (temporary / "decant.json").write_text(json.dumps(state, indent=1))
            shutil.rmtree(target, ignore_errors=True)
            _sync_tree(temporary)
            os.replace(temporary, target)
            for old in sorted(self.folder.glob("step-*"))[:-keep]:
                shutil.rmtree(old)
        self.accelerator.wait_for_everyone()


def truncate_metrics(path: Path, step: int) -> None:
    """Drop the lines behind a checkpoint, which the resumed run repeats, and a torn last line."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            values = json.loads(line)
        except ValueError:
            break
        if values["step"] <= step:
            kept.append(line + "\n")
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(kept))
    os.replace(temporary, path)


def _sync_tree(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
