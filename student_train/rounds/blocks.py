"""What the commands of a round are given: pure functions of the configuration and the round."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from decant.schemas import Truncation
from decant.student_train.config.run import TrainConfig
from decant.student_train.data.served import refuse_unkept
from decant.student_train.losses.kinds import SAMPLED
from decant.student_train.rounds.config import RoundsConfig, group, number
from decant.student_train.rounds.places import Places

WARMUP_RATIO = 0.1
"""Of a round's training that says nothing of a warmup: its AdamW begins anew."""


@dataclass(frozen=True, slots=True)
class Replay:
    """An older round's cache in the mixture of a round."""

    number: int
    weight: float


def student_of(config: RoundsConfig, round_number: int) -> str:
    """Which student a round begins with: a path or hub id; "" where the training makes one."""
    if round_number == 1:
        return str(group(config.train, "train.student").get("path") or "")
    return str(Places(Path(config.output), round_number - 1).student)


def samples_by_student(config: RoundsConfig, round_number: int) -> bool:
    """Whether the student answers the round's prompts, and not the teacher."""
    return round_number > 1 or config.first_sampler == "student"


def dump_block(config: RoundsConfig, round_number: int, output: Path) -> dict[str, Any]:
    """The keys of the dump.yaml of a round."""
    block = copy.deepcopy(config.dump)
    source = block["source"]
    generate = source["generate"]
    generate["seed"] = number(generate, "dump.source.generate.seed", 0) + round_number - 1
    if samples_by_student(config, round_number):
        generate["by"] = student_of(config, round_number)
    if config.prompt_parts > 1:
        source |= {
            "parts": config.prompt_parts,
            "part": (round_number - 1) % config.prompt_parts,
        }
    return {"output": str(output), **block}


def train_block(
    config: RoundsConfig,
    round_number: int,
    cache: Path,
    output: Path,
    replayed: Sequence[Replay],
) -> dict[str, Any]:
    """The keys of the train.yaml of a round: its cache, older ones with their weights.

    A preset of the loss is told whose prefixes each of them holds.
    """
    block = copy.deepcopy(config.train)
    fixed = block.pop("mixture", None) or []
    student = group(block, "train.student")
    if round_number > 1:  # a directory with all that belongs to it
        for name in ("config", "from_teacher", "tokenizer", "revision"):
            student.pop(name, None)
        block["student"] = {**student, "path": student_of(config, round_number)}
    optimizer = dict(group(block, "train.optimizer"))
    optimizer["lr"] = _rate(optimizer) * config.lr_decay ** (round_number - 1)
    if not (optimizer.get("warmup_steps") or optimizer.get("warmup_ratio")):
        optimizer["warmup_ratio"] = WARMUP_RATIO
    block["optimizer"] = optimizer
    block["seed"] = number(block, "train.seed", 0) + round_number - 1
    has_preset = bool(group(block, "train.loss").get("preset"))

    def share(number: int, path: Path, weight: float) -> dict[str, Any]:
        side = "student" if samples_by_student(config, number) else "teacher"
        more = {"prefixes": side} if has_preset else {}
        return {"cache": str(path), "weight": weight, **more}

    output_of = Path(config.output)
    older = [share(one.number, Places(output_of, one.number).cache, one.weight) for one in replayed]
    given: dict[str, Any]
    if older or fixed or has_preset:
        given = {"mixture": [share(round_number, cache, 1.0), *older, *fixed]}
    else:
        given = {"cache": str(cache)}
    return {**given, "output": str(output), **block}


def replay(config: RoundsConfig, round_number: int, there: Sequence[int]) -> list[Replay]:
    """Which older rounds a round trains on, of those whose caches are there; the newest first."""
    oldest = round_number - config.keep_rounds + 1 if config.keep_rounds else 1
    return [
        Replay(one, config.replay_decay ** (round_number - one))
        for one in sorted(there, reverse=True)
        if oldest <= one < round_number and config.replay_decay > 0
    ]


def refuse_misfit(config: RoundsConfig, training: TrainConfig) -> None:
    """Raise ValueError if the caches of the dump cannot be trained on so.

    Only what both blocks say is known here; the commands look at everything else.
    """
    stored = config.dump.get("temperatures", [1.0])
    known = [float(t) for t in stored] if isinstance(stored, list) else []
    if missing := [t for t in training.loss.temperatures if t != 1 and t not in known]:
        raise ValueError(
            f"train.loss.temperature {missing[0]:g} is not among dump.temperatures {stored}: add "
            "it there"
        )
    loss = training.losses[0]
    truncation = _truncation(config)
    if loss.kind not in SAMPLED and truncation is not None:
        refuse_unkept(loss, truncation, "a round's cache (dump.truncation)")
    elif config.first_sampler == "teacher" and loss.of_kind.get("clip"):
        raise ValueError(
            "train.loss.clip needs the log probs of the student that sampled, and "
            "first_sampler: teacher has the teacher answer in the first round: warm up in a "
            "training of its own, or set clip to 0"
        )


def _truncation(config: RoundsConfig) -> Truncation | None:
    """What the dump keeps; None if it is none that there is, which its command says best."""
    try:
        return Truncation(**group(config.dump, "dump.truncation"))
    except (TypeError, ValueError):
        return None


def _rate(optimizer: dict[str, Any]) -> float:
    value = optimizer.get("lr", 1e-4)
    try:
        return float(value)  # YAML reads 1e-4 as a text
    except (TypeError, ValueError):
        raise ValueError(f"train.optimizer.lr is {value!r}: expected a number") from None
