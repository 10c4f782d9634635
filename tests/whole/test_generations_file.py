"""What a training writes of its answers, as the source of a dump."""

import json
from pathlib import Path
from typing import Any

import pytest
from accelerate import Accelerator

from decant.student_train import GenerationConfig
from decant.student_train.evaluation.answers import Generation
from decant.teacher_dump.inputs.config import SourceConfig
from decant.teacher_dump.inputs.kinds import formed
from decant.teacher_dump.inputs.records import SourceError
from decant.teacher_dump.inputs.sources import iter_records
from tests.support import models
from tests.support.dumps import save_records


@pytest.fixture(scope="module")
def generations(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`generations.jsonl` of two prompts."""
    folder = tmp_path_factory.mktemp("run")
    asked = [{"prompt": "the quick", "response": " fox"}, {"prompt": "a", "response": " dog"}]
    settings = GenerationConfig(
        path=str(save_records(folder / "asked.jsonl", *asked)), max_new_tokens=5
    )
    generation = Generation(settings, models.build_tokenizer(), add_bos=False, seed=0)
    generation.metrics(models.build_model(seed=2), Accelerator(cpu=True), folder)
    return folder / "generations.jsonl"


def scored(path: Path, fields: dict[str, str]) -> list[Any]:
    """The answers that a dump of the file scores."""
    found = iter_records(SourceConfig(path=str(path), fields=fields))
    return [formed(record).record.fields["response"] for record in found]


def test_what_is_scored_is_what_was_asked_for(generations: Path) -> None:
    """The student's words, or the reference; neither by itself."""
    written = [json.loads(line) for line in generations.read_text().splitlines()]
    assert scored(generations, {"response": "generated"}) == [w["generated"] for w in written]
    assert scored(generations, {"generated": ""}) == [" fox", " dog"]
    with pytest.raises(SourceError, match=r"line 1: generated stands beside response"):
        scored(generations, {})
