"""The dump job: open or start the cache, score every missing shard, seal it."""

import contextlib
import dataclasses
import logging
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

from decant.schemas import FormatError, Manifest, ShardPlan
from decant.storage import CacheWriter, Store
from decant.storage.cache import extension, paths
from decant.storage.cache.records import read_manifest
from decant.storage.cache.renewal import settle
from decant.storage.inspect.precision import logprob_error_warning
from decant.teacher_dump.config import DumpConfig
from decant.teacher_dump.engines import Engine
from decant.teacher_dump.engines.opening import check_engine
from decant.teacher_dump.inputs.sequences import SequenceCounts
from decant.teacher_dump.job.config import RayConfig
from decant.teacher_dump.job.extend import Base, OnKnown, is_part, open_or_extend
from decant.teacher_dump.job.fill import fill_shards, open_teacher
from decant.teacher_dump.job.ray_executor import fill_with_ray, import_ray
from decant.teacher_dump.job.refusals import refuse_before_asking, refuse_misfits
from decant.teacher_dump.job.sampler import check_sampler, with_sampler
from decant.teacher_dump.job.shard_inputs import restore_inputs
from decant.teacher_dump.job.start import missing_shards, open_or_create
from decant.teacher_dump.progress import progress
from decant.teacher_dump.teacher import Teacher, describe_teacher, hash_weights

log = logging.getLogger(__name__)

POLL_S = 2.0
"""How often a worker looks whether worker 0 has started the cache, where no lock says so."""


@dataclass(frozen=True, slots=True)
class Worker:
    """Which of several processes that fill one cache this is; alone by default."""

    index: int = 0
    count: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.count:
            raise ValueError(
                f"worker-index {self.index} of num-workers {self.count}: must lie in "
                f"[0, {self.count})"
            )

    def fills(self, shard: int) -> bool:
        """Whether this worker scores a shard: every `count`-th one, from `index` on."""
        return shard % self.count == self.index


def dump(
    config: DumpConfig,
    worker: Worker = Worker(),
    ray: RayConfig | None = None,
    *,
    retry_rejected: bool = False,
    extend: OnKnown | None = None,
) -> Manifest:
    """Fill the cache at `config.output`; shards that are committed already are left alone.

    Several workers of one `count` share the shards of the same plan; the last one to end makes the
    cache final. With `ray`, actors of a cluster fill the shards, and this process does the rest.
    Sequences that the teacher could not score stay rejected, unless told to `retry_rejected`: their
    shards are scored again.
    Raises ValueError (or a subclass) if the user must change something, storage.Busy if another
    process writes this cache. An interruption or error loses the shard in progress, no other.
    With `extend` the records of the source are added to a final cache, which readers see as it was
    until all of them are scored; it says what becomes of sequences whose sample id is there.
    """
    if extend is None:
        return _fill_cache(config, worker, ray, None, retry_rejected=retry_rejected)
    if config.source.generate.n:
        raise ValueError(
            "source.generate has no effect with --extend: dump into another output, then "
            "`decant merge` the two"
        )
    outer = Store(config.output)
    Base(config.output, extend)  # refuses what cannot be extended
    with outer.lock(shared=worker.count > 1):
        with outer.lock(paths.SHARDS, wait=True):
            _seal_renewed(outer)
        base = Base(config.output, extend)
        moved = extension.moving(outer)
        if moved and moved.cache_id == base.manifest.cache_id:  # a killed run did all but this
            with outer.lock(paths.SHARDS, wait=True):
                extension.move_in(outer)
        if is_part(config, base.manifest):
            log.info("%s is extended by %s already", config.output, config.source.path)
            return base.manifest
        inner = dataclasses.replace(config, output=extension.extension_url(config.output))
        try:
            manifest = _fill_cache(inner, worker, ray, base, retry_rejected=retry_rejected)
        except BaseException:
            if not Store(inner.output).names(""):
                outer.remove_folder(paths.EXTENSION)
            raise
        if not manifest.is_final:
            return manifest
        with outer.lock(paths.SHARDS, wait=True), progress("move in", "shards") as bar:
            if not outer.exists(f"{paths.EXTENSION}/{paths.MANIFEST}"):  # another worker did
                return read_manifest(outer)
            manifest = extension.move_in(outer, lambda done, _: bar.to(done))
        log.info(
            "%s has %d more sequences", config.output, manifest.num_sequences - len(base.reader)
        )
        return manifest


def _fill_cache(
    config: DumpConfig,
    worker: Worker,
    ray: RayConfig | None,
    base: Base | None,
    *,
    retry_rejected: bool,
) -> Manifest:
    """`dump` into `config.output`, which is the extension of the `base` if there is one."""
    if ray is not None:
        import_ray()
    store = Store(config.output)
    refuse_before_asking(config)
    teacher = describe_teacher(config.teacher)
    refuse_misfits(config, teacher)
    teacher = with_sampler(config, teacher)
    if not store.exists(paths.MANIFEST):
        # With Ray, what runs the teacher is elsewhere; who samples is here.
        found = check_engine(config.teacher, teacher.model_path) if ray is None else []
        for warning in [*found, *check_sampler(config, teacher)]:
            log.warning("%s", warning)
    with store.lock(shared=worker.count > 1):
        teacher = hash_weights(teacher, progress=log.info)
        _await_start(store, worker)
        with _alone(store, worker):
            writer, missing = _set_up(config, store, teacher, worker, base, retry_rejected)
            if not missing and writer.is_sealed():
                log.info("%s is complete already", config.output)
                store.remove_folder(paths.INPUTS)
                if worker.count == 1:
                    store.remove_folder(paths.RENEWAL)  # without a commit record: of a killed run
                return writer.manifest
        log.info(
            "%d sequences, %d targets in %d shards, %d shards to score%s",
            writer.manifest.num_sequences,
            writer.manifest.num_targets,
            writer.manifest.num_shards,
            len(missing),
            f" by worker {worker.index} of {worker.count}" if worker.count > 1 else "",
        )
        try:
            if missing and ray is not None:
                fill_with_ray(config, teacher, writer, missing, ray, retry_rejected=retry_rejected)
            elif missing:
                engine = open_teacher(config, teacher)
                try:
                    _fill(writer, engine, missing, worker, config.max_rejected, retry_rejected)
                finally:
                    engine.close()
        except BaseException:
            with _alone(store, worker):
                if writer.manifest.is_final and not writer.missing():  # some may be replaced
                    writer.finalize(keep_inputs=worker.count > 1)
            raise
        with _alone(store, worker):
            left = writer.missing()
            if left and worker.count > 1:
                log.info(
                    "worker %d has done its part; %d of %d shards are other workers'",
                    worker.index,
                    len(left),
                    writer.manifest.num_shards,
                )
                return writer.manifest
            if ray is not None:  # whose actors have logs of their own
                for record in writer.committed():
                    error = record.logprob_error_mean, record.logprob_error_max
                    if warnings := logprob_error_warning(config.precision, *error):
                        log.warning("shard %d: %s", record.shard + 1, warnings[0])
                        break
            # Of shards that are scored again, none is missing while others still need the inputs.
            manifest = writer.finalize(keep_inputs=retry_rejected and worker.count > 1)
        assert manifest.totals is not None
        log.info(
            "%s is complete: %d targets, %.1f MB, %.1f bytes per target%s",
            config.output,
            manifest.totals.targets,
            manifest.totals.bytes / 1e6,
            manifest.totals.bytes / max(manifest.totals.targets, 1),
            f", {manifest.totals.rejected} sequences rejected" if manifest.totals.rejected else "",
        )
        return manifest


def _seal_renewed(store: Store) -> None:
    """Make shards that a killed run scored again part of the cache that is to be extended."""
    if store.exists(paths.RENEWAL):
        store.remove_temporaries(paths.RENEWAL)
        CacheWriter(store.url).finalize()


def _alone(store: Store, worker: Worker) -> AbstractContextManager[None]:
    """One worker at a time; a single one is alone anyway."""
    return store.lock(paths.SHARDS, wait=True) if worker.count > 1 else nullcontext()


def _await_start(store: Store, worker: Worker) -> None:
    """Where nothing can be locked, worker 0 alone starts the cache; the others wait for it."""
    if store.is_local or worker.index == 0:
        return
    if not store.exists(paths.MANIFEST):
        log.info("waiting for worker 0 to start %s", store.url)
    while not store.exists(paths.MANIFEST):
        time.sleep(POLL_S)


def _set_up(
    config: DumpConfig,
    store: Store,
    teacher: Teacher,
    worker: Worker,
    base: Base | None,
    retry_rejected: bool,
) -> tuple[CacheWriter, list[ShardPlan]]:
    """The started cache and the shards that this worker must score, with their inputs in place."""
    with progress("tokenise", "sequences") as bar:

        def tokenised(counts: SequenceCounts) -> None:
            bar.to(counts.sequences)

        alone = worker.count == 1
        if base is None:
            writer = open_or_create(config, store, teacher, tokenised, alone=alone)
        else:
            writer = open_or_extend(config, store, teacher, base, tokenised, alone=alone)
        for folder in ("", paths.PLAN, paths.INPUTS, paths.TOKENIZER, paths.RECORDS):
            store.remove_temporaries(folder)
        if worker.count == 1:
            store.remove_temporaries(paths.SHARDS)
            store.remove_temporaries(paths.RENEWAL)
        with contextlib.suppress(FormatError):  # damaged records, which are sealed anew
            settle(store, writer.manifest)
        before = base.manifest.num_shards if base else 0
        missing = missing_shards(
            writer, worker.fills, retry_rejected=retry_rejected, inherited=before
        )
        if base is None:
            _refuse_extended(writer, missing)
        restore_inputs(
            config,
            writer,
            teacher,
            missing,
            tokenised,
            first_shard=before,
            first=base.manifest.num_sequences if base else 0,
            accept=base.accept if base else None,
        )
    return writer, missing


def _refuse_extended(writer: CacheWriter, missing: list[ShardPlan]) -> None:
    """Raise ValueError for shards that came from other records than the cache's first."""
    for step in extension.steps_of(writer.manifest)[:1]:
        later = [plan.shard for plan in missing if plan.shard >= step.shards]
        if later:
            raise ValueError(
                f"shard {later[0]} of {writer.store.url} is missing, but came from an extension "
                f"({step.source.get('path')}): put its file back from a copy, or dump those "
                "records into another output and merge the caches"
            )


def _fill(
    writer: CacheWriter,
    engine: Engine,
    missing: list[ShardPlan],
    worker: Worker,
    max_rejected: float,
    retry_rejected: bool,
) -> None:
    """Fill the missing shards one after another, with a bar over all that this worker has."""
    mine = sum(s.num_targets for s in writer.plan if worker.fills(s.shard))
    committed = mine - sum(s.num_targets for s in missing)
    start, targets, sequences, written_bytes = time.monotonic(), 0, 0, 0
    precision, warned = writer.manifest.precision, False
    with progress("score", "targets", total=mine, initial=committed) as bar:

        def done(num_targets: int) -> None:
            nonlocal targets, sequences
            sequences += 1
            targets += num_targets
            bar.note(f"{sequences} sequences, {written_bytes / 1e6:.1f} MB")
            bar.add(num_targets)

        for filled in fill_shards(
            writer,
            engine,
            missing,
            max_rejected=max_rejected,
            retry_rejected=retry_rejected,
            progress=done,
        ):
            written_bytes += filled.bytes
            log.info(
                "shard %d of %d committed: %.1f MB, %.0f targets/s%s",
                filled.plan.shard + 1,
                writer.manifest.num_shards,
                filled.bytes / 1e6,
                targets / (time.monotonic() - start),
                f", {filled.rejected} sequences rejected" if filled.rejected else "",
            )
            for warning in logprob_error_warning(precision, *filled.logprob_error):
                if not warned:
                    log.warning("shard %d: %s", filled.plan.shard + 1, warning)
                warned = True
