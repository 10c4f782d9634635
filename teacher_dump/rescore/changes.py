"""Score the sequences of a cache again: with other temperatures, another k, or another teacher."""

import dataclasses
import os
from dataclasses import dataclass
from typing import Any

from decant.schemas import PRECISIONS, Manifest, Truncation
from decant.schemas.truncation import METHODS
from decant.storage import CacheReader
from decant.teacher_dump.config import DumpConfig
from decant.teacher_dump.engines.config import DTYPES, QUANTIZATIONS, REMOTE, TeacherConfig
from decant.teacher_dump.inputs.config import SequenceConfig, SourceConfig

UNKNOWN = "unknown"
"""Fingerprint of the teacher of an imported cache."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Changes:
    """What the new cache has otherwise than the old one; None: nothing."""

    method: str | None = None
    k: int | None = None
    p: float | None = None
    min_k: int | None = None
    draws: int | None = None
    seed: int | None = None
    temperatures: tuple[float, ...] | None = None
    more_temperatures: tuple[float, ...] = ()
    """Besides those of the old cache."""
    precision: str | None = None
    shard_targets: int | None = None
    limit: int = 0
    """Only the first sequences, this many; 0 = all."""


def rescore_config(url: str, out: str, teacher: TeacherConfig, changes: Changes) -> DumpConfig:
    """The dump that scores the sequences of the cache at `url` again into `out`.

    Where the teacher's path is empty it is the one that the cache names; its dtype auto is the one
    that the cache was computed in. Raises ValueError where the changes do not go together.
    """
    manifest = CacheReader(url).manifest
    sequences = manifest.sequences
    truncation = _truncation(manifest.truncation, changes, url)
    without = not truncation.rule.has_logprobs
    if without and [*changes.more_temperatures, *(changes.temperatures or [])] not in ([], [1.0]):
        raise ValueError(
            f"{url} holds {manifest.truncation.text()}"
            + f", and method {truncation.method} would be stored" * bool(changes.method)
            + ": other temperatures than 1 need log probs of kept entries. `decant rescore` with "
            "--method topk and each --temperature scores it with both"
        )
    more: dict[str, Any] = {}
    if shard_targets := changes.shard_targets or sequences.get("shard_targets"):
        more["shard_targets"] = int(shard_targets)
    if changes.precision or (manifest.precision in PRECISIONS and not without):
        more["precision"] = changes.precision or manifest.precision
    return DumpConfig(
        output=out,
        teacher=teacher_of(manifest, teacher),
        source=SourceConfig(path=os.path.expanduser(url), format="cache", limit=changes.limit),
        sequences=SequenceConfig(
            max_length=int(sequences.get("max_length") or _longest(url)),
            overlong="error",
            add_bos=bool(sequences.get("add_bos")),
        ),
        truncation=truncation,
        temperatures=_temperatures(manifest, changes, without),
        **more,
    )


def teacher_of(manifest: Manifest, teacher: TeacherConfig) -> TeacherConfig:
    """The teacher to score with: where nothing is said, as the cache was scored."""
    changed: dict[str, Any] = {}
    if teacher.engine in REMOTE:
        return teacher
    dtype, _, quantization = manifest.teacher.dtype.partition("+")
    if teacher.path == OF_CACHE:
        name, _, adapter = manifest.teacher.name.partition(" + ")
        path, at, revision = name.rpartition("@")
        changed["path"] = path if at and not os.path.exists(name) else name
        if at and not os.path.exists(name) and not teacher.revision:
            changed["revision"] = revision
        if adapter and not teacher.adapter and teacher.engine == "transformers":
            changed["adapter"] = adapter
        if (
            quantization in QUANTIZATIONS
            and quantization
            and not teacher.quantization
            and teacher.engine == "transformers"
        ):
            changed["quantization"] = quantization
    if teacher.dtype == "auto" and dtype in DTYPES and teacher.path == OF_CACHE:
        changed["dtype"] = dtype
    return dataclasses.replace(teacher, **changed)


OF_CACHE = "the cache's"
"""Path of a teacher that the cache names."""


def _truncation(old: Truncation, changes: Changes, url: str) -> Truncation:
    """The old truncation with the changes; of another method what that has no effect on is left."""
    if changes.k is not None and not changes.method and not old.rule.has_entries:
        raise ValueError(f"--k {changes.k}: {url} holds {old.text()}; name --method topk beside it")
    given = {
        name: getattr(changes, name)
        for name in ("k", "p", "min_k", "draws", "seed")
        if getattr(changes, name) is not None
    }
    method = changes.method or old.method
    if method not in METHODS:
        raise ValueError(f"--method {method!r} is not one of {tuple(METHODS)}")
    kept = {name: getattr(old, name) for name in METHODS[method].options if name not in given}
    if "min_k" in kept and "k" in given:
        kept["min_k"] = min(kept["min_k"], given["k"])
    default = Truncation.__dataclass_fields__
    if kept.get("k") == 0:
        kept["k"] = default["k"].default
    return Truncation(method=method, **{**kept, **given})


def _temperatures(manifest: Manifest, changes: Changes, without: bool) -> list[float]:
    base = list(changes.temperatures or manifest.temperatures)
    if without and changes.temperatures is None:
        base = [1.0]
    again = [t for t in changes.more_temperatures if f"{t:g}" in {f"{b:g}" for b in base}]
    if again:
        raise ValueError(
            f"temperature {again[0]:g} is stored already: the cache has "
            f"{', '.join(f'{t:g}' for t in base)}"
        )
    return [*base, *changes.more_temperatures]


def _longest(url: str) -> int:
    reader = CacheReader(url)
    return max((len(sequence.input_ids) for sequence in reader), default=2)


def refuse_other_teacher(manifest: Manifest, fingerprint: str, url: str) -> None:
    """Raise ValueError unless the teacher is the one that the cache was scored by."""
    from decant.teacher_dump.teacher import fingerprint_like  # tokenizers, which help does without

    stored = manifest.teacher.fingerprint
    if stored != fingerprint_like(fingerprint, stored):
        known = f"has fingerprint {stored}" if stored != UNKNOWN else "was imported: it is unknown"
        raise ValueError(
            f"another teacher than that of {url}: the one given has fingerprint {fingerprint}, "
            f"that of the cache {known}. `decant rescore` takes any teacher"
        )
