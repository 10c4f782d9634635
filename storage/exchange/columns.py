"""Files of rows with columns: Parquet, Arrow, JSON lines, saved datasets; lists as arrays.

Knows no tool's names of columns. Refuses, by file and row, what is no list of the kind expected.
"""

import itertools
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from decant.schemas.strict import LARGEST
from decant.storage.cache.pages import check_pages
from decant.storage.cache.parquet import UNREADABLE
from decant.storage.exchange.arrow_stream import unpacked_bytes
from decant.storage.exchange.bounds import (
    MAX_DESCRIPTION,
    MAX_LINE,
    MAX_UNPACKED,
    FileBytes,
    read_whole,
    regular,
)
from decant.storage.exchange.foreign import (
    IGNORED_LABEL,
    PADDING,
    ForeignError,
    ForeignRecord,
    make_record,
    matrix,
)

BATCH_ROWS = 8
"""Records held at a time."""
SUFFIXES = (".parquet", ".arrow", ".jsonl")

Lists = tuple[NDArray[np.int64], NDArray[np.float64]]
"""Ids and values [n, W] of n lists; -1 and -inf = no entry."""


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a file."""

    file: Path
    where: str
    """File and row, for messages."""
    batch: pa.RecordBatch
    """Of this one row."""

    @property
    def names(self) -> set[str]:
        """The columns."""
        return set(self.batch.schema.names)

    def require(self, file_format: str, *names: str, hint: str = "") -> None:
        """Raise ForeignError unless all these columns are there."""
        missing = [name for name in names if name not in self.names]
        if not missing:
            return
        if missing == ["input_ids"]:
            hint = "; add the tokens that the teacher scored, chat template applied"
        raise ForeignError(
            f"{self.file}: no column {', '.join(missing)} for --format {file_format}; "
            f"found {', '.join(sorted(self.names))}{hint}"
        )

    def integers(self, name: str, length: int | None = None) -> NDArray[np.int64]:
        """A list of integers, of this length if it is given."""
        value = self.batch[name][0]
        items = value.values if _is_list(value.type) else None
        if items is None or items.null_count or not _is_integer(items.type):
            raise ForeignError(
                f"{self.where}: {name} is {_shown(value)}: expected a list of integers"
            )
        if length is not None and len(items) != length:
            raise ForeignError(f"{self.where}: {name} has {len(items)} entries for {length} tokens")
        return items.cast(pa.int64()).to_numpy(zero_copy_only=False)

    def lists(self, name: str) -> tuple[NDArray[np.int64], pa.Array]:
        """Starts [n+1] and the entries of a list of lists; an absent list counts as empty."""
        value = self.batch[name][0]
        lists = value.values if _is_list(value.type) else None
        if lists is not None and pa.types.is_null(lists.type):
            lists = lists.cast(pa.list_(pa.null()))
        if lists is None or not _is_list(lists.type):
            raise ForeignError(
                f"{self.where}: {name} is {_shown(value)}: expected one list of entries per token"
            )
        lengths = pc.fill_null(pc.list_value_length(lists), 0).to_numpy(zero_copy_only=False)
        flat = lists.flatten()
        if pa.types.is_null(flat.type) and not len(flat):
            flat = flat.cast(pa.int64())
        return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]), flat

    def same_shape(
        self, name: str, found: NDArray[np.int64], other: str, expected: NDArray[np.int64]
    ) -> None:
        """Raise ForeignError unless two columns have lists of equal lengths."""
        if len(found) != len(expected):
            raise ForeignError(
                f"{self.where}: {name} has {len(found) - 1} lists, {other} has {len(expected) - 1}"
            )
        if (differs := np.flatnonzero(np.diff(found) != np.diff(expected))).size:
            place = differs[0]
            raise ForeignError(
                f"{self.where}, list {place}: {name} has {np.diff(found)[place]} entries, {other} "
                f"has {np.diff(expected)[place]}: expected as many"
            )

    def sample_id(self, number: int) -> str:
        """The row's own, or its number."""
        return str(self.batch["sample_id"][0].as_py()) if "sample_id" in self.names else str(number)

    def records(
        self,
        number: int,
        lists: Lists,
        vocab_size: int,
        shift: int,
        *,
        column: str,
        from_end: bool = False,
        rounding: float = 0.0,
    ) -> Iterator[ForeignRecord]:
        """The documents of a row: one, or several that `attention_mask` numbers.

        `lists` [n, W] are ids and values of column `column`: list j is about token j + 1, or, if
        `from_end`, about token L - n + j; `shift` moves them all.
        """
        tokens = self.integers("input_ids")
        length, num_lists = len(tokens), len(lists[0])
        wanted = None
        if "is_target" in self.names:
            wanted = self.integers("is_target", length) != 0
        elif "labels" in self.names:
            wanted = self.integers("labels", length) != IGNORED_LABEL
        lengths = f"{num_lists} lists for {length} tokens"
        if from_end and num_lists > length:
            raise ForeignError(f"{self.where}: {column} has {lengths}: expected at most one each")
        if not from_end and num_lists not in (length - 1, length):
            raise ForeignError(
                f"{self.where}: {column} has {lengths}: expected one each, or all but the last"
            )
        offset = (length - num_lists if from_end else 1) + shift
        spans = self._documents(length)
        for i, span in enumerate(spans):
            alone = len(spans) == 1
            yield make_record(
                self.where if alone else f"{self.where} document {i}",
                self.sample_id(number) if alone else f"{self.sample_id(number)}.{i}",
                tokens,
                offset,
                *lists,
                vocab_size,
                span=span,
                wanted=wanted,
                rounding=rounding,
            )

    def _documents(self, length: int) -> list[tuple[int, int]]:
        """Ranges of the documents that an attention mask numbers; zeros are padding."""
        if "attention_mask" not in self.names:
            return [(0, length)]
        mask = self.integers("attention_mask", length)
        bounds = np.flatnonzero(np.diff(mask, prepend=0, append=0))
        runs = [(int(a), int(b)) for a, b in itertools.pairwise(bounds) if mask[a]]
        numbers = [int(mask[a]) for a, _ in runs]
        if numbers != list(range(1, len(runs) + 1)):
            raise ForeignError(
                f"{self.where}: attention_mask is not one run of 1 between zeros, nor runs of 1, "
                "2, 3, ... that number packed documents: expected one of these"
            )
        return runs or [(0, 0)]


def plain(row: Row, ids: str, values: str, mask: str | None = None) -> Lists:
    """Ids and values [n, W] of two columns of lists, -1 and -inf for entries that are padding."""
    starts, flat = row.lists(values)
    id_starts, flat_ids = row.lists(ids)
    row.same_shape(ids, id_starts, values, starts)
    if mask is None:
        return entries(row, ids, flat_ids, values, flat, starts)
    mask_starts, flat_mask = row.lists(mask)
    row.same_shape(mask, mask_starts, values, starts)
    used = flat_mask.cast(pa.int64()).to_numpy(zero_copy_only=False) != 0
    return entries(row, ids, flat_ids, values, flat, starts, used)


def entries(
    row: Row,
    ids: str,
    flat_ids: pa.Array,
    values: str,
    flat: pa.Array,
    starts: NDArray[np.int64],
    used: NDArray[np.bool_] | None = None,
) -> Lists:
    """Ids and values [n, W] of lists that lie one after the other, the names for messages."""
    if flat_ids.null_count or not _is_integer(flat_ids.type):
        raise ForeignError(f"{row.where}: {ids} holds {flat_ids.type}: expected integers")
    if flat.null_count or not (pa.types.is_floating(flat.type) or _is_integer(flat.type)):
        raise ForeignError(f"{row.where}: {values} holds {flat.type}: expected numbers")
    found = flat_ids.cast(pa.int64()).to_numpy(zero_copy_only=False).copy()
    numbers = flat.cast(pa.float64()).to_numpy(zero_copy_only=False)
    padding = numbers <= PADDING
    if used is not None:
        padding = padding | ~used
    if (bad := np.flatnonzero(~padding & (found < 0))).size:
        place = np.searchsorted(starts, bad[0], "right") - 1
        raise ForeignError(f"{row.where}, list {place}: token id {found[bad[0]]} is negative")
    found[padding] = -1
    return matrix(row.where, starts, found, np.where(padding, -np.inf, numbers))


def table_files(path: str) -> list[Path]:
    """The files a source consists of. Raises ForeignError if it is none that can be read."""
    source = Path(os.path.expanduser(path))
    if not source.exists():
        raise ForeignError(f"{path}: no such file or directory")
    if source.is_file():
        if source.suffix not in SUFFIXES:
            raise ForeignError(f"{path}: expected a file ending in one of {', '.join(SUFFIXES)}")
        return [source]
    try:
        if (source / "dataset_dict.json").exists():
            splits = _small_json(source / "dataset_dict.json")["splits"]
            names = ", ".join(f"{path}/{split}" for split in splits)
            raise ForeignError(f"{path} holds several splits: give one of {names}")
        if (source / "state.json").exists():
            state = _small_json(source / "state.json")
            named = [source / entry["filename"] for entry in state["_data_files"]]
            return [regular(file, source) for file in named]
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        if isinstance(error, ForeignError):
            raise
        raise ForeignError(f"{path} is not a saved dataset: {error!r}") from error
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
    return [regular(file, source) for file in files]


def _small_json(file: Path) -> Any:
    return json.loads(read_whole(file, MAX_DESCRIPTION))


def read_rows(path: str) -> Iterator[Row]:
    """Every row of a file or directory, in order. Raises ForeignError."""
    for file in table_files(path):
        if file.suffix == ".jsonl":
            for where, value in json_lines(file):
                try:
                    yield Row(file, where, pa.RecordBatch.from_pylist([value]))
                except UNREADABLE as error:
                    raise ForeignError(f"{where} is no JSON record: {error}") from error
            continue
        try:
            row = 0
            for batch in _batches(file):
                for i in range(len(batch)):
                    yield Row(file, f"{file} row {row}", batch.slice(i, 1))
                    row += 1
        except ForeignError:
            raise
        except UNREADABLE as error:
            kind = "a Parquet file" if file.suffix == ".parquet" else "an Arrow stream"
            raise ForeignError(f"{file} cannot be read as {kind}: {error}") from error


def json_lines(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every object of a file of JSON lines, and where it is. Raises ForeignError."""
    with open(regular(file), "rb") as lines:
        for number in itertools.count(1):
            if not (line := lines.readline(MAX_LINE + 1)):
                return
            where = f"{file} line {number}"
            if len(line) > MAX_LINE:
                raise ForeignError(f"{where} has more than the {MAX_LINE} bytes that one may have")
            if not line.strip():
                continue
            try:
                value = json.loads(line)
                if not isinstance(value, dict):
                    raise ValueError(f"expected an object, found {type(value).__name__}")
            except (ValueError, RecursionError) as error:
                raise ForeignError(f"{where} is no JSON record: {error}") from error
            yield where, value


def json_files(path: str) -> list[Path]:
    """The `.jsonl` files of a source. Raises ForeignError if it is anything else."""
    files = table_files(path)
    if files[0].suffix != ".jsonl":
        raise ForeignError(f"{files[0]}: expected JSON lines, in a file ending in .jsonl")
    return files


def token_list(where: str, name: str, value: Any) -> NDArray[np.int64]:
    """Ids out of JSON. Raises ForeignError if they are none."""
    if not isinstance(value, Sequence) or any(type(token) is not int for token in value):
        raise ForeignError(f"{where}: {name} is not a list of token ids")
    if any(not 0 <= token < LARGEST for token in value):
        raise ForeignError(f"{where}: {name} holds a number that is no token id")
    return np.array(value, np.int64)


def _batches(file: Path) -> Iterator[pa.RecordBatch]:
    regular(file)
    if file.suffix == ".parquet":
        with pq.ParquetFile(file) as parquet, open(file, "rb") as source:
            data = FileBytes(source)
            for i in range(parquet.metadata.num_row_groups):
                where = f"{file} row group {i}"
                check_pages(data, 0, parquet.metadata, MAX_UNPACKED, where, i, strict=False)
            for batch in parquet.iter_batches(batch_size=BATCH_ROWS, use_threads=False):
                batch.validate(full=True)
                yield batch
    else:
        with pa.memory_map(str(file)) as source:
            for number, size in enumerate(unpacked_bytes(source)):
                if size > MAX_UNPACKED:
                    what = f"{file}: batch {number} would unpack to {size} bytes"
                    raise ForeignError(f"{what}, at most {MAX_UNPACKED}")
            source.seek(0)
            for batch in pa.ipc.open_stream(source):
                batch.validate(full=True)  # its offsets are the file's own
                yield batch


def _is_integer(kind: pa.DataType) -> bool:
    """Whether a column's entries are whole numbers."""
    return pa.types.is_integer(kind) or pa.types.is_boolean(kind)


def _shown(value: Any) -> str:
    """What an Arrow value is, for messages."""
    return f"{value.type}" if value.is_valid else "null"


def _is_list(kind: pa.DataType) -> bool:
    return (
        pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    )
