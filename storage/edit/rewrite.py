"""An older cache with its shards in the present form: no value changes, fewer bytes hold them."""

import dataclasses

from decant.schemas import FORMAT_VERSION, NO_LOGPROBS, Manifest
from decant.storage.cache.reader import CacheReader
from decant.storage.edit.derived import Blueprint, NewShard, Piece, bytes_of


def rewrite(cache: CacheReader) -> Blueprint:
    """How the shards of a cache are written in the present form, each from one of the cache's.

    Plan, source and rejected sequences stay as they are; only form, version and cache id change.
    Shards without log probs have that form in every version and are linked.
    Raises ValueError if the cache has the present form and version already.
    """
    old = cache.manifest
    draft = in_present_form(old)
    if old.format_version == FORMAT_VERSION and old.ids == draft.ids:
        raise ValueError(
            f"{cache.url} has the form of format version {FORMAT_VERSION} already: nothing is to "
            "be rewritten"
        )
    is_link = bytes_of(old) == bytes_of(draft)
    return Blueprint(
        draft=draft,
        tokenizer_of=cache,
        shards=tuple(NewShard(plan, (Piece.whole(cache, plan),), is_link) for plan in cache.plan),
        files=tuple(old.source.get("generated", ())),
    )


def in_present_form(old: Manifest) -> Manifest:
    """The start of the same cache as it is written today, with the compact code that it has."""
    newer = old.derived(source=old.source, sequences=old.sequences)
    return dataclasses.replace(newer, ids="planes" if old.precision == NO_LOGPROBS else "ranked")
