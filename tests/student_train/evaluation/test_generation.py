"""ROUGE of generated answers against references, and what is refused before training."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from rouge_score.rouge_scorer import RougeScorer

from decant.student_train import EvalConfig, GenerationConfig, train
from decant.student_train.evaluation.answers import Generation
from tests.support import models
from tests.support.trainings import config

RECORDS = [
    {"prompt": "the quick brown", "response": " fox jumps over"},
    {"prompt": "a lazy dog and", "response": " runs away from hunters in deep woods"},
    {"prompt": "in", "response": " the quick brown fox"},
]


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    return path


def one_by_one(student: Any, tokenizer: Any, length: int) -> list[str]:
    """The most probable continuation of each prompt, token by token, without batch or cache."""
    texts = []
    for record in RECORDS:
        ids = tokenizer(record["prompt"]).input_ids
        given: list[int] = []
        while len(given) < length:
            with torch.no_grad():
                token = int(student(torch.tensor([ids + given])).logits[0, -1].argmax())
            if token == tokenizer.eos_token_id:
                break
            given.append(token)
        texts.append(tokenizer.decode(given, skip_special_tokens=True))
    return texts


def test_answers_and_scores_are_those_of_one_prompt_at_a_time(
    prompts: Path, tmp_path: Path
) -> None:
    """Left padding changes nothing; the means are rouge_score's F-measures."""
    tokenizer, student = models.build_tokenizer(), models.build_model(seed=2)
    settings = GenerationConfig(path=str(prompts), max_new_tokens=9, batch_size=2)
    generation = Generation(settings, tokenizer, add_bos=False, seed=0)
    found = generation.metrics(student.train(), Accelerator(cpu=True), tmp_path)
    assert student.training
    texts = one_by_one(student.eval(), tokenizer, 9)
    answers = [json.loads(line) for line in (tmp_path / "generations.jsonl").open()]
    assert [answer["generated"] for answer in answers] == texts
    assert [answer["prompt"] for answer in answers] == [r["prompt"] for r in RECORDS]
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)
    for name in ("rouge1", "rouge2", "rougeL"):
        scores = [
            scorer.score(record["response"], text)[name].fmeasure
            for record, text in zip(RECORDS, texts, strict=True)
        ]
        assert found[name] == pytest.approx(sum(scores) / 3)


def test_a_student_that_copies_the_references_scores_one(prompts: Path) -> None:
    """Trained on them until it knows them by heart."""
    tokenizer, student = models.build_tokenizer(), models.build_model("llama", seed=2)
    optimizer = torch.optim.AdamW(student.parameters(), lr=3e-3)
    sequences = [[*tokenizer(r["prompt"] + r["response"]).input_ids, 1] for r in RECORDS]
    for _ in range(60):
        for ids in sequences:
            batch = torch.tensor([ids])
            student(batch, labels=batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    settings = GenerationConfig(path=str(prompts), max_new_tokens=40)
    generation = Generation(settings, tokenizer, add_bos=False, seed=0)
    found = generation.metrics(student, Accelerator(cpu=True))
    assert found["rouge1"] == found["rouge2"] == found["rougeL"] == 1.0


def test_drawn_answers_repeat_and_leave_the_random_state(prompts: Path, tmp_path: Path) -> None:
    """The same at every evaluation, other than the greedy ones; dropout goes on as it would."""
    tokenizer, student = models.build_tokenizer(), models.build_model(seed=2)
    texts = []
    for drawn in (True, True, False):
        settings = GenerationConfig(path=str(prompts), max_new_tokens=9, do_sample=drawn)
        generation = Generation(settings, tokenizer, add_bos=True, seed=0)
        before = torch.random.get_rng_state()
        generation.metrics(student, Accelerator(cpu=True), tmp_path)
        assert torch.equal(torch.random.get_rng_state(), before)
        texts.append((tmp_path / "generations.jsonl").read_text())
    assert texts[0] == texts[1] != texts[2]


def test_a_run_reports_them_beside_the_heldout_figures(
    cache: Path, prompts: Path, tmp_path: Path
) -> None:
    """At every evaluation, in the summary and as what the best is chosen by."""
    generation = GenerationConfig(path=str(prompts), num_samples=2, max_new_tokens=4)
    evaluation = EvalConfig(
        heldout_fraction=0.1, every_steps=2, keep_best="rougeL", generation=generation
    )
    summary = train(config(cache, tmp_path / "run", steps=4, eval=evaluation))
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").open()]
    assert [line["step"] for line in lines if "rouge2" in line] == [0, 2, 4]
    assert {"rouge1", "rougeL", "heldout_ce", "best_step"} <= summary.keys()
    assert len((tmp_path / "run/generations.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"prompt": "a"}', "line 1.*'response'"),
        ('{"prompt": "a", "response": "b"}\nnonsense', "line 2: expected a JSON object"),
        ('{"prompt": "a", "response": ""}', "must be texts, not empty"),
        ('["a", "b"]', "line 1: expected a JSON object"),
        ("\n\n", "holds no record"),
    ],
)
def test_prompts_without_references_are_refused(
    cache: Path, tmp_path: Path, text: str, message: str
) -> None:
    """Before the first step, with the line."""
    (tmp_path / "bad.jsonl").write_text(text)
    generation = GenerationConfig(path=str(tmp_path / "bad.jsonl"))
    with pytest.raises(ValueError, match=message):
        train(config(cache, tmp_path / "run", eval=EvalConfig(generation=generation)))
    assert not (tmp_path / "run/metrics.jsonl").exists()


def test_settings_without_effect_are_refused() -> None:
    """Sampling options of greedy answers, options of no prompts."""
    with pytest.raises(ValueError, match="no effect without do_sample"):
        GenerationConfig(path="x", temperature=0.7)
    with pytest.raises(ValueError, match="no effect without path"):
        GenerationConfig(max_new_tokens=5)
    with pytest.raises(ValueError, match="has none"):
        Generation(GenerationConfig(path="x"), None, add_bos=False, seed=0)


def test_prompts_are_lines_of_utf8(tmp_path: Path) -> None:
    """Other characters that Python takes for the end of a line are text; others fail."""
    path = tmp_path / "prompts.jsonl"
    record = {"prompt": "a\u2028b", "response": "c\x85é"}
    path.write_text(json.dumps(record, ensure_ascii=False) + "\n", encoding="utf-8")
    tokenizer = models.build_tokenizer()
    settings = GenerationConfig(path=str(path))
    assert Generation(settings, tokenizer, add_bos=False, seed=0).records == [record]
    path.write_bytes(gzip.compress(b"{}"))
    with pytest.raises(ValueError, match=r"prompts\.jsonl .*plain JSON lines"):
        Generation(settings, tokenizer, add_bos=False, seed=0)
