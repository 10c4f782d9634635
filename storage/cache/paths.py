"""Every file name inside a cache, spelled once. All are relative to the cache's root."""

import re
from pathlib import PurePath

MANIFEST = "manifest.json"
SHARDS = "shards"
INPUTS = "inputs"
PLAN = "plan"
RECORDS = "records"
GENERATED = "generated"
"""Responses that were sampled from the teacher; stays."""
GENERATION = "generated/_generation.json"
"""What they were sampled with; readers of the folder as a dataset skip the underscore."""
ANSWERS = "generated/_answers"
"""Answers of a chat API until their part is published: a folder for each part."""
TOKENIZER = "tokenizer"
KEPT_REPORT = "stats/inspect.json"
"""Figures that inspect keeps; no part of the cache."""
RECORD_INDEX = "records/records-000000.parquet"
"""The commit records of a final cache that was never extended."""
EXTENSION = "extension"
"""More shards of a final cache, while they are scored: a cache of its own that is moved in."""
RENEWAL = "renewal"
"""Shards that are scored again, until the manifest says so and they have their places."""


def shard(index: int) -> str:
    """The Parquet file of a shard."""
    return f"{SHARDS}/part-{index:06d}.parquet"


def record(index: int) -> str:
    """The commit record of a shard."""
    return f"{SHARDS}/part-{index:06d}.json"


def renewed_shard(index: int) -> str:
    """The Parquet file of a shard that was scored again."""
    return f"{RENEWAL}/part-{index:06d}.parquet"


def renewed_record(index: int) -> str:
    """Its commit record."""
    return f"{RENEWAL}/part-{index:06d}.json"


def inputs(index: int) -> str:
    """The tokens to score for a shard; removed when the cache is final."""
    return f"{INPUTS}/part-{index:06d}.parquet"


def generated(index: int) -> str:
    """The responses to a run of prompts."""
    return f"{GENERATED}/part-{index:06d}.parquet"


def record_index(index: int = 0) -> str:
    """The commit records of a final cache; each generation of it has the next number."""
    return f"{RECORDS}/records-{index:06d}.parquet"


def number(segment: str) -> int:
    """The number in the name of a plan or of commit records: each has a higher one than before."""
    return int(PurePath(segment).name.split(".")[0].rpartition("-")[2])


def segment(kind: str, index: int = 0) -> str:
    """A segment of JSON lines: the plan, or the commit records of format version 1."""
    return f"{kind}/{kind}-{index:06d}.jsonl.zst"


def is_segment(name: str) -> bool:
    """Whether a name is one of a plan or of sealed commit records."""
    return bool(
        re.fullmatch(r"(plan/plan|records/records)-\d{6,9}\.(jsonl\.zst|parquet)", name, re.A)
    )
