"""The configuration of rounds: a dump's and a training's keys, and what ties them together."""

import math
from dataclasses import dataclass
from typing import Any, Literal

from decant.student_train.config.paths import expand_home


@dataclass(frozen=True, kw_only=True)
class RoundsConfig:
    """Train a student on its own answers, round by round."""

    output: str
    """Directory for all rounds: their caches, trainings and figures; a rerun resumes there."""
    rounds: int
    """Rounds when all is done; more may be asked for later."""
    dump: dict[str, Any]
    """The keys of a dump.yaml, without output: teacher, source with source.generate, sequences,
    truncation and so on. Each round samples with the student of the round before."""
    train: dict[str, Any]
    """The keys of a train.yaml, without output and cache. student.path is the student to begin
    with, steps are those of one round, the caches of a mixture are trained on in every round,
    with weights beside the new cache's 1."""
    first_sampler: Literal["student", "teacher"] = "student"
    """Who answers the prompts of the first round. teacher: a warm start, also for a student that
    is only made by the first training."""
    prompt_parts: int = 1
    """Deal the prompts into so many parts; each round takes the next one, from the first again
    after the last. 1: all prompts in every round, each time with another seed."""
    replay_decay: float = 0.5
    """Weight in the mixture of the cache of one round before, of its square two rounds before, and
    so on; the new cache's is 1. 0 = train on the new cache alone."""
    keep_rounds: int = 0
    """Caches and students that stay on disk, those of the last so many rounds; older ones are
    removed, and no longer trained on. 0 = all."""
    lr_decay: float = 1.0
    """Each round's learning rate over that of the round before."""
    launcher: str = ""
    """What starts the trainings, for example `accelerate launch --config_file ddp.yaml`; "" is this
    Python."""
    plots: bool = True
    """Draw rounds.png beside rounds.jsonl, where matplotlib is installed."""

    def __post_init__(self) -> None:
        expand_home(self, "output")
        if not self.output or "://" in self.output:
            raise ValueError(f"output {self.output!r} must be a local directory")
        for name, least in (("rounds", 1), ("prompt_parts", 1), ("keep_rounds", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}: expected at least {least}")
        if not 0 <= self.replay_decay <= 1:
            raise ValueError(f"replay_decay is {self.replay_decay}, must lie in [0, 1]")
        if not (math.isfinite(self.lr_decay) and 0 < self.lr_decay <= 1):
            raise ValueError(f"lr_decay is {self.lr_decay}, must lie in (0, 1]")
        self._check_dump()
        self._check_train()

    def _check_dump(self) -> None:
        refuse(self.dump, "dump", {"output": "each round has a cache of its own below output"})
        shared = "a round's cache is filled by one command: give executor: ray for several machines"
        own = "rounds make caches of their own"
        refuse(
            self.dump,
            "dump",
            {"worker_index": shared, "num_workers": shared, "extend": own, "on_known": own},
        )
        source = group(self.dump, "dump.source")
        if self.prompt_parts > 1:
            dealt = "prompt_parts deals the prompts"
            refuse(source, "dump.source", {"parts": dealt, "part": dealt})
        generate = group(source, "dump.source.generate")
        named = "each round samples with the student of the round before; see first_sampler"
        refuse(generate, "dump.source.generate", {"by": named})
        if number(generate, "dump.source.generate.n", 0) < 1:
            raise ValueError(
                "dump.source.generate.n is missing: give the number of responses to each prompt"
            )
        number(generate, "dump.source.generate.seed", 0)

    def _check_train(self) -> None:
        refuse(
            self.train,
            "train",
            {
                "output": "each round has a training of its own below output",
                "cache": "each round trains on its own cache; others stand in train.mixture",
                "follow": "a round's cache is whole before it is trained on",
                "epochs": "give train.steps, those of one round",
                "push_to_hub": "push the last round's student when all is done",
            },
        )
        if number(self.train, "train.steps", 0) < 1:
            raise ValueError("train.steps is missing: give the optimizer steps of one round")
        student = group(self.train, "train.student")
        if not student.get("path") and self.first_sampler == "student":
            raise ValueError(
                "train.student.path is missing: the student of the first round answers prompts "
                "before it is trained. Give a path, or first_sampler: teacher"
            )
        if group(self.train, "train.adapter").get("merge") is False:
            raise ValueError(
                "train.adapter.merge: false saves no whole student, which the next round samples "
                "with: leave it out"
            )


def refuse(keys: dict[str, Any], where: str, reasons: dict[str, str]) -> None:
    """Raise ValueError for a key that a block must not have."""
    for name, reason in reasons.items():
        if name in keys:
            raise ValueError(f"{where}.{name} must be left out: {reason}")


def group(keys: dict[str, Any], name: str) -> dict[str, Any]:
    """The keys below a dotted name's last part; {} if there are none.

    Raises ValueError if it is no group.
    """
    value = keys.get(name.rpartition(".")[2])
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ValueError(f"{name} is {value!r}: expected a group of keys")
    return value


def number(keys: dict[str, Any], name: str, default: int) -> int:
    """The whole number below a dotted name's last part. Raises ValueError if it is none."""
    value = keys.get(name.rpartition(".")[2], default)
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{name} is {value!r}: expected a whole number")
    return value
