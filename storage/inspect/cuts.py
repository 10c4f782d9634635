"""Scored sequences as a dump with fewer entries gives them, and the bytes that those take."""

import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from decant.schemas import Manifest, ScoredSequence, shard_schema
from decant.schemas.arrow import CompactCode
from decant.storage.cache.numbering import Fitter
from decant.storage.cache.parquet import DENSE, parquet_options
from decant.storage.cache.rows import encode

MOST_TARGETS = 4096
"""Targets that `bytes_ratios` encodes for each k."""


def cut(sequence: ScoredSequence, k: int, temperatures: Sequence[float]) -> ScoredSequence:
    """The sequence with at most its first k entries, the others in the tail at each temperature."""
    assert sequence.logprobs is not None and sequence.log_tail is not None
    log_tail = np.empty_like(sequence.log_tail)
    for i, temperature in enumerate(temperatures):
        beyond = sequence.logprobs[:, k:].astype(np.float64) / temperature
        beyond -= sequence.log_z[:, i, None]
        everything = np.concatenate([beyond, sequence.log_tail[:, i, None]], axis=1)
        log_tail[:, i] = np.logaddexp.reduce(everything, axis=1)
    return dataclasses.replace(
        sequence,
        token_ids=np.ascontiguousarray(sequence.token_ids[:, :k]),
        logprobs=np.ascontiguousarray(sequence.logprobs[:, :k]),
        log_tail=log_tail,
    )


def bytes_ratios(
    manifest: Manifest, sequences: Iterable[ScoredSequence], ks: Sequence[int]
) -> dict[int, float]:
    """Bytes of a target at each of `ks` over those with all entries, from the first sequences.

    In the present form of the format, conversations and sample ids left out. Empty without targets.
    """
    sample: list[ScoredSequence] = []
    targets = 0
    for sequence in sequences:
        sample.append(dataclasses.replace(sequence, messages=None))
        targets += sequence.num_targets
        if targets >= MOST_TARGETS:
            break
    if not targets:
        return {}
    most = manifest.truncation.k
    sizes = {}
    for k in sorted({*ks, most}):
        shorter = [cut(one, k, manifest.temperatures) for one in sample]
        sizes[k] = _encoded_bytes(shorter, k, manifest)
    return {k: size / sizes[most] for k, size in sizes.items()}


def _encoded_bytes(sample: list[ScoredSequence], k: int, manifest: Manifest) -> int:
    """Of the row group of a shard as large as those of the cache, without sample ids."""
    layout = dataclasses.replace(
        manifest.layout,
        slots=k,
        ids="ranked",
        has_messages=False,
        rounded=manifest.precision != "f32",
        code=CompactCode(),
    )
    schema, ids = shard_schema(layout), np.concatenate([one.token_ids for one in sample])
    per_shard = manifest.num_targets // max(manifest.num_shards, 1)
    numbering = Fitter(layout).choose(ids, max(per_shard, len(ids)))
    table = encode(sample, 0, layout, numbering)
    sink = pa.BufferOutputStream()
    dense = len(ids) >= DENSE * len(table)
    with pq.ParquetWriter(sink, schema, **parquet_options(schema, dense)) as file:
        file.write_table(table, row_group_size=len(table))
    group = pq.read_metadata(pa.BufferReader(sink.getvalue())).row_group(0)
    columns = [group.column(i) for i in range(group.num_columns)]
    sizes = {column.path_in_schema: int(column.total_compressed_size) for column in columns}
    return sum(size for name, size in sizes.items() if name != "sample_id")
