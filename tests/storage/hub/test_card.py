"""The card says what inspect says, and nothing that a cache's texts could make of it."""

import dataclasses

import pytest

from decant.schemas import Manifest
from decant.storage import CacheReader
from decant.storage.hub.card import dataset_card, escaped, stated_cache_id
from decant.storage.inspect.collect import inspect
from decant.storage.inspect.report import Report
from tests.support import caches


@pytest.fixture(scope="module")
def looked(tmp_path_factory: pytest.TempPathFactory) -> tuple[Manifest, Report]:
    """Manifest and report of a small cache."""
    path = tmp_path_factory.mktemp("card") / "cache"
    settings = caches.Settings()
    caches.write_cache(path, settings, caches.random_shards(settings))
    return CacheReader(path).manifest, inspect(path)


def test_the_figures_are_those_of_inspect(looked: tuple[Manifest, Report]) -> None:
    """Counts, mass kept, the teacher's perplexity, and five lines that read it."""
    manifest, report = looked
    card = dataset_card(manifest, report, "me/demo", "cc-by-4.0")
    assert f"| targets | {report.targets:,} |" in card
    assert f"| perplexity of the teacher on this data | {report.teacher_perplexity:.3f} |" in card
    for of in report.temperatures:
        assert of.retained_mass
        mean = f"{of.retained_mass.mean:.4f} on average"
        assert f"| mass kept at T={of.temperature:g} | {mean}" in card
    code = card.split("```python\n")[1].split("```")[0].strip().splitlines()
    assert len([line for line in code if line]) <= 5
    assert 'CacheReader("hf://datasets/me/demo")' in card
    assert stated_cache_id(card) == manifest.cache_id


@pytest.mark.parametrize(
    "text",
    [
        "a | b |\n\n# Heading",
        "<script>alert(1)</script>",
        "[free](http://evil.example)",
        "![x](http://evil.example/a.png)",
        "`code` *bold* _it_ ~~no~~ $x$ @someone #1",
        "http://evil.example and www.evil.example",
        "---\nlicense: mit\n---",
        "\u202egnp.exe \x1b[31m",
    ],
)
def test_texts_of_a_cache_are_only_text(text: str, looked: tuple[Manifest, Report]) -> None:
    """No character of a teacher's name or of a path is markup, a link, or a new line."""
    manifest, report = looked

    def card_of(said: str) -> str:
        teacher = dataclasses.replace(manifest.teacher, name=said)
        source = {**manifest.source, "path": said}
        changed = dataclasses.replace(manifest, teacher=teacher, source=source, cache_id="")
        return dataset_card(changed, report, "me/demo", "mit")

    plain, card = card_of("teacher"), card_of(text)
    assert len(card.splitlines()) == len(plain.splitlines())
    assert card.count("---") == plain.count("---") and card.count("|") == plain.count("|")
    for piece in ("<script", "](", "http:", "www.", "`code`", "@", "\x1b", "\u202e", "*bold"):
        assert card.count(piece) == plain.count(piece)
    assert escaped(text) in card


def test_long_texts_are_cut() -> None:
    """A text takes one line of a table, however long it is; plain ones stay as they are."""
    assert len(escaped("x" * 10_000)) == 200
    assert escaped("Qwen/Qwen3-8B, bf16") == "Qwen/Qwen3-8B, bf16"
    assert escaped("a_b") == "a&#95;b"
