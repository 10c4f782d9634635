"""Which rounds may follow those that are there: what may change in their config, and what not."""

import json
import logging
from typing import Any

from decant.student_train.config.run import TrainConfig
from decant.student_train.outputs.resuming import FROM_HERE_ON, config_record, leaves
from decant.student_train.rounds.config import RoundsConfig, group

log = logging.getLogger(__name__)

LATER = (
    *(f"train.{name}" for name in FROM_HERE_ON),
    *("dump.max_rejected", "dump.shard_targets", "dump.retry_rejected", "lr_decay", "replay_decay"),
)
"""Options that count for the rounds to come."""


def rounds_record(config: RoundsConfig, training: TrainConfig) -> dict[str, Any]:
    """What the rounds of one output have in common, as plain JSON values.

    Where the teacher is and how it is run may change: each cache says by itself which one it was.
    """
    dumped = {name: value for name, value in config.dump.items() if name not in ("teacher", "ray")}
    source = {name: value for name, value in group(dumped, "dump.source").items() if name != "path"}
    record = {
        "dump": {**dumped, "source": source},
        "train": config_record(training),
        "first_sampler": config.first_sampler,
        "prompt_parts": config.prompt_parts,
        "replay_decay": config.replay_decay,
        "lr_decay": config.lr_decay,
    }
    plain: dict[str, Any] = json.loads(json.dumps(record, default=str))
    return plain


def refuse_other_config(theirs: dict[str, Any], ours: dict[str, Any], where: str) -> None:
    """Raise ValueError, listing the options that differ, unless rounds may go on with them."""
    was, now = leaves(theirs), leaves(ours)
    names = [n for n in sorted(was.keys() | now.keys()) if was.get(n) != now.get(n)]
    if refused := [name for name in names if name not in LATER]:
        raise ValueError(
            f"{where} has rounds of another config; differing:\n"
            + "\n".join(
                f"  {name}: was {was.get(name)!r}, is {now.get(name)!r} now" for name in refused
            )
            + "\nUse the same config to go on, or another output whose train.student.path is "
            f"{where}/student."
        )
    for name in names:
        log.info("%s: was %r, is %r for the rounds to come", name, was.get(name), now.get(name))
