"""Fill shards of a started cache: claim, read the inputs, score, write, commit.

Scoring runs in the calling thread; each shard is encoded, written and committed by a thread of its
own that follows it, so that the commit of one overlaps the scoring of the next. What lies around
the shards (starting, sharing out, sealing) is not known here.
"""

import contextlib
import logging
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from decant.schemas import ScoredSequence, ShardPlan
from decant.storage import CacheWriter
from decant.storage.cache import paths
from decant.teacher_dump.config import DumpConfig
from decant.teacher_dump.engines import Engine, open_engine
from decant.teacher_dump.job.chat_sampler import open_kept_answers
from decant.teacher_dump.job.handover import Result, _Waiting
from decant.teacher_dump.job.isolate import Isolator, Rejection
from decant.teacher_dump.job.selection import lost_targets, select_targets
from decant.teacher_dump.job.shard_inputs import read_inputs
from decant.teacher_dump.teacher import Teacher

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Filled:
    """A shard that this process has committed."""

    plan: ShardPlan
    bytes: int
    """Size of the shard file."""
    rejected: int
    """Sequences that the teacher could not score."""
    logprob_error: tuple[float | None, float | None]
    """Mean and largest, over targets, of the worst log prob's error, nats; None without one."""


def open_teacher(config: DumpConfig, teacher: Teacher) -> Engine:
    """Load the teacher in the configured engine; the caller closes it.

    Raises EngineError if the engine is not installed or cannot give what the config asks for.
    """
    if config.teacher.is_chat:
        return open_kept_answers(config, teacher)
    return open_engine(
        config.teacher,
        teacher.model_path,
        vocab_size=teacher.shared_vocab_size,
        truncation=config.truncation,
        temperatures=tuple(config.temperatures),
        max_length=config.sequences.max_length,
        fingerprint=teacher.info.fingerprint,
        tokenizer=teacher.tokenizer,
    )


def is_done(writer: CacheWriter, shard: int, *, retry_rejected: bool = False) -> bool:
    """Whether a shard has a commit record, with `retry_rejected` one without rejected sequences."""
    if not retry_rejected:
        return writer.store.exists(paths.record(shard))
    record = writer.record(shard)
    return record is not None and not record.rejected


def fill_shard(
    writer: CacheWriter,
    engine: Engine,
    plan: ShardPlan,
    *,
    max_rejected: float,
    retry_rejected: bool = False,
    progress: Callable[[int], None] = lambda _: None,
) -> Filled | None:
    """Score one shard and commit it; None if another process has it or has committed it.

    `progress` is called for each sequence with the targets that are through. The shard's inputs
    must lie in the cache (`inputs.restore_inputs`). Several processes may be given the same shard:
    one fills it. With `retry_rejected`, a committed shard that has rejected sequences is scored
    again and valid until it is replaced. Raises TooManyRejected where the teacher cannot score more
    than `max_rejected` of the sequences; that or whatever else the engine or the disk raises leaves
    the shard as if it had not been begun.
    """
    for filled in fill_shards(
        writer,
        engine,
        [plan],
        max_rejected=max_rejected,
        retry_rejected=retry_rejected,
        progress=progress,
    ):
        return filled
    return None


def fill_shards(
    writer: CacheWriter,
    engine: Engine,
    plans: Iterable[ShardPlan],
    *,
    max_rejected: float,
    retry_rejected: bool = False,
    progress: Callable[[int], None] = lambda _: None,
) -> Iterator[Filled]:
    """`fill_shard` over many, scoring one while the one before is still being committed.

    Yields each shard once it is committed, not those of other processes. `plans` is read lazily:
    the next one when the scoring of the last has ended. An error or interruption loses the shard
    that is being scored; the one before it is still committed, unless the error is its own.
    """
    isolator = Isolator(engine, max_rejected)
    target_share = _target_share(writer)
    committing: Future[Filled] | None = None
    with ThreadPoolExecutor(2, "write") as threads:
        for plan in plans:
            with contextlib.ExitStack() as claim:
                ours = claim.enter_context(writer.store.claim(paths.inputs(plan.shard)))
                if not ours or is_done(writer, plan.shard, retry_rejected=retry_rejected):
                    count = writer.manifest.num_shards
                    log.info("shard %d of %d is another process's", plan.shard + 1, count)
                    continue
                files = (paths.shard(plan.shard), paths.record(plan.shard))
                for folder in (paths.SHARDS, paths.RENEWAL):  # where they have the same names
                    writer.store.remove_temporaries(folder, files)
                inputs = read_inputs(writer.store, plan)
                held = claim.pop_all()
            waiting = _Waiting()
            try:
                writing = threads.submit(_write, held, writer, plan, waiting, retry_rejected)
                for scored in isolator.score(inputs, plan.first_sequence):
                    result = scored
                    if isinstance(scored, ScoredSequence):
                        result = select_targets(scored, target_share)
                    if not waiting.put(result, _num_bytes(result)):
                        writing.result()  # raises what ended it
                    if committing is not None and committing.done():
                        committing.result()  # raises if it failed
                    progress(_num_targets(result, target_share))
            except BaseException:
                waiting.abandon()
                raise
            waiting.finish()
            if committing is not None:
                yield committing.result()
            committing = writing
        if committing is not None:
            yield committing.result()


def _write(
    claim: contextlib.ExitStack,
    writer: CacheWriter,
    plan: ShardPlan,
    waiting: _Waiting,
    replace: bool,
) -> Filled:
    """Write a shard as its sequences arrive, and commit it."""
    rejected = 0
    replace = replace and writer.store.exists(paths.record(plan.shard))
    try:
        with claim, writer.shard(plan.shard, replace=replace) as shard:
            for result in waiting:
                if isinstance(result, Rejection):
                    rejected += 1
                    lost = result.sequence
                    shard.reject(
                        lost.sample_id,
                        lost.input_ids,
                        lost_targets(lost, _target_share(writer)),
                        result.reason,
                        lost.messages or None,
                    )
                else:
                    shard.write(result)
    finally:
        waiting.refuse()
    return Filled(
        plan=plan,
        bytes=shard.bytes_written,
        rejected=rejected,
        logprob_error=shard.logprob_error,
    )


def _target_share(writer: CacheWriter) -> float:
    """What the cache was started with; older ones keep every target."""
    return float(writer.manifest.sequences.get("target_share", 1.0))


def _num_targets(result: Result, target_share: float) -> int:
    if isinstance(result, Rejection):
        return int(lost_targets(result.sequence, target_share).sum())
    return result.num_targets


def _num_bytes(result: Result) -> int:
    if isinstance(result, Rejection):
        return 0
    arrays = sum(values.nbytes for values in result.known().values())
    return arrays + len(result.messages or "")
