"""Extend a final cache by more records, scored into new shards of it.

The new shards are filled in `extension/` of the cache (`storage/cache/extension.py`) by the same
job as any dump, with its workers, its resumption and its Ray actors, and moved in at the end.
"""

import dataclasses
import logging
from collections.abc import Callable
from typing import Any, Literal

from decant.schemas import Manifest
from decant.storage import CacheReader, CacheWriter, Store
from decant.storage.cache import extension, paths
from decant.storage.cache.records import committed_shards, read_manifest
from decant.teacher_dump.config import DumpConfig
from decant.teacher_dump.inputs.counts import SequenceCounts, summary, warnings
from decant.teacher_dump.inputs.records import SourceError, TokenSequence
from decant.teacher_dump.inputs.sources import describe_source
from decant.teacher_dump.job.shard_inputs import sharded, source_records, write_input
from decant.teacher_dump.job.start import (
    ConfigChanged,
    changes,
    clear,
    identity,
    sequence_settings,
    start_over,
)
from decant.teacher_dump.teacher import Teacher, fingerprint_like

log = logging.getLogger(__name__)

OnKnown = Literal["refuse", "skip", "keep"]


class Base:
    """The cache that is extended, and what becomes of sequences whose sample id it has."""

    def __init__(self, url: str, on_known: OnKnown) -> None:
        """Open a final cache. Raises ValueError if there is none, or it is not complete."""
        store = Store(url)
        if not store.exists(paths.MANIFEST):
            raise ValueError(f"{url} holds no cache to extend: dump it first, without --extend")
        if read_manifest(store).sampler_logprobs:
            raise ValueError(
                f"{url} keeps its sampler's log probs, which no records bring: dump the new "
                "samples into another output, then `decant merge` the two"
            )
        if not read_manifest(store).is_final:
            raise ValueError(
                f"{url} is not complete: complete it first, by its own config without --extend"
            )
        self.url, self.on_known = url, on_known
        self.reader = CacheReader(url)
        self.skipped = 0
        """Sequences left out because the cache has their id."""
        self._ids: set[str] | None = None

    @property
    def manifest(self) -> Manifest:
        """Of the cache before it is extended."""
        return self.reader.manifest

    def accept(self, sequence: TokenSequence) -> bool:
        """Whether to score a sequence. Raises SourceError if it is to be refused."""
        if self.on_known == "keep":
            return True
        if self._ids is None:
            groups = self.reader.row_groups()
            read = self.reader.read_stored
            self._ids = {name for group in groups for name in read(group).sample_ids}
        if sequence.sample_id not in self._ids:
            return True
        if self.on_known == "refuse":
            raise SourceError(
                f"sample {sequence.sample_id!r} is in {self.url} already: --on-known skip leaves "
                "such ones out, keep scores them again beside the old ones"
            )
        self.skipped += 1
        return False


def open_or_extend(
    config: DumpConfig,
    store: Store,
    teacher: Teacher,
    base: Base,
    progress: Callable[[SequenceCounts], None],
    *,
    alone: bool = True,
) -> CacheWriter:
    """Open the extension in `store`, which is `config.output`, or start it there.

    Raises ConfigChanged, listing the differing fields, if the config does not fit the cache, or if
    another extension is under way of which something is scored already.
    """
    source = describe_source(config.source)
    settings = sequence_settings(config, teacher)
    keeping = dataclasses.replace(config.sequences, keep_messages=base.manifest.messages)
    config = dataclasses.replace(config, sequences=keeping)
    _refuse_unfit(config, source, teacher, base)
    if store.exists(paths.MANIFEST):
        writer = CacheWriter(store.url)
        step = extension.steps_of(writer.manifest)[-1]
        differing = _differing(step, base, source, settings)
        if differing:
            scored = committed_shards(store) - set(range(step.shards))
            if scored or not alone:
                raise ConfigChanged(
                    f"{base.url} is being extended by something else; differing:\n"
                    + "\n".join(differing)
                    + f"\nUse that config to go on, or remove {store.url}."
                )
            log.warning("starting the extension of %s over with this config", base.url)
            start_over(store)
            writer = _started(config, store, teacher, base, source, settings, progress)
    else:
        writer = _started(config, store, teacher, base, source, settings, progress)
    extension.take_over(writer, base.reader)
    return writer


def is_part(config: DumpConfig, manifest: Manifest) -> bool:
    """Whether the last extension of the cache is by the source of this config."""
    steps = extension.steps_of(manifest)
    if not steps:
        return False
    fingerprint: object = describe_source(config.source)["fingerprint"]
    return steps[-1].source.get("fingerprint") == fingerprint


def _refuse_unfit(config: DumpConfig, source: dict[str, Any], teacher: Teacher, base: Base) -> None:
    """Raise ConfigChanged unless the config scores as the cache was scored."""
    ours = identity(config, source, teacher, base.manifest.tokenizer.fingerprint)
    stored = base.manifest.teacher.fingerprint
    ours["teacher.fingerprint"] = fingerprint_like(ours["teacher.fingerprint"], stored)
    same = {
        name: value
        for name, value in ours.items()
        if name == "sequences.target_share" or not name.startswith(("source.", "sequences."))
    }
    differing = changes(base.manifest, same)
    if differing:
        raise ConfigChanged(
            f"{base.url} cannot be extended by this config; differing:\n"
            + "\n".join(differing)
            + "\nUse the teacher and the settings that it was scored with."
        )


def _differing(
    step: extension.Step, base: Base, source: dict[str, Any], settings: dict[str, Any]
) -> list[str]:
    pairs: dict[str, tuple[object, object]] = {
        "cache_id": (step.cache_id, base.manifest.cache_id),
        "source.fingerprint": (step.source.get("fingerprint"), source["fingerprint"]),
        **{f"sequences.{n}": (step.settings.get(n), value) for n, value in settings.items()},
        "on-known": (step.settings.get("on_known"), base.on_known),
    }
    return [
        f"  {name}: the extension has {theirs!r}, this run gives {ours!r}"
        for name, (theirs, ours) in pairs.items()
        if theirs != ours
    ]


def _started(
    config: DumpConfig,
    store: Store,
    teacher: Teacher,
    base: Base,
    source: dict[str, Any],
    settings: dict[str, Any],
    progress: Callable[[SequenceCounts], None],
) -> CacheWriter:
    """A new extension; if it cannot be made, nothing of it is left."""
    start_over(store)  # a removal of an earlier one may have been cut short
    try:
        counts = SequenceCounts()
        plan, first = [], base.manifest.num_sequences
        records = source_records(config, teacher, source["fingerprint"])
        shards = sharded(
            config, teacher, counts, progress, records, accept=base.accept, keep_sampler=False
        )
        for shard, sequences in enumerate(shards, base.manifest.num_shards):
            share = config.sequences.target_share
            plan.append(write_input(store, shard, first, sequences, share))
            first += len(sequences)
        log.info("inputs: %s", summary(counts))
        if base.skipped:
            log.info("%d sequences are in %s already: left out", base.skipped, base.url)
        if not plan:
            raise SourceError(
                f"{config.source.path}: {counts.records} records give no sequence with a target "
                f"that {base.url} does not have"
            )
        for warning in warnings(counts, config.sequences.max_length):
            log.warning("warning: %s", warning)
        more = {
            **settings,
            "on_known": base.on_known,
            "known": base.skipped,
            "counts": dataclasses.asdict(counts),
        }
        return extension.start(
            store.url, base.reader, extension.draft(base.manifest, source, more), plan
        )
    except BaseException:
        if not store.exists(paths.MANIFEST):
            clear(store)
        raise
