"""What is known of rounds: what one began with, what one came to. Finished or absent, sealed."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from decant.schemas import FormatError, Manifest, from_json, to_json
from decant.storage import CacheReader, Store
from decant.storage.files.durable import publish_bytes
from decant.storage.files.sealed import publish_json, read_json
from decant.student_train.config.evaluation import NAMES, ROUGE
from decant.student_train.rounds.places import LINES, Places

BEGUN, MIXED, DONE = "begun.json", "mixture.json", "round.json"
"""What a round began with; which caches it is trained on; what it came to."""
NO_WEIGHTS = (".md",)
"""Ends of names of a student's files that change nothing about it."""


@dataclass(frozen=True, kw_only=True)
class Round:
    """A finished round."""

    number: int
    config: dict[str, Any]
    """What later rounds must have in common with it, and what may change from one to the next."""
    sampler: dict[str, Any]
    """Who answered: the cache's own word, or only the path."""
    teacher: str
    """Fingerprint of the teacher that scored."""
    cache_id: str
    sequences: int
    rejected: int
    targets: int
    bytes: int
    """Of the cache."""
    samples_nll: float
    """Nats per target: mean of -log p(token) of the teacher on the round's answers."""
    steps: int
    """Of this round's training."""
    mixture: dict[str, float]
    """Older rounds that it was trained on, by number, with their weights."""
    student_xxh3_128: str
    before: dict[str, float]
    """Figures of the student that the round began with."""
    figures: dict[str, float]
    """Of the student that it came to."""
    seconds: dict[str, float]
    """Of the two phases, as far as they ran to an end here."""


def finished_rounds(output: Path) -> list[Round]:
    """The rounds that are complete, from the first on. Raises FormatError if one between is not."""
    found: list[Round] = []
    while (folder := Places(output, len(found) + 1).folder).joinpath(DONE).exists():
        found.append(from_json(Round, read_json(Store(folder), DONE), str(folder / DONE)))
    for later in sorted(output.glob(f"round-*/{DONE}"))[len(found) :]:
        raise FormatError(
            f"{folder / DONE} is missing, but {later} is there: put it back from a copy, or choose "
            "another output"
        )
    return found


def publish_round(output: Path, record: Round) -> None:
    """Say that a round is complete."""
    publish_json(Store(Places(output, record.number).folder), DONE, to_json(record))


def publish_lines(path: Path, records: list[Round]) -> None:
    """Write a line per round, and one for the student before the first, as JSON."""
    lines: list[dict[str, Any]] = []
    if records and records[0].before:
        lines.append({"round": 0, **records[0].before})
    lines += [{"round": one.number, **shown(one)} for one in records]
    publish_bytes(path / LINES, "".join(json.dumps(line) + "\n" for line in lines).encode())


def shown(record: Round) -> dict[str, float]:
    """The numbers of a round."""
    return {
        "sequences": record.sequences,
        "targets": record.targets,
        "bytes": record.bytes,
        "samples_teacher_ce": record.samples_nll,
        "steps": record.steps,
        **{f"{name}_s": seconds for name, seconds in record.seconds.items()},
        **record.figures,
    }


def hash_student(path: str) -> str:
    """Hash of all files of a student's directory; "" if it is none, as a hub id."""
    folder = Path(path)
    if not path or not folder.is_dir():
        return ""
    store = Store(folder)
    names = sorted(
        str(file.relative_to(folder))
        for file in folder.rglob("*")
        if file.is_file() and file.suffix not in NO_WEIGHTS and not file.name.startswith(".")
    )
    digest = xxhash.xxh3_128()
    for name in names:
        digest.update(f"{name} {store.hash(name)}\n".encode())
    return digest.hexdigest()


def refuse_changed_student(places: Places, path: str) -> str:
    """Pin the student that a round begins with, until its cache begins; returns its hash.

    Raises ValueError if it is another one by now, or gone.
    """
    found = hash_student(path)
    store = Store(places.folder)
    if not store.exists(BEGUN) or not _has_files(places.cache):
        places.folder.mkdir(parents=True, exist_ok=True)
        publish_json(store, BEGUN, {"student": path, "xxh3_128": found})
        return found
    begun = read_json(store, BEGUN)
    known, before = str(begun["xxh3_128"]), str(begun["student"])
    if found != known:
        what = f"the student {path} " + ("changed" if Path(path).is_dir() else "is gone")
        what += f" since round {places.number} began"
        if before != path:
            what = f"round {places.number} began with the student {before}, and it is {path} now"
        raise ValueError(
            f"{what} (hash {known or 'none'}, now {found or 'none'}): put it back, or remove "
            f"{places.folder} to begin the round again"
        )
    return known


def _has_files(folder: Path) -> bool:
    """Whether anything but what is hidden lies in a folder."""
    return any(not file.name.startswith(".") and file.is_file() for file in folder.rglob("*"))


def pinned_mixture(places: Places, wanted: dict[str, float]) -> dict[str, float]:
    """The older rounds that a round is trained on: as decided when its training first began."""
    store = Store(places.folder)
    if store.exists(MIXED):
        return {str(key): float(value) for key, value in read_json(store, MIXED).items()}
    publish_json(store, MIXED, wanted)
    return wanted


def final_cache(path: Path) -> Manifest | None:
    """The manifest of a cache that is complete; None if the dump has still to say what it is."""
    try:
        return CacheReader(path).manifest
    except FormatError:
        return None


def samples_nll(path: Path) -> float:
    """Mean of -log p(token) of the teacher over the targets of a cache, in nats."""
    reader, total, count = CacheReader(path), 0.0, 0
    for group in reader.row_groups():
        label_logprob = reader.read(group).label_logprob
        total -= float(label_logprob.sum(dtype=np.float64))
        count += len(label_logprob)
    return total / max(count, 1)


def figures_of(summary: dict[str, Any]) -> dict[str, float]:
    """The metrics of a summary, those of single caches of a mixture left out."""
    return {name: float(summary[name]) for name in (*NAMES, *ROUGE) if name in summary}
