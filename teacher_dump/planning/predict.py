"""What a dump will cost, before it is paid: score a sample, measure, extrapolate.

Counts are exact, for the whole source is tokenised. Everything else is measured on a stratified
sample: time with the configured truncation, what each k keeps and loses with one so large that
smaller ones are cut out of it.
"""

import contextlib
import dataclasses
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from decant.schemas import ScoredSequence
from decant.storage import Store
from decant.storage.inspect.budget import SURE, Budget, Step, choose
from decant.storage.inspect.precision import logprob_error_warning
from decant.teacher_dump.config import DumpConfig
from decant.teacher_dump.engines import Engine, EngineError
from decant.teacher_dump.engines.opening import check_engine
from decant.teacher_dump.inputs.counts import warnings as counted_warnings
from decant.teacher_dump.inputs.records import SourceError, TokenSequence
from decant.teacher_dump.inputs.sequences import SequenceCounts
from decant.teacher_dump.job.fill import open_teacher
from decant.teacher_dump.job.isolate import Isolator, Rejection
from decant.teacher_dump.job.refusals import refuse_foreign, refuse_misfits
from decant.teacher_dump.job.sampler import check_sampler, with_sampler
from decant.teacher_dump.job.selection import select_targets
from decant.teacher_dump.planning import warnings
from decant.teacher_dump.planning.ladder import (
    Rung,
    cut_ladder,
    reference_truncation,
    shard_bytes,
)
from decant.teacher_dump.planning.sample import draw_responses, draw_sequences
from decant.teacher_dump.progress import progress
from decant.teacher_dump.teacher import Teacher, describe_teacher, engine_label


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineTime:
    """How long one engine takes."""

    engine: str
    """With its version."""
    problem: str
    """Why it was not measured, or ""; the figures are 0 then."""
    load_seconds: float = 0
    targets_per_second: float = 0
    hours: float = 0
    """To score all targets, loading once included."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Prediction:
    """What a dump will give, and what it will cost."""

    counts: SequenceCounts
    """Of the whole source."""
    shards: int
    bytes: int
    """Of all shards, as configured."""
    bytes_per_target: float
    engines: tuple[EngineTime, ...]
    """The configured one first."""
    generate_hours: float | None
    """To sample the responses, loading once included; None for given text. With it, `counts` are
    estimated from one response to each prompt of the sample."""
    sample_sequences: int
    sample_targets: int
    cross_entropy: float
    """Nats per target: mean of -log p of the actual token, by which a teacher shows that it knows
    such texts."""
    mass: float | None
    """Mean retained mass as configured; None unless the entries are the most probable ones."""
    reference_k: int
    """What `ladder` was cut from."""
    beyond_reference: float
    """Nats per target that the reference itself may be away from the teacher, at most."""
    beyond_reference_error: float | None
    """Its standard error over sequences; None with fewer than two."""
    ladder: tuple[Rung, ...]
    recommended_k: int | None
    """The k of the ladder, below the reference, that a budget asks for; None without a budget, or
    where no such k is known to be it."""
    recommendation: str
    """That, and why, in one line; "" without a budget."""
    disk_free: int | None
    """Bytes; None for an object store."""
    warnings: tuple[str, ...]
    """What the dump would refuse, leave out, or not have room for."""


def predict(
    config: DumpConfig,
    sample: int = 64,
    engines: Sequence[str] = (),
    budget: Budget | None = None,
) -> Prediction:
    """Tokenise the source, score `sample` sequences, extrapolate; nothing is written to the output.

    `engines` are further ones to time, `budget` one to recommend a k for. Raises ValueError as
    `dump` would for the same config; but overlong records that would stop it are counted.
    """
    if sample < 1:
        raise ValueError(f"sample must be at least 1, found {sample}")
    teacher = describe_teacher(config.teacher)
    refuse_misfits(config, teacher)
    refuse_foreign(config)
    teacher = with_sampler(config, teacher)
    slow = check_engine(config.teacher, teacher.model_path) + check_sampler(config, teacher)
    counts = SequenceCounts()
    generate_hours = None
    if config.source.generate.n:
        drawn, shards, generate_hours = draw_responses(config, teacher, counts, sample)
    else:
        drawn, shards = draw_sequences(config, teacher, counts, sample)
    if not drawn:
        raise SourceError(
            f"{config.source.path}: {counts.records} records give no sequence with a target"
        )
    sequences = [entry.sequence for entry in drawn]
    scored, timed = _timed(config, teacher, sequences, counts)
    names = [name for name in dict.fromkeys(engines) if name != config.teacher.engine]
    others = [_timed_other(config, name, teacher, sequences, counts) for name in names]

    reference = reference_truncation(config.truncation, teacher)
    wide = scored
    if config.truncation != reference:
        wide = _score(dataclasses.replace(config, truncation=reference), teacher, sequences)
    kept = [
        index for index, one in enumerate(wide) if one is not None and scored[index] is not None
    ]
    if not kept:
        raise EngineError("the teacher can score none of the sample's sequences")
    share = config.sequences.target_share
    full = [select_targets(one, share) for index in kept if (one := wide[index]) is not None]
    own = [select_targets(one, share) for index in kept if (one := scored[index]) is not None]
    weights = [drawn[index].weight for index in kept]
    ladder = cut_ladder(config, teacher, full, weights, counts.targets, shards)
    stored = shard_bytes(config, teacher, own)
    num_bytes = round(stored.of(counts.targets, shards))
    is_top = config.truncation.rule.is_top
    masses = _retained(own, weights, config.temperatures) if is_top else {}
    free = _disk_free(config.output)
    found = slow + counted_warnings(counts, config.sequences.max_length)
    found += warnings.of_records(config, counts)
    rejected = len(sequences) - len(kept)
    found += warnings.of_rejections(config, rejected, len(sequences), counts.sequences / shards)
    if teacher.tokenizer is not None and (bos := teacher.tokenizer.bos_token_id) is not None:
        without = sum(int(sequence.input_ids[0]) != bos for sequence in sequences)
        found += warnings.of_beginnings(teacher.tokenizer.bos_token, without, len(sequences))
    found += logprob_error_warning(config.precision, *stored.logprob_error)
    found += warnings.of_masses(masses) + warnings.of_space(config, num_bytes, counts.tokens, free)
    chosen = None
    if budget:
        steps = [
            Step(k=r.k, nats=r.kl, error=r.kl_error, bytes_per_target=r.bytes_per_target)
            for r in ladder.rungs
        ]
        beyond = ladder.beyond + SURE * (ladder.beyond_error or 0.0)
        chosen = choose(steps, beyond, budget, counts.targets)
    return Prediction(
        counts=counts,
        shards=shards,
        bytes=num_bytes,
        bytes_per_target=num_bytes / counts.targets,
        engines=(timed, *others),
        generate_hours=generate_hours,
        sample_sequences=len(kept),
        sample_targets=sum(one.num_targets for one in own),
        cross_entropy=_cross_entropy(own, weights),
        mass=masses.get(1.0),
        reference_k=reference.k,
        beyond_reference=ladder.beyond,
        beyond_reference_error=ladder.beyond_error,
        ladder=ladder.rungs,
        recommended_k=chosen.k if chosen else None,
        recommendation=chosen.text if chosen else "",
        disk_free=free,
        warnings=tuple(found),
    )


def _timed(
    config: DumpConfig, teacher: Teacher, sequences: list[TokenSequence], counts: SequenceCounts
) -> tuple[list[ScoredSequence | None], EngineTime]:
    """The sample scored as configured, and how long the whole source would take."""
    start = time.monotonic()
    engine = open_teacher(config, teacher)
    try:
        loaded = time.monotonic() - start
        with contextlib.suppress(EngineError):
            _isolated(engine, sequences[:1])  # what only happens once is not extrapolated
        start = time.monotonic()
        scored = _isolated(engine, sequences)
        seconds = time.monotonic() - start
    finally:
        engine.close()
    # The forward takes by far the most of it, and that goes by tokens.
    seconds *= counts.tokens / sum(len(s.input_ids) for s in sequences)
    return scored, EngineTime(
        engine=engine_label(config.teacher),
        problem="",
        load_seconds=loaded,
        targets_per_second=counts.targets / seconds,
        hours=(loaded + seconds) / 3600,
    )


def _timed_other(
    config: DumpConfig,
    engine: str,
    teacher: Teacher,
    sequences: list[TokenSequence],
    counts: SequenceCounts,
) -> EngineTime:
    """The same of an engine that is not the configured one; why not, if it cannot."""
    try:
        other = dataclasses.replace(config.teacher, engine=engine)
        changed = dataclasses.replace(config, teacher=other)
        return _timed(changed, teacher, sequences, counts)[1]
    except (ValueError, RuntimeError, ImportError) as error:
        return EngineTime(engine=engine, problem=str(error).splitlines()[0])


def _score(
    config: DumpConfig, teacher: Teacher, sequences: list[TokenSequence]
) -> list[ScoredSequence | None]:
    engine = open_teacher(config, teacher)
    try:
        return _isolated(engine, sequences)
    finally:
        engine.close()


def _isolated(engine: Engine, sequences: list[TokenSequence]) -> list[ScoredSequence | None]:
    """Each sequence scored, or None if the teacher cannot."""
    scored: list[ScoredSequence | None] = []
    with progress("score", "sequences", total=len(sequences), keep=False) as bar:
        for result in Isolator(engine, 1.0).score(sequences, 0):
            scored.append(None if isinstance(result, Rejection) else result)
            bar.add(1)
    return scored


def _retained(
    scored: list[ScoredSequence], weights: list[float], temperatures: Sequence[float]
) -> dict[float, float]:
    """Mean retained mass at each temperature, over the targets that the sample stands for."""
    lost, total = np.zeros(len(temperatures)), 0.0
    for sequence, weight in zip(scored, weights, strict=True):
        assert sequence.log_tail is not None
        lost += weight * np.exp(sequence.log_tail, dtype=np.float64).sum(axis=0)
        total += weight * sequence.num_targets
    return {float(t): float(1 - part) for t, part in zip(temperatures, lost / total, strict=True)}


def _cross_entropy(scored: list[ScoredSequence], weights: list[float]) -> float:
    """Mean of -log p of the actual token, over the targets that the sample stands for."""
    pairs = list(zip(scored, weights, strict=True))
    total = sum(w * float(s.label_logprob.sum(dtype=np.float64)) for s, w in pairs)
    return -total / sum(w * s.num_targets for s, w in pairs)


def _disk_free(output: str) -> int | None:
    store = Store(output)
    if not store.is_local:
        return None
    path = Path(store.path(""))
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free
