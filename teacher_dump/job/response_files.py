"""The files of sampled responses in a cache: their columns, their names, what a row says.

A part is one Parquet file, finished or absent; the manifest of the cache pins its hash.
"""

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from decant.schemas import FormatError
from decant.storage import Store
from decant.storage.cache import paths
from decant.teacher_dump.engines.seam import Response
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


SAMPLER_LOGPROBS = "sampler_logprobs"
BY_ANOTHER = pa.schema(
    [*COLUMNS, (SAMPLER_LOGPROBS, pa.list_(pa.float32()))],
    metadata={
        **COLUMNS.metadata,
        b"sampler_logprobs": b"of response_ids: nats that the model which sampled them gave to"
        b" each, over the whole vocabulary, at temperature 1 and before top-p",
    },
)
"""Of responses that another model than the teacher sampled."""


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


def row_of(
    tokenizer: Any,
    record: Record,
    prompt_ids: NDArray[np.int32],
    response: Response,
    suffix: str,
) -> dict[str, Any]:
    """The row of a response to a record's prompt, whose id ends with the suffix."""
    fields = record.fields
    text = tokenizer.decode(response.token_ids.tolist(), skip_special_tokens=True)
    prompt, conversation = fields.get("prompt"), None
    beside = {name: fields.get(name) for name in ("tools", "chat_template_kwargs")}
    if prompt is None:
        prompt = tokenizer.decode(prompt_ids.tolist())
        said = [*fields["messages"], {"role": "assistant", "content": text}]
        conversation = json.dumps(said, ensure_ascii=False)
    row = {
        "id": record.sample_id + suffix,
        "prompt": prompt,
        "response": text,
        "conversation": conversation,
        "prompt_ids": prompt_ids,
        "response_ids": response.token_ids,
        "finish_reason": response.finish_reason,
        **{name: _json(value) for name, value in beside.items()},
    }
    return row if response.logprobs is None else {**row, SAMPLER_LOGPROBS: response.logprobs}


def _json(value: Any) -> str | None:
    if value is None or isinstance(value, str):
        return value
    return json.dumps(value, ensure_ascii=False)


def _as_context(message: dict[str, Any]) -> dict[str, Any]:
    """The message as one that is not to be learned."""
    kept = {name: value for name, value in message.items() if name not in TARGET_FIELDS}
    return kept if message.get("role") != "assistant" else {**kept, "weight": 0}


def publish_part(store: Store, part: int, rows: list[dict[str, Any]]) -> None:
    """Publish the rows of one part."""
    schema = COLUMNS
    if any("top_ids" in row for row in rows):
        schema = CHAT_COLUMNS
    elif any(SAMPLER_LOGPROBS in row for row in rows):
        schema = BY_ANOTHER
    table = pa.Table.from_pylist(rows, schema=schema)
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
