"""`plan`: what it takes and what it prints."""

from dataclasses import dataclass, field
from typing import Annotated

from decant.storage.cli import process
from decant.storage.cli.commands import Command
from decant.storage.cli.options import Shown
from decant.storage.inspect.budget import Budget
from decant.teacher_dump.config import DumpConfig
from decant.teacher_dump.engines.config import ENGINES
from decant.teacher_dump.job.command import COMMON
from decant.teacher_dump.job.config import ShareConfig

TEXT = """
  decant plan --config dump.yaml
  decant plan --config dump.yaml --sample 200 --json
  decant plan --config dump.yaml --engines vllm     time another engine as well
  decant plan --config dump.yaml --max-bytes 200GB  which k fits that?

Takes every configuration that `decant dump` takes, and writes nothing.
"""


@dataclass(frozen=True, kw_only=True)
class PlanArguments(ShareConfig):
    """What a plan takes beside its configuration."""

    sample: int = 64
    """Sequences to score for the prediction."""
    engines: list[str] = field(default_factory=list)
    """Further engines to time on the sample: transformers, vllm, http."""
    max_bytes: Annotated[str, Shown("BYTES")] = ""
    """Recommend the largest k that fits: bytes per target, or with a unit (20GB) of the cache."""
    max_nats: Annotated[float | None, Shown("NATS")] = None
    """Recommend the smallest k known to cost at most this much forward KL per target."""
    json: bool = False
    """Print one JSON object."""

    def budget(self) -> Budget:
        """What a target may take and lose; false where nothing is said."""
        return Budget(max_bytes=self.max_bytes, max_nats=self.max_nats)

    def __post_init__(self) -> None:
        ShareConfig.__post_init__(self)
        self.budget()
        if unknown := set(self.engines) - set(ENGINES):
            raise ValueError(f"engines: {sorted(unknown)} are not among {ENGINES}")


def run_plan(config: DumpConfig, arguments: PlanArguments) -> int:
    """Predict and print; returns the exit code."""
    from decant.schemas import to_json
    from decant.storage.cli.terminal import json_text
    from decant.teacher_dump.engines.quiet import quiet_transformers
    from decant.teacher_dump.planning.predict import predict
    from decant.teacher_dump.planning.text import plan_text

    quiet_transformers()
    if config.teacher.is_chat:
        from decant.teacher_dump.planning.chat import chat_text, predict_chat

        if arguments.budget():
            raise ValueError(
                "--max-bytes and --max-nats have no effect here: a chat API gives so many entries "
                "for each token, and no curve can be cut out of them: leave them out"
            )
        counted = predict_chat(config)
        print(json_text(to_json(counted)) if arguments.json else chat_text(counted))
        return process.DONE
    prediction = predict(config, arguments.sample, arguments.engines, arguments.budget())
    print(json_text(to_json(prediction)) if arguments.json else plan_text(prediction, config))
    return process.DONE


PLAN = Command(
    text=TEXT,
    config=DumpConfig,
    arguments=PlanArguments,
    common=COMMON,
    run=run_plan,
    goes_on=False,
)
