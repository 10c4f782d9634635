"""Read a cache: by sequence, in order, or by row group; every byte used is hashed before use."""

import functools
import os
from collections.abc import Callable, Iterator

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from decant.schemas import (
    ByteRange,
    CommitRecord,
    FormatError,
    Manifest,
    Rejected,
    ScoredSequence,
    ShardPlan,
    shard_schema,
)
from decant.schemas.strict import UnfitError
from decant.storage.cache import paths
from decant.storage.cache import rows as rows_codec
from decant.storage.cache.checks import check_decoded, check_stored
from decant.storage.cache.index import RowGroupRef, RowGroups, ShardIndex
from decant.storage.cache.numbering import Numbering, from_footer
from decant.storage.cache.pages import check_pages
from decant.storage.cache.parquet import Window, differences, reading
from decant.storage.cache.records import (
    Rewritten,
    committed_shards,
    generation,
    read_manifest,
    read_plan,
    read_record,
    read_records,
)
from decant.storage.files.store import Store

MAX_UNPACKED = 1 << 30
"""Bytes that a row group may unpack to; writers make them of about 16 MB."""
OPENINGS = 5
"""How often a cache is opened anew that is replaced at the very moment."""
RECENT_SHARDS = 64
"""Shards whose record and footer stay parsed: row groups of several are read in turn."""


class CacheReader:
    """A whole cache, opened for reading.

    `reader[i]` is the i-th sequence of the shard plan, `len(reader)` their number. Opening reads
    the manifest and its two segments, never a shard.
    """

    def __init__(
        self,
        url: str | os.PathLike[str],
        *,
        allow_incomplete: bool = False,
        listener: Callable[[int, int, bytes], None] | None = None,
        manifest: Manifest | None = None,
    ) -> None:
        """Open a cache.

        `listener` is called with (shard, offset, bytes) of all that is fetched of shards;
        `manifest` is taken for the cache's own where that is not published yet.
        Raises FormatError if it is absent, damaged, or not complete (unless `allow_incomplete`,
        which gives the sequences of the committed shards, renumbered from 0).
        """
        self._store, self._listener = Store(url), listener
        self.url = self._store.url
        self.manifest = manifest or read_manifest(self._store)
        self._is_published = manifest is None
        self._set_index(self._opened(allow_incomplete))
        self._places: dict[int, str] = {}
        """Where shards are that are not at their places."""
        self._schema = shard_schema(self.manifest.layout)
        self._recent: dict[int, CommitRecord] = {}
        self._footers: dict[int, tuple[pq.FileMetaData, list[Numbering | None]]] = {}
        self._last: tuple[int, rows_codec.Rows] | None = None

    def _set_index(self, index: ShardIndex) -> None:
        self.index = index
        """The commit records in shard order."""
        self._groups = index.groups
        self._ends = np.cumsum(self._groups.sequences)

    @property
    def generation(self) -> int:
        """Which state of a final cache this is: higher each time that it is sealed anew."""
        return generation(self.manifest)

    def refuse_rewritten(self) -> None:
        """Raise Rewritten if the cache is by now another than the one that was opened.

        What was taken of its files before is of the one that was opened, as files that a manifest
        names are replaced after it.
        """
        if not self._is_published:
            return
        try:
            now = read_manifest(self._store)
        except UnfitError:
            raise Rewritten(
                f"{self.url} holds no cache any more: it was removed while it was read"
            ) from None
        if now.cache_id != self.manifest.cache_id:
            raise Rewritten(
                f"{self.url} was cache {self.manifest.cache_id} and is {now.cache_id} now: it was "
                "replaced while it was read; run the command again, which opens the new one"
            )
        if self.manifest.is_final and now.records != self.manifest.records:
            raise Rewritten(
                f"{self.url} was rewritten while it was read (generation {self.generation} to "
                f"{generation(now)}): run the command again, which opens the new one"
            )

    def refresh(self) -> list[int]:
        """Look again at a cache that was not complete; return the shards committed since, in order.

        Sequences are renumbered. Raises Rewritten if another cache has taken its place, or if a
        shard that is known was scored again.
        """
        if self.manifest.is_final:
            return []
        manifest = read_manifest(self._store)
        self.refuse_rewritten()
        if manifest.is_final:
            self._refuse_renewed(read_records(self._store, manifest))
        known, self.manifest = set(self.index.shards.tolist()), manifest
        new = sorted(committed_shards(self._store) & set(range(manifest.num_shards)) - known)
        if new:
            records = (read_record(self._store, manifest, shard) for shard in new)
            self._last = None
            self._set_index(self.index.with_more(records))
        return new

    def _refuse_renewed(self, now: ShardIndex) -> None:
        """Raise Rewritten if a shard has another commit record by now, or none."""
        for record in self.index:
            if record.shard not in now.shards or now[now.position(record.shard)] != record:
                raise Rewritten(
                    f"{self.url}: shard {record.shard} was scored again while the cache was read: "
                    "run the command again, which opens the new one"
                )

    def _opened(self, allow_incomplete: bool) -> ShardIndex:
        """The index; where the manifest is replaced meanwhile, of the new one."""
        for _ in range(OPENINGS):
            try:
                return self._index(allow_incomplete)
            except FormatError:
                now = read_manifest(self._store) if self._is_published else self.manifest
                if now == self.manifest:
                    raise
                self.manifest = now
        return self._index(allow_incomplete)

    def _index(self, allow_incomplete: bool) -> ShardIndex:
        manifest, store = self.manifest, self._store
        if manifest.is_final:
            return read_records(store, manifest)
        planned = range(manifest.num_shards)
        done = sorted(shard for shard in committed_shards(store) if shard in planned)
        if not allow_incomplete:
            raise UnfitError(
                f"{self.url} is not complete: {len(done)} of {len(planned)} shards are "
                "committed. Run the dump again; it fills what is missing and seals the cache"
            )
        records = (read_record(store, manifest, shard) for shard in done)
        return ShardIndex.of(records, manifest.cache_id)

    @functools.cached_property
    def plan(self) -> list[ShardPlan]:
        """All shards, committed or not. Raises FormatError if the plan is damaged."""
        return read_plan(self._store, self.manifest)

    @property
    def rejected(self) -> Iterator[Rejected]:
        """The sequences that the teacher could not score, in plan order; they have no targets."""
        return self.index.rejected()

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, index: int) -> ScoredSequence:
        if not -len(self) <= index < len(self):
            raise IndexError(f"sequence {index} of {len(self)}")
        index %= len(self)
        group = int(np.searchsorted(self._ends, index, side="right"))
        if self._last is None or self._last[0] != group:
            self._last = (group, self.read(self._groups[group]))
        return self._last[1][index - int(self._ends[group] - self._groups.sequences[group])]

    def __iter__(self) -> Iterator[ScoredSequence]:
        for group in self._groups:
            yield from self.read(group)

    def row_groups(self) -> RowGroups:
        """All row groups in plan order."""
        return self._groups

    def read(self, group: RowGroupRef) -> rows_codec.Rows:
        """The decoded columns of one row group.

        Raises FormatError, naming the file, if a byte of it is not what was committed.
        """
        return self._decoded(group, self.read_stored(group))

    def read_stored(self, group: RowGroupRef) -> rows_codec.StoredRows:
        """The columns of one row group, not decoded. Raises FormatError as `read`."""
        return self._stored(group, self.read_table(group))

    def decode(self, group: RowGroupRef, table: pa.Table) -> rows_codec.Rows:
        """The decoded columns of one row group, of which `read_table` gave the table."""
        return self._decoded(group, self._stored(group, table))

    def _decoded(self, group: RowGroupRef, stored: rows_codec.StoredRows) -> rows_codec.Rows:
        with np.errstate(invalid="ignore", over="ignore"):  # what comes of it is looked at
            rows = rows_codec.decode_rows(stored, self.manifest.layout)
        where = f"{self._store.path(paths.shard(group.shard))} row group {group.index}"
        check_decoded(rows, self.manifest.temperatures, where)
        return rows

    def _stored(self, group: RowGroupRef, table: pa.Table) -> rows_codec.StoredRows:
        record = self._record(group.shard)
        _, numberings = self._footer(record)
        layout = self.manifest.layout
        stored = rows_codec.stored_rows(table, layout, numberings[group.index])
        where = f"{self._store.path(paths.shard(group.shard))} row group {group.index}"
        first = record.first_sequence + sum(g.sequences for g in record.row_groups[: group.index])
        check_stored(stored, layout, record.row_groups[group.index], first, where)
        return stored

    def read_table(self, group: RowGroupRef) -> pa.Table:
        """One row group as stored. Raises FormatError as `read`."""
        record = self._record(group.shard)
        entry = record.row_groups[group.index]
        where = self._store.path(paths.shard(group.shard))
        metadata, _ = self._footer(record)
        data = self._verified(group.shard, entry.data)
        with reading(f"{where} row group {group.index}"):
            file = pq.ParquetFile(
                pa.PythonFile(Window(entry.data.offset, data, record.bytes), mode="r"),
                metadata=metadata,
                pre_buffer=False,  # page checksums add nothing: `data` was hashed as a whole
            )
            whole = memoryview(data)
            check_pages(whole, entry.data.offset, metadata, MAX_UNPACKED, where, group.index)
            table = file.read_row_group(group.index, use_threads=False)
            table.validate(full=True)
        if not table.schema.equals(self._schema) or len(table) != entry.rows:
            raise FormatError(
                f"{where} row group {group.index}: expected {entry.rows} rows, found {len(table)}; "
                f"columns: {differences(self._schema, table.schema)}"
            )
        return table

    def column_bytes(self, group: RowGroupRef) -> dict[str, int]:
        """Compressed bytes of each column of one row group, from the shard's footer."""
        metadata, _ = self._footer(self._record(group.shard))
        row_group = metadata.row_group(group.index)
        columns = [row_group.column(i) for i in range(row_group.num_columns)]
        sizes = [column.total_compressed_size for column in columns]
        return dict(zip(self._schema.names, sizes, strict=True))

    def _record(self, shard: int) -> CommitRecord:
        kept = self._recent.get(shard)
        if kept is None:
            kept = self.index[self.index.position(shard)]
            if len(self._recent) >= RECENT_SHARDS:
                self._recent.clear()
            self._recent[shard] = kept
        return kept

    def _footer(self, record: CommitRecord) -> tuple[pq.FileMetaData, list[Numbering | None]]:
        """A shard's footer, and the numbering of each row group."""
        kept = self._footers.get(record.shard)
        if kept is None:
            where = self._store.path(paths.shard(record.shard))
            data = self._verified(record.shard, record.footer)
            with reading(f"{where}: its footer"):
                metadata = pq.read_metadata(pa.BufferReader(b"PAR1" + data))
            groups = len(record.row_groups)
            self._check_footer(metadata, record, where)
            numberings: list[Numbering | None] = [None] * groups
            if self.manifest.layout.ranked:
                numberings = from_footer(metadata.metadata, self.manifest.layout, groups, where)
            kept = metadata, numberings
            if len(self._footers) >= RECENT_SHARDS:
                self._footers.clear()
            self._footers[record.shard] = kept
        return kept

    def _check_footer(self, metadata: pq.FileMetaData, record: CommitRecord, where: str) -> None:
        """Raise FormatError unless a footer has the columns and rows of its record."""
        found = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
        expected = [group.rows for group in record.row_groups]
        if found != expected:
            raise FormatError(
                f"{where}: its footer has row groups of {found[:9]} rows, committed {expected[:9]}"
            )
        with reading(f"{where}: its schema"):
            schema = metadata.schema.to_arrow_schema()
        if not schema.equals(self._schema):
            raise FormatError(f"{where}: columns: {differences(self._schema, schema)}")
        columns = [metadata.row_group(i).num_columns for i in range(metadata.num_row_groups)]
        if any(count != len(schema) for count in columns):
            raise FormatError(f"{where}: row groups of {columns[:9]} columns, not {len(schema)}")
        width = sum(kind.bit_width for kind in schema.types if _is_fixed(kind)) // 8
        if max(expected, default=0) * width > MAX_UNPACKED:
            raise FormatError(
                f"{where}: {max(expected)} rows of {width} bytes in a row group, at most "
                f"{MAX_UNPACKED} bytes"
            )

    def place_of(self, shard: int) -> str:
        """The file in which a shard is: that of its number, or its replacement's.

        Raises FormatError as `read`.
        """
        self._footer(self._record(shard))
        return self._places.get(shard, paths.shard(shard))

    def copy_shard(self, shard: int, target: Store, name: str) -> None:
        """Publish the file of a shard in another store, by a name there.

        Call `refuse_rewritten` before what is made of it is published. Raises as `read`.
        """
        for _ in range(OPENINGS):
            try:
                return target.copy(self._store, self.place_of(shard), name)
            except FileNotFoundError:  # moved to its place since
                self._footers.pop(shard, None)
        target.copy(self._store, self.place_of(shard), name)

    def _verified(self, shard: int, part: ByteRange) -> bytes:
        """A run of bytes of a shard that are what was committed.

        A shard that was scored again is found beside the cache until it is moved to its place.
        """
        usual = paths.shard(shard)
        data: bytes | None = None
        for name in (self._places.get(shard, usual), paths.renewed_shard(shard), usual):
            try:
                read = self._store.read_range(name, part.offset, part.length)
            except FileNotFoundError:
                continue
            found = xxhash.xxh3_128(read).hexdigest()
            if len(read) == part.length and found == part.xxh3_128:
                if name == usual:
                    self._places.pop(shard, None)
                else:
                    self._places[shard] = name
                if self._listener:
                    self._listener(shard, part.offset, read)
                return read
            if name == usual:
                data = read
        self.refuse_rewritten()
        if not self.manifest.is_final:
            self._refuse_renewed(self._index(allow_incomplete=True))
        where = self._store.path(usual)
        if data is None:
            raise FormatError(
                f"{where} is missing; run the dump again, which scores that shard again"
            )
        found = xxhash.xxh3_128(data).hexdigest()
        raise FormatError(
            f"{where} is damaged: {len(data)} of {part.length} bytes at {part.offset} with "
            f"hash {found}, committed with {part.xxh3_128}; delete the file and run the dump "
            "again, which scores that shard again"
        )


def _is_fixed(kind: pa.DataType) -> bool:
    return bool(pa.types.is_primitive(kind) or pa.types.is_fixed_size_binary(kind))
