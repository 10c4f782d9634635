"""The files of sampled responses in a cache: their columns, their names, what a row says.

A part is one Parquet file, finished or absent; the manifest of the cache pins its hash.
"""

import json
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from decant.schemas import FormatError
from decant.storage import Store
from decant.storage.cache import paths
from decant.teacher_dump.inputs.messages import TARGET_FIELDS, read_conversation
from decant.teacher_dump.inputs.records import Record

COLUMNS = pa.schema(
    [
        ("id", pa.string()),
        ("prompt", pa.string()),
        ("response", pa.string()),
        ("conversation", pa.string()),
        ("prompt_ids", pa.list_(pa.int32())),
        ("response_ids", pa.list_(pa.int32())),
        ("finish_reason", pa.string()),
        ("tools", pa.string()),
        ("chat_template_kwargs", pa.string()),
    ],
    metadata={
        "conversation": "JSON of the record's messages and the answer; null for a plain prompt",
        "prompt": "the record's prompt; for messages, the text that the template makes of them",
        "tools": "JSON of the record's own beside its messages; null without, and so are"
        " chat_template_kwargs",
    },
)

CHAT_COLUMNS = pa.schema(
    [
        *COLUMNS,
        ("problem", pa.string()),
        ("model", pa.string()),
        ("system_fingerprint", pa.string()),
        ("logprobs", pa.list_(pa.float32())),
        ("top_ids", pa.list_(pa.list_(pa.int32()))),
        ("top_logprobs", pa.list_(pa.list_(pa.float32()))),
        ("unnamed_mass", pa.list_(pa.float32())),
        ("num_unnamed", pa.int32()),
    ],
    metadata={
        **COLUMNS.metadata,
        b"problem": b"why an answer of a chat API has no distributions, else null; its"
        b" response_ids are then those of its text",
        b"logprobs": b"of response_ids; -9999 where the API does not tell",
        b"top_ids": b"the most probable tokens in place of each of response_ids",
        b"unnamed_mass": b"of those that no one id of the tokenizer stands for",
    },
)
"""Of the answers of a chat API, which come with their distributions."""


def part_names(store: Store) -> list[str]:
    """The files of responses, in order."""
    names = (name for name in store.names(paths.GENERATED) if not name.startswith("."))
    return [f"{paths.GENERATED}/{name}" for name in names if name.endswith(".parquet")]


def hash_parts(store: Store) -> dict[str, str]:
    """File -> xxh3_128 of all that generation leaves in the cache, for the manifest."""
    return {name: store.hash(name) for name in [paths.GENERATION, *part_names(store)]}


def system_fingerprints(store: Store) -> list[str]:
    """What a chat API has said of itself with its answers."""
    name = "system_fingerprint"
    tables = (read_part(store, part) for part in part_names(store))
    found = (set(t.column(name).to_pylist()) for t in tables if name in t.column_names)
    return sorted({value for values in found for value in values if value})


def rows_of(store: Store) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every row of every part in order, with where it stands. Raises FormatError if damaged."""
    for name in part_names(store):
        for row, fields in enumerate(read_part(store, name).to_pylist()):
            yield f"{store.path(name)} row {row}", fields


def conversation_of(row: dict[str, Any], where: str, everything: bool) -> str:
    """What was asked and answered, as a cache keeps it; "" where it was a plain prompt.

    `everything`: earlier answers are targets too.
    """
    if not row["conversation"]:
        return ""
    messages = json.loads(row["conversation"])
    if not everything:
        *before, answer = messages
        messages = [*map(_as_context, before), answer]
    fields = {"messages": messages} | {
        name: row[name] for name in ("tools", "chat_template_kwargs") if row.get(name)
    }
    return read_conversation(Record(row["id"], fields, where)).kept().to_text()


def _as_context(message: dict[str, Any]) -> dict[str, Any]:
    """The message as one that is not to be learned."""
    kept = {name: value for name, value in message.items() if name not in TARGET_FIELDS}
    return kept if message.get("role") != "assistant" else {**kept, "weight": 0}


def publish_part(store: Store, part: int, rows: list[dict[str, Any]]) -> None:
    """Publish the rows of one part."""
    is_chat = any("top_ids" in row for row in rows)
    table = pa.Table.from_pylist(rows, schema=CHAT_COLUMNS if is_chat else COLUMNS)
    with store.staged(paths.generated(part)) as temporary:
        pq.write_table(table, temporary, compression="zstd", write_page_checksum=True)


def read_part(store: Store, name: str) -> pa.Table:
    """The rows of one part. Raises FormatError if they are damaged."""
    data = store.read(name)
    try:
        return pq.read_table(pa.BufferReader(data), page_checksum_verification=True)
    except Exception as error:  # whatever a damaged file may raise
        raise FormatError(
            f"{store.path(name)} is damaged: {error}; delete it, and the same command samples it "
            "again"
        ) from error
