"""`rescore` and `add-temperature`: what they take and what they print."""

import dataclasses
from dataclasses import dataclass
from typing import Annotated, Literal

from decant.storage.cli import process
from decant.storage.cli.commands import Command
from decant.storage.cli.options import Hidden, Named, Shown, Word
from decant.teacher_dump.engines.config import REMOTE, TeacherConfig
from decant.teacher_dump.rescore.changes import OF_CACHE, Changes


@dataclass(frozen=True, kw_only=True)
class AgainArguments(TeacherConfig):
    """Which cache, where to, by which teacher; the teacher's options are those of a dump."""

    url: Annotated[str, Word("CACHE")]
    """The cache: a directory or an fsspec URL."""
    out: Annotated[str, Word("NEW")]
    """The new cache; the same command again goes on where it stopped."""
    teacher: Annotated[str, Shown("PATH")] = ""
    """Directory or hub id of the teacher; by default the one that CACHE names, in its dtype. With
    engine http or openai the URL of a server."""
    limit: int = 0
    """Only the first sequences, this many; 0 = all."""
    worker_index: int = 0
    """Which of several workers this one is, from 0."""
    num_workers: int = 1
    """Processes that fill NEW together, each its share of the shards."""
    dry_run: bool = False
    """Say what would be scored, and write nothing."""
    path: Annotated[str, Hidden()] = ""
    """Given as `teacher`."""
    endpoints: Annotated[tuple[str, ...], Hidden()] = ()
    """Given as `teacher`."""

    def __post_init__(self) -> None:
        if self.limit < 0:
            raise ValueError(f"--limit {self.limit} must be at least 0")
        self.config()

    def config(self) -> TeacherConfig:
        """The teacher. Raises ValueError where its options do not go together."""
        given = {f.name: getattr(self, f.name) for f in dataclasses.fields(TeacherConfig)}
        is_remote = self.engine in REMOTE
        if is_remote and not self.teacher:
            raise ValueError(f"--engine {self.engine} needs --teacher http://host:port")
        given["path"] = "" if is_remote else self.teacher or OF_CACHE
        given["endpoints"] = (self.teacher,) if is_remote else ()
        return TeacherConfig(**given)


@dataclass(frozen=True, kw_only=True)
class RescoreArguments(AgainArguments):
    """What the new cache has otherwise than the old one."""

    method: str | None = None
    """Truncation: topk | topp | sample | topk+sample | label; by default as in CACHE."""
    k: int | None = None
    """Entries kept; by default as in CACHE."""
    p: float | None = None
    """topp: the mass to reach; by default as in CACHE."""
    min_k: int | None = None
    """topp: entries at least; by default as in CACHE."""
    draws: int | None = None
    """Draws per target of methods that sample; by default as in CACHE."""
    seed: int | None = None
    """Of the draws; by default as in CACHE."""
    temperatures: Annotated[tuple[float, ...], Named("temperature"), Shown("T")] = ()
    """A temperature to store, 1 first; may be given several times. By default as in CACHE."""
    precision: Literal["compact", "f16", "f32"] | None = None
    """How log probs are stored; by default as in CACHE."""
    shard_targets: int | None = None
    """Targets per shard, at least; by default as in CACHE."""

    def changes(self) -> Changes:
        """What is changed."""
        names = ("method", "k", "p", "min_k", "draws", "seed", "precision", "shard_targets")
        return Changes(
            **{name: getattr(self, name) for name in names},
            temperatures=tuple(map(float, self.temperatures)) or None,
            limit=self.limit,
        )


@dataclass(frozen=True, kw_only=True)
class AddTemperatureArguments(AgainArguments):
    """Which temperatures are added."""

    temperatures: Annotated[tuple[float, ...], Named("temperature"), Shown("T")] = ()
    """A temperature to store besides those of CACHE; may be given several times."""

    def __post_init__(self) -> None:
        AgainArguments.__post_init__(self)
        if not self.temperatures:
            raise ValueError("give --temperature, once or several times")

    def changes(self) -> Changes:
        """What is changed."""
        added = tuple(map(float, self.temperatures))
        return Changes(more_temperatures=added, limit=self.limit)


def run_rescore(arguments: RescoreArguments) -> int:
    """Score a cache's sequences again; returns the exit code."""
    return _score(arguments, arguments.changes(), same_teacher=False)


def run_add_temperature(arguments: AddTemperatureArguments) -> int:
    """Score a cache's sequences again at more temperatures; returns the exit code."""
    return _score(arguments, arguments.changes(), same_teacher=True)


def _score(arguments: AgainArguments, changes: Changes, *, same_teacher: bool) -> int:
    import logging

    from decant.storage.cache.command import refuse_missing
    from decant.storage.cache.reader import CacheReader
    from decant.storage.cli.terminal import megabytes
    from decant.teacher_dump.engines.quiet import quiet_transformers
    from decant.teacher_dump.job.refusals import refuse_before_asking, refuse_misfits
    from decant.teacher_dump.job.run import Worker, dump
    from decant.teacher_dump.rescore.changes import refuse_other_teacher, rescore_config
    from decant.teacher_dump.teacher import describe_teacher, hash_weights

    refuse_missing(arguments.url)
    quiet_transformers()
    config = rescore_config(arguments.url, arguments.out, arguments.config(), changes)
    manifest = CacheReader(arguments.url).manifest
    refuse_before_asking(config)
    teacher = describe_teacher(config.teacher)
    if same_teacher:
        teacher = hash_weights(teacher, progress=logging.getLogger(__name__).info)
        refuse_other_teacher(manifest, teacher.info.fingerprint, arguments.url)
    assert manifest.totals is not None
    kept = config.truncation.text()
    if arguments.dry_run:
        refuse_misfits(config, teacher)
        print(
            f"{arguments.out}: {manifest.totals.sequences:,} sequences, "
            f"{manifest.totals.targets:,} targets of {arguments.url} to score by "
            f"{teacher.info.name}, {kept}, at T = "
            f"{', '.join(f'{t:g}' for t in config.temperatures)}"
        )
        print(
            f"{arguments.url} has {megabytes(manifest.totals.bytes)}, "
            f"{manifest.truncation.text()}; nothing was written"
        )
        return process.DONE
    worker = Worker(arguments.worker_index, arguments.num_workers)
    made = dump(config, worker)
    targets, state = made.num_targets, ", not all of them committed yet"
    if made.totals is not None:
        targets, state = made.totals.targets, ""
    print(f"{arguments.out}: {targets} targets in {made.num_shards} shards, {kept}{state}")
    return process.DONE


AS_A_DUMP = """
NEW is filled like a dump: shards that are committed stay, the same command goes
on where the last one stopped, and no reader takes it before it is complete.
CACHE is only read. Sequences without a target, as those that the teacher could
not score, are left out and counted."""
RESCORE = Command(
    text=f"""
  decant rescore caches/mine caches/k128 --k 128
  decant rescore caches/mine caches/other --teacher path/of/another
  decant rescore caches/mine caches/draws --method sample --draws 64

The same sequences, the same targets, the same sample ids, scored again: by the
teacher that CACHE names or by another one of its tokenizer. What is not said
stays as it is in CACHE.
{AS_A_DUMP}
""",
    arguments=RescoreArguments,
    common=("teacher", "k", "temperature", "method", "precision", "engine", "dtype", "device"),
    run=run_rescore,
)
ADD_TEMPERATURE = Command(
    text=f"""
  decant add-temperature caches/mine caches/hot --temperature 2
  decant add-temperature caches/mine caches/hot --temperature 2 --temperature 4

What a temperature takes (its normaliser and its tail) comes from the whole
distribution, so the teacher scores the sequences again; it must be the one that
CACHE was scored by. All else stays as it is in CACHE.
{AS_A_DUMP}
""",
    arguments=AddTemperatureArguments,
    common=("temperature", "teacher", "engine", "dtype", "device"),
    run=run_add_temperature,
)
