"""`python -m student_train --config train.yaml [--key value ...]`, also under accelerate launch."""

import contextlib
import json
import logging
import os
import sys
from pathlib import Path

from jsonargparse import ArgumentParser

from decant.storage.cli import process as cli

DESCRIPTION = """Train a student from a cache. No teacher is loaded.

  python -m student_train --config train.yaml
  python -m student_train --config train.yaml --loss.kind akl --output runs/akl
  python -m student_train --config train.yaml --dry-run    what it will need; writes nothing
  python -m student_train --config train.yaml --follow     while the cache is still being dumped
  accelerate launch --num_processes 8 -m student_train --config train.yaml

Run the same command again to resume from the last checkpoint. --print_config writes the resolved
YAML, a good start for a config file.
"""


def parser() -> ArgumentParser:
    """The command line."""
    from decant.student_train.config.run import TrainConfig

    command = cli.config_parser(
        TrainConfig, prog="python -m student_train", description=DESCRIPTION
    )
    command.add_argument(
        "--dry-run",
        action="store_true",
        help="build everything, take one step, print sizes, memory and steps; write nothing",
    )
    command.add_argument(
        "--json", action="store_true", help="end with the summary as JSON in place of a table"
    )
    return command


def main(arguments: list[str]) -> int:
    """Parse and run; returns the exit code."""
    from decant.student_train.config.run import TrainConfig

    cli.interrupt_on_terminate()
    command = parser()
    values = command.instantiate(command.parse_args(_spelled_out(arguments)))
    config = TrainConfig(**{name: values[name] for name in TrainConfig.__dataclass_fields__})
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    logging.getLogger("accelerate").setLevel(logging.WARNING)
    # That tied weights are saved once: they are tied again on resuming.
    logging.getLogger("accelerate.utils.other").setLevel(logging.ERROR)
    if values["dry_run"]:
        from decant.student_train.dry_run import dry_run

        with contextlib.redirect_stdout(sys.stderr):  # what libraries print
            report = dry_run(config)
        if int(os.environ.get("RANK", "0")) == 0:
            print(report)
        return cli.DONE
    from decant.student_train.loop import train

    with contextlib.redirect_stdout(sys.stderr):
        summary = train(config)
    if int(os.environ.get("RANK", "0")) == 0:
        from decant.student_train.outputs.closing import closing_text

        print(json.dumps(summary) if values["json"] else closing_text(summary, Path(config.output)))
    return cli.DONE


def _spelled_out(arguments: list[str]) -> list[str]:
    """The arguments with a bare `--follow` as `--follow=true`."""
    following = [*arguments[1:], "--"]
    return [
        "--follow=true" if word == "--follow" and after.startswith("--") else word
        for word, after in zip(arguments, following, strict=False)
    ]


if __name__ == "__main__":
    cli.run(main)
