"""Which run may go on from what another one left: what may change in its config, and what not."""

import dataclasses
import json
import logging
import math
import re
from typing import Any

from decant.student_train.config.run import TrainConfig
from decant.student_train.config.student import StudentConfig

log = logging.getLogger(__name__)

FREE_TO_CHANGE = (
    *("output", "log_every_steps", "save_every_steps", "keep_checkpoints", "trackers", "plots"),
    *("batch_size", "gradient_accumulation", "packing", "compile", "gradient_checkpointing"),
    *("push_to_hub", "hub_private", "eval.batch_size", "eval.generation.batch_size"),
    *("cache", "mixture.*.cache", "student.path", "student.from_teacher.path"),
    *("student.revision", "student.trust_remote_code"),
)
"""Options that do not change what is computed. Of the sizes of batches only the product counts:
`refuse_other_batches`. Caches are known by their id, the frozen weights of an adapter by their
fingerprint, and all others are in the checkpoint: paths may be others."""

FROM_HERE_ON = (
    *("steps", "epochs", "eval.cache", "eval.every_steps", "eval.patience"),
    *("optimizer.lr", "optimizer.schedule", "optimizer.warmup_steps", "optimizer.warmup_ratio"),
    *("optimizer.min_lr_ratio", "optimizer.weight_decay", "optimizer.max_grad_norm"),
)
"""Options that count for the rest of a run, as if it had had them from its first step on."""


def config_record(config: TrainConfig) -> dict[str, Any]:
    """The fields that a checkpoint is only good for, as plain JSON values."""
    fields = json.loads(json.dumps(dataclasses.asdict(config)))
    for name in FREE_TO_CHANGE:
        *groups, last = name.split(".")
        members = [fields]
        for key in groups:
            members = [one for m in members for one in (m if key == "*" else [m[key]])]
        for member in members:
            del member[last]
    return fields


def leaves(record: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values of a nested record by their dotted names; what is not a mapping is a value.

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


def changes(theirs: dict[str, Any], ours: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """What another config had and what this one has, by the names of the options that differ.

    An option that is newer than the other config counts as its default there.
    """
    least = TrainConfig(cache="-", output="-", steps=1, student=StudentConfig(path="-"))
    was = leaves(dataclasses.asdict(least)) | leaves(theirs)
    now = leaves(ours)
    return {
        name: (was.get(name), now.get(name))
        for name in sorted(leaves(theirs).keys() | now.keys())
        if was.get(name) != now.get(name) and re.sub(r"\.\d+\.", ".*.", name) not in FREE_TO_CHANGE
    }


def refuse_other_config(theirs: dict[str, Any], ours: dict[str, Any], where: str) -> None:
    """Raise ValueError, listing the options that differ, unless the run may go on with them.

    Those in `FROM_HERE_ON` are said and taken.
    """
    found = changes(theirs, ours)
    if refused := [name for name in found if name not in FROM_HERE_ON]:
        raise ValueError(
            f"{where} is of another config; differing:\n"
            + "\n".join(
                f"  {name}: was {found[name][0]!r}, this run gives {found[name][1]!r}"
                for name in refused
            )
            + "\nUse the same config to resume, or another output."
        )
    for name, (was, now) in found.items():
        log.info("%s: %s was %r, is %r from here on", where, name, was, now)


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
