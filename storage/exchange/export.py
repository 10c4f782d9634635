"""Write a cache as plain lists for other tools: Parquet files, or a Hugging Face dataset.

Decides nothing about values: they are what the reader gives, log probs decoded to float32. Unused
slots are left out, so a list of K entries is as long as what the target keeps.
"""

import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from decant.schemas import Layout, Manifest, to_json
from decant.schemas.arrow import scalar_columns, temperature_columns
from decant.schemas.distributions import FIELDS, SLOTS
from decant.storage.cache.reader import CacheReader
from decant.storage.cache.rows import Rows
from decant.storage.files.durable import staged_directory

FORMATS = ("parquet", "hf")
ROWS = ("sequences", "targets")
METADATA = b"decant"
"""Key of the Arrow schema's metadata: JSON that says which cache the values come from."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportReport:
    """What was written."""

    sequences: int
    targets: int
    bytes: int
    """Of all files."""


def export(
    url: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    file_format: str = "parquet",
    rows: str = "sequences",
    progress: Callable[[int, int], None] | None = None,
) -> ExportReport:
    """Write a final cache into a new local directory, one row group in memory at a time.

    `file_format` "parquet" gives one file per shard; "hf" a directory for
    `datasets.load_from_disk`. `rows` "sequences" gives a row per sequence with lists of lists,
    "targets" a row per target. `progress` is called with (row groups done, row groups in all).

    Raises FileExistsError if `target` exists, FormatError if the cache is damaged or not final.
    Nothing is left under `target` then.
    """
    if file_format not in FORMATS or rows not in ROWS:
        raise ValueError(f"cannot export {rows!r} as {file_format!r}: expected {ROWS}, {FORMATS}")
    reader = CacheReader(url)
    table_of = _sequences if rows == "sequences" else _targets
    layout = reader.manifest.layout
    metadata = {METADATA: json.dumps(_origin(reader.manifest), ensure_ascii=False)}
    groups = reader.row_groups()

    def tables(members: Iterable[int]) -> Iterator[pa.Table]:
        for i in members:
            yield table_of(reader.read(groups[i]), layout).replace_schema_metadata(metadata)
            if progress:
                progress(i + 1, len(groups))

    with staged_directory(target) as folder:
        if file_format == "parquet":
            for shard, members in itertools.groupby(range(len(groups)), lambda i: groups[i].shard):
                _write_parquet(folder / f"part-{shard:06d}.parquet", tables(members))
        else:
            _write_hf(folder, tables(range(len(groups))), metadata[METADATA])
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    targets = reader.index.totals().targets
    return ExportReport(sequences=len(reader), targets=targets, bytes=size)


def _origin(manifest: Manifest) -> dict:
    fields = to_json(manifest)
    names = ("cache_id", "teacher", "shared_vocab_size", "truncation", "temperatures", "precision")
    return {name: fields[name] for name in names} | {
        "tokenizer_fingerprint": manifest.tokenizer.fingerprint,
        "source": manifest.source,
    }


def _write_parquet(path: Path, tables: Iterator[pa.Table]) -> None:
    first = next(tables)
    with pq.ParquetWriter(
        path,
        first.schema,
        compression="zstd",
        use_dictionary=["sequence", "sample_id"],
        write_page_checksum=True,
    ) as writer:
        for table in itertools.chain([first], tables):
            if len(table):  # no row per target where all sequences were rejected
                writer.write_table(table, row_group_size=len(table))


def _write_hf(folder: Path, tables: Iterator[pa.Table], description: str) -> None:
    import datasets  # takes a second, and nothing else here needs it

    scratch = folder / "scratch"
    scratch.mkdir()
    first = next(tables)
    with pa.ipc.new_stream(str(scratch / "all.arrow"), first.schema) as stream:
        for table in itertools.chain([first], tables):
            stream.write_table(table)
    shown = not datasets.utils.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        dataset = datasets.Dataset.from_file(str(scratch / "all.arrow"))
        dataset.info.description = description
        dataset.save_to_disk(str(folder))
    finally:
        if shown:
            datasets.enable_progress_bars()
    (scratch / "all.arrow").unlink()
    scratch.rmdir()


def _sequences(rows: Rows, layout: Layout) -> pa.Table:
    """A row per sequence; n targets each: lists of L tokens, of n targets, of n lists."""

    def per_token(values: NDArray) -> pa.Array:
        return _lists(rows.row_starts, pa.array(values))

    def per_target(values: pa.Array) -> pa.Array:
        return _lists(rows.target_starts, values)

    return pa.table(
        {
            "sequence": rows.sequence,
            "sample_id": pa.array(rows.sample_ids, pa.string()),
            "input_ids": per_token(rows.input_ids),
            "is_target": per_token(rows.is_target),
            "positions": per_target(pa.array(rows.positions)),
            **{name: per_target(values) for name, values in _distributions(rows, layout)},
            **_messages(rows),
        }
    )


def _messages(rows: Rows) -> dict[str, pa.Array]:
    """A column of conversations, null where there is none, in caches that keep them."""
    if rows.messages is None:
        return {}
    return {"messages": pa.array([text or None for text in rows.messages], pa.string())}


def _targets(rows: Rows, layout: Layout) -> pa.Table:
    """A row per target: what SQL takes."""
    counts = np.diff(rows.target_starts)
    sample = np.repeat(np.arange(len(rows), dtype=np.int32), counts)
    return pa.table(
        {
            "sequence": np.repeat(rows.sequence, counts),
            "sample_id": pa.array(rows.sample_ids, pa.string()).take(pa.array(sample)),
            "position": rows.positions,
            "label": rows.labels,
            **dict(_distributions(rows, layout)),
        }
    )


def _distributions(rows: Rows, layout: Layout) -> Iterator[tuple[str, pa.Array]]:
    """Columns of n rows: lists of the entries in use, and the scalars of every temperature."""
    used = rows.token_ids >= 0
    starts = np.concatenate([[0], np.cumsum(used.sum(axis=1))])
    for name, values in rows.known().items():
        if FIELDS[name].axis == SLOTS and layout.slots:
            yield name, _lists(starts, pa.array(values[used]))
    for name, i, column in temperature_columns(layout):
        yield column, pa.array(getattr(rows, name)[:, i])
    for name in scalar_columns(layout):
        yield name, pa.array(getattr(rows, name))


def _lists(starts: NDArray, values: pa.Array) -> pa.Array:
    return pa.ListArray.from_arrays(pa.array(starts, pa.int32()), values)
