"""The commit records of a cache as columns: a hundred thousand shards without an object each.

`records/` holds them as one Parquet file once the cache is final. Shapes: S shards, G row groups.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from decant.schemas import CommitRecord, FormatError, Rejected, Totals, from_json, to_json
from decant.schemas.shards import OPTIONAL
from decant.schemas.strict import LARGEST
from decant.storage.cache.pages import check_pages
from decant.storage.cache.parquet import differences, reading

_HASH = pa.binary(16)
_RANGE = [("offset", pa.int64()), ("length", pa.int64()), ("xxh3_128", _HASH)]
_GROUP = pa.struct(
    [(name, pa.int64()) for name in ("rows", "sequences", "targets")]
    + [("data", pa.struct(_RANGE))]
)
_REJECTED = pa.struct(
    [
        ("sequence", pa.int64()),
        ("sample_id", pa.string()),
        ("targets", pa.int64()),
        ("reason", pa.string()),
    ]
)
SCHEMA = pa.schema(
    [
        pa.field(name, kind, nullable=False)
        for name, kind in [
            *((name, pa.int64()) for name in ("shard", "first_sequence", "num_sequences")),
            *((name, pa.int64()) for name in ("rows", "targets")),
            ("rejected", pa.list_(_REJECTED)),
            ("bytes", pa.int64()),
            ("xxh3_128", _HASH),
            ("row_groups", pa.list_(_GROUP)),
            ("footer", pa.struct(_RANGE)),
            *((name, pa.float64()) for name in ("kl_error_mean", "kl_error_max", "seconds")),
            ("worker", pa.string()),
        ]
    ]
    + [pa.field(name, pa.float64()) for name in OPTIONAL]
)
"""One row per shard: the fields of `CommitRecord` but for the cache id, which is the manifest's."""
WITHOUT_OPTIONAL = pa.schema([field for field in SCHEMA if field.name not in OPTIONAL])
VERSION_2_SCHEMA = WITHOUT_OPTIONAL.remove(WITHOUT_OPTIONAL.get_field_index("rejected"))
RANGES = ("row_groups.data", "footer")
MAX_INDEX = 1 << 31
"""Bytes that the records of all shards may unpack to."""
CHUNK = 1000
"""Shards whose records are objects at the same time."""


@dataclass(frozen=True, slots=True)
class RowGroupRef:
    """One row group of a cache: where it is and what it holds. Read it with `CacheReader.read`."""

    shard: int
    index: int
    first_sequence: int
    """Plan index of its first sequence."""
    sequences: int
    rows: int
    targets: int


class RowGroups(Sequence[RowGroupRef]):
    """All row groups in plan order; the columns are there for arithmetic over all of them."""

    def __init__(self, index: "ShardIndex") -> None:
        lists = index.table.column("row_groups").combine_chunks()
        per_shard = lists.value_lengths().to_numpy()
        values = lists.flatten()
        self.starts = np.concatenate([[0], np.cumsum(per_shard)])
        """[S+1] groups of shard row i are starts[i]:starts[i+1]."""
        self.shard = np.repeat(_numbers(index.table, "shard"), per_shard)
        """[G]."""
        self.rows, self.sequences, self.targets = (
            values.field(name).to_numpy() for name in ("rows", "sequences", "targets")
        )
        ends = np.cumsum(self.sequences)
        before = np.concatenate([[0], ends])[self.starts[:-1]]  # sequences of the shards before
        offset = _numbers(index.table, "first_sequence") - before
        self.first_sequence = ends - self.sequences + np.repeat(offset, per_shard)
        """[G] plan index of each group's first sequence."""

    def __len__(self) -> int:
        return len(self.shard)

    @overload
    def __getitem__(self, at: int) -> RowGroupRef: ...
    @overload
    def __getitem__(self, at: slice) -> list[RowGroupRef]: ...
    def __getitem__(self, at: int | slice) -> RowGroupRef | list[RowGroupRef]:
        if isinstance(at, slice):
            return [self[i] for i in range(*at.indices(len(self)))]
        at = range(len(self))[at]
        row = int(np.searchsorted(self.starts, at, side="right")) - 1
        return RowGroupRef(
            shard=int(self.shard[at]),
            index=at - int(self.starts[row]),
            first_sequence=int(self.first_sequence[at]),
            sequences=int(self.sequences[at]),
            rows=int(self.rows[at]),
            targets=int(self.targets[at]),
        )


class ShardIndex(Sequence[CommitRecord]):
    """Commit records in shard order, held as one Arrow table."""

    def __init__(self, table: pa.Table, cache_id: str, where: str = "") -> None:
        """Take a table of `SCHEMA`, read from `where`."""
        self.table, self._cache_id, self._where = table, cache_id, where
        self.shards = _numbers(table, "shard")
        """[S] ascending."""
        self.groups = RowGroups(self)

    @classmethod
    def of(cls, records: Iterable[CommitRecord], cache_id: str) -> "ShardIndex":
        """The index of some records, in ascending shard order."""
        return cls(pa.Table.from_batches(_batches(iter(records)), SCHEMA), cache_id)

    @classmethod
    def read(
        cls, data: bytes, cache_id: str, where: str, version: int, shards: int
    ) -> "ShardIndex":
        """What `write` wrote in a format version of so many shards.

        Raises FormatError if it is not of this form.
        """
        schemas = _schemas(version)
        with reading(where):
            file = pq.ParquetFile(pa.BufferReader(data))
            if file.metadata.num_rows != shards:
                raise FormatError(f"{where}: {file.metadata.num_rows} rows for {shards} shards")
            found = file.schema_arrow
            if not any(found.equals(schema) for schema in schemas):
                raise FormatError(f"{where}: columns: {differences(schemas[0], found)}")
            check_pages(memoryview(data), 0, file.metadata, MAX_INDEX, where)
            table = file.read()
            table.validate(full=True)
        _check_columns(table, where)
        if version < 3:
            field = SCHEMA.field("rejected")
            none = pa.array([[]] * len(table), field.type)
            table = table.add_column(SCHEMA.get_field_index("rejected"), field, none)
        for name in OPTIONAL:
            if name not in table.column_names:
                none = pa.nulls(len(table), pa.float64())
                table = table.append_column(SCHEMA.field(name), none)
        return cls(table, cache_id, where)

    @staticmethod
    def write(path: Path, records: Iterable[CommitRecord], version: int) -> int:
        """Write records, in ascending shard order, to a file; return how many there were."""
        count = 0
        schema = _schemas(version)[0]
        with pq.ParquetWriter(path, schema, compression="zstd") as writer:
            for batch in _batches(iter(records)):
                writer.write_batch(batch.select(schema.names))
                count += len(batch)
        return count

    def check_whole(self, where: str, num_sequences: int) -> None:
        """Raise FormatError unless these are the shards 0, 1, ... of so many sequences."""
        count, first = _numbers(self.table, "num_sequences"), _numbers(self.table, "first_sequence")
        ends = np.cumsum(count)
        wrong = (self.shards != np.arange(len(self))) | (first != ends - count)
        if wrong.any():
            at = int(np.argmax(wrong))
            raise FormatError(
                f"{where}: row {at} is of shard {self.shards[at]} from first_sequence {first[at]}, "
                f"expected {at} from {ends[at] - count[at]}"
            )
        if count.sum() != num_sequences:
            raise FormatError(
                f"{where}: num_sequences add up to {count.sum()}, the manifest says {num_sequences}"
            )

    def __len__(self) -> int:
        return len(self.table)

    @overload
    def __getitem__(self, at: int) -> CommitRecord: ...
    @overload
    def __getitem__(self, at: slice) -> list[CommitRecord]: ...
    def __getitem__(self, at: int | slice) -> CommitRecord | list[CommitRecord]:
        if isinstance(at, slice):
            return [self[i] for i in range(*at.indices(len(self)))]
        (entry,) = self.table.slice(range(len(self))[at], 1).to_pylist()
        return _record(entry, self._cache_id, self._where)

    def __iter__(self) -> Iterator[CommitRecord]:
        for batch in self.table.to_batches(CHUNK):
            for entry in batch.to_pylist():
                yield _record(entry, self._cache_id, self._where)

    def with_more(self, records: Iterable[CommitRecord]) -> "ShardIndex":
        """This index with the records of further shards, in ascending shard order."""
        more = ShardIndex.of(records, self._cache_id)
        table = pa.concat_tables([self.table, more.table]).sort_by("shard").combine_chunks()
        return ShardIndex(table, self._cache_id, self._where)

    def position(self, shard: int) -> int:
        """The position of a shard's record. Raises KeyError if there is none."""
        at = int(np.searchsorted(self.shards, shard))
        if at == len(self.shards) or self.shards[at] != shard:
            raise KeyError(shard)
        return at

    def groups_of(self, shard: int) -> list[RowGroupRef]:
        """The row groups of one shard."""
        at = self.position(shard)
        return self.groups[int(self.groups.starts[at]) : int(self.groups.starts[at + 1])]

    def rejected(self) -> Iterator[Rejected]:
        """The rejected sequences of all shards, in plan order."""
        for chunk in self.table.column("rejected").chunks:
            for entry in chunk.flatten():
                yield from_json(Rejected, entry.as_py(), f"{self._where}: rejected")

    def totals(self) -> Totals:
        """The sums over the records."""
        sums = {
            name: int(_numbers(self.table, name).sum())
            for name in ("num_sequences", "rows", "targets", "bytes")
        }
        return Totals(
            shards=len(self),
            sequences=sums["num_sequences"],
            tokens=sums["rows"],
            targets=sums["targets"],
            rejected=sum(len(c.flatten()) for c in self.table.column("rejected").chunks),
            bytes=sums["bytes"],
            seconds=float(sum(self.table.column("seconds").to_pylist())),
        )


def _check_columns(table: pa.Table, where: str) -> None:
    """Raise FormatError on a null, a count beyond reason, or row groups that are not the shard's.

    That is what arithmetic over columns relies on; the rest is checked where a record is made.
    """
    lists = {name: table.column(name).combine_chunks() for name in table.column_names}
    for name in ("row_groups", "rejected"):
        if name in lists:
            lists |= {
                f"{name}.{f.name}": _field(lists[name].flatten(), f.name)
                for f in lists[name].type.value_type
            }
    for path in RANGES:
        lists |= {f"{path}.{f.name}": _field(lists[path], f.name) for f in lists[path].type}
    for path, column in lists.items():
        if column.null_count and path not in OPTIONAL:
            raise FormatError(f"{where}: {path} holds a null")
        if pa.types.is_integer(column.type) and len(column):
            values = column.to_numpy()
            if values.min() < 0 or values.max() > LARGEST:
                raise FormatError(f"{where}: {path} holds {values.min()} to {values.max()}")
        known = column.drop_null() if pa.types.is_floating(column.type) else column.slice(0, 0)
        if len(known) and not np.isfinite(known.to_numpy()).all():
            raise FormatError(f"{where}: {path} holds a number that is not finite")
    per_shard = lists["row_groups"].value_lengths().to_numpy()
    ends = [lists[f"{p}.offset"].to_numpy() + lists[f"{p}.length"].to_numpy() for p in RANGES]
    footers = lists["footer.offset"].to_numpy()
    if (ends[0] > np.repeat(footers, per_shard)).any():
        raise FormatError(f"{where}: row_groups.data ends after a footer begins")
    if (ends[1] != lists["bytes"].to_numpy()).any():
        raise FormatError(f"{where}: footer does not end where bytes says that its shard ends")
    starts = np.concatenate([[0], np.cumsum(per_shard)])
    for name, of_group in (("rows", "rows"), ("num_sequences", "sequences"), ("targets",) * 2):
        sums = np.concatenate([[0], np.cumsum(lists[f"row_groups.{of_group}"].to_numpy())])
        found, stated = np.diff(sums[starts]), lists[name].to_numpy()
        if (found != stated).any():
            at = int(np.argmax(found != stated))
            raise FormatError(
                f"{where}: row {at}: {name} {stated[at]}, but row_groups sum to {found[at]}"
            )


def _field(values: pa.StructArray, name: str) -> pa.Array:
    """A field of structs; nulls where the structs are."""
    return pc.struct_field(values, name)


def _schemas(version: int) -> list[pa.Schema]:
    """What records of a format version have: the one that is written first."""
    if version < 3:
        return [VERSION_2_SCHEMA]
    return [SCHEMA, WITHOUT_OPTIONAL] if version >= 4 else [WITHOUT_OPTIONAL]


def _batches(records: Iterator[CommitRecord]) -> Iterator[pa.RecordBatch]:
    while chunk := list(islice(records, CHUNK)):
        yield pa.RecordBatch.from_pylist([_entry(record) for record in chunk], SCHEMA)


def _entry(record: CommitRecord) -> dict[str, Any]:
    return _with_hashes({**to_json(record), "cache_id": None}, bytes.fromhex)


def _record(entry: dict[str, Any], cache_id: str, where: str) -> CommitRecord:
    fields = _with_hashes({**entry, "cache_id": cache_id}, bytes.hex)
    return from_json(CommitRecord, fields, f"{where}: record of shard {entry['shard']}")


def _with_hashes(value: Any, convert: Any) -> Any:
    """The same tree with every `xxh3_128` converted, between hex text and bytes."""
    if isinstance(value, dict):
        return {
            name: convert(item) if name == "xxh3_128" else _with_hashes(item, convert)
            for name, item in value.items()
        }
    if isinstance(value, list):
        return [_with_hashes(item, convert) for item in value]
    return value


def _numbers(table: pa.Table, name: str) -> NDArray[np.int64]:
    return table.column(name).to_numpy()
