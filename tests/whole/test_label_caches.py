"""Commands on a cache that keeps the log prob of the actual token alone: done, or one line why not.

What needs entries names the cache, and what to do instead.
"""

import math
from pathlib import Path

import numpy as np
import pytest

from decant.schemas import Truncation
from decant.storage import CacheReader
from decant.storage.hub.card import dataset_card
from decant.storage.inspect.collect import inspect
from tests.support import caches, commands

SETTINGS = caches.Settings(truncation=Truncation(method="label"), temperatures=(1.0,))
DONE = [
    "inspect {cache} --json",
    "head {cache}",
    "diff {cache} {entries}",
    "export {cache} {out} --to hf",
    "subset {cache} {out} --where cross_entropy>0",
    "merge {cache} {cache} {out} --on-duplicate keep-all",
]
REFUSED = {
    "inspect {cache} --max-bytes 50": "--method topk",
    "export {cache} {out} --to axolotl": "--to lists",
    "subset {cache} {out} --where mean_entropy<3": "cross_entropy",
    "merge {cache} {entries} {out}": "truncation.method",
    "rescore {cache} {out} --k 8 --dry-run": "--method topk",
    "rescore {cache} {out} --temperature 1 --temperature 2 --dry-run": "--method topk",
    "add-temperature {cache} {out} --temperature 2 --dry-run": "--method topk",
}


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A cache of labels, and one with entries of the same sequences."""
    folder = tmp_path_factory.mktemp("labels")
    entries = caches.Settings(temperatures=(1.0,))
    for name, settings in (("cache", SETTINGS), ("entries", entries)):
        caches.write_cache(folder / name, settings, caches.random_shards(settings))
    return {name: str(folder / name) for name in ("cache", "entries")}


def run(text: str, paths: dict[str, str], out: Path) -> commands.Result:
    words = [word.format(out=out, **paths) for word in text.split()]
    return commands.command("decant", *words)


@pytest.mark.parametrize("text", DONE)
def test_what_needs_no_entries_is_done(text: str, paths: dict[str, str], tmp_path: Path) -> None:
    """With exit code 0."""
    result = run(text, paths, tmp_path / "out")
    assert result.code == 0, result.stderr


@pytest.mark.parametrize("text", REFUSED)
def test_what_needs_entries_says_so(text: str, paths: dict[str, str], tmp_path: Path) -> None:
    """In one line with the cache's name and the way out; nothing is written."""
    result = run(text, paths, tmp_path / "out")
    said = result.stderr.strip().removesuffix("(--debug shows the traceback)").strip()
    assert result.code == 2, result.stdout
    assert len(said.splitlines()) == 1 and said.startswith("error: "), said
    assert paths["cache"] in said and REFUSED[text] in said, said
    assert not list(tmp_path.iterdir())


def test_figures_are_of_the_labels(paths: dict[str, str]) -> None:
    """The report and the dataset card of it have the perplexity, and no mass of entries."""
    report = inspect(paths["cache"])
    labels = np.concatenate([s.label_logprob for s in CacheReader(paths["cache"])])
    assert report.teacher_perplexity == pytest.approx(math.exp(-labels.mean()))
    manifest = CacheReader(paths["cache"]).manifest
    card = dataset_card(manifest, report, "me/demo", "cc-by-4.0")
    assert "log prob of the actual token alone" in card
    assert "mass kept" not in card
