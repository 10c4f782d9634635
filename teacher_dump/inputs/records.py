"""One record of a source, and the error that names a bad one."""

from dataclasses import dataclass
from typing import Any

Row = tuple[str, str, dict[str, Any]]
"""The id it gets without an id field, where it stands, its fields."""


class SourceError(ValueError):
    """The input data, or the path to it, cannot be used; the message says where and what to do."""


@dataclass(frozen=True, slots=True)
class Record:
    """One record of the source, as it was found."""

    sample_id: str
    fields: dict[str, Any]
    where: str
    """For error messages, e.g. "data.jsonl.zst line 12" (lines from 1, rows from 0)."""
