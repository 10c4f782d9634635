"""The dump job: open or start the cache, score every missing shard, seal it."""

import collections
import logging
import time
from concurrent.futures import Future, ThreadPoolExecutor

from tqdm import tqdm

from schemas import Manifest, ShardPlan
from storage import CacheWriter, Store, paths
from teacher_dump.config import DumpConfig
from teacher_dump.engines import Engine, open_engine
from teacher_dump.inputs import read_inputs, restore_inputs
from teacher_dump.prepare import is_sealed, missing_shards, open_or_create, refuse_misfits
from teacher_dump.sequences import SequenceCounts
from teacher_dump.teacher import describe_teacher, hash_weights

log = logging.getLogger(__name__)

WRITES_AHEAD = 256
"""Scored sequences that may wait for the writing thread."""


def dump(config: DumpConfig) -> Manifest:
    """Fill the cache at `config.output`; shards that are committed already are left alone.

    Raises ValueError (or a subclass) if the user must change something, storage.Busy if another
    process writes this cache. An interruption or error loses the shard in progress, no other.
    """
    store = Store(config.output)
    teacher = describe_teacher(config.teacher)
    refuse_misfits(config, teacher)
    with store.lock():
        teacher = hash_weights(teacher, progress=log.info)
        with tqdm(desc="tokenise", unit=" sequences", disable=None) as bar:

            def tokenised(counts: SequenceCounts) -> None:
                bar.update(counts.sequences - bar.n)

            writer = open_or_create(config, store, teacher, tokenised)
            store.remove_temporaries()
            missing, records = missing_shards(writer)
            if not missing and is_sealed(writer, records):
                log.info("%s is complete already", config.output)
                store.remove_folder(paths.INPUTS)
                return writer.manifest
            restore_inputs(config, writer, teacher, missing, tokenised)
        log.info(
            "%d sequences, %d targets in %d shards, %d shards to score",
            writer.manifest.num_sequences,
            writer.manifest.num_targets,
            writer.manifest.num_shards,
            len(missing),
        )
        if missing:
            engine = open_engine(
                config.teacher,
                teacher.model_path,
                vocab_size=teacher.shared_vocab_size,
                truncation=config.truncation,
                temperatures=tuple(config.temperatures),
                max_length=config.sequences.max_length,
            )
            try:
                _fill(writer, engine, missing)
            finally:
                engine.close()
        manifest = writer.finalize()
        assert manifest.totals is not None
        log.info(
            "%s is complete: %d targets, %.1f MB, %.1f bytes per target",
            config.output,
            manifest.totals.targets,
            manifest.totals.bytes / 1e6,
            manifest.totals.bytes / manifest.totals.targets,
        )
        return manifest


def _fill(writer: CacheWriter, engine: Engine, missing: list[ShardPlan]) -> None:
    committed = sum(s.num_targets for s in writer.plan) - sum(s.num_targets for s in missing)
    start, scored_targets, sequences, written_bytes = time.monotonic(), 0, 0, 0
    with tqdm(
        desc="score",
        total=writer.manifest.num_targets,
        initial=committed,
        unit=" targets",
        unit_scale=True,
        disable=None,
    ) as bar:
        for plan in missing:
            inputs = read_inputs(writer.store, plan)
            pending: collections.deque[Future[None]] = collections.deque()
            with writer.shard(plan.shard) as shard, ThreadPoolExecutor(1) as pool:
                for scored in engine.score(inputs, plan.first_sequence):
                    if len(pending) >= WRITES_AHEAD:
                        pending.popleft().result()
                    pending.append(pool.submit(shard.write, scored))
                    sequences += 1
                    scored_targets += scored.num_targets
                    bar.update(scored.num_targets)
                    bar.set_postfix_str(
                        f"{sequences} sequences, {written_bytes / 1e6:.1f} MB", refresh=False
                    )
                while pending:
                    pending.popleft().result()
            written_bytes += shard.bytes_written
            seconds = time.monotonic() - start
            log.info(
                "shard %d of %d committed: %.1f MB, %.0f targets/s",
                plan.shard + 1,
                writer.manifest.num_shards,
                shard.bytes_written / 1e6,
                scored_targets / seconds,
            )
