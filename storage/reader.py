"""Read a cache: by sequence, in order, or by row group; every byte used is hashed before use."""

import bisect
import io
import os
from collections.abc import Iterator
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from schemas import (
    ByteRange,
    CommitRecord,
    FormatError,
    ScoredSequence,
    ShardPlan,
    from_json,
    shard_schema,
)
from schemas import RowGroup as RowGroupRecord
from storage import codec, paths
from storage.files import Store
from storage.writer import read_manifest, read_plan, read_record


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


class CacheReader:
    """A whole cache, opened for reading.

    `reader[i]` is the i-th sequence of the shard plan, `len(reader)` their number. Opening reads
    the manifest and its two segments, never a shard.
    """

    def __init__(self, url: str | os.PathLike[str], *, allow_incomplete: bool = False) -> None:
        """Open a cache.

        Raises FormatError if it is absent, damaged, or not complete (unless `allow_incomplete`,
        which gives the sequences of the committed shards, renumbered from 0).
        """
        self._store = Store(url)
        self.url = self._store.url
        self.manifest = read_manifest(self._store)
        self.plan = read_plan(self._store, self.manifest)
        self.records = self._records(allow_incomplete)
        self._groups = [
            RowGroupRef(
                shard=record.shard,
                index=i,
                first_sequence=record.first_sequence
                + sum(g.sequences for g in record.row_groups[:i]),
                sequences=group.sequences,
                rows=group.rows,
                targets=group.targets,
            )
            for record in self.records
            for i, group in enumerate(record.row_groups)
        ]
        self._by_shard = {record.shard: record for record in self.records}
        self._starts = [0]
        for group in self._groups:
            self._starts.append(self._starts[-1] + group.sequences)
        self._schema = shard_schema(self.manifest.layout)
        self._metadata: tuple[int, pq.FileMetaData] | None = None
        self._last: tuple[int, codec.Rows] | None = None

    def _records(self, allow_incomplete: bool) -> list[CommitRecord]:
        manifest, store = self.manifest, self._store
        if manifest.records is not None:
            where = store.path(manifest.records.name)
            entries = store.read_segment(manifest.records)
            return [from_json(CommitRecord, entry, where) for entry in entries]
        present = set(store.names(paths.SHARDS))
        done = [s for s in self.plan if paths.record(s.shard).rsplit("/")[-1] in present]
        if not allow_incomplete:
            raise FormatError(
                f"{self.url} is not complete: {len(done)} of {len(self.plan)} shards are "
                "committed. Run the dump again; it fills what is missing and seals the cache"
            )
        return [read_record(store, manifest, s.shard) for s in done]

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, index: int) -> ScoredSequence:
        if not -len(self) <= index < len(self):
            raise IndexError(f"sequence {index} of {len(self)}")
        index %= len(self)
        group = bisect.bisect_right(self._starts, index) - 1
        if self._last is None or self._last[0] != group:
            self._last = (group, self.read(self._groups[group]))
        return self._last[1][index - self._starts[group]]

    def __iter__(self) -> Iterator[ScoredSequence]:
        for group in self._groups:
            rows = self.read(group)
            for i in range(len(rows)):
                yield rows[i]

    def row_groups(self) -> list[RowGroupRef]:
        """All row groups in plan order."""
        return list(self._groups)

    def shard_plan(self) -> list[ShardPlan]:
        """The plan of all shards, committed or not."""
        return list(self.plan)

    def read(self, group: RowGroupRef) -> codec.Rows:
        """The decoded columns of one row group.

        Raises FormatError, naming the file, if a byte of it is not what was committed.
        """
        return codec.decode(self.read_table(group), self.manifest.layout)

    def read_table(self, group: RowGroupRef) -> pa.Table:
        """One row group as stored. Raises FormatError as `read`."""
        record = self._by_shard[group.shard]
        entry = record.row_groups[group.index]
        where = self._store.path(paths.shard(group.shard))
        data = self._verified(group.shard, entry.data)
        window = _Window(entry.data.offset, data, record.bytes)
        try:
            file = pq.ParquetFile(
                pa.PythonFile(window, mode="r"),
                metadata=self._footer(record),
                page_checksum_verification=True,
                pre_buffer=False,
            )
            table = file.read_row_group(group.index, use_threads=False)
        except (OSError, pa.ArrowException) as error:
            raise FormatError(f"{where} row group {group.index} cannot be read: {error}") from error
        if not table.schema.equals(self._schema) or len(table) != entry.rows:
            raise FormatError(
                f"{where} row group {group.index}: expected {entry.rows} rows of\n{self._schema}\n"
                f"found {len(table)} rows of\n{table.schema}"
            )
        return table

    def column_bytes(self, group: RowGroupRef) -> dict[str, int]:
        """Compressed bytes of each column of one row group, from the shard's footer."""
        try:
            metadata = self._footer(self._by_shard[group.shard]).row_group(group.index)
        except (OSError, pa.ArrowException) as error:
            where = self._store.path(paths.shard(group.shard))
            raise FormatError(f"{where}: its footer cannot be read: {error}") from error
        columns = [metadata.column(i) for i in range(metadata.num_columns)]
        return {c.path_in_schema: c.total_compressed_size for c in columns}

    def row_group_record(self, group: RowGroupRef) -> RowGroupRecord:
        """What the commit record says of a row group."""
        return self._by_shard[group.shard].row_groups[group.index]

    def _footer(self, record: CommitRecord) -> pq.FileMetaData:
        kept = self._metadata  # read once: other threads may replace it
        if kept is None or kept[0] != record.shard:
            data = self._verified(record.shard, record.footer)
            kept = (record.shard, pq.read_metadata(pa.BufferReader(b"PAR1" + data)))
            self._metadata = kept
        return kept[1]

    def _verified(self, shard: int, part: ByteRange) -> bytes:
        name = paths.shard(shard)
        where = self._store.path(name)
        try:
            data = self._store.read_range(name, part.offset, part.length)
        except FileNotFoundError:
            raise FormatError(
                f"{where} is missing; run the dump again, which scores that shard again"
            ) from None
        found = xxhash.xxh3_128(data).hexdigest()
        if len(data) != part.length or found != part.xxh3_128:
            raise FormatError(
                f"{where} is damaged: {len(data)} of {part.length} bytes at {part.offset} with "
                f"hash {found}, committed with {part.xxh3_128}; delete the file and run the dump "
                "again, which scores that shard again"
            )
        return data


class _Window(io.RawIOBase):
    """A seekable file of `size` bytes of which only one verified run can be read."""

    def __init__(self, offset: int, data: bytes, size: int) -> None:
        super().__init__()
        self._offset, self._data, self._size, self._at = offset, memoryview(data), size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        self._at = base + offset
        return self._at

    def read(self, size: int = -1) -> memoryview:
        start = self._at - self._offset
        stop = len(self._data) if size < 0 else start + size
        if start < 0 or stop > len(self._data):
            raise OSError(
                f"bytes {self._at}+{size} lie outside the verified run at {self._offset} of "
                f"{len(self._data)}"
            )
        self._at += stop - start
        return self._data[start:stop]
