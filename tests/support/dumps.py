"""Dumps in tests: their config, their records, what they leave."""

import contextlib
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaModel

from decant.storage import CacheReader, verify
from decant.storage.cache import paths
from decant.teacher_dump import (
    DumpConfig,
)

MODULE = "teacher_dump"
LOADING = 4
"""Forwards while the teacher is loaded: to look at its head, and at what padding does."""
HALF = LOADING + 3
"""Forwards that score some of the shards of `config`."""


def change(config: Any, path: str, value: Any) -> Any:
    """A copy of the config with the (dotted) field changed."""
    name, _, rest = path.partition(".")
    if rest:
        value = change(getattr(config, name), rest, value)
    return dataclasses.replace(config, **{name: value})


def files(folder: Path) -> dict[str, bytes]:
    """Content of every file below, by relative name."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def committed(cache: Path) -> dict[str, bytes]:
    """The files of the shards that are there with their commit record."""
    shown = sorted((cache / "shards").glob("[!.]*"))  # the others may go while they are looked at
    stems = [path.stem for path in shown]
    return {path.name: path.read_bytes() for path in shown if stems.count(path.stem) == 2}


def temporaries(cache: Path) -> list[Path]:
    """What a writer has not published."""
    return list(cache.rglob(".*"))


def assert_whole(output: str | Path, cache: Path) -> None:
    """The output is a whole cache, row for row the one of an undisturbed dump, and no more."""
    assert verify(output).problems == ()
    assert rows(output) == rows(cache)
    assert temporaries(Path(output)) == []
    assert not (Path(output) / "inputs").exists()


def save_records(path: Path, *records: dict[str, Any]) -> Path:
    """Write JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def save_config(config: DumpConfig, folder: Path) -> str:
    """Write the config for a command line; JSON is YAML."""
    path = folder / "dump.yaml"
    path.write_text(json.dumps(dataclasses.asdict(config)))
    return str(path)


def assert_same(output: Path, cache: Path) -> None:
    """A whole cache: plan, decoded rows and stored columns are those of the other; no more files.

    Commit records differ in who wrote a shard, and how fast.
    """
    assert_whole(output, cache)
    found, expected = CacheReader(output), CacheReader(cache)
    for ours, theirs in zip(found.row_groups(), expected.row_groups(), strict=True):
        assert found.read_table(ours).equals(expected.read_table(theirs))
    assert files(output).keys() == files(cache).keys()
    assert files(output / paths.PLAN) == files(cache / paths.PLAN)


def rows(cache: str | Path, without: str = "") -> list[tuple[Any, ...]]:
    """Every sequence of a whole cache as comparable values, one field left out if named."""
    return [
        tuple(
            value.tobytes() if isinstance(value, np.ndarray) else value
            for value in (
                getattr(sequence, f.name) for f in dataclasses.fields(sequence) if f.name != without
            )
        )
        for sequence in CacheReader(cache)
    ]


@contextlib.contextmanager
def failing_after(forwards: int) -> Iterator[None]:
    """Every Llama of this process breaks after so many forwards."""
    left = [forwards]

    def fail(module: torch.nn.Module, _: Any) -> None:
        if isinstance(module, LlamaModel):
            left[0] -= 1
            if left[0] < 0:
                raise RuntimeError("the device fell off the bus")

    handle = torch.nn.modules.module.register_module_forward_pre_hook(fail)
    try:
        yield
    finally:
        handle.remove()
