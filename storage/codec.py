"""Scored sequences to Arrow tables and back, in numpy columns; never a Python object per token.

Shapes: R rows (tokens), S sequences, n targets, K slots, T temperatures.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from schemas import Layout, ScoredSequence, shard_schema
from schemas.arrow import log_tail_column, log_z_column

GAP_LIMIT = 32.0
"""Compact code: gaps to the most probable entry are clamped here, in nats (e^-32 = 1e-14)."""
GAP_TABLE = (np.expm1(np.arange(256) * (np.log1p(4 * GAP_LIMIT) / 255)) / 4).astype(np.float32)
"""Compact code q stands for the gap (129^(q/255) - 1) / 4 nats."""
_EXP_TABLE = np.exp(-GAP_TABLE.astype(np.float64)).astype(np.float32)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Rows:
    """The decoded columns of whole sequences: what a training batch is cut from."""

    sequence: NDArray[np.int64]
    """[S] index of each sequence in the shard plan."""
    sample_ids: list[str]
    """[S]."""
    row_starts: NDArray[np.int64]
    """[S+1] rows of sequence s are row_starts[s]:row_starts[s+1]."""
    target_starts: NDArray[np.int64]
    """[S+1] targets of sequence s are target_starts[s]:target_starts[s+1]."""
    input_ids: NDArray[np.int32]
    """[R]."""
    is_target: NDArray[np.bool_]
    """[R]."""
    positions: NDArray[np.int32]
    """[n] position of each target in its sequence."""
    token_ids: NDArray[np.int32]
    """[n, K] -1 = unused slot."""
    logprobs: NDArray[np.float32]
    """[n, K] -inf = unused slot."""
    draws: NDArray[np.int32] | None
    """[n, K]."""
    log_z: NDArray[np.float32]
    """[n, T]."""
    log_tail: NDArray[np.float32]
    """[n, T]."""
    label_logprob: NDArray[np.float32]
    """[n]."""

    @property
    def labels(self) -> NDArray[np.int32]:
        """[n] the actual token of each target."""
        return self.input_ids[self.is_target]

    def __len__(self) -> int:
        return len(self.sample_ids)

    def __getitem__(self, index: int) -> ScoredSequence:
        rows = slice(self.row_starts[index], self.row_starts[index + 1])
        targets = slice(self.target_starts[index], self.target_starts[index + 1])
        return ScoredSequence(
            sample_id=self.sample_ids[index],
            input_ids=self.input_ids[rows],
            is_target=self.is_target[rows],
            positions=self.positions[targets],
            token_ids=self.token_ids[targets],
            logprobs=self.logprobs[targets],
            draws=None if self.draws is None else self.draws[targets],
            log_z=self.log_z[targets],
            log_tail=self.log_tail[targets],
            label_logprob=self.label_logprob[targets],
        )


def encode(sequences: Sequence[ScoredSequence], first: int, layout: Layout) -> pa.Table:
    """One table of whole sequences whose plan indices start at `first`.

    The sequences must have passed `storage.check.check_sequence`.
    """
    lengths = np.array([len(s.input_ids) for s in sequences])
    is_target = np.concatenate([s.is_target for s in sequences])
    token_ids = np.concatenate([s.token_ids for s in sequences])
    logprobs = np.concatenate([s.logprobs for s in sequences])
    index = np.repeat(np.arange(len(sequences), dtype=np.int32), lengths)
    used = token_ids >= 0

    def scatter(values: NDArray) -> NDArray:
        """Spread per-target values over all rows, zero where a row is no target."""
        out = np.zeros((len(is_target), *values.shape[1:]), values.dtype)
        out[is_target] = values
        return out

    def blob(values: NDArray) -> pa.Array:
        packed = scatter(values)
        width = packed.shape[1] * packed.itemsize
        return pa.FixedSizeBinaryArray.from_buffers(
            pa.binary(width), len(packed), [None, pa.py_buffer(packed)]
        )

    kept = np.where(used, token_ids, 0)
    columns: dict[str, pa.Array | NDArray] = {
        "sequence": index.astype(np.int64) + first,
        "sample_id": pa.DictionaryArray.from_arrays(
            pa.array(index), pa.array([s.sample_id for s in sequences], pa.string())
        ),
        "position": np.concatenate([np.arange(n, dtype=np.int32) for n in lengths]),
        "token_id": np.concatenate([s.input_ids for s in sequences]),
        "is_target": is_target,
        "topk_lo": blob((kept & 0xFFFF).astype("<u2")),
        "topk_logprob": blob(encode_logprobs(logprobs, used, layout.precision)),
        "label_logprob": scatter(np.concatenate([s.label_logprob for s in sequences])),
    }
    if layout.wide:
        columns["topk_hi"] = blob((kept >> 16).astype(np.uint8))
    if layout.has_num_kept:
        columns["num_kept"] = scatter(used.sum(axis=1).astype(np.uint16))
    if layout.has_draws:
        draws = np.concatenate([s.draws for s in sequences if s.draws is not None])
        columns["draws"] = blob(draws.astype("<u2"))
    for i, temperature in enumerate(layout.temperatures):
        if temperature != 1:
            columns[log_z_column(temperature)] = scatter(
                np.concatenate([s.log_z[:, i] for s in sequences])
            )
        columns[log_tail_column(temperature)] = scatter(
            np.concatenate([s.log_tail[:, i] for s in sequences])
        )
    schema = shard_schema(layout)
    return pa.Table.from_arrays([pa.array(columns[f.name]) for f in schema], schema=schema)


def decode(table: pa.Table, layout: Layout) -> Rows:
    """The inverse of `encode` for a table of whole sequences (one row group)."""
    table = table.combine_chunks()
    sequence = _column(table, "sequence")
    num_rows = len(sequence)
    breaks = np.flatnonzero(np.diff(sequence)) + 1
    row_starts = np.concatenate([[0], breaks, [num_rows]]) if num_rows else np.zeros(1, np.int64)
    is_target = _column(table, "is_target")
    targets = np.flatnonzero(is_target)
    target_starts = np.searchsorted(targets, row_starts)
    sample_column = table.column("sample_id").combine_chunks()
    sample_ids = sample_column.take(pa.array(row_starts[:-1])).to_pylist()

    def blob(name: str, dtype: str) -> NDArray:
        array = table.column(name).combine_chunks()
        width = array.type.byte_width
        data = np.frombuffer(array.buffers()[1], np.uint8, num_rows * width, array.offset * width)
        return data.reshape(num_rows, width)[targets].view(dtype)

    token_ids = blob("topk_lo", "<u2").astype(np.int32)
    if layout.wide:
        token_ids |= blob("topk_hi", "u1").astype(np.int32) << 16
    if layout.has_num_kept:
        num_kept = _column(table, "num_kept")[targets]
        unused = np.arange(layout.slots) >= num_kept[:, None]
        token_ids[unused] = -1
    else:
        unused = None
    log_tail = np.stack(
        [_column(table, log_tail_column(t))[targets] for t in layout.temperatures], axis=1
    )
    log_z = np.stack(
        [
            _column(table, log_z_column(t))[targets]
            if t != 1
            else np.zeros(len(targets), np.float32)
            for t in layout.temperatures
        ],
        axis=1,
    )
    stored = blob("topk_logprob", {"f32": "<f4", "f16": "<f2", "compact": "u1"}[layout.precision])
    logprobs = decode_logprobs(stored, unused, log_tail[:, 0], layout.precision)
    return Rows(
        sequence=sequence[row_starts[:-1]],
        sample_ids=sample_ids,
        row_starts=row_starts,
        target_starts=target_starts,
        input_ids=_column(table, "token_id"),
        is_target=is_target,
        positions=_column(table, "position")[targets],
        token_ids=token_ids,
        logprobs=logprobs,
        draws=blob("draws", "<u2").astype(np.int32) if layout.has_draws else None,
        log_z=log_z,
        log_tail=log_tail,
        label_logprob=_column(table, "label_logprob")[targets],
    )


def encode_logprobs(
    logprobs: NDArray[np.float32], used: NDArray[np.bool_], precision: str
) -> NDArray:
    """Stored form of kept log probs [n, K], descending, zero in unused slots.

    `compact`: the gap g to the first entry, at most 32 nats, as q = round(255 ln(1+4g) / ln 129),
    then differences of successive q. The first log prob is not stored: it follows from the tail.
    """
    if precision == "f32":
        return np.where(used, logprobs, 0).astype("<f4")
    if precision == "f16":
        return np.where(used, logprobs, 0).astype("<f2")
    gaps = np.minimum(logprobs[:, :1] - np.where(used, logprobs, logprobs[:, :1]), GAP_LIMIT)
    codes = np.rint(np.log1p(4 * gaps) * (255 / np.log1p(4 * GAP_LIMIT))).astype(np.uint8)
    steps = np.diff(codes, axis=1, prepend=np.uint8(0))
    steps[~used] = 0
    return steps


def decode_logprobs(
    stored: NDArray,
    unused: NDArray[np.bool_] | None,
    log_tail: NDArray[np.float32],
    precision: str,
) -> NDArray[np.float32]:
    """Log probs [n, K] from their stored form; `log_tail` [n] is the tail mass at T=1."""
    if precision != "compact":
        logprobs = stored.astype(np.float32)
        if unused is not None:
            logprobs[unused] = -np.inf
        return logprobs
    codes = np.cumsum(stored, axis=1, dtype=np.uint8)
    weights = _EXP_TABLE[codes]
    if unused is not None:
        weights[unused] = 0
    # The kept mass is 1 - r exactly, so the most probable entry follows from the gaps.
    with np.errstate(divide="ignore"):
        kept = np.log(-np.expm1(log_tail.astype(np.float64)))
    first = (kept - np.log(weights.sum(axis=1, dtype=np.float64))).astype(np.float32)
    logprobs = first[:, None] - GAP_TABLE[codes]
    if unused is not None:
        logprobs[unused] = -np.inf
    return logprobs


def decoding_error(
    logprobs: NDArray[np.float32], decoded: NDArray[np.float32]
) -> NDArray[np.float64]:
    """[n] generalised KL(scored || decoded) in nats over the kept entries; unused slots -inf.

    sum p (log p - log p') - p + p', which is zero only at p' = p whatever the mass of p'.
    """
    used = np.isfinite(logprobs)
    p = np.exp(logprobs, dtype=np.float64)
    gap = np.where(used, logprobs, 0).astype(np.float64) - np.where(used, decoded, 0)
    return (p * (gap + np.expm1(-gap))).sum(axis=1)


def _column(table: pa.Table, name: str) -> NDArray:
    return table.column(name).to_numpy()
