"""Fix what will be scored: tokenise the source once, cut it into shards, seal the plan.

Afterwards the source is not needed: the tokens of each shard lie in the cache until it is final,
so any number of workers can fill shards in any order and bad records are found before a teacher
is loaded.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from schemas import (
    FORMAT_VERSION,
    FormatError,
    Manifest,
    Segment,
    ShardPlan,
    tokenizer_fingerprint,
)
from schemas.strict import to_json
from storage import CacheWriter, Store, paths
from teacher_dump.config import DumpConfig
from teacher_dump.sequences import SequenceCounts, TokenSequence, iter_sequences
from teacher_dump.sources import SourceError, describe_source, iter_records
from teacher_dump.teacher import Teacher, save_tokenizer

STARTED = {paths.INPUTS, paths.PLAN, paths.TOKENIZER}
"""Folders that an interrupted start may leave; anything else is somebody's data."""


class ConfigChanged(ValueError):
    """The directory holds a cache of another config, source, tokenizer or teacher."""


def open_or_create(
    config: DumpConfig, store: Store, teacher: Teacher, progress: Callable[[SequenceCounts], None]
) -> CacheWriter:
    """Open the cache in `config.output`, or start it there.

    Raises ConfigChanged, listing the differing fields, if the cache there is not the one this
    config gives; FileExistsError if the directory holds something else.
    """
    source = describe_source(config.source)
    if store.exists(paths.MANIFEST):
        writer = CacheWriter(config.output)
        _refuse_changes(writer, _identity(config, source, teacher))
        return writer
    foreign = [name for name in store.names("") if name not in STARTED]
    if foreign:
        raise FileExistsError(
            f"{store.url} is not empty and holds no cache ({', '.join(foreign[:5])}); "
            "choose another output"
        )
    for folder in STARTED:
        store.remove_folder(folder)
    counts = SequenceCounts()
    plan = list(_write_inputs(config, store, teacher, counts, progress))
    if not plan:
        raise SourceError(
            f"{config.source.path}: {counts.records} records give no sequence with a target"
        )
    draft = Manifest(
        format_version=FORMAT_VERSION,
        cache_id="",
        teacher=teacher.info,
        tokenizer=save_tokenizer(store, teacher.tokenizer),
        shared_vocab_size=teacher.shared_vocab_size,
        truncation=config.truncation,
        temperatures=tuple(config.temperatures),
        precision=config.precision,
        source=source,
        sequences={**_sequence_settings(config), "counts": dataclasses.asdict(counts)},
        num_shards=0,
        num_sequences=0,
        num_tokens=0,
        num_targets=0,
        plan=Segment(name="", entries=0, bytes=0, xxh3_128=""),
        totals=None,
        records=None,
    )
    return CacheWriter.create(config.output, draft, plan)


def sequences_of(config: DumpConfig, teacher: Teacher, counts: SequenceCounts) -> Iterator:
    """The token sequences of the source, checked against teacher and vocabulary."""
    limit = teacher.max_positions
    if limit and config.sequences.max_length > limit:
        raise ValueError(
            f"sequences.max_length is {config.sequences.max_length}, but the teacher "
            f"{config.teacher.path} takes at most {limit} positions"
        )
    return iter_sequences(
        iter_records(config.source),
        teacher.tokenizer,
        config.sequences,
        vocab_size=teacher.shared_vocab_size,
        counts=counts,
    )


def _write_inputs(
    config: DumpConfig,
    store: Store,
    teacher: Teacher,
    counts: SequenceCounts,
    progress: Callable[[SequenceCounts], None],
) -> Iterator[ShardPlan]:
    buffer: list[TokenSequence] = []
    targets = first = index = 0

    def close() -> ShardPlan:
        table, digest = _input_table(buffer)
        with store.staged(paths.inputs(index)) as temporary:
            pq.write_table(table, temporary, compression="zstd", write_page_checksum=True)
        return ShardPlan(
            shard=index,
            first_sequence=first,
            num_sequences=len(buffer),
            num_tokens=sum(len(s.input_ids) for s in buffer),
            num_targets=targets,
            input_xxh3_128=digest,
        )

    for sequence in sequences_of(config, teacher, counts):
        buffer.append(sequence)
        targets += int(sequence.is_target.sum())
        progress(counts)
        if targets >= config.shard_targets:
            yield close()
            first, index = first + len(buffer), index + 1
            buffer, targets = [], 0
    if buffer:
        yield close()


def read_inputs(store: Store, plan: ShardPlan) -> list[TokenSequence]:
    """The sequences to score for one shard. Raises FormatError if they are not those planned."""
    name = paths.inputs(plan.shard)
    where = store.path(name)
    try:
        table = pq.read_table(
            pa.BufferReader(store.read(name)), page_checksum_verification=True
        ).combine_chunks()
    except FileNotFoundError:
        raise FormatError(f"{where} is missing; start again in an empty directory") from None
    except (OSError, pa.ArrowException) as error:
        raise FormatError(f"{where} is damaged: {error}") from error
    ids = table.column("input_ids").combine_chunks()
    mask = table.column("is_target").combine_chunks()
    flat_ids = ids.values.to_numpy()
    flat_mask = mask.values.to_numpy(zero_copy_only=False)
    offsets = ids.offsets.to_numpy()
    sequences = [
        TokenSequence(sample_id, flat_ids[start:stop], flat_mask[start:stop])
        for sample_id, start, stop in zip(
            table.column("sample_id").to_pylist(), offsets[:-1], offsets[1:], strict=True
        )
    ]
    _, digest = _input_table(sequences)
    if digest != plan.input_xxh3_128:
        raise FormatError(
            f"{where} is damaged: content hash {digest}, planned {plan.input_xxh3_128}"
        )
    return sequences


def _input_table(sequences: list[TokenSequence]) -> tuple[pa.Table, str]:
    """The tokens of a shard as a table, and a hash of the content that no library changes."""
    lengths = np.array([len(s.input_ids) for s in sequences])
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    ids = np.concatenate([s.input_ids for s in sequences]).astype("<i4")
    mask = np.concatenate([s.is_target for s in sequences])
    digest = xxhash.xxh3_128()
    for part in (offsets.astype("<i8"), ids, np.packbits(mask)):
        digest.update(part.tobytes())
    digest.update("\0".join(s.sample_id for s in sequences).encode())
    table = pa.table(
        {
            "sample_id": pa.array([s.sample_id for s in sequences], pa.string()),
            "input_ids": pa.ListArray.from_arrays(pa.array(offsets), pa.array(ids)),
            "is_target": pa.ListArray.from_arrays(pa.array(offsets), pa.array(mask)),
        }
    )
    return table, digest.hexdigest()


def _sequence_settings(config: DumpConfig) -> dict[str, Any]:
    return {**dataclasses.asdict(config.sequences), "shard_targets": config.shard_targets}


def _identity(config: DumpConfig, source: dict, teacher: Teacher) -> dict[str, Any]:
    """What must be equal for a rerun to continue a cache; names are those of the manifest."""
    tokenizer = teacher.tokenizer
    return {
        "teacher.fingerprint": teacher.info.fingerprint,
        "teacher.dtype": teacher.info.dtype,
        "teacher.engine": teacher.info.engine.split()[0],
        "tokenizer.fingerprint": "" if tokenizer is None else tokenizer_fingerprint(tokenizer),
        "shared_vocab_size": teacher.shared_vocab_size,
        **{f"truncation.{k}": v for k, v in dataclasses.asdict(config.truncation).items()},
        "temperatures": list(config.temperatures),
        "precision": config.precision,
        "source.fingerprint": source["fingerprint"],
        **{f"sequences.{k}": v for k, v in _sequence_settings(config).items()},
    }


def _refuse_changes(writer: CacheWriter, ours: dict[str, Any]) -> None:
    stored = to_json(writer.manifest)
    stored["teacher"]["engine"] = stored["teacher"]["engine"].split()[0]
    differing = []
    for name, value in ours.items():
        theirs: Any = stored
        for part in name.split("."):
            theirs = theirs[part]
        if theirs != value:
            differing.append(f"  {name}: the cache has {theirs!r}, this run gives {value!r}")
    if differing:
        raise ConfigChanged(
            f"{writer.store.url} holds another cache; differing:\n"
            + "\n".join(differing)
            + "\nUse the config it was started with to resume, or another output."
        )
