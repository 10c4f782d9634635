"""Scored sequences to Arrow tables and back, in numpy columns; never a Python object per token.

Shapes: R rows (tokens), S sequences, n targets, K slots, T temperatures.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from decant.schemas import Distributions, Layout, ScoredSequence, shard_schema
from decant.schemas.arrow import SAMPLER_COLUMN, scalar_columns, temperature_columns
from decant.schemas.distributions import FIELDS, TEMPERATURES, joined
from decant.storage.cache.logprobs import (
    STORED_LOGPROB,
    decode_logprobs,
    empty,
    encode_logprobs,
    in_planes,
    of_planes,
    rounded,
    tail_to_store,
)
from decant.storage.cache.numbering import Numbering, ids_of_planes, numbers_of_ids


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class StoredRows:
    """The columns of whole sequences as they are stored: views of Arrow's memory where possible.

    Values of rows that are no target are zero, those of unused slots any.
    """

    sequence: NDArray[np.int64]
    """[S] index of each sequence in the shard plan."""
    sample_ids: list[str]
    """[S]."""
    messages: list[str] | None = None
    """[S] the conversation of each sequence, "" where there is none; None where none are kept."""
    row_starts: NDArray[np.int64]
    """[S+1] rows of sequence s are row_starts[s]:row_starts[s+1]."""
    target_starts: NDArray[np.int64]
    """[S+1] targets of sequence s are target_starts[s]:target_starts[s+1]."""
    target_rows: NDArray[np.int64]
    """[n] the row of each target."""
    is_target: NDArray[np.bool_]
    """[R]."""
    position: NDArray[np.int32]
    """[R] as stored."""
    token_id: NDArray[np.int32]
    """[R]."""
    numbering: Numbering | None
    """What the numbers stand for; None: for the ids that they are."""
    topk_lo: NDArray[np.uint8]
    """[R, K] lowest byte of the numbers of the kept ids."""
    topk_mid: NDArray[np.uint8]
    """[R, K] second byte."""
    topk_hi: NDArray[np.uint8] | None
    """[R, K] third byte, where numbers need it."""
    topk_logprob: tuple[NDArray, ...] | None
    """The columns of the log probs, for `of_planes`: [R, K] float32, float16 or uint8 alone, or
    planes of uint8. None where draws are stored without log probs; the ids are ascending then."""
    num_kept: NDArray[np.uint16] | None
    """[R] where it varies."""
    draws: NDArray[np.uint16] | None
    """[R, K]."""
    by_temperature: dict[str, list[NDArray[np.float32] | None]]
    """For each field of `Distributions` that has a number per temperature and is stored: T of [R],
    None where there is no column, as of log Z at T=1."""
    scalars: dict[str, NDArray[np.float32]]
    """Each stored field that has one number per target: [R]."""
    sampler_logprobs: NDArray[np.float32] | None = None
    """[R] as `ScoredSequence.sampler_logprobs`; None where none are kept."""

    def __len__(self) -> int:
        return len(self.sample_ids)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Rows(Distributions[NDArray[Any]]):
    """The decoded columns of whole sequences: what a training batch is cut from."""

    sequence: NDArray[np.int64]
    """[S] index of each sequence in the shard plan."""
    sample_ids: list[str]
    """[S]."""
    messages: list[str] | None = None
    """[S] the conversation of each sequence, "" where there is none; None where none are kept."""
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
    sampler_logprobs: NDArray[np.float32] | None = None
    """[n] as `ScoredSequence.sampler_logprobs`; None where none are kept."""

    @property
    def labels(self) -> NDArray[np.int32]:
        """[n] the actual token of each target."""
        return self.input_ids[self.is_target]

    def __len__(self) -> int:
        return len(self.sample_ids)

    def __getitem__(self, index: int) -> ScoredSequence:
        return self._sequence(index, self.known())

    def __iter__(self) -> Iterator[ScoredSequence]:
        known = self.known()
        return (self._sequence(index, known) for index in range(len(self)))

    def _sequence(self, index: int, known: dict[str, NDArray]) -> ScoredSequence:
        rows = slice(self.row_starts[index], self.row_starts[index + 1])
        targets = slice(self.target_starts[index], self.target_starts[index + 1])
        return ScoredSequence(
            sample_id=self.sample_ids[index],
            input_ids=self.input_ids[rows],
            is_target=self.is_target[rows],
            positions=self.positions[targets],
            messages=(self.messages[index] or None) if self.messages else None,
            sampler_logprobs=None
            if self.sampler_logprobs is None
            else self.sampler_logprobs[targets],
            **{name: values[targets] for name, values in known.items()},
        )


def encode(
    sequences: Sequence[ScoredSequence],
    first: int,
    layout: Layout,
    numbering: Numbering | None = None,
    *,
    decoded: bool = False,
) -> pa.Table:
    """One table of whole sequences whose plan indices start at `first`.

    Kept ids are stored by their numbers, where there is a numbering. The sequences must have
    passed `storage.check.check_sequence`. Those that were `decoded` from rows of this layout keep
    the values that they had there: nothing is rounded.
    """
    lengths = np.array([len(s.input_ids) for s in sequences])
    is_target = np.concatenate([s.is_target for s in sequences])
    index = np.repeat(np.arange(len(sequences), dtype=np.int32), lengths)

    def scatter(values: NDArray) -> NDArray:
        """Spread per-target values over all rows, zero where a row is not a target."""
        out = np.zeros((len(is_target), *values.shape[1:]), values.dtype)
        out[is_target] = values
        return out

    def blob(values: NDArray) -> pa.Array:
        packed = scatter(values)
        width = packed.shape[1] * packed.itemsize
        return pa.FixedSizeBinaryArray.from_buffers(
            pa.binary(width), len(packed), [None, pa.py_buffer(packed)]
        )

    columns: dict[str, pa.Array | NDArray] = {
        "sequence": index.astype(np.int64) + first,
        "sample_id": pa.DictionaryArray.from_arrays(
            pa.array(index), pa.array([s.sample_id for s in sequences], pa.string())
        ),
        "position": np.concatenate([np.arange(n, dtype=np.int32) for n in lengths]),
        "token_id": np.concatenate([s.input_ids for s in sequences]),
        "is_target": is_target,
    }
    if layout.has_messages:
        columns["messages"] = _messages(sequences, lengths)
    known = joined(sequences, np.concatenate, layout.fields)
    token_ids = known["token_ids"]
    used = token_ids >= 0
    if layout.has_logprobs:
        ids = np.where(used, token_ids, 0)
        logprobs, log_tail = known["logprobs"], known["log_tail"]
        if layout.precision == "compact" and not decoded:
            log_tail[:, 0] = tail_to_store(logprobs, log_tail[:, 0])
        stored = encode_logprobs(logprobs, used, layout.precision, layout.code)
        parts = in_planes(stored, used, layout) if layout.ranked else [stored]
        for name, part in zip(layout.logprob_columns, parts, strict=True):
            columns[name] = blob(part)
        if numbering:
            ids = np.where(used, numbers_of_ids(ids, numbering, layout.vocab_size), 0)
        if layout.has_num_kept:
            columns["num_kept"] = scatter(used.sum(axis=1).astype(np.uint16))
        if layout.has_draws:
            columns["draws"] = blob(known["draws"].astype("<u2"))
    else:
        ids = draw_steps(token_ids, known["draws"]) if layout.has_draws else token_ids
    planes = (ids & 0xFFFF, ids >> 16) if layout.ids == "lo16" else (ids, ids >> 8, ids >> 16)
    for name, plane in zip(layout.id_columns, planes, strict=False):
        two = layout.ids == "lo16" and name == "topk_lo"
        columns[name] = blob(plane.astype("<u2" if two else np.uint8))  # the low byte of each
    shown = rounded if layout.rounded and not decoded else np.asarray
    for name, i, column in temperature_columns(layout):
        columns[column] = scatter(shown(known[name][:, i]))
    for name in scalar_columns(layout):
        columns[name] = scatter(shown(known[name]))
    if layout.has_sampler:
        given = [s.sampler_logprobs for s in sequences if s.sampler_logprobs is not None]
        columns[SAMPLER_COLUMN] = scatter(shown(np.concatenate(given)))
    schema = shard_schema(layout)
    return pa.Table.from_arrays([pa.array(columns[f.name]) for f in schema], schema=schema)


def draw_steps(token_ids: NDArray[np.int32], draws: NDArray[np.int32]) -> NDArray[np.int32]:
    """[n, N] the steps between the N ascending draws of each target, from ids and counts [n, N].

    The counts of a target must add up to N.
    """
    counts = np.where(token_ids >= 0, draws, 0)
    drawn = np.repeat(token_ids.ravel(), counts.ravel()).reshape(token_ids.shape)
    drawn.sort(axis=1)
    return np.diff(drawn, axis=1, prepend=np.int32(0))


def draws_of_steps(
    steps: NDArray[np.int32],
) -> tuple[NDArray[np.int32], NDArray[np.uint16], NDArray[np.uint16]]:
    """The inverse of `draw_steps`: ascending ids and counts [n, N], how many are in use [n]."""
    n, slots = steps.shape
    is_new = steps > 0
    is_new[:, 0] = True
    slot = is_new.cumsum(axis=1, dtype=np.int32)
    num_kept = slot[:, -1].astype(np.uint16)
    slot += (np.arange(n, dtype=np.int32) * slots - 1)[:, None]
    counts = np.bincount(slot.ravel(), minlength=n * slots)
    ids = np.zeros(n * slots, np.int32)
    ids[slot[is_new]] = steps.cumsum(axis=1, dtype=np.int32)[is_new]
    return ids.reshape(n, slots), counts.reshape(n, slots).astype(np.uint16), num_kept


def decode(table: pa.Table, layout: Layout, numbering: Numbering | None = None) -> Rows:
    """The inverse of `encode` for a table of whole sequences (one row group)."""
    return decode_rows(stored_rows(table, layout, numbering), layout)


def stored_rows(table: pa.Table, layout: Layout, numbering: Numbering | None = None) -> StoredRows:
    """The columns of a table of whole sequences, nothing decoded."""
    table = table.combine_chunks()
    sequence = _column(table, "sequence")
    num_rows = len(sequence)
    breaks = np.flatnonzero(np.diff(sequence)) + 1
    row_starts = np.concatenate([[0], breaks, [num_rows]]) if num_rows else np.zeros(1, np.int64)
    is_target = _column(table, "is_target")
    target_rows = np.flatnonzero(is_target)

    def only_chunk(name: str) -> pa.Array:
        column = table.column(name)  # combining again would copy it
        return column.chunk(0) if column.num_chunks else pa.array([], column.type)

    def blob(name: str, dtype: str) -> NDArray:
        array = only_chunk(name)
        width = array.type.byte_width
        data = np.frombuffer(array.buffers()[1], np.uint8, num_rows * width, array.offset * width)
        return data.view(dtype).reshape(num_rows, -1)

    no_plane = np.zeros((num_rows, 0), np.uint8)
    planes = [blob(name, "u1") for name in layout.id_columns] or [no_plane] * 3
    if layout.ids == "lo16":
        planes[:1] = [planes[0][:, 0::2], planes[0][:, 1::2]]
    by_temperature: dict[str, list[NDArray[np.float32] | None]] = {
        name: [None] * len(layout.temperatures)
        for name in layout.fields
        if FIELDS[name].axis == TEMPERATURES
    }
    for name, i, column in temperature_columns(layout):
        by_temperature[name][i] = _column(table, column)
    num_kept = _column(table, "num_kept") if "num_kept" in table.column_names else None
    draws = blob("draws", "<u2") if layout.has_draws and layout.has_logprobs else None
    if layout.has_draws and not layout.has_logprobs:
        steps = np.zeros((num_rows, layout.slots), np.int32)
        for i, plane in enumerate(planes):
            steps |= plane.astype(np.int32) << 8 * i
        ids, draws, num_kept = draws_of_steps(steps)
        draws[~is_target], num_kept[~is_target] = 0, 0
        planes = [(ids >> 8 * i).astype(np.uint8) for i in range(len(planes))]
    logprobs = None
    if layout.ranked:
        logprobs = tuple(blob(name, "u1") for name in layout.logprob_columns)
    elif layout.has_logprobs:
        logprobs = (blob("topk_logprob", STORED_LOGPROB[layout.precision]),)
    return StoredRows(
        sequence=sequence[row_starts[:-1]],
        sample_ids=only_chunk("sample_id").take(pa.array(row_starts[:-1])).to_pylist(),
        messages=(
            only_chunk("messages").take(pa.array(row_starts[:-1])).to_pylist()
            if layout.has_messages
            else None
        ),
        row_starts=row_starts,
        target_starts=np.searchsorted(target_rows, row_starts),
        target_rows=target_rows,
        is_target=is_target,
        position=_column(table, "position"),
        token_id=_column(table, "token_id"),
        numbering=numbering,
        topk_lo=planes[0],
        topk_mid=planes[1],
        topk_hi=planes[2] if layout.wide else None,
        topk_logprob=logprobs,
        num_kept=num_kept,
        draws=draws,
        by_temperature=by_temperature,
        scalars={name: _column(table, name) for name in scalar_columns(layout)},
        sampler_logprobs=_column(table, SAMPLER_COLUMN) if layout.has_sampler else None,
    )


def decode_rows(stored: StoredRows, layout: Layout) -> Rows:
    """The distributions that stored columns stand for."""
    targets = stored.target_rows
    n = len(targets)

    def taken(values: NDArray) -> NDArray:
        out = empty((n, values.shape[1]), values.dtype)
        return values.take(targets, axis=0, out=out, mode="clip")

    planes = [stored.topk_lo, stored.topk_mid]
    if stored.topk_hi is not None:
        planes.append(stored.topk_hi)
    token_ids = ids_of_planes(
        [taken(plane) for plane in planes], stored.numbering, layout.vocab_size
    )
    unused = None
    if stored.num_kept is not None:
        unused = np.arange(layout.slots) >= stored.num_kept[targets][:, None]
        token_ids[unused] = -1
    known: dict[str, NDArray] = {"token_ids": token_ids}
    for name, columns in stored.by_temperature.items():
        known[name] = np.zeros((n, len(columns)), np.float32)
        for i, values in enumerate(columns):
            if values is not None:
                known[name][:, i] = values[targets]
    for name, values in stored.scalars.items():
        known[name] = values[targets]
    if stored.topk_logprob is not None:
        known["logprobs"] = decode_logprobs(
            of_planes(
                [taken(column) for column in stored.topk_logprob],
                layout.slots,
                layout.precision == "compact",
            ),
            unused,
            known["log_tail"][:, 0],
            layout.precision,
            layout.code,
        )
    if stored.draws is not None:
        known["draws"] = taken(stored.draws).astype(np.int32)
    return Rows(
        sequence=stored.sequence,
        sample_ids=stored.sample_ids,
        messages=stored.messages,
        row_starts=stored.row_starts,
        target_starts=stored.target_starts,
        input_ids=stored.token_id,
        is_target=stored.is_target,
        positions=stored.position[targets],
        sampler_logprobs=(
            None if stored.sampler_logprobs is None else stored.sampler_logprobs[targets]
        ),
        **known,
    )


def _messages(sequences: Sequence[ScoredSequence], lengths: NDArray) -> pa.Array:
    """[R] the conversation in the first row of its sequence, nothing in all others."""
    texts = [(s.messages or "").encode() for s in sequences]
    offsets = np.zeros(int(lengths.sum()) + 1, np.int32)
    np.add.at(offsets, np.cumsum(lengths) - lengths + 1, [len(text) for text in texts])
    np.cumsum(offsets, out=offsets)
    return pa.StringArray.from_buffers(
        len(offsets) - 1, pa.py_buffer(offsets), pa.py_buffer(b"".join(texts))
    )


def _column(table: pa.Table, name: str) -> NDArray:
    return table.column(name).to_numpy()
