"""Texts of a cache that would be obeyed, in every command that runs a model."""

import dataclasses
import json
from pathlib import Path

import pytest

from decant.schemas import Manifest
from decant.storage import CacheReader, Store, verify
from decant.storage.cache import paths
from decant.storage.cache.writer import write_cache
from decant.storage.hub.card import escaped
from decant.student_train.outputs.model_card import model_card
from tests.support.commands import Result, command
from tests.support.trainings import STUDENT, config

PLANTED = "\x1b[31m\x9b2J\u202e<script>alert(1)</script>[a](http://b.example) www.c.example\r@d"
HARMFUL = ("\x1b", "\x9b", "\u202e", "<script", "](http", "http://b", "www.c", "\r", "@d")


@pytest.fixture(scope="module")
def planted(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache with such texts wherever its maker may put one. Never write to it."""
    folder = tmp_path_factory.mktemp("planted") / "cache"
    reader = CacheReader(cache)
    held = reader.manifest
    draft = Manifest.draft(
        teacher=dataclasses.replace(
            held.teacher,
            name=PLANTED,
            architecture=PLANTED,
            fingerprint=PLANTED,
            engine=PLANTED,
        ),
        tokenizer=held.tokenizer,
        shared_vocab_size=held.shared_vocab_size,
        truncation=held.truncation,
        temperatures=held.temperatures,
        precision=held.precision,
        source={**held.source, "path": PLANTED},
        sequences=held.sequences,
    )
    sequences = [dataclasses.replace(s, sample_id=s.sample_id + PLANTED) for s in reader]
    write_cache(folder, draft, sequences, reader.plan)
    for name in held.tokenizer.files:
        Store(folder).copy(Store(cache), f"{paths.TOKENIZER}/{name}")
    assert verify(folder).ok, verify(folder).problems[:1]
    return folder


def run(*words: object) -> Result:
    """A command of the product, which says nothing that a terminal would obey."""
    result = command("decant", *map(str, words))
    shown = result.stdout + result.stderr
    assert result.code in (0, 1), shown
    assert [c for c in shown if not (c.isprintable() or c in "\n\t\r")] == []
    assert "Traceback" not in shown
    return result


@pytest.mark.slow
def test_a_training_its_card_and_its_evaluation(planted: Path, tmp_path: Path) -> None:
    """No log line, no report and no file beside the student holds one as it is."""
    fields = {
        "cache": str(planted),
        "output": str(tmp_path / "run"),
        "steps": 1,
        "batch_size": 2,
        "student": {"config": STUDENT},
    }
    (tmp_path / "train.yaml").write_text(json.dumps(fields))
    assert run("train", "--config", tmp_path / "train.yaml").code == 0
    card = (tmp_path / "run/student/README.md").read_text()
    assert "alert" in card and [text for text in HARMFUL if text in card] == []
    student = tmp_path / "run/student"
    assert run("evaluate", "--student", student, "--cache", planted).code == 0
    assert "ce" in run("evaluate", "--student", student, "--cache", planted, "--json").stdout
    page = tmp_path / "page.html"
    assert run("evaluate", "--model", student, "--cache", planted, "--html", page).code == 0
    html = page.read_text()
    assert "<script>alert" not in html and "\x1b" not in html


def test_an_audit(planted: Path, teacher_path: Path) -> None:
    """Names that it compares are shown as text."""
    assert "alert" in run("audit", planted, "--teacher", teacher_path).stdout
    run("audit", planted, "--teacher", teacher_path, "--json")


@pytest.mark.parametrize(
    "text", ["http://b.example", "www.b.example", "WWW.b.example", "@d", "_a_", "__a__"]
)
def test_no_name_becomes_a_link_in_a_model_card(text: str, cache: Path, tmp_path: Path) -> None:
    """Nor a mention, nor emphasis, where no character of it is markup by itself."""
    held = CacheReader(cache).manifest
    teacher = dataclasses.replace(held.teacher, name=text)
    manifest = dataclasses.replace(held, teacher=teacher, cache_id="")
    card = model_card(config(cache, tmp_path), [manifest], {"steps": 1, "epochs": 1})
    (row,) = [line for line in card.splitlines() if line.startswith("| teacher |")]
    assert text not in row and escaped(text) in row
