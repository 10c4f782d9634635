"""Several caches of one teacher as one."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from decant.schemas import FormatError, Manifest, to_json
from decant.storage.cache.lineage import MEANING, sequences_of, source_of
from decant.storage.cache.reader import CacheReader
from decant.storage.cache.rows import Rows
from decant.storage.cache.same_tokenizer import same_ids
from decant.storage.edit.derived import Blueprint, Piece, new_shards
from decant.storage.edit.figures import id_hashes, token_hashes
from decant.storage.edit.survey import Survey, grouped, survey

ON_DUPLICATE = ("refuse", "keep-first", "keep-all")
TOKENIZER = "tokenizer.fingerprint"
UNKNOWN = "unknown"
"""Fingerprint of the teacher of an imported cache."""
Progress = Callable[[int, int], None]


class Unlike(ValueError):
    """Caches that cannot be one."""


@dataclass(frozen=True, slots=True)
class Duplicates:
    """Sequences whose sample id an earlier cache has."""

    sequences: int
    other_tokens: int
    """Those of them whose tokens are not those of a sequence with that id there."""
    first_id: str
    """One of the ids."""


def merge(
    caches: Sequence[CacheReader],
    on_duplicate: str = "refuse",
    progress: Progress | None = None,
) -> tuple[Blueprint, Duplicates]:
    """How the sequences of the caches, in turn, become one cache.

    A sequence is a duplicate if an earlier cache has its sample id; of those of one cache none is.
    `keep-first` leaves duplicates out. Shards stay as they are, but for what is left out.
    Raises Unlike, naming the fields, for caches of another teacher, tokenizer or layout, and
    ValueError for duplicates that are to be refused.
    """
    if on_duplicate not in ON_DUPLICATE:
        raise ValueError(f"--on-duplicate {on_duplicate!r} is not one of {ON_DUPLICATE}")
    if len(caches) < 2:
        raise ValueError("a merge needs at least two caches")
    refuse_unlike(caches)
    manifests = [cache.manifest for cache in caches]
    known = _surveys(caches, progress)
    keeps, duplicates = _first_ones(known)
    if duplicates.sequences and on_duplicate == "refuse":
        raise ValueError(
            f"{duplicates.sequences} sequences have a sample id that a cache before has "
            f"({duplicates.other_tokens} of them with other tokens), first "
            f"{duplicates.first_id!r}: --on-duplicate keep-first leaves them out, keep-all keeps "
            "them"
        )
    if on_duplicate == "keep-all":
        keeps = [np.ones(len(entry), bool) for entry in known]
    pieces: list[Piece] = []
    for entry, keep in zip(known, keeps, strict=True):
        pieces += entry.pieces(keep)
    origins = [(cache.url, cache.manifest) for cache in caches]
    draft = manifests[0].derived(
        source=source_of("merge", {"on_duplicate": on_duplicate}, origins),
        sequences=sequences_of(manifests),
    )
    draft = dataclasses.replace(draft, messages=any(m.messages for m in manifests))
    size = max(plan.num_targets for cache in caches for plan in cache.plan)
    groups = grouped(pieces, size) if on_duplicate == "keep-first" else [[p] for p in pieces]
    shards = new_shards(groups, draft)
    return Blueprint(draft=draft, tokenizer_of=caches[0], shards=shards), duplicates


def refuse_unlike(caches: Sequence[CacheReader]) -> None:
    """Raise Unlike, with each differing field, unless the caches can be one."""
    first = caches[0]
    ours = _likeness(first.manifest)
    for other in caches[1:]:
        theirs = _likeness(other.manifest)
        differing = [
            f"{name} is {ours[name]!r} and {theirs[name]!r}"
            for name in ours
            if ours[name] != theirs[name] and not (name == TOKENIZER and _same_ids(first, other))
        ]
        if differing:
            if "sampler_logprobs" in " ".join(differing):
                differing.append("`mixture` of a training takes both as they are")
            raise Unlike(
                f"{first.url} and {other.url} cannot be one cache: " + "; ".join(differing)
            )


def _same_ids(ours: CacheReader, theirs: CacheReader) -> bool:
    """Whether every id means the same, whatever else the tokenizers choose."""
    try:
        same_ids(ours, theirs)
    except FormatError:
        return False
    return True


def _likeness(manifest: Manifest) -> dict[str, Any]:
    """What must be equal in caches that are to be one; names are those of the manifest."""
    teacher = manifest.teacher
    imported = {"teacher.name": teacher.name} if teacher.fingerprint == UNKNOWN else {}
    return {
        **imported,
        "teacher.fingerprint": teacher.fingerprint,
        "teacher.dtype": teacher.dtype,
        "teacher.vocab_size": teacher.vocab_size,
        TOKENIZER: manifest.tokenizer.fingerprint,
        "shared_vocab_size": manifest.shared_vocab_size,
        **{f"truncation.{k}": v for k, v in dataclasses.asdict(manifest.truncation).items()},
        "temperatures": list(manifest.temperatures),
        "precision": manifest.precision,
        "sampler_logprobs": manifest.sampler_logprobs,
        "compact": to_json(manifest.compact) if manifest.compact else None,
        **{f"source.{name}": manifest.source.get(name) for name in MEANING},
    }


def _surveys(caches: Sequence[CacheReader], progress: Progress | None) -> list[Survey]:
    total = sum(len(cache.row_groups()) for cache in caches)
    known: list[Survey] = []
    done = 0

    def columns(rows: Rows) -> dict[str, NDArray]:
        return {"id": id_hashes(rows.sample_ids), "tokens": token_hashes(rows)}

    def step(groups: int, _: int) -> None:
        if progress:
            progress(done + groups, total)

    for cache in caches:
        known.append(survey(cache, columns, step))
        done += len(cache.row_groups())
    return known


def _first_ones(known: Sequence[Survey]) -> tuple[list[NDArray[np.bool_]], Duplicates]:
    """For each cache [S] which sequences are of an id that no cache before has."""
    keeps: list[NDArray[np.bool_]] = []
    sequences = other_tokens = 0
    first_id = ""
    for i, entry in enumerate(known):
        before = [other.columns["id"] for other in known[:i]]
        known_ids = np.unique(np.concatenate(before)) if before else entry.columns["id"][:0]
        again = np.isin(entry.columns["id"], known_ids)
        keeps.append(~again)
        if not again.any():
            continue
        if not sequences:
            first_id = entry.cache[int(np.flatnonzero(again)[0])].sample_id
        sequences += int(again.sum())
        pairs = [_pairs(other) for other in known[:i]]
        other_tokens += int((again & ~np.isin(_pairs(entry), np.concatenate(pairs))).sum())
    return keeps, Duplicates(sequences, other_tokens, first_id)


def _pairs(entry: Survey) -> NDArray[np.bytes_]:
    """[S] id and tokens of each sequence, as one value."""
    both = np.stack([entry.columns["id"], entry.columns["tokens"]], axis=1)
    return np.ascontiguousarray(both).view("S32")[:, 0]
