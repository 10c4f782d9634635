"""`python -m student_train --config train.yaml [--key value ...]`, also under accelerate launch."""

import json
import logging

from storage import cli

DESCRIPTION = """Train a student from a cache. No teacher is loaded.

  python -m student_train --config train.yaml
  python -m student_train --config train.yaml --loss.kind akl --output runs/akl
  accelerate launch --num_processes 8 -m student_train --config train.yaml

Run the same command again to resume from the last checkpoint. --print_config writes the resolved
YAML, a good start for a config file.
"""


def main(arguments: list[str]) -> int:
    """Parse and run; returns the exit code."""
    from student_train.config import TrainConfig

    config = cli.parse(
        TrainConfig, arguments, prog="python -m student_train", description=DESCRIPTION
    )
    from transformers.utils import logging as transformers_logging

    from student_train.train import train

    transformers_logging.disable_progress_bar()
    logging.getLogger("accelerate").setLevel(logging.WARNING)
    print(json.dumps(train(config)))
    return cli.DONE


if __name__ == "__main__":
    cli.run(main)
