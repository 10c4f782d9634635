"""The tokens to score, one file per shard, from the source to the engine.

They are made when a cache is started, lie in it until it is final, and are made again, and compared
with the plan, where they were lost.
"""

import dataclasses
import logging
from collections.abc import Callable, Iterable, Iterator
from pathlib import PurePath

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from decant.schemas import FormatError, ShardPlan
from decant.schemas.selection import num_selected
from decant.schemas.strict import UnfitError
from decant.storage import CacheWriter, Store
from decant.storage.cache import paths
from decant.teacher_dump.config import DumpConfig
from decant.teacher_dump.inputs.border import BorderCheck
from decant.teacher_dump.inputs.records import Record, TokenSequence
from decant.teacher_dump.inputs.sequences import SequenceCounts, iter_sequences
from decant.teacher_dump.inputs.sources import iter_records
from decant.teacher_dump.job.responses import sampled_records
from decant.teacher_dump.teacher import Teacher

log = logging.getLogger(__name__)

Accept = Callable[[TokenSequence], bool]
SAMPLER = "sampler_logprobs"
"""The column of a file of inputs that has them."""
MADE_AGAIN = "delete it, and the same command makes it from the source again"


def sequences_of(
    config: DumpConfig,
    teacher: Teacher,
    counts: SequenceCounts,
    records: Iterable[Record],
    *,
    is_checked: bool = True,
) -> Iterator[TokenSequence]:
    """The token sequences of the records, checked against the vocabulary.

    `is_checked`: some records are compared with what their tokens say.
    """
    settings = config.sequences
    border = None
    if is_checked and teacher.tokenizer is not None:
        border = BorderCheck(
            teacher.tokenizer, targets=settings.targets, accept=settings.accept_rendering
        )
    return iter_sequences(
        records,
        teacher.tokenizer,
        settings,
        vocab_size=teacher.shared_vocab_size,
        counts=counts,
        border=border,
    )


def source_records(config: DumpConfig, teacher: Teacher, fingerprint: str) -> Iterator[Record]:
    """The records of the source; or, if asked for, the teacher's own responses to them.

    `fingerprint` is that of the description of the source, by which the responses are known.
    """
    if not config.source.generate.n:
        return iter_records(config.source)
    return sampled_records(config, teacher, Store(config.output), fingerprint)


def sharded(
    config: DumpConfig,
    teacher: Teacher,
    counts: SequenceCounts,
    progress: Callable[[SequenceCounts], None],
    records: Iterable[Record],
    *,
    is_checked: bool = True,
    accept: Accept | None = None,
    keep_sampler: bool = True,
) -> Iterator[list[TokenSequence]]:
    """The sequences of each shard: as many as reach `shard_targets`, in the records' order.

    Those that are not to be had, if `accept` is asked, are left out; so are the log probs of who
    sampled them, unless told to `keep_sampler`.
    """
    shard: list[TokenSequence] = []
    targets = 0
    for sequence in sequences_of(config, teacher, counts, records, is_checked=is_checked):
        if accept is not None and not accept(sequence):
            continue
        shard.append(
            sequence if keep_sampler else dataclasses.replace(sequence, sampler_logprobs=None)
        )
        candidates = int(sequence.is_target.sum())
        targets += num_selected(candidates, config.sequences.target_share)
        progress(counts)
        if targets >= config.shard_targets:
            yield shard
            shard, targets = [], 0
    if shard:
        yield shard


def restore_inputs(
    config: DumpConfig,
    writer: CacheWriter,
    teacher: Teacher,
    missing: Iterable[ShardPlan],
    progress: Callable[[SequenceCounts], None],
    *,
    first_shard: int = 0,
    first: int = 0,
    accept: Accept | None = None,
) -> None:
    """Make the inputs of these shards from the source again where they are gone.

    The source's first sequence is of index `first`, in `first_shard`; `accept` as in `sharded`.
    Raises FormatError if the source, whose content is the cache's, gives other tokens now.
    """
    present = set(writer.store.names(paths.INPUTS))
    lost = {s.shard for s in missing if PurePath(paths.inputs(s.shard)).name not in present}
    if not lost:
        return
    log.info("making the inputs of %d shards again from %s", len(lost), config.source.path)
    kept = dataclasses.replace(config.sequences, keep_messages=writer.manifest.messages)
    config = dataclasses.replace(config, sequences=kept)
    records = source_records(config, teacher, writer.manifest.source["fingerprint"])
    made = sharded(
        config,
        teacher,
        SequenceCounts(),
        progress,
        records,
        is_checked=False,
        accept=accept,
        keep_sampler=writer.manifest.sampler_logprobs,
    )
    for shard, sequences in enumerate(made, first_shard):
        if shard in lost:
            share = config.sequences.target_share
            again = write_input(writer.store, shard, first, sequences, share)
            if again != writer.plan[shard]:
                raise UnfitError(
                    f"{config.source.path} gives other tokens for shard {shard} than the plan of "
                    f"{writer.store.url}, as another version of the tokenizer's library may do; "
                    "dump into another output"
                )
            lost.remove(shard)
        first += len(sequences)
        if not lost:
            break


def write_input(
    store: Store, shard: int, first: int, sequences: list[TokenSequence], target_share: float
) -> ShardPlan:
    """Publish the tokens of one shard, whose first sequence has this plan index.

    The plan counts the targets that are kept of each sequence.
    """
    table, digest = _input_table(sequences)
    with store.staged(paths.inputs(shard)) as temporary:
        pq.write_table(table, temporary, compression="zstd", write_page_checksum=True)
    return ShardPlan(
        shard=shard,
        first_sequence=first,
        num_sequences=len(sequences),
        num_tokens=sum(len(s.input_ids) for s in sequences),
        num_targets=sum(num_selected(int(s.is_target.sum()), target_share) for s in sequences),
        input_xxh3_128=digest,
    )


def read_inputs(store: Store, plan: ShardPlan) -> list[TokenSequence]:
    """The sequences to score for one shard. Raises FormatError if they are not those planned."""
    name = paths.inputs(plan.shard)
    where = store.path(name)
    try:
        data = store.read(name)
    except FileNotFoundError:
        raise FormatError(f"{where} is missing; the same command makes it again") from None
    try:
        table = pq.read_table(
            pa.BufferReader(data), page_checksum_verification=True
        ).combine_chunks()
        sequences = _sequences(table)
        _, digest = _input_table(sequences)
    except Exception as error:  # whatever a damaged file may raise
        raise FormatError(f"{where} is damaged: {error}; {MADE_AGAIN}") from error
    if digest != plan.input_xxh3_128:
        raise FormatError(
            f"{where} is damaged: content hash {digest}, planned {plan.input_xxh3_128}; "
            f"{MADE_AGAIN}"
        )
    return sequences


def _sequences(table: pa.Table) -> list[TokenSequence]:
    ids = table.column("input_ids").combine_chunks()
    mask = table.column("is_target").combine_chunks()
    flat_ids = ids.values.to_numpy()
    flat_mask = mask.values.to_numpy(zero_copy_only=False)
    offsets = ids.offsets.to_numpy()
    has_messages = "messages" in table.column_names
    said = table.column("messages").to_pylist() if has_messages else [""] * len(table)
    sampler = None
    if SAMPLER in table.column_names:
        sampler = table.column(SAMPLER).combine_chunks().values.to_numpy()
    return [
        TokenSequence(
            sample_id,
            flat_ids[start:stop],
            flat_mask[start:stop],
            messages,
            None if sampler is None else sampler[start:stop],
        )
        for sample_id, start, stop, messages in zip(
            table.column("sample_id").to_pylist(), offsets[:-1], offsets[1:], said, strict=True
        )
    ]


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
    columns = {
        "sample_id": pa.array([s.sample_id for s in sequences], pa.string()),
        "input_ids": pa.ListArray.from_arrays(pa.array(offsets), pa.array(ids)),
        "is_target": pa.ListArray.from_arrays(pa.array(offsets), pa.array(mask)),
    }
    if any(s.messages for s in sequences):
        columns["messages"] = pa.array([s.messages for s in sequences], pa.string())
        for s in sequences:
            digest.update(f"\0{len(s.messages)} {s.messages}".encode())
    sampler = [s.sampler_logprobs for s in sequences if s.sampler_logprobs is not None]
    if sampler:
        assert len(sampler) == len(sequences), "some sequences have a sampler, others none"
        flat = np.concatenate(sampler).astype("<f4")
        columns[SAMPLER] = pa.ListArray.from_arrays(pa.array(offsets), pa.array(flat))
        digest.update(b"\0" + flat.tobytes())
    return pa.table(columns), digest.hexdigest()
