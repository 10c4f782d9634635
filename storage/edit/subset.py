"""Some of the sequences of a cache, or each of them once, as a cache of their own."""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from decant.schemas import Layout
from decant.schemas.strict import canonical
from decant.storage.cache.lineage import sequences_of, source_of
from decant.storage.cache.reader import CacheReader
from decant.storage.cache.rows import Rows
from decant.storage.edit.derived import Blueprint, new_shards
from decant.storage.edit.figures import figures_of, id_hashes, known_figures, token_hashes
from decant.storage.edit.predicate import Predicate
from decant.storage.edit.survey import Survey, grouped, survey

Progress = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """Which sequences of a cache are wanted; what is not said chooses nothing away."""

    ids: tuple[str, ...] = ()
    """Sample ids; all sequences of each."""
    where: str = ""
    """A condition on the figures of a sequence."""
    share: float = 1.0
    """Of those that are left then, chosen at random; at least one."""
    seed: int = 0
    """Of the random choice."""
    invert: bool = False
    """Take all the others instead."""

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ValueError(f"--share {self.share:g} must lie in (0, 1]")
        if self.seed < 0:
            raise ValueError(f"--seed {self.seed} must be at least 0")
        if self.seed and self.share == 1:
            raise ValueError("--seed has no effect without --share")
        if not (self.ids or self.where or self.share < 1):
            raise ValueError("nothing is chosen: give --ids, --ids-file, --where or --share")


def read_ids(path: str) -> tuple[str, ...]:
    """Sample ids from a file: a JSON list (.json), JSON strings (.jsonl), or one a line.

    Raises ValueError if it holds none, or something else.
    """
    text = Path(path).expanduser().read_text(encoding="utf-8")
    kind = Path(path).suffix
    ids: Any = text.splitlines()
    try:
        if kind == ".json":
            ids = json.loads(text)
        elif kind == ".jsonl":
            ids = [json.loads(line) for line in text.splitlines() if line.strip()]
    except ValueError as error:
        raise ValueError(f"{path} is not {kind[1:]} of sample ids: {error}") from None
    if not isinstance(ids, list) or not all(isinstance(entry, str) for entry in ids):
        raise ValueError(f"{path}: expected a list of strings, which sample ids are")
    found = tuple(entry for entry in ids if entry)
    if not found:
        raise ValueError(f"{path} holds no sample id")
    return found


def subset(
    cache: CacheReader, choice: Choice, progress: Progress | None = None, shard_targets: int = 0
) -> tuple[Blueprint, Survey]:
    """How the chosen sequences become a cache, in their order; and what was found of all.

    Shards are joined until they have `shard_targets`; 0 = as many as the largest of the cache.
    Raises ValueError for ids that the cache does not have and for a condition that it cannot tell.
    """
    layout = cache.manifest.layout
    predicate = None
    if choice.where:
        predicate = Predicate(choice.where, known_figures(layout), _absent(layout, cache))

    def columns(rows: Rows) -> dict[str, NDArray]:
        found: dict[str, NDArray] = {}
        if choice.ids:
            found["id"] = id_hashes(rows.sample_ids)
        if predicate:
            figures = figures_of(rows, layout)
            found["holds"] = predicate.holds(figures)
        return found

    known = survey(cache, columns, progress)
    keep = np.ones(len(known), bool)
    if choice.ids:
        keep &= _with_ids(known.columns["id"], choice.ids, cache.url)
    if predicate:
        keep &= known.columns["holds"]
    if choice.share < 1:
        keep = _share(keep, choice.share, choice.seed)
    if choice.invert:
        keep = ~keep
    if not keep.any():
        raise ValueError(f"{cache.url}: none of {len(known)} sequences is left")
    options = {
        "ids": len(choice.ids) or "",
        "ids_xxh3_128": _hash_of(choice.ids) if choice.ids else "",
        "where": choice.where,
        "share": choice.share if choice.share < 1 else "",
        "seed": choice.seed if choice.share < 1 else "",
        "invert": choice.invert or "",
    }
    return _part("subset", options, known, keep, shard_targets), known


def dedupe(
    cache: CacheReader, progress: Progress | None = None, shard_targets: int = 0
) -> tuple[Blueprint, NDArray[np.int64]]:
    """How the sequences become a cache in which no two have the same tokens.

    Of equal ones the first that was scored stays. Gives [S] for each sequence of the cache the one
    that stands for it: itself, if it stays. `shard_targets` as in `subset`.
    """
    known = survey(cache, lambda rows: {"tokens": token_hashes(rows)}, progress)
    order = np.lexsort((np.arange(len(known)), known.is_rejected, known.columns["tokens"]))
    hashes = known.columns["tokens"][order]
    is_first = np.ones(len(known), bool)
    is_first[1:] = hashes[1:] != hashes[:-1]
    stands = np.empty(len(known), np.int64)
    stands[order] = order[is_first][np.cumsum(is_first) - 1]
    keep = stands == np.arange(len(known))
    return _part("dedupe", {"by": "token_ids"}, known, keep, shard_targets), stands


def _part(
    operation: str,
    options: dict[str, Any],
    known: Survey,
    keep: NDArray[np.bool_],
    shard_targets: int,
) -> Blueprint:
    cache = known.cache
    size = shard_targets or max(plan.num_targets for plan in cache.plan)
    draft = cache.manifest.derived(
        source=source_of(operation, options, [(cache.url, cache.manifest)]),
        sequences=sequences_of([cache.manifest]),
    )
    groups = grouped(list(known.pieces(keep)), size)
    return Blueprint(draft=draft, tokenizer_of=cache, shards=new_shards(groups, draft))


def _absent(layout: Layout, cache: CacheReader) -> str:
    method = cache.manifest.truncation.method
    return (
        f"truncation.method {method!r} stores no log probs of kept entries; {cache.url} gives "
        f"{', '.join(known_figures(layout))}"
    )


def _with_ids(hashes: NDArray, ids: Iterable[str], url: str) -> NDArray[np.bool_]:
    """[S] which sequences have one of these ids. Raises ValueError for an id that none has."""
    names = tuple(dict.fromkeys(ids))
    wanted = id_hashes(list(names))
    absent = [names[i] for i in np.flatnonzero(~np.isin(wanted, hashes))]
    if absent:
        said = ", ".join(repr(name) for name in absent[:5])
        raise ValueError(
            f"{url} has no sequence of {len(absent)} of {len(names)} sample ids, first {said}: "
            "leave them out"
        )
    found: NDArray[np.bool_] = np.isin(hashes, wanted)
    return found


def _share(keep: NDArray[np.bool_], share: float, seed: int) -> NDArray[np.bool_]:
    """This share of the chosen ones, at least one, at random."""
    candidates = np.flatnonzero(keep)
    if not len(candidates):
        return keep
    count = max(1, round(share * len(candidates)))
    chosen = np.random.default_rng(seed).choice(candidates, count, replace=False)
    out = np.zeros(len(keep), bool)
    out[chosen] = True
    return out


def _hash_of(ids: tuple[str, ...]) -> str:
    return xxhash.xxh3_128(canonical(sorted(set(ids)))).hexdigest()
