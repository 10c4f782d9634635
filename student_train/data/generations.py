"""Which generation of its caches a run trains on, and what is said where that changes."""

import logging
from collections.abc import Sequence

from decant.storage import CacheReader

log = logging.getLogger(__name__)

GENERATIONS = "generations"
"""What the state of a stream says of the caches beside their ids."""


def generations_of(readers: Sequence[CacheReader]) -> list[str]:
    """What tells one generation of each cache from another: the hash of its records."""
    return [reader.manifest.records.xxh3_128 for reader in readers if reader.manifest.records]


def note_rewritten(
    readers: Sequence[CacheReader], before: list[str] | None, now: list[str] | None
) -> None:
    """Say that sequences were scored again since a state was saved; their order is the same.

    Older states, and caches that are not complete, say nothing of it.
    """
    for reader, old, new in zip(readers, before or (), now or (), strict=False):
        if old != new:
            log.warning(
                "%s was rewritten since the checkpoint (sequences were scored again): from here on "
                "its generation %d is trained on",
                reader.url,
                reader.generation,
            )
