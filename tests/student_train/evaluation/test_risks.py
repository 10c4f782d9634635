"""Risks of a student from caches over samples, against figures made in another way."""

import collections
import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from rouge_score.rouge_scorer import RougeScorer
from transformers import AutoModelForCausalLM

from decant.schemas import Truncation
from decant.storage import CacheReader
from decant.student_train.command import run_evaluate
from decant.student_train.config.verdict import EvaluateArguments
from decant.student_train.evaluation.risks import distinct, measure_samples
from decant.teacher_dump import DumpConfig, dump
from decant.teacher_dump.inputs.config import GenerateConfig
from tests.support import models
from tests.support.dumps import change, save_records


@dataclasses.dataclass(frozen=True)
class Kept:
    """A student, a teacher, and caches over what either samples to the same prompts."""

    student: Path
    teacher: Path
    by_student: Path
    by_teacher: Path


@pytest.fixture(scope="module")
def kept(dump_config: DumpConfig, tmp_path_factory: pytest.TempPathFactory) -> Kept:
    """Never write to it."""
    folder = tmp_path_factory.mktemp("risks")
    models.save_teacher(folder / "student", seed=11)
    prompts = [{"id": f"p{i}", "prompt": " ".join(models.WORDS[i : i + 3])} for i in range(8)]
    path = str(save_records(folder / "prompts.jsonl", *prompts))
    config = change(dump_config, "source.path", path)
    config = dataclasses.replace(config, truncation=Truncation(method="label"), temperatures=[1.0])
    config = dataclasses.replace(config, precision="compact", shard_targets=40)
    for name, by, n in (("by_student", str(folder / "student"), 2), ("by_teacher", "", 1)):
        generate = GenerateConfig(n=n, by=by, max_new_tokens=10)
        own = change(config, "source.generate", generate)
        dump(dataclasses.replace(own, output=str(folder / name)))
    teacher = Path(dump_config.teacher.path)
    return Kept(folder / "student", teacher, folder / "by_student", folder / "by_teacher")


def rows_of(cache: Path) -> list[dict[str, Any]]:
    return pq.read_table(cache / "generated").to_pylist()


def nll(path: Path, cache: Path) -> np.ndarray:
    """Of all responses of a cache, token by token, in a plain forward in float64."""
    return np.concatenate(nll_of_each(path, cache))


def likelihoods(path: Path, cache: Path) -> np.ndarray:
    """Of each response: the geometric mean of its tokens' probabilities."""
    return np.array(
        [np.exp(-tokens).prod() ** (1 / len(tokens)) for tokens in nll_of_each(path, cache)]
    )


def nll_of_each(path: Path, cache: Path) -> list[np.ndarray]:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64)
    found = []
    for row in rows_of(cache):
        ids = torch.tensor([row["prompt_ids"] + row["response_ids"]])
        with torch.no_grad():
            logp = model(ids).logits[0, :, : models.VOCAB_SIZE].log_softmax(-1)
        first = len(row["prompt_ids"])
        found.append(-logp[first - 1 : -1].gather(1, ids[0, first:, None])[:, 0].numpy())
    return found


def evaluate(capsys: pytest.CaptureFixture[str], **options: Any) -> dict[str, Any]:
    """What the command prints as JSON."""
    assert run_evaluate(EvaluateArguments(json=True, **options)) == 0
    printed: dict[str, Any] = json.loads(capsys.readouterr().out)
    return printed


def test_risks_are_those_of_plain_forwards(kept: Kept, capsys: pytest.CaptureFixture[str]) -> None:
    """The teacher's of the student's samples, the student's of the teacher's.

    The estimate of the reverse KL is the difference of both sides, and its interval holds it.
    """
    found = evaluate(
        capsys,
        samples=str(kept.by_student),
        cache=str(kept.by_teacher),
        model=(str(kept.student),),
    )
    samples = found["samples"]
    ours, theirs = nll(kept.teacher, kept.by_student), nll(kept.student, kept.by_student)
    assert samples["targets"] == len(ours) and samples["sequences"] == 16
    assert samples["likelihood_risk"] == pytest.approx(ours.mean(), abs=1e-3)
    assert samples["likelihood_risk_of_sequence"] == pytest.approx(ours.sum() / 16, rel=1e-3)
    assert samples["sampler_cross_entropy"] == pytest.approx(theirs.mean(), abs=1e-3)
    assert samples["reverse_kl"] == pytest.approx((ours - theirs).mean(), abs=1e-3)
    low, high = samples["reverse_kl_interval"]
    assert low < samples["reverse_kl"] < high and samples["is_unbiased"]
    assert samples["sampled_by"] == f"{kept.student}, T=1.0, top-p 1.0"
    expected = nll(kept.student, kept.by_teacher)
    assert found["coverage_risk"] == pytest.approx(expected.mean(), abs=1e-3)
    assert found["coverage_risk_interval"][0] < found["coverage_risk"]
    assert found["targets"] == len(expected)
    for name, value, cache in (
        ("by_student", -samples["sequence_gap"], kept.by_student),
        ("by_teacher", found["coverage_gap"], kept.by_teacher),
    ):
        gaps = likelihoods(kept.teacher, cache) - likelihoods(kept.student, cache)
        assert value == pytest.approx(gaps.mean(), abs=1e-4), name
        assert abs(value) > 1e-2


def test_samples_are_compared_with_references(
    kept: Kept, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of the same prompt: in a file, or what the other cache says; ROUGE is rouge_score's."""
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)
    said = {row["id"]: row["response"] for row in rows_of(kept.by_teacher)}
    records = [{"id": name, "response": "the quick fox " + name} for name in said]
    path = save_records(tmp_path / "references.jsonl", *records[:5])
    in_file = {record["id"]: record["response"] for record in records[:5]}
    cases: tuple[tuple[dict[str, str], dict[str, str], str], ...] = (
        ({"cache": str(kept.by_teacher)}, said, "what the targets of"),
        ({"references": str(path)}, in_file, "references.jsonl"),
    )
    for options, references, what in cases:
        found = measure_samples(str(kept.by_student), **options)
        pairs = [
            (references[name], row["response"])
            for row in rows_of(kept.by_student)
            if (name := row["id"].split("#")[0]) in references and references[name]
        ]
        scores = [scorer.score(*pair)["rougeL"].fmeasure for pair in pairs]
        assert found.rouge is not None and what in found.references
        assert found.rouge["rougeL"] == pytest.approx(np.mean(scores))
        assert found.compared == len(pairs)
    assert run_evaluate(EvaluateArguments(samples=str(kept.by_student), references=str(path))) == 0
    text = capsys.readouterr().out
    assert "likelihood risk" in text and "10 samples against" in text and "coverage" not in text


def test_distinct_n_counts_different_ones_among_all() -> None:
    """By hand, and by counting; texts too short for it have none."""
    found = distinct(["a b a b", "a b"])
    assert list(found.values()) == [2 / 6, 2 / 4, 2 / 2, 1 / 1]
    assert distinct(["", "one"]) == {"distinct_1": 1}
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(models.WORDS, 30)) for _ in range(5)]
    pairs = collections.Counter(
        pair for text in texts for pair in zip(text.split()[:-1], text.split()[1:], strict=True)
    )
    assert distinct(texts)["distinct_2"] == len(pairs) / pairs.total()


def test_a_cache_without_a_sampler_has_the_teacher_s_risk_alone(kept: Kept) -> None:
    """It says nothing of a sampler, and there is no KL to be had."""
    found = measure_samples(str(kept.by_teacher))
    assert found.sampled_by == "" and found.sampler_cross_entropy is None
    assert found.reverse_kl is None and not found.is_unbiased and found.rouge is None
    labels = np.concatenate([s.label_logprob for s in CacheReader(kept.by_teacher)])
    assert found.likelihood_risk == pytest.approx(-labels.mean(), rel=1e-5)


def test_what_does_not_go_together_is_refused(kept: Kept, tmp_path: Path) -> None:
    """References of other prompts, lines that are none, options without effect."""
    cases: tuple[tuple[dict[str, Any], str], ...] = (
        ({"references": "x", "cache": "c", "student": "s"}, "--references has no effect without"),
        ({"samples": "a", "student": "s"}, "--samples goes with --model once"),
        ({"samples": "a", "model": ("m", "n"), "cache": "c"}, "--samples goes with --model once"),
        ({"samples": "a", "model": ("m",)}, "needs --cache: a cache over what the teacher"),
        ({"samples": "a", "html": "b"}, "--html has no effect with --samples"),
        ({"samples": "a", "device": "cuda"}, "--device has no effect with --samples"),
        ({"samples": "a", "kind": "rkl"}, "--kind has no effect with --samples"),
        ({"student": "s"}, "give --cache"),
    )
    for options, match in cases:
        with pytest.raises(ValueError, match=match):
            EvaluateArguments(**options)
    other = save_records(tmp_path / "other.jsonl", {"id": "z", "response": "a"})
    with pytest.raises(ValueError, match=r"has no record of any of the 16 samples, such as 'p0#1'"):
        measure_samples(str(kept.by_student), references=str(other))
    for record in ({"id": "p0"}, {"id": "p0", "response": 3}, {"messages": []}):
        bad = save_records(tmp_path / "bad.jsonl", record)
        with pytest.raises(ValueError, match=r"bad\.jsonl line 1: expected a JSON object with a"):
            measure_samples(str(kept.by_student), references=str(bad))
