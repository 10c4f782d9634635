"""The driver: sample and score, train, and again. All that is computed is computed by commands.

What is done is read off the files: a finished cache, a finished training, a finished round. Killed
at any moment, it goes on with the phase that was cut short, and that one where it was.
"""

import json
import logging
import os
import shutil
import time
from pathlib import Path
from typing import Any

import yaml

from decant.schemas import Manifest
from decant.storage import CacheReader, Store
from decant.storage.cli.config import parse_config
from decant.storage.files.durable import move, publish_bytes, temporary_for
from decant.storage.files.scratch import scratch_folder
from decant.student_train.config.run import TrainConfig
from decant.student_train.data.served import refuse_unserved
from decant.student_train.data.stream_config import temperature_indices
from decant.student_train.outputs.plots import draw
from decant.student_train.rounds import blocks, records
from decant.student_train.rounds.changes import refuse_other_config, rounds_record
from decant.student_train.rounds.config import RoundsConfig
from decant.student_train.rounds.places import CHECKPOINTS, LINES, PLOT, STUDENT, Places
from decant.student_train.rounds.processes import (
    Start,
    command_words,
    launcher_words,
    run_phase,
    start_process,
    training_words,
)
from decant.student_train.rounds.records import Round
from decant.student_train.rounds.report import PANELS, round_line

log = logging.getLogger(__name__)


class NothingToLearn(ValueError):
    """A round's cache has no target."""


def run_rounds(config: RoundsConfig, start: Start = start_process) -> list[Round]:
    """Do the rounds that are missing; returns the records of all.

    Raises ValueError if the user must change something, Busy if other rounds run in the output,
    PhaseFailed if a command fails.
    """
    output = Path(config.output)
    common = rounds_record(config, check(config))
    if output.exists() and not output.is_dir():
        raise ValueError(f"output {output} is not a directory: choose another")
    if (output / STUDENT).exists() and not (output / STUDENT).is_symlink():
        raise ValueError(
            f"{output / STUDENT} was not written by rounds, and would be replaced: choose another "
            "output"
        )
    with Store(output).lock():
        done = records.finished_rounds(output)
        if done:
            refuse_other_config(done[-1].config, common, config.output)
        for one in done:
            _remove_checkpoints(Places(output, one.number))
        if len(done) >= config.rounds:
            log.info("%s has its %d rounds already", output, len(done))
        for number in range(len(done) + 1, config.rounds + 1):
            done.append(_round(config, number, done, common, start))
            log.info("%s", round_line(done[-1], config.rounds))
            _show(config, output, done)
        _show(config, output, done)
    return done


def check(config: RoundsConfig) -> TrainConfig:
    """What can be said of the configuration before anything runs; the first round's training.

    Raises ValueError naming the block. What only the dump knows, its command says before it loads a
    model.
    """
    places = Places(Path(config.output), 1)
    parsed = []
    for number in (1, 2):
        block = blocks.train_block(config, number, places.cache, places.training, [])
        parsed.append(_parsed(block, places.output))
    blocks.refuse_misfit(config, parsed[0])
    for share, loss in zip(parsed[0].mixture, parsed[0].losses, strict=False):
        if share.cache != str(places.cache) and "://" not in share.cache:
            reader = _given("train.mixture", share.cache)
            temperature_indices(reader, loss.temperatures)
            refuse_unserved(loss, reader)
    heldout = parsed[0].eval.cache
    if heldout and "://" not in heldout:
        _given("train.eval.cache", heldout)
    if config.launcher:
        launcher_words(config.launcher)
    path = blocks.student_of(config, 1)
    if path and (path.startswith((".", "/")) or path.count("/") > 1) and not Path(path).is_dir():
        raise ValueError(f"train.student.path {path} is not there")
    return parsed[0]


def _given(key: str, path: str) -> CacheReader:
    """A cache that the configuration names. Raises ValueError if it is none."""
    if not Path(path, "manifest.json").is_file():
        raise ValueError(f"{key}: {path} is no cache")
    return CacheReader(path)


def _parsed(block: dict[str, Any], output: Path) -> TrainConfig:
    """A training's configuration as its command reads it."""
    with scratch_folder() as folder:
        file = Path(folder, "train.yaml")
        file.write_text(json.dumps(block))
        try:
            (config,) = parse_config([TrainConfig], ["--config", str(file)])
        except ValueError as error:
            raise ValueError(f"train: {str(error).replace(str(file), 'the block')}") from error
    assert isinstance(config, TrainConfig)
    return config


def _round(
    config: RoundsConfig, number: int, done: list[Round], common: dict[str, Any], start: Start
) -> Round:
    """One round from its first sample to its student; `common` is what all rounds share."""
    output = Path(config.output)
    places = Places(output, number)
    of = f"round {number} of {config.rounds}"
    first = blocks.student_of(config, number)
    for folder in (output, places.folder):
        Store(folder).remove_temporaries("")  # of a driver that was killed
    records.refuse_changed_student(places, first)
    _remove_older(config, places)

    began = time.monotonic()
    if records.final_cache(places.cache) is None:
        who = first if blocks.samples_by_student(config, number) else "the teacher"
        log.info("%s: %s answers, the teacher scores: %s", of, who, places.cache)
        _write(places.dump_config, blocks.dump_block(config, number, places.cache))
        words = command_words("dump", places.dump_config)
        run_phase(start, words, places.cache, f"the dump of {of}")
    manifest = records.final_cache(places.cache)
    _refuse_useless(manifest, places, done)
    assert manifest is not None and manifest.totals is not None
    dumped = time.monotonic()

    if not (places.training / "summary.json").is_file():
        records.refuse_changed_student(places, first)
        wanted = {
            str(one.number): one.weight for one in blocks.replay(config, number, _there(output))
        }
        mixture = records.pinned_mixture(places, wanted)
        older = [blocks.Replay(int(one), weight) for one, weight in mixture.items()]
        block = blocks.train_block(config, number, places.cache, places.training, older)
        said = f" and on those of earlier rounds ({', '.join(mixture)})" if mixture else ""
        log.info("%s: trains on its cache%s: %s", of, said, places.training)
        _write(places.train_config, block)
        words = training_words(config.launcher, places.train_config)
        is_launched = bool(config.launcher)
        what = f"the training of {of}"
        run_phase(start, words, places.training, what, is_launched=is_launched)
    summary = json.loads((places.training / "summary.json").read_text())
    sampler = manifest.source.get("sampler") or {"path": first}
    record = Round(
        number=number,
        config=common,
        sampler=sampler if blocks.samples_by_student(config, number) else {"path": "the teacher"},
        teacher=manifest.teacher.fingerprint,
        cache_id=manifest.cache_id,
        sequences=manifest.totals.sequences,
        rejected=manifest.totals.rejected,
        targets=manifest.totals.targets,
        bytes=manifest.totals.bytes,
        samples_nll=records.samples_nll(places.cache),
        steps=int(summary["steps"]),
        mixture=records.pinned_mixture(places, {}),
        student_xxh3_128=records.hash_student(str(places.student)),
        before=records.figures_of(summary.get("before") or {}),
        figures=records.figures_of(summary),
        seconds={
            "dump": round(dumped - began, 1),
            "training": round(time.monotonic() - dumped, 1),
        },
    )
    records.publish_round(output, record)
    _remove_checkpoints(places)
    return record


def _remove_checkpoints(places: Places) -> None:
    """Remove those of a finished round, which nothing goes on from."""
    shutil.rmtree(places.training / CHECKPOINTS, ignore_errors=True)


def _refuse_useless(manifest: Manifest | None, places: Places, done: list[Round]) -> None:
    """Raise unless there is a whole cache with targets, of the teacher of the rounds before."""
    if manifest is None or manifest.totals is None:
        raise ValueError(
            f"{places.cache} is not complete, though its dump ended well: look at {places.cache}"
        )
    totals = manifest.totals
    if not totals.targets:
        raise NothingToLearn(
            f"round {places.number} has no accepted sample: the teacher rejected {totals.rejected} "
            f"of {totals.sequences} (decant inspect {places.cache} lists the reasons). Mend what "
            f"rejects them and remove {places.folder}; the same command does the round again"
        )
    if done and done[-1].teacher != manifest.teacher.fingerprint:
        raise ValueError(
            f"round {places.number} was scored by another teacher (fingerprint "
            f"{manifest.teacher.fingerprint}) than round {done[-1].number} ({done[-1].teacher}): "
            f"put back the teacher and remove {places.folder}, or begin in another output"
        )


def _there(output: Path) -> list[int]:
    """The rounds whose caches are there."""
    found: list[int] = []
    while Places(output, len(found) + 1).folder.is_dir():
        found.append(len(found) + 1)
    return [number for number in found if (Places(output, number).cache).is_dir()]


def _remove_older(config: RoundsConfig, places: Places) -> None:
    """Remove the caches and students of rounds that are to be kept no longer.

    A round that has begun to train keeps what it trains on; the student it began with stays.
    """
    for leftover in places.output.glob("round-*/**/.removed.*"):
        shutil.rmtree(leftover, ignore_errors=True)
    if not config.keep_rounds:
        return
    mixed = Store(places.folder)
    trained_on = set()
    if mixed.exists(records.MIXED):
        trained_on = {int(number) for number in records.pinned_mixture(places, {})}
    for number in range(1, places.number - config.keep_rounds + 1):
        older = Places(places.output, number)
        for folder in older.removable:
            kept = number in trained_on if folder == older.cache else number == places.number - 1
            if folder.is_dir() and not kept:
                gone = folder.with_name(f".removed.{folder.name}")
                shutil.rmtree(gone, ignore_errors=True)
                move(folder, gone)
                shutil.rmtree(gone)
                log.info("removed %s: rounds before %d are not kept", folder, number + 1)


def _write(file: Path, block: dict[str, Any]) -> None:
    """Write the configuration of a phase."""
    publish_bytes(file, yaml.safe_dump(block, sort_keys=False, allow_unicode=True).encode())


def _show(config: RoundsConfig, output: Path, done: list[Round]) -> None:
    """Lines, plot and the link to the last student."""
    records.publish_lines(output, done)
    link, place = output / STUDENT, os.path.relpath(Places(output, len(done)).student, output)
    if not link.is_symlink() or os.readlink(link) != place:
        temporary = temporary_for(link)
        temporary.symlink_to(place)
        move(temporary, link)
    if config.plots:
        try:
            draw(output / LINES, output / PLOT, PANELS, along="round")
        except OSError as error:  # a full disk: the students are what matters
            log.warning("no %s: %s", output / PLOT, error)
