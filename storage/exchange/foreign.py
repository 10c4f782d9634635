"""Read the top-k dumps of other tools: which columns, which row is about which token.

`docs/exchange.md` describes the layouts. Knows nothing of caches: gives the entries of every token
that has some, sorted, as the file has them; refuses what no cache could hold.

Shapes: L tokens of a record, m of them with entries, W entries at most.
"""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

FORMATS = ("distillkit", "axolotl")
BATCH_ROWS = 8
"""Records held at a time."""
PADDING = -1e8
"""Values at or below it fill a list up: axolotl pads with -1e9, others with -inf."""
IGNORED_LABEL = -100
SUFFIXES = (".parquet", ".arrow", ".jsonl")


class ForeignError(ValueError):
    """A file is not what its format says: names the file, the row, what was found and a way out."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))  # one line, whatever Arrow has to say


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ForeignRecord:
    """The tokens of one record and the entries of those that have some."""

    where: str
    """File and row, for messages."""
    sample_id: str
    input_ids: NDArray[np.int32]
    """[L]."""
    positions: NDArray[np.int64]
    """[m] the token that each list of entries is about, 1 to L-1, ascending."""
    lists: NDArray[np.int64]
    """[m] where each list stands in its row, for messages."""
    token_ids: NDArray[np.int64]
    """[m, W] in descending value; -1 = no entry."""
    values: NDArray[np.float64]
    """[m, W] log probs, or logits; -inf = no entry."""

    @property
    def labels(self) -> NDArray[np.int32]:
        """[m] the actual tokens."""
        return self.input_ids[self.positions]

    def place(self, target: int) -> str:
        """Where a target stands, for messages."""
        return f"{self.where}, list {self.lists[target]}"


def read_foreign(
    path: str, file_format: str, vocab_size: int, logprobs_field: str, shift: int
) -> Iterator[ForeignRecord]:
    """All records of a file or directory in order, one batch in memory.

    `shift` moves every list by so many tokens from where the format puts it. Records of which no
    token has entries are given too. Raises ForeignError.
    """
    number = 0
    for file in source_files(path):
        for where, row in _rows(file):
            layout = _layout(file, row.schema, file_format, logprobs_field)
            yield _record(where, row, layout, vocab_size, shift, number)
            number += 1


def source_files(path: str) -> list[Path]:
    """The files a source consists of. Raises ForeignError if it is none that can be read."""
    source = Path(os.path.expanduser(path))
    if not source.exists():
        raise ForeignError(f"{path}: no such file or directory")
    if source.is_file():
        if source.suffix not in SUFFIXES:
            raise ForeignError(f"{path}: expected a file ending in one of {', '.join(SUFFIXES)}")
        return [source]
    try:
        if (source / "dataset_dict.json").is_file():
            splits = json.loads((source / "dataset_dict.json").read_bytes())["splits"]
            names = ", ".join(f"{path}/{split}" for split in splits)
            raise ForeignError(f"{path} holds several splits: give one of {names}")
        if (source / "state.json").is_file():
            state = json.loads((source / "state.json").read_bytes())
            return [source / entry["filename"] for entry in state["_data_files"]]
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ForeignError(f"{path} is no saved dataset: {error!r}") from error
    files = sorted(
        file
        for file in source.rglob("*")
        if file.suffix in (".parquet", ".jsonl")
        and not any(part.startswith(".") for part in file.relative_to(source).parts)
    )
    if not files:
        raise ForeignError(f"{path}: no .parquet or .jsonl file and no saved dataset inside")
    if len({file.suffix for file in files}) > 1:
        raise ForeignError(f"{path}: both .parquet and .jsonl files inside: give one of them")
    return files


# Files to rows


def _rows(file: Path) -> Iterator[tuple[str, pa.RecordBatch]]:
    """Every row of a file as a batch of one, and where it stands."""
    if file.suffix == ".jsonl":
        yield from _json_rows(file)
        return
    try:
        row = 0
        for batch in _batches(file):
            for i in range(len(batch)):
                yield f"{file} row {row}", batch.slice(i, 1)
                row += 1
    except (pa.ArrowException, OSError) as error:
        kind = "a Parquet file" if file.suffix == ".parquet" else "an Arrow stream"
        raise ForeignError(f"{file} cannot be read as {kind}: {error}") from error


def _batches(file: Path) -> Iterator[pa.RecordBatch]:
    if file.suffix == ".parquet":
        with pq.ParquetFile(file) as parquet:
            yield from parquet.iter_batches(batch_size=BATCH_ROWS, use_threads=False)
    else:
        with pa.memory_map(str(file)) as source:
            yield from pa.ipc.open_stream(source)


def _json_rows(file: Path) -> Iterator[tuple[str, pa.RecordBatch]]:
    with open(file, "rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            where = f"{file} line {number}"
            try:
                value = json.loads(line)
                if not isinstance(value, dict):
                    raise ValueError(f"expected an object, found {type(value).__name__}")
                yield where, pa.RecordBatch.from_pylist([value])
            except (ValueError, pa.ArrowException) as error:
                raise ForeignError(f"{where} is no JSON record: {error}") from error


# Rows to records


@dataclass(frozen=True, slots=True)
class _Layout:
    """Names of the columns, and which token list j is about."""

    values: str
    ids: str | None
    """None: `values` holds objects of `logprob` and `token`."""
    mask: str | None
    from_end: bool
    """List j of n is about token L - n + j; otherwise about token j + 1."""


def _layout(file: Path, schema: pa.Schema, file_format: str, logprobs_field: str) -> _Layout:
    present = set(schema.names)

    def require(*names: str) -> None:
        missing = [name for name in names if name not in present]
        if not missing:
            return
        hint = ""
        if file_format == "distillkit" and {"compressed_logprobs", "packed_indices"} & present:
            hint = (
                "; these rows are compressed: decode them with DistillKit's "
                "LogprobCompressor.decompress_to_sparse and save the result as token_ids, "
                "top_values"
            )
        elif missing == ["input_ids"]:
            hint = "; add the tokens that the teacher scored, chat template applied"
        raise ForeignError(
            f"{file}: no column {', '.join(missing)} for --format {file_format}; "
            f"found {', '.join(sorted(present))}{hint}"
        )

    if file_format == "distillkit":
        require("token_ids", "top_values", "input_ids")
        return _Layout("top_values", "token_ids", None, from_end=False)
    if "target_logprobs" in present:
        require("target_token_ids", "input_ids")
        mask = "target_mask" if "target_mask" in present else None
        return _Layout("target_logprobs", "target_token_ids", mask, from_end=False)
    require(logprobs_field, "input_ids")
    ids = "target_token_ids" if "target_token_ids" in present else None
    return _Layout(logprobs_field, ids, None, from_end=True)


def _record(
    where: str, row: pa.RecordBatch, layout: _Layout, vocab_size: int, shift: int, number: int
) -> ForeignRecord:
    tokens = _integers(where, row, "input_ids")
    length = len(tokens)
    if length and not (tokens.min() >= 0 and tokens.max() < vocab_size):
        worst = tokens.max() if tokens.max() >= vocab_size else tokens.min()
        raise ForeignError(f"{where}: input_ids has {worst}, {_expected_id(vocab_size)}")
    wanted = np.ones(length, bool)
    if "labels" in row.schema.names:
        wanted = _integers(where, row, "labels", length) != IGNORED_LABEL
    first, last = 0, length
    if "attention_mask" in row.schema.names:
        first, last = _attended(where, _integers(where, row, "attention_mask", length))
    starts, ids, values = _entries(where, row, layout)
    num_lists = len(starts) - 1
    lengths = f"{num_lists} lists for {length} tokens"
    if layout.from_end and num_lists > length:
        raise ForeignError(f"{where}: {layout.values} has {lengths}: expected at most one each")
    if not layout.from_end and num_lists not in (length - 1, length):
        raise ForeignError(
            f"{where}: {layout.values} has {lengths}: expected one each, or all but the last"
        )
    offset = (length - num_lists if layout.from_end else 1) + shift
    matrix_ids, matrix = _matrix(starts, ids, values)
    positions = np.arange(num_lists) + offset
    inside = (positions > first) & (positions < last)
    inside[inside] = wanted[positions[inside]]
    lists = np.flatnonzero(inside & (matrix_ids >= 0).any(axis=1))
    record = ForeignRecord(
        where=where,
        sample_id=_sample_id(row, number),
        input_ids=tokens[first:last].astype(np.int32),
        positions=positions[lists] - first,
        lists=lists,
        token_ids=matrix_ids[lists],
        values=matrix[lists],
    )
    _refuse_bad_entries(record, vocab_size)
    return record


def _refuse_bad_entries(record: ForeignRecord, vocab_size: int) -> None:
    def refuse(bad: NDArray[np.bool_], values: NDArray, what: str) -> None:
        if bad.any():
            target, slot = np.argwhere(bad)[0]
            raise ForeignError(f"{record.place(target)}: {values[target, slot]} {what}")

    ids, used = record.token_ids, record.token_ids >= 0
    refuse(np.isnan(record.values), record.values, "is no number: score this record again")
    refuse(np.isposinf(record.values), record.values, "is no log prob: score this record again")
    refuse(used & (ids >= vocab_size), ids, f"is no token id, {_expected_id(vocab_size)}")
    ordered = np.sort(ids, axis=1)
    twice = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)
    refuse(twice, ordered[:, 1:], "stands twice among the token ids: expected distinct ids")


def _expected_id(vocab_size: int) -> str:
    return f"expected 0 to {vocab_size - 1}: give the dump's own tokenizer or --vocab-size"


def _sample_id(row: pa.RecordBatch, number: int) -> str:
    names = row.schema.names
    return str(row["sample_id"][0].as_py()) if "sample_id" in names else str(number)


def _integers(
    where: str, row: pa.RecordBatch, name: str, length: int | None = None
) -> NDArray[np.int64]:
    value = row[name][0]
    items = value.values if _is_list(value.type) else None
    if items is None or items.null_count or not _is_integer(items.type):
        raise ForeignError(f"{where}: {name} is {_shown(value)}: expected a list of integers")
    if length is not None and len(items) != length:
        raise ForeignError(f"{where}: {name} has {len(items)} entries for {length} tokens")
    return items.cast(pa.int64()).to_numpy(zero_copy_only=False)


def _attended(where: str, mask: NDArray[np.int64]) -> tuple[int, int]:
    """The run of ones in an attention mask, as a range."""
    ones = np.flatnonzero(mask)
    if not len(ones):
        return 0, 0
    first, last = int(ones[0]), int(ones[-1]) + 1
    if last - first != len(ones) or (mask[ones] != 1).any():
        raise ForeignError(
            f"{where}: attention_mask is not one run of 1 between zeros: expected one sequence a "
            "row, so unpack packed rows first"
        )
    return first, last


def _entries(
    where: str, row: pa.RecordBatch, layout: _Layout
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
    """Starts [n+1] of the lists among all entries, their ids (-1 = padding) and values."""
    starts, flat = _flat(where, row, layout.values)
    if layout.ids is None:
        flat_ids, flat = _objects(where, layout.values, flat)
    else:
        id_starts, flat_ids = _flat(where, row, layout.ids)
        _same_shape(where, layout.ids, id_starts, layout.values, starts)
    if flat_ids.null_count or not _is_integer(flat_ids.type):
        raise ForeignError(f"{where}: {layout.ids} holds {flat_ids.type}: expected integers")
    if flat.null_count or not (pa.types.is_floating(flat.type) or _is_integer(flat.type)):
        raise ForeignError(f"{where}: {layout.values} holds {flat.type}: expected numbers")
    ids = flat_ids.cast(pa.int64()).to_numpy(zero_copy_only=False).copy()
    values = flat.cast(pa.float64()).to_numpy(zero_copy_only=False)
    padding = values <= PADDING
    if layout.mask is not None:
        mask_starts, mask = _flat(where, row, layout.mask)
        _same_shape(where, layout.mask, mask_starts, layout.values, starts)
        padding = padding | (mask.cast(pa.int64()).to_numpy(zero_copy_only=False) == 0)
    if (bad := np.flatnonzero(~padding & (ids < 0))).size:
        place = np.searchsorted(starts, bad[0], "right") - 1
        raise ForeignError(f"{where}, list {place}: token id {ids[bad[0]]} is negative")
    ids[padding] = -1
    return starts, ids, np.where(padding, -np.inf, values)


def _flat(where: str, row: pa.RecordBatch, name: str) -> tuple[NDArray[np.int64], pa.Array]:
    """Starts [n+1] and the entries of a list of lists; an absent list counts as empty."""
    value = row[name][0]
    lists = value.values if _is_list(value.type) else None
    if lists is not None and pa.types.is_null(lists.type):
        lists = lists.cast(pa.list_(pa.null()))
    if lists is None or not _is_list(lists.type):
        raise ForeignError(
            f"{where}: {name} is {_shown(value)}: expected one list of entries per token"
        )
    lengths = pc.fill_null(pc.list_value_length(lists), 0).to_numpy(zero_copy_only=False)
    flat = lists.flatten()
    if pa.types.is_null(flat.type) and not len(flat):
        flat = flat.cast(pa.int64())
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]), flat


def _objects(where: str, name: str, flat: pa.Array) -> tuple[pa.Array, pa.Array]:
    """Ids and values of entries {"logprob": -0.1, "token": "token_id:42"}."""
    if not len(flat):
        return pa.array([], pa.int64()), pa.array([], pa.float64())
    try:
        tokens = pc.struct_field(flat, "token")
        ids = pc.replace_substring_regex(tokens, "^token_id:", "").cast(pa.int64())
        return ids, pc.struct_field(flat, "logprob")
    except (pa.ArrowException, KeyError) as error:
        raise ForeignError(
            f"{where}: {name} holds {flat.type}: expected numbers beside a column "
            f'target_token_ids, or objects of "logprob" and "token": "token_id:N" ({error})'
        ) from error


def _same_shape(
    where: str, name: str, found: NDArray[np.int64], other: str, expected: NDArray[np.int64]
) -> None:
    if len(found) != len(expected):
        raise ForeignError(
            f"{where}: {name} has {len(found) - 1} lists, {other} has {len(expected) - 1}"
        )
    if (differs := np.flatnonzero(np.diff(found) != np.diff(expected))).size:
        place = differs[0]
        raise ForeignError(
            f"{where}, list {place}: {name} has {np.diff(found)[place]} entries, {other} has "
            f"{np.diff(expected)[place]}: expected as many"
        )


def _matrix(
    starts: NDArray[np.int64], ids: NDArray[np.int64], values: NDArray[np.float64]
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """[n, W] ids and values in descending value, padding last."""
    lengths = np.diff(starts)
    shape = (len(lengths), int(lengths.max(initial=1)))
    rows = np.repeat(np.arange(len(lengths)), lengths)
    slots = np.arange(len(ids)) - np.repeat(starts[:-1], lengths)
    matrix_ids, matrix = np.full(shape, -1, np.int64), np.full(shape, -np.inf)
    matrix_ids[rows, slots], matrix[rows, slots] = ids, values
    if (matrix[:, 1:] <= matrix[:, :-1]).all():
        return matrix_ids, matrix
    order = np.argsort(-matrix, axis=1, kind="stable")
    return np.take_along_axis(matrix_ids, order, 1), np.take_along_axis(matrix, order, 1)


def _is_list(kind: pa.DataType) -> bool:
    return (
        pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    )


def _is_integer(kind: pa.DataType) -> bool:
    return pa.types.is_integer(kind) or pa.types.is_boolean(kind)


def _shown(value: Any) -> str:
    return f"{value.type}" if value.is_valid else "null"
