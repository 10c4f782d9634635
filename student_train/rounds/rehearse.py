"""What rounds will cost, before any is paid: their commands on a few prompts, kept nowhere.

The dump's `plan` predicts the cache of a round, a dump of a few prompts gives one to try the
training's `--dry-run` on. Nothing is written to the output.
"""

import copy
import json
import logging
import os
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from decant.storage.cli.terminal import megabytes
from decant.storage.files.scratch import scratch_folder
from decant.student_train.rounds import blocks
from decant.student_train.rounds.config import RoundsConfig, group, number
from decant.student_train.rounds.places import Places
from decant.student_train.rounds.processes import (
    PhaseFailed,
    command_words,
    training_words,
    with_this_package,
)
from decant.student_train.rounds.run import check

log = logging.getLogger(__name__)

PROMPTS = 8
"""That are answered for the rehearsal."""

Ask = Callable[[Sequence[str]], str]
"""Runs a command and gives what it prints; raises PhaseFailed."""


def ask(words: Sequence[str]) -> str:
    """Run a command whose messages go where ours do."""
    done = subprocess.run(
        words,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
        env=with_this_package(os.environ),
    )
    if done.returncode:
        raise PhaseFailed(
            f"the rehearsal's `decant {words[3] if len(words) > 3 else words[-1]}` ended with code "
            f"{done.returncode}, its message is above; nothing was written"
        )
    return done.stdout


def rehearse(config: RoundsConfig, run: Ask = ask) -> str:
    """A report for people. Raises what a round would raise before its first step."""
    check(config)
    output = Places(Path(config.output), 1)
    with scratch_folder() as name:
        folder = Path(name)
        dump, train = folder / "dump.yaml", folder / "train.yaml"
        block = blocks.dump_block(config, 1, folder / "cache")
        dump.write_text(yaml.safe_dump(block))
        log.info("predicts the dump of a round")
        plan = json.loads(run([*command_words("plan", dump), "--sample", str(PROMPTS), "--json"]))
        dump.write_text(yaml.safe_dump(_few(block)))
        log.info("answers and scores %d prompts", PROMPTS)
        run(command_words("dump", dump))
        block = blocks.train_block(config, 1, folder / "cache", output.training, [])
        train.write_text(yaml.safe_dump(block))
        log.info("tries the training")
        tried = run([*training_words(config.launcher, train), "--dry-run"])
    return _report(config, plan, tried.replace(str(folder / "cache"), str(output.cache)))


def _few(block: dict[str, Any]) -> dict[str, Any]:
    """The dump of a few prompts."""
    few = copy.deepcopy(block)
    source = few["source"]
    limit = number(source, "dump.source.limit", 0)
    wanted = PROMPTS * number(source, "dump.source.parts", 1)
    source["limit"] = min(limit, wanted) if limit else wanted
    return few


def _of_few(line: str) -> bool:
    """Whether it tells epochs, which are those of a few answers."""
    return line.startswith("epochs") or line.endswith("sequences an epoch")


def _report(config: RoundsConfig, plan: dict[str, Any], tried: str) -> str:
    counts, engine = plan["counts"], plan["engines"][0]
    rounds = config.rounds
    kept = min(config.keep_rounds or rounds, rounds)
    generate = plan["generate_hours"] or 0.0
    n = number(group(group(config.dump, "dump.source"), "dump.source.generate"), "n", 0)
    rows = [
        ("rounds", f"{rounds}, each:"),
        ("answers", f"about {counts['sequences']:,}, {n} to a prompt"),
        ("targets", f"about {counts['targets']:,}"),
        ("sample", f"{generate:.2f} h"),
        ("score", f"{engine['hours']:.2f} h with {engine['engine']}"),
        ("cache", megabytes(plan["bytes"])),
        ("all rounds", f"{rounds * (generate + engine['hours']):.2f} h to sample and score"),
        ("", f"{megabytes(kept * plan['bytes'])} of caches on disk, of {kept} rounds"),
    ]
    lines = [f"{name:<12}{text}" for name, text in rows]
    lines += ["", "the training of the first round, tried on a few answers:"]
    lines += [f"  {line}" for line in tried.strip().splitlines() if not _of_few(line)]
    lines += [f"warning: {text}" for text in plan["warnings"]]
    return "\n".join(lines)
