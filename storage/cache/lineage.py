"""What the manifest of a cache says of the caches it was made from, and what of theirs stays true.

It stands in the manifest's free object `source`, under `lineage`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import xxhash

from decant.schemas import FormatError, Manifest
from decant.schemas.strict import canonical

LINEAGE = "lineage"
SAMPLER = "sampler"
"""Field of `source`: who sampled the targets, where that was not the teacher."""
EXTENSIONS = "extensions"
"""Field of `source`: what the cache was extended by, a step for each time."""
MEANING = ("normalised_over", "unknown_label")
"""What an import says of the values themselves; it goes where they go."""


def source_of(
    operation: str,
    options: Mapping[str, Any],
    origins: Sequence[tuple[str, Manifest]],
    *,
    meaning: bool = True,
) -> dict[str, Any]:
    """`source` of the manifest of a cache that an operation makes of others, (url, manifest) each.

    With `meaning` their values go along, and what an import says of these, which must be the same
    in all of them. The sampler stays where all have the same.
    """
    manifests = [manifest for _, manifest in origins]
    lineage = {
        "operation": operation,
        "options": dict(options),
        "from": [
            {
                "url": url,
                "cache_id": manifest.cache_id,
                "format_version": manifest.format_version,
                "num_sequences": manifest.num_sequences,
                "teacher": {"name": manifest.teacher.name, "engine": manifest.teacher.engine},
                "source": manifest.source,
                "sequences": manifest.sequences,
            }
            for url, manifest in origins
        ],
    }
    paths = [str(manifest.source.get("path", "")) for manifest in manifests]
    said = manifests[0].source if meaning else {}
    samplers = [manifest.source.get(SAMPLER) for manifest in manifests]
    same_sampler = all(sampler == samplers[0] for sampler in samplers)
    return {
        "path": ", ".join(dict.fromkeys(path for path in paths if path)),
        **{name: said[name] for name in MEANING if name in said},
        **({SAMPLER: samplers[0]} if samplers[0] and same_sampler else {}),
        "fingerprint": xxhash.xxh3_128(canonical(lineage)).hexdigest(),
        LINEAGE: lineage,
    }


def sequences_of(manifests: Sequence[Manifest]) -> dict[str, Any]:
    """`sequences` of the manifest of such a cache: the settings that all of them share.

    `max_length` is the largest; counts of records stay in the lineage.
    """
    first = manifests[0].sequences
    shared = {
        name: value
        for name, value in first.items()
        if name != "counts"
        and all(name in m.sequences and m.sequences[name] == value for m in manifests)
    }
    lengths = [m.sequences["max_length"] for m in manifests if "max_length" in m.sequences]
    return {**shared, "max_length": max(lengths)} if lengths else shared


def lineage_text(source: Mapping[str, Any]) -> str:
    """In one line, how a cache was made of others, and extended; "" if it was neither."""
    parts = []
    lineage = source.get(LINEAGE)
    if isinstance(lineage, dict):
        origins = ", ".join(str(origin["url"]) for origin in lineage["from"])
        known = {name: value for name, value in lineage["options"].items() if value != ""}
        said = ", ".join(f"{name} {value}" for name, value in known.items())
        parts.append(f"{lineage['operation']} of {origins}" + (f" ({said})" if said else ""))
    parts += [f"extended by {step['source'].get('path')}" for step in source.get(EXTENSIONS, ())]
    return "; ".join(parts)


def sampler_text(source: Mapping[str, Any]) -> str:
    """In one line, who sampled the targets, and how; "" where it is not another than the teacher.

    Of caches merged of several samplers it names each.
    """
    sampler, lineage = source.get(SAMPLER), source.get(LINEAGE)
    if isinstance(sampler, dict):
        step = f", step {sampler['step']}" if "step" in sampler else ""
        return (
            f"{sampler.get('path')}{step}, T={sampler.get('temperature')}, "
            f"top-p {sampler.get('top_p')}"
        )
    origins = lineage.get("from") if isinstance(lineage, dict) else None
    known = [o for o in (origins if isinstance(origins, list) else []) if isinstance(o, dict)]
    found = [sampler_text(o["source"]) for o in known if isinstance(o.get("source"), dict)]
    return "; ".join(dict.fromkeys(filter(None, found)))


def check_said(manifest: Manifest, where: str) -> None:
    """Raise FormatError unless what is used of `source` and `sequences` has the types it must."""
    source, sequences = manifest.source, manifest.sequences
    _expect(f"{where}: source.path", source.get("path", ""), str | None)
    _expect(f"{where}: source.fingerprint", source.get("fingerprint", ""), str)
    _expect(f"{where}: sequences.counts", sequences.get("counts", {}), dict)
    for name, count in sequences.get("counts", {}).items():
        _expect(f"{where}: sequences.counts.{name}", count, int)
    for name in ("max_length", "target_share"):
        _expect(f"{where}: sequences.{name}", sequences.get(name, 0), int | float)
    sampler = source.get(SAMPLER)
    _expect(f"{where}: source.{SAMPLER}", sampler, dict | None)
    if sampler is not None:
        of_sampler: dict[str, Any] = {"path": str, "fingerprint": str, "temperature": float}
        for name, kind in (of_sampler | {"top_p": float}).items():
            _expect(f"{where}: source.{SAMPLER}.{name}", sampler.get(name), kind)
        _expect(f"{where}: source.{SAMPLER}.step", sampler.get("step", 0), int)
    lineage = source.get(LINEAGE)
    _expect(f"{where}: source.{LINEAGE}", lineage, dict | None)
    if lineage is not None:
        of_lineage: dict[str, Any] = {"operation": str, "options": dict, "from": list}
        for name, kind in of_lineage.items():
            _expect(f"{where}: source.{LINEAGE}.{name}", lineage.get(name), kind)
        for i, origin in enumerate(lineage["from"]):
            _expect(f"{where}: source.{LINEAGE}.from[{i}]", origin, dict)
            _expect(f"{where}: source.{LINEAGE}.from[{i}].url", origin.get("url"), str)
    steps = source.get(EXTENSIONS, [])
    _expect(f"{where}: source.{EXTENSIONS}", steps, list)
    for i, step in enumerate(steps):
        at = f"{where}: source.{EXTENSIONS}[{i}]"
        _expect(at, step, dict)
        fields: dict[str, Any] = {"cache_id": str, "shards": int, "sequences": int}
        for name, of in (fields | {"source": dict, "settings": dict}).items():
            _expect(f"{at}.{name}", step.get(name), of)
        if len(step) != 5 or not 0 <= step["shards"] <= manifest.num_shards:
            raise FormatError(f"{at}: shards {step['shards']} of {manifest.num_shards}, 5 fields")


def _expect(where: str, value: Any, kind: Any) -> None:
    if not isinstance(value, kind) or isinstance(value, bool):
        raise FormatError(
            f"{where}: expected {getattr(kind, '__name__', kind)}, found {value!r:.60}"
        )
