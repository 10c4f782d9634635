"""Write a cache in a form that other tools read: Parquet files, or a Hugging Face dataset.

Decides nothing about values, and nothing about columns: each form's own module makes its tables.
"""

import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from decant.schemas import Manifest, to_json
from decant.storage.cache.reader import CacheReader
from decant.storage.cache.rows import Rows
from decant.storage.exchange import axolotl, distillkit, lists
from decant.storage.exchange.peers import Peer
from decant.storage.files.durable import staged_directory

FORMATS = ("parquet", "hf")
ROWS = ("sequences", "targets")
PEERS = ("axolotl", "distillkit")
FORMS = ("lists", "hf", *PEERS)
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
    to: str = "lists",
    file_format: str | None = None,
    rows: str = "sequences",
    temperature: float = 1.0,
    renormalise: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> ExportReport:
    """Write a final cache into a new local directory, one row group in memory at a time.

    `to` is "lists", "axolotl" or "distillkit"; "hf" is lists in a saved dataset. `file_format`
    "parquet" gives one file per shard, and is the default of lists; "hf" a directory for
    `datasets.load_from_disk`. `rows` "sequences" gives a row per sequence with lists of lists,
    "targets" a row per target. For axolotl, log probs are those at a stored `temperature`, and add
    up to 1 over the kept entries if told to `renormalise`. `progress` is called with (row groups
    done, row groups in all).

    Raises FileExistsError if `target` exists, FormatError if the cache is damaged or not final,
    ValueError if it has nothing that the tool could read. Nothing is left under `target` then.
    """
    if file_format is None:
        file_format = "parquet" if to == "lists" else "hf"
    if to == "hf" and file_format != "hf":
        raise ValueError("--to hf writes a saved dataset: --format parquet is for the others")
    if file_format not in FORMATS or rows not in ROWS or to not in FORMS:
        raise ValueError(
            f"cannot export {rows!r} to {to!r} as {file_format!r}: expected {ROWS}, {FORMS}, "
            f"{FORMATS}"
        )
    if rows != "sequences" and to in PEERS:
        raise ValueError(f"--to {to} reads a row per sequence: --rows {rows} is for lists")
    if to != "axolotl" and (temperature != 1 or renormalise):
        name = "--renormalise" if renormalise else f"--temperature {temperature:g}"
        raise ValueError(f"{name} has no effect with --to {to}")
    reader = CacheReader(url)
    metadata = {METADATA: json.dumps(_origin(reader.manifest), ensure_ascii=False)}
    groups = reader.row_groups()
    if to in PEERS:
        peer = Peer.of(reader, to, temperature=temperature, renormalise=renormalise)
        make = axolotl.table if to == "axolotl" else distillkit.table

        def made(group: Rows) -> Iterator[pa.Table]:
            return (make(peer, sequences) for sequences in peer.batches(group))

    else:
        plain = lists.sequences if rows == "sequences" else lists.targets

        def made(group: Rows) -> Iterator[pa.Table]:
            yield plain(group, reader.manifest.layout)

    def tables(members: Iterable[int]) -> Iterator[pa.Table]:
        for i in members:
            for table in made(reader.read(groups[i])):
                yield table.replace_schema_metadata(metadata)
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
