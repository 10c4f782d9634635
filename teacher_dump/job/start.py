"""Fix what will be scored: tokenise the source once, cut it into shards, seal the plan.

Afterwards no record is read again: the tokens of each shard lie in the cache until it is final, so
any number of workers can fill shards in any order and bad records are found before a teacher is
loaded. Only what was lost since is made from the source again.
"""

import dataclasses
import logging
from collections.abc import Callable
from pathlib import PurePath
from typing import Any

import xxhash

from decant.schemas import NO_LOGPROBS, FormatError, Manifest, ShardPlan, tokenizer_fingerprint
from decant.schemas.strict import canonical
from decant.storage import CacheWriter, Store
from decant.storage.cache import paths
from decant.storage.cache.records import committed_shards
from decant.storage.files.sealed import read_json
from decant.teacher_dump.config import DumpConfig
from decant.teacher_dump.inputs.counts import SequenceCounts, summary, warnings
from decant.teacher_dump.inputs.records import SourceError
from decant.teacher_dump.inputs.sequences import chat_template_text
from decant.teacher_dump.inputs.sources import describe_source
from decant.teacher_dump.job.refusals import STARTED, refuse_foreign
from decant.teacher_dump.job.response_files import hash_parts, system_fingerprints
from decant.teacher_dump.job.responses import describe_generation
from decant.teacher_dump.job.shard_inputs import sharded, source_records, write_input
from decant.teacher_dump.teacher import Teacher, fingerprint_like
from decant.teacher_dump.tokenizer import save_tokenizer

log = logging.getLogger(__name__)

LATER = {
    "sequences.empty": "error",
    "sequences.duplicates": "keep",
    "sequences.window_head": "none",
    "sequences.target_share": 1.0,
}
"""What caches did that were started before they could say so."""
SAMPLER = "source.sampler.fingerprint"
KEEP_MESSAGES = "sequences.keep_messages"


class ConfigChanged(ValueError):
    """The directory holds a cache of another config, source, tokenizer or teacher."""


def open_or_create(
    config: DumpConfig,
    store: Store,
    teacher: Teacher,
    progress: Callable[[SequenceCounts], None],
    *,
    alone: bool = True,
) -> CacheWriter:
    """Open the cache in `config.output`, or start it there.

    A cache of another config of which no shard is committed yet is started again, if this process
    is `alone` with it. Raises ConfigChanged, listing the differing fields, if the cache there is
    not the one this config gives; FileExistsError if the directory holds something else.
    """
    source = describe_source(config.source)
    if config.source.generate.n:
        source = describe_generation(config, teacher, source)
    if store.exists(paths.MANIFEST):
        try:
            writer = CacheWriter(config.output)
        except FormatError as error:
            raise FormatError(
                f"{error}; restore it from a copy, or dump into another output"
            ) from error
        stored = writer.manifest.tokenizer.fingerprint
        ours = identity(config, source, teacher, stored)
        known = writer.manifest.teacher.fingerprint
        ours["teacher.fingerprint"] = fingerprint_like(ours["teacher.fingerprint"], known)
        differing = changes(writer.manifest, ours)
        if differing and alone and _holds_nothing(writer, source):
            log.warning(
                "%s holds the start of another cache, of which no shard is committed; starting "
                "over with this config. Differing:\n%s",
                store.url,
                "\n".join(differing),
            )
            start_over(store)
            return _started(config, store, teacher, source, progress)
        if differing:
            raise ConfigChanged(
                f"{writer.store.url} holds another cache; differing:\n"
                + "\n".join(differing)
                + "\nUse the config it was started with to resume, or another output."
            )
        files = (f"{paths.TOKENIZER}/{name}" for name in writer.manifest.tokenizer.files)
        if not all(store.exists(file) for file in files):
            save_tokenizer(store, teacher.tokenizer)
        return writer
    return _started(config, store, teacher, source, progress)


def _holds_nothing(writer: CacheWriter, source: dict[str, Any]) -> bool:
    """Whether nothing is lost with a cache: no committed shard, nor responses to other prompts."""
    store = writer.store
    if committed_shards(store):
        return False
    return not store.exists(paths.GENERATION) or (
        read_json(store, paths.GENERATION).get("fingerprint") == source["fingerprint"]
    )


def start_over(store: Store) -> None:
    """Remove a cache without a committed shard; what was sampled for it stays.

    Whenever this is cut short, what is left is that cache or the start of one.
    """
    for folder in (
        paths.SHARDS,
        paths.RENEWAL,
        paths.RECORDS,
        PurePath(paths.KEPT_REPORT).parts[0],
    ):
        store.remove_folder(folder)
    store.remove(paths.MANIFEST)
    clear(store)


def _started(
    config: DumpConfig,
    store: Store,
    teacher: Teacher,
    source: dict[str, Any],
    progress: Callable[[SequenceCounts], None],
) -> CacheWriter:
    """A new cache; if it cannot be made, nothing of it is left."""
    refuse_foreign(config)
    clear(store)
    try:
        return _create(config, store, teacher, source, progress)
    except FileExistsError as error:  # what lies there is another process's start
        raise FileExistsError(
            f"another process is starting a different cache in {store.url}: choose another output "
            f"({error})"
        ) from error
    except BaseException:
        if not store.exists(paths.MANIFEST):  # else it is a cache, which a rerun completes
            clear(store)
        raise


def _create(
    config: DumpConfig,
    store: Store,
    teacher: Teacher,
    source: dict[str, Any],
    progress: Callable[[SequenceCounts], None],
) -> CacheWriter:
    counts = SequenceCounts()
    plan, first, messages, sampler = [], 0, False, False
    records = source_records(config, teacher, source["fingerprint"])
    for shard, sequences in enumerate(sharded(config, teacher, counts, progress, records)):
        share = config.sequences.target_share
        plan.append(write_input(store, shard, first, sequences, share))
        first += len(sequences)
        messages = messages or any(sequence.messages for sequence in sequences)
        sampler = sampler or sequences[0].sampler_logprobs is not None
    log.info("inputs: %s", summary(counts))
    if not plan:
        raise SourceError(
            f"{config.source.path}: {counts.records} records give no sequence with a target"
        )
    for warning in warnings(counts, config.sequences.max_length):
        log.warning("warning: %s", warning)
    if config.source.generate.n:
        source = {**source, "generated": hash_parts(store)}
        if config.teacher.is_chat:
            source["system_fingerprints"] = system_fingerprints(store)
    draft = Manifest.draft(
        teacher=teacher.info,
        tokenizer=save_tokenizer(store, teacher.tokenizer, new=True),
        shared_vocab_size=teacher.shared_vocab_size,
        # A manifest read back holds floats, whatever was given: 1 and 1.0 are written differently.
        truncation=dataclasses.replace(config.truncation, p=float(config.truncation.p)),
        temperatures=tuple(float(t) for t in config.temperatures),
        precision=config.precision,
        source=source,
        sequences={**sequence_settings(config, teacher), "counts": dataclasses.asdict(counts)},
        messages=messages,
        sampler_logprobs=sampler,
    )
    return CacheWriter.create(config.output, draft, plan)


def clear(store: Store) -> None:
    """Remove what the start of a dump leaves."""
    for folder in STARTED:
        store.remove_folder(folder)


def missing_shards(
    writer: CacheWriter,
    mine: Callable[[int], bool],
    *,
    retry_rejected: bool = False,
    inherited: int = 0,
) -> list[ShardPlan]:
    """The shards to score: those without a commit record, or whose file is gone or cut short.

    Of a damaged shard the record is removed first, so that no state in between says it is whole;
    shards that are not `mine` are left to the worker whose they are. With `retry_rejected`, those
    with rejected sequences too, which stay as they are until they are replaced. Of the first shards
    as many as are `inherited` are another cache's, and whole.
    """
    store = writer.store
    whole, retried = set(), set()
    sizes = store.sizes(paths.SHARDS)
    try:
        renewed = writer.renewed()
        for record in writer.committed(renewed):
            name = paths.shard(record.shard)
            size = sizes.get(PurePath(name).name, -1)
            is_whole = size == record.bytes or record.shard in renewed
            if is_whole or not mine(record.shard) or record.shard < inherited:
                whole.add(record.shard)
                if record.shard >= inherited and retry_rejected and record.rejected:
                    retried.add(record.shard)
                continue
            found = "is missing" if size < 0 else f"has {size} of {record.bytes} bytes"
            log.warning("%s %s: scoring it again", store.path(name), found)
            store.remove(paths.record(record.shard))
    except FormatError as error:
        raise FormatError(
            f"{error}; delete it, and the same command scores its shard again"
        ) from error
    return [s for s in writer.plan if s.shard not in whole - retried and mine(s.shard)]


def sequence_settings(config: DumpConfig, teacher: Teacher) -> dict[str, Any]:
    """What the manifest says of how records become sequences, without counts."""
    template = getattr(teacher.tokenizer, "chat_template", None)
    template = chat_template_text(config.sequences) or template
    settings = dataclasses.asdict(config.sequences)
    for name in ("chat_template", "max_unrenderable", "accept_rendering"):  # change no sequence
        settings.pop(name)
    if not config.sequences.makes_windows:
        settings["window_head"] = "none"
    return {
        **settings,
        "shard_targets": config.shard_targets,
        "chat_template_xxh3_128": xxhash.xxh3_128(canonical(template)).hexdigest(),
    }


def identity(
    config: DumpConfig, source: dict[str, Any], teacher: Teacher, stored: str
) -> dict[str, Any]:
    """What must be equal for a rerun to continue a cache; names are those of the manifest.

    `stored` is the cache's fingerprint of the tokenizer, whose scheme ours is taken in.
    """
    fingerprint = ""
    if teacher.tokenizer is not None:
        fingerprint = tokenizer_fingerprint(teacher.tokenizer, like=stored)
    return {
        "teacher.fingerprint": teacher.info.fingerprint,
        "teacher.dtype": teacher.info.dtype,
        "teacher.engine": teacher.info.engine.split()[0],
        "tokenizer.fingerprint": fingerprint,
        "shared_vocab_size": teacher.shared_vocab_size,
        **{f"truncation.{k}": v for k, v in dataclasses.asdict(config.truncation).items()},
        "temperatures": list(config.temperatures),
        "precision": config.precision,
        "source.fingerprint": source["fingerprint"],
        **({SAMPLER: source["sampler"]["fingerprint"]} if "sampler" in source else {}),
        **{f"sequences.{k}": v for k, v in sequence_settings(config, teacher).items()},
    }


def changes(manifest: Manifest, ours: dict[str, Any]) -> list[str]:
    """A line for each field in which a cache is not the one that a config gives."""
    stored = manifest.to_json()
    stored["teacher"]["engine"] = stored["teacher"]["engine"].split()[0]
    if stored["precision"] == NO_LOGPROBS:  # of draws alone, whatever is asked for log probs
        del ours["precision"]
    if KEEP_MESSAGES.split(".")[1] not in stored["sequences"]:  # begun before there was a choice
        del ours[KEEP_MESSAGES]
    differing = []
    for name, value in ours.items():
        theirs: Any = stored
        for part in name.split("."):
            theirs = theirs.get(part, LATER.get(name)) if isinstance(theirs, dict) else theirs
        if theirs != value:
            differing.append(f"  {name}: the cache has {theirs!r}, this run gives {value!r}")
    return differing
