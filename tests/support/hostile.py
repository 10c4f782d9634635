"""Caches of a stranger: sound by every hash and seal, and false in one place.

`python -m tests.support.hostile FOLDER SEED COUNT` reads such caches in bounded memory, and fails
on anything but equal rows or one line that names the file.
"""

import contextlib
import copy
import dataclasses
import hashlib
import json
import random
import resource
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import tokenizers
import xxhash
import zstandard

from decant.schemas import TokenizerInfo
from decant.schemas.strict import canonical
from decant.storage import CacheReader, Store, verify
from decant.storage.cache import index as record_index
from decant.storage.cache import paths, writer
from decant.storage.cache.parquet import extent
from decant.storage.files.sealed import SEAL, publish_json
from decant.storage.inspect.collect import inspect
from decant.storage.inspect.head import head, head_text
from decant.storage.inspect.html import report_html
from decant.storage.inspect.report import Report
from decant.storage.inspect.text import report_text
from tests.support import bombs, caches

SETTINGS = caches.Settings(precision="compact", vocab_size=300)
MEMORY = 1 << 31
"""Bytes of address space that reading a small cache may take beyond what is loaded."""
LONGEST = 6000
"""Characters of an error."""
SECONDS = 10.0
"""That reading it may take, on a busy machine."""
VALUES: tuple[Any, ...] = (
    *(None, True, -1, 0, 1, 255, 2**31, 2**40, 2**53 + 1, 2**63, -(2**63), 10**30),
    *(1.5, -0.5, 1e300, "", "x", "../../etc/passwd", "/etc/passwd", "a::b", "\x1b[31m<script>"),
    *("0" * 32, [], {}, [None], {"a": 1}, [[]]),
    *(2**32, -(2**31), 5e-324, "\0", "x" * 200_000, json.loads("[" * 95 + "]" * 95), ["x"] * 9999),
)
DECODING = ("compact", "temperatures", "precision", "ids", "truncation", "format_version")
"""Fields of the manifest that say what the bytes mean: others of them are other values."""


def make(folder: Path) -> Path:
    """A whole cache with a tokenizer."""
    words = {f"w{i}": i for i in range(SETTINGS.vocab_size)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
    data = tokenizer.to_str().encode()
    files = {"tokenizer.json": xxhash.xxh3_128(data).hexdigest()}
    draft = dataclasses.replace(
        SETTINGS.draft(), tokenizer=TokenizerInfo(fingerprint="sha256:1", files=files)
    )
    shards = caches.random_shards(SETTINGS, sequences=2, favoured=range(290, 300))
    sequences = [sequence for shard in shards for sequence in shard]
    writer.write_cache(folder, draft, sequences, caches.plan_of(shards))
    Store(folder).publish(f"{paths.TOKENIZER}/tokenizer.json", data)
    return folder


def read_manifest(cache: Path) -> dict[str, Any]:
    """Its fields, without the seal."""
    fields: dict[str, Any] = json.loads((cache / paths.MANIFEST).read_bytes())
    del fields[SEAL]
    return fields


def write_manifest(cache: Path, fields: dict[str, Any]) -> None:
    """With the id and the seal that such fields have."""
    if "cache_id" in fields:
        free = ("cache_id", "totals", "records", "rejected")
        pinned = {name: value for name, value in fields.items() if name not in free}
        fields = {**fields, "cache_id": hashlib.sha256(canonical(pinned)).hexdigest()[:32]}
    publish_json(Store(cache), paths.MANIFEST, fields)


def write_segment(cache: Path, field: str, data: bytes, entries: int) -> None:
    """The bytes of the plan or the records, with the manifest that names them."""
    manifest = read_manifest(cache)
    name = manifest[field]["name"]
    (cache / name).write_bytes(data)
    digest = xxhash.xxh3_128(data).hexdigest()
    manifest[field] = {"name": name, "entries": entries, "bytes": len(data), "xxh3_128": digest}
    write_manifest(cache, manifest)


def read_plan(cache: Path) -> list[Any]:
    """The lines of the plan."""
    data = (cache / read_manifest(cache)["plan"]["name"]).read_bytes()
    return [json.loads(line) for line in zstandard.decompress(data).splitlines()]


def write_plan(cache: Path, lines: list[Any]) -> None:
    """A sealed plan of any lines."""
    text = b"".join(json.dumps(line).encode() + b"\n" for line in lines)
    write_segment(cache, "plan", zstandard.compress(text), len(lines))


def read_records(cache: Path) -> list[Any]:
    """The rows of the sealed records."""
    rows: list[Any] = pq.read_table(cache / paths.RECORD_INDEX).to_pylist()
    return rows


def write_records(cache: Path, rows: list[Any]) -> None:
    """Sealed records of any rows; raises what Arrow raises where a column cannot hold a value."""
    out = pa.BufferOutputStream()
    batch = pa.RecordBatch.from_pylist(rows, record_index.SCHEMA)
    with pq.ParquetWriter(out, record_index.SCHEMA) as writer:
        writer.write_batch(batch)
    write_segment(cache, "records", out.getvalue().to_pybytes(), len(rows))


def write_shard(cache: Path, data: bytes) -> None:
    """Bytes of the first shard, with records whose hashes are theirs."""
    (cache / paths.shard(0)).write_bytes(data)
    rows = read_records(cache)
    record = rows[0]
    record["bytes"], record["xxh3_128"] = len(data), xxhash.xxh3_128(data).digest()
    record["footer"]["length"] = len(data) - record["footer"]["offset"]
    for part in (record["footer"], *(group["data"] for group in record["row_groups"])):
        end = part["offset"] + part["length"]
        part["xxh3_128"] = xxhash.xxh3_128(data[part["offset"] : end]).digest()
    write_records(cache, rows)


def write_rows(cache: Path, table: pa.Table) -> None:
    """The first shard, of other rows of the same sequences, stored without any bound."""
    footer = pq.read_metadata(cache / paths.shard(0)).metadata
    table = table.replace_schema_metadata(footer)
    data = bombs.parquet(table, use_dictionary=["sample_id"], dictionary_pagesize_limit=1 << 30)
    (start, end), size = extent(pq.read_metadata(pa.BufferReader(data)).row_group(0)), len(data)
    rows = read_records(cache)
    record, whole = rows[0], {"offset": start, "length": end - start, "xxh3_128": bytes(16)}
    (group,) = record["row_groups"]
    record["row_groups"] = [{**group, "data": whole}]
    record["footer"]["offset"] = size - 8 - int.from_bytes(data[-8:-4], "little")
    write_records(cache, rows)
    write_shard(cache, data)


def places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every field and item, at every depth."""
    if at:
        yield at
    if isinstance(value, dict | list):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from places(item, (*at, key))


def put(value: Any, at: tuple[Any, ...], new: Any) -> Any:
    """A copy with another value at a path."""
    whole = copy.deepcopy(value)
    inner = whole
    for key in at[:-1]:
        inner = inner[key]
    inner[at[-1]] = new
    return whole


def without(value: Any, at: tuple[Any, ...]) -> Any:
    """A copy that lacks a field or an item."""
    whole = copy.deepcopy(value)
    inner = whole
    for key in at[:-1]:
        inner = inner[key]
    del inner[at[-1]]
    return whole


def doubled(value: Any, at: tuple[Any, ...]) -> Any:
    """A copy that has an item twice; of a field, under another name too."""
    whole = copy.deepcopy(value)
    inner = whole
    for key in at[:-1]:
        inner = inner[key]
    if isinstance(inner, list):
        inner.insert(at[-1], inner[at[-1]])
    else:
        inner[f"{at[-1]}2"] = inner[at[-1]]
    return whole


def looks(cache: Path) -> dict[str, Callable[[], Any]]:
    """What reads a cache, by name."""
    from decant.student_train import CacheStream

    def stream() -> None:
        batches = iter(CacheStream(cache, batch_size=2, temperature=1.0, lanes=2))
        for _ in range(2):
            next(batches).targets_at(1.0)
        batches.close()

    def rows() -> list[tuple[str, bytes, bytes]]:
        found = []
        for sequence in CacheReader(cache):
            ids = sequence.token_ids.tobytes()
            found.append((sequence.sample_id, sequence.input_ids.tobytes(), ids))
        return found

    def shown(report: Report) -> tuple[str, str]:
        return report_text(report), report_html(report)

    return {
        "verify": lambda: verify(cache),
        "inspect": lambda: shown(inspect(cache, workers=1, keep=True)),
        "head": lambda: head_text(head(cache)),
        "rows": rows,
        "stream": stream,
    }


def faults(cache: Path, what: str, expected: Any) -> Iterator[str]:
    """What is wrong with how a cache is read: a kind of error, lines without a file, time."""
    for name, look in looks(cache).items():
        began = time.monotonic()
        try:
            found = look()
        except ValueError as error:
            if type(error) is UnicodeDecodeError or str(cache) not in str(error):
                yield f"{what}: {name}: names no file: {error!r}\n{traceback.format_exc()}"
            if len(str(error)) > LONGEST or "\n" in str(error):
                yield f"{what}: {name}: no line of {LONGEST} characters: {str(error)[:4000]}"
        except BaseException:
            yield f"{what}: {name}: {traceback.format_exc()}"
        else:
            if name == "rows" and expected is not None and found != expected:
                yield f"{what}: other rows"
        if time.monotonic() - began > SECONDS:
            yield f"{what}: {name}: took {time.monotonic() - began:.1f} s"


def cases(cache: Path, generator: random.Random, count: int) -> Iterator[tuple[str, Any, bool]]:
    """Some of all false values: (what, a function that puts it there, whether rows stay)."""
    manifest, plan, records = read_manifest(cache), read_plan(cache), read_records(cache)
    shard = (cache / paths.shard(0)).read_bytes()
    footer = records[0]["footer"]["offset"]
    kept = json.loads((cache / paths.KEPT_REPORT).read_bytes())
    del kept[SEAL]
    kinds: list[tuple[str, Any, Callable[[Any], None]]] = [
        (paths.MANIFEST, manifest, lambda value: write_manifest(cache, value)),
        ("plan", plan, lambda value: write_plan(cache, value)),
        ("records", records, lambda value: write_records(cache, value)),
        (
            paths.KEPT_REPORT,
            kept,
            lambda value: publish_json(Store(cache), paths.KEPT_REPORT, value),
        ),
    ]
    every = [
        (f"{name} {at}: {new!r:.40}", lambda w=write, v=value, a=at, n=new: w(put(v, a, n)), keeps)
        for name, value, write in kinds
        for at in places(value)
        for new in VALUES
        for keeps in [not (name == paths.MANIFEST and at[0] in DECODING)]
    ]
    every += [
        (
            f"{name} {at}: {change.__name__}",
            lambda w=write, v=value, a=at, c=change: w(c(v, a)),
            keeps,
        )
        for name, value, write in kinds
        for at in places(value)
        for change in (without, doubled)
        for keeps in [not (name == paths.MANIFEST and at[0] in DECODING)]
    ]
    yield from generator.sample(every, min(count, len(every)))
    for _ in range(count // 4):
        inside = generator.choice((range(footer), range(footer, len(shard))))
        at, byte = generator.choice(inside), generator.choice((0, 1, 127, 128, 255))
        changed = shard[:at] + bytes([byte]) + shard[at + 1 :]
        yield f"shard byte {at}: {byte}", lambda d=changed: write_shard(cache, d), False


def run(folder: Path, seed: int, count: int) -> list[str]:
    """Read so many false caches; what went wrong."""
    whole, cache = make(folder / "whole"), folder / "cache"
    looks(whole)["inspect"]()
    expected = looks(whole)["rows"]()
    for look in looks(whole).values():  # loads what is loaded late
        look()
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY,) * 2)
    wrong: list[str] = []
    shutil.copytree(whole, cache)
    for what, put_there, keeps in list(cases(cache, random.Random(seed), count)):
        with contextlib.suppress(pa.ArrowException, OverflowError, TypeError, AttributeError):
            put_there()  # what cannot be written is no case
            wrong += faults(cache, what, expected if keeps else None)
        shutil.rmtree(cache)
        shutil.copytree(whole, cache)
    return wrong


if __name__ == "__main__":
    found = run(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
    print("\n".join(found))
    print(f"{len(found)} faults")
    sys.exit(bool(found))
