"""`train`: what it takes and what it prints."""

import contextlib
import json
import logging
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from decant.storage.cli import process
from decant.storage.cli.commands import Command
from decant.student_train.config.run import TrainConfig

TEXT = """
  decant train --config train.yaml
  decant train --config train.yaml --loss.kind akl --output runs/akl
  decant train --config train.yaml --dry-run    what it needs; writes nothing
  decant train --config train.yaml --follow     while the cache is being dumped
  accelerate launch -m decant.student_train --config train.yaml

The same command again goes on from the last checkpoint, to the sample.
"""


@dataclass(frozen=True, kw_only=True)
class TrainArguments:
    """What a training takes beside its configuration."""

    dry_run: bool = False
    """Build everything, take one step, print sizes, memory and steps; write nothing."""
    json: bool = False
    """End with the summary as JSON in place of a table."""


def run_train(config: TrainConfig, arguments: TrainArguments) -> int:
    """Train and print the summary; returns the exit code."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    logging.getLogger("accelerate").setLevel(logging.WARNING)
    # That tied weights are saved once: they are tied again on resuming.
    logging.getLogger("accelerate.utils.other").setLevel(logging.ERROR)
    if arguments.dry_run:
        from decant.student_train.dry_run import dry_run

        with contextlib.redirect_stdout(sys.stderr):  # what libraries print
            report = dry_run(config)
        if int(os.environ.get("RANK", "0")) == 0:
            print(report)
        return process.DONE
    from decant.student_train.loop import train

    with contextlib.redirect_stdout(sys.stderr):
        summary = train(config)
    if int(os.environ.get("RANK", "0")) == 0:
        from decant.student_train.outputs.closing import closing_text

        print(json.dumps(summary) if arguments.json else closing_text(summary, Path(config.output)))
    return process.DONE


TRAIN = Command(
    text=TEXT,
    config=TrainConfig,
    arguments=TrainArguments,
    common=(
        "cache",
        "output",
        "student.path",
        "loss.kind",
        "loss.temperature",
        "steps",
        "epochs",
        "batch_size",
        "optimizer.lr",
        "mixed_precision",
    ),
    run=run_train,
)
