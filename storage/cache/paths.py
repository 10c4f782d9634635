"""Every file name inside a cache, spelled once. All are relative to the cache's root."""

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
"""The commit records of a final cache."""


def shard(index: int) -> str:
    """The Parquet file of a shard."""
    return f"{SHARDS}/part-{index:06d}.parquet"


def record(index: int) -> str:
    """The commit record of a shard."""
    return f"{SHARDS}/part-{index:06d}.json"


def inputs(index: int) -> str:
    """The tokens to score for a shard; removed when the cache is final."""
    return f"{INPUTS}/part-{index:06d}.parquet"


def generated(index: int) -> str:
    """The responses to a run of prompts."""
    return f"{GENERATED}/part-{index:06d}.parquet"


def segment(kind: str, index: int = 0) -> str:
    """A segment of JSON lines: the plan, or the commit records of format version 1."""
    return f"{kind}/{kind}-{index:06d}.jsonl.zst"
