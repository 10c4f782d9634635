"""`rounds`: what it takes and what it prints."""

from dataclasses import dataclass
from pathlib import Path

from decant.storage.cli import process
from decant.storage.cli.commands import Command
from decant.student_train.rounds.config import RoundsConfig

TEXT = """
  decant rounds --config rounds.yaml
  decant rounds --config rounds.yaml --dry-run    what a round costs
  decant rounds --config rounds.yaml --rounds 8   more of them, the same output

Each round samples answers with the present student, scores them with the
teacher (`decant dump`), and trains the student on them (`decant train`), as
processes of their own. The same command again goes on where the last one
stopped, in the phase that was cut short.
"""


@dataclass(frozen=True, kw_only=True)
class RoundsArguments:
    """What rounds take beside their configuration."""

    dry_run: bool = False
    """Answer, score and try to train on a few prompts; say what a round costs; keep nothing."""
    json: bool = False
    """End with one JSON object per round in place of a table."""


def run(config: RoundsConfig, arguments: RoundsArguments) -> int:
    """Do the rounds and print their table; returns the exit code."""
    if arguments.dry_run:
        from decant.student_train.rounds.rehearse import rehearse

        print(rehearse(config))
        return process.DONE
    from decant.schemas import to_json
    from decant.storage.cli.terminal import json_text
    from decant.student_train.rounds.report import closing_text
    from decant.student_train.rounds.run import run_rounds

    records = run_rounds(config)
    if arguments.json:
        print(json_text([to_json(record) for record in records]))
    else:
        print(closing_text(Path(config.output), records))
    return process.DONE


ROUNDS = Command(
    text=TEXT,
    config=RoundsConfig,
    arguments=RoundsArguments,
    common=("output", "rounds", "keep_rounds", "replay_decay", "prompt_parts", "lr_decay"),
    run=run,
)
