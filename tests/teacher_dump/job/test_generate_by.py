"""Claims about responses that another model samples: its log probs, identity, what it must be."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pyarrow.parquet as pq
import pytest
import torch
from huggingface_hub import constants
from transformers import AutoModelForCausalLM

from decant.schemas import Truncation
from decant.storage import CacheReader, verify
from decant.teacher_dump import DumpConfig, SourceError, TeacherConfig, dump
from decant.teacher_dump.engines import EngineError
from decant.teacher_dump.inputs.config import GenerateConfig, SourceConfig
from decant.teacher_dump.job.responses import GenerationChanged
from decant.teacher_dump.job.start import ConfigChanged
from decant.teacher_dump.planning.predict import predict
from decant.teacher_dump.teacher import describe_teacher, hash_weights
from tests.support import models
from tests.support.dumps import change, failing_after, rows, save_records
from tests.support.services import http_config, unreliable


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student of the teacher's tokenizer with padding of its own, below the output of a run.

    Its saved generation settings would change what it samples.
    """
    run = tmp_path_factory.mktemp("run")
    models.save_teacher(run / "student", seed=7, vocab_size=333)
    own = {"eos_token_id": [1, 3], "do_sample": True, "top_k": 1, "repetition_penalty": 5.0}
    (run / "student/generation_config.json").write_text(json.dumps(own))
    (run / "summary.json").write_text('{"steps": 40, "best_step": 30}')
    return run / "student"


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten of them, some conversations."""
    records: list[dict[str, Any]] = []
    for i in range(10):
        text = " ".join(models.WORDS[i : i + 2 + i % 4])
        chat = [{"role": "user", "content": text}]
        records.append({"id": f"p{i}", **({"messages": chat} if i % 3 == 0 else {"prompt": text})})
    return save_records(tmp_path_factory.mktemp("prompts") / "prompts.jsonl", *records)


@pytest.fixture(scope="module")
def settings(dump_config: DumpConfig, student: Path, prompts: Path) -> DumpConfig:
    """Two responses to each prompt, in three parts, of which only labels are scored."""
    config = change(dump_config, "source.path", str(prompts))
    generate = GenerateConfig(
        n=2, by=str(student), temperature=0.8, top_p=0.9, max_new_tokens=12, part_prompts=4
    )
    config = change(config, "source.generate", generate)
    return dataclasses.replace(
        config,
        truncation=Truncation(method="label"),
        temperatures=[1.0],
        precision="compact",
        shard_targets=60,
    )


@pytest.fixture(scope="module")
def sampled(settings: DumpConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cache of `settings`. Never write to it."""
    path = tmp_path_factory.mktemp("sampled") / "cache"
    dump(dataclasses.replace(settings, output=str(path)))
    return path


def logprobs_of(model: Any, ids: list[int], first: int) -> np.ndarray:
    """Log probs in float64 of the tokens from `first` on: a plain forward over the vocabulary."""
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0, :, : models.VOCAB_SIZE].double()
    each = logits.log_softmax(-1)[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
    found: np.ndarray = each[first - 1 :].numpy()
    return found


def responses(cache: Path) -> list[dict[str, Any]]:
    return pq.read_table(cache / "generated").to_pylist()


def generated_files(cache: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (cache / "generated").iterdir()}


def test_log_probs_are_those_of_a_plain_forward(
    sampled: Path, student: Path, teacher_path: Path
) -> None:
    """The sampler's, untempered, over the whole vocabulary; the labels' are the teacher's.

    The files under `generated/` have them exactly, the cache to the rounding of numbers per target.
    """
    by = AutoModelForCausalLM.from_pretrained(student, dtype=torch.float64)
    teacher = AutoModelForCausalLM.from_pretrained(teacher_path, dtype=torch.float64)
    stored = {s.sample_id: s for s in CacheReader(sampled)}
    assert len(stored) == 20 and verify(sampled).problems == ()
    for row in responses(sampled):
        ids, first = row["prompt_ids"] + row["response_ids"], len(row["prompt_ids"])
        sequence = stored[row["id"]]
        assert sequence.labels.tolist() == row["response_ids"]
        expected = logprobs_of(by, ids, first)
        np.testing.assert_allclose(row["sampler_logprobs"], expected, atol=2e-5)
        np.testing.assert_allclose(sequence.sampler_logprobs, expected, atol=2e-4)
        np.testing.assert_allclose(
            sequence.label_logprob, logprobs_of(teacher, ids, first), atol=2e-4
        )
        assert max(row["response_ids"]) < models.VOCAB_SIZE
        assert (row["finish_reason"] == "stop") == (row["response_ids"][-1] in (1, 3))


def test_the_manifest_says_who_sampled(sampled: Path, student: Path, settings: DumpConfig) -> None:
    """Path, weights and step, temperature and top-p; the output of the run names it as well."""
    manifest = CacheReader(sampled).manifest
    fingerprint = hash_weights(describe_teacher(TeacherConfig(path=str(student)))).info.fingerprint
    assert manifest.sampler_logprobs and manifest.source["sampler"] == {
        "path": str(student),
        "fingerprint": fingerprint,
        "temperature": 0.8,
        "top_p": 0.9,
        "step": 30,
    }
    assert manifest.teacher.fingerprint != fingerprint
    of_run = change(settings, "source.generate.by", str(student.parent))
    assert dump(dataclasses.replace(of_run, output=str(sampled))).cache_id == manifest.cache_id


def test_a_student_may_be_named_by_its_hub_id(
    sampled: Path,
    student: Path,
    settings: DumpConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What the hub's cache holds of it samples as its folder does, and is known by the id."""
    repository, commit = tmp_path / "hub/models--some--student", "a" * 40
    shutil.copytree(student, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text(commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    config = change(settings, "source.generate.by", "some/student")
    dump(dataclasses.replace(config, output=str(tmp_path / "cache")))
    assert responses(tmp_path / "cache") == responses(sampled)
    assert rows(tmp_path / "cache") == rows(sampled)
    sampler = CacheReader(tmp_path / "cache").manifest.source["sampler"]
    known = CacheReader(sampled).manifest.source["sampler"]
    assert sampler["path"] == "some/student"
    assert sampler["fingerprint"] == known["fingerprint"]


def test_an_interrupted_sampling_goes_on(
    settings: DumpConfig, sampled: Path, tmp_path: Path
) -> None:
    """Broken off behind a part: files and rows are those of a run that nothing happened to."""
    config = dataclasses.replace(settings, output=str(tmp_path / "cache"))
    with failing_after(40), pytest.raises(RuntimeError):
        dump(config)
    assert 1 <= len(list((tmp_path / "cache/generated").glob("part-*"))) < 3
    dump(config)
    assert generated_files(tmp_path / "cache") == generated_files(sampled)
    assert rows(tmp_path / "cache") == rows(sampled)


def test_a_teacher_behind_a_service_scores_what_a_student_samples(
    settings: DumpConfig, sampled: Path, teacher_path: Path, tmp_path: Path
) -> None:
    """Sampling does not know the scorer: the same responses, and the same numbers of them."""
    with unreliable(teacher_path) as server:
        config = dataclasses.replace(
            settings, teacher=http_config(server.url, max_batch_tokens=512)
        )
        dump(dataclasses.replace(config, output=str(tmp_path / "cache")))
    ours, theirs = generated_files(tmp_path / "cache"), generated_files(sampled)
    assert ours == theirs
    for one, other in zip(CacheReader(tmp_path / "cache"), CacheReader(sampled), strict=True):
        np.testing.assert_array_equal(one.sampler_logprobs, other.sampler_logprobs)
        np.testing.assert_allclose(one.label_logprob, other.label_logprob, atol=2e-4)


def test_a_sampler_that_is_the_teacher_agrees_with_its_scores(
    settings: DumpConfig, teacher_path: Path, tmp_path: Path
) -> None:
    """What it gave a token when it was drawn is what it gives it afterwards, cut by no top-p."""
    config = change(settings, "source.generate.by", str(teacher_path))
    config = change(config, "truncation", Truncation(k=16))
    config = change(config, "sequences.target_share", 0.5)
    config = dataclasses.replace(config, output=str(tmp_path / "cache"), precision="f32")
    dump(config)
    for s in CacheReader(tmp_path / "cache"):
        np.testing.assert_allclose(s.sampler_logprobs, s.label_logprob, atol=1e-4)


def test_a_student_that_is_an_adapter_samples(settings: DumpConfig, tmp_path: Path) -> None:
    """On the base that it names, with the tokenizer beside it; its weights are part of it."""
    base = tmp_path / "base"
    models.save_teacher(base, seed=7)
    model = AutoModelForCausalLM.from_pretrained(base)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "adapter")
    models.build_tokenizer().save_pretrained(tmp_path / "adapter")
    config = change(settings, "source.generate.by", str(tmp_path / "adapter"))
    made = dump(dataclasses.replace(config, output=str(tmp_path / "cache")))
    merged = adapted.merge_and_unload().double()
    row = responses(tmp_path / "cache")[0]
    ids, first = row["prompt_ids"] + row["response_ids"], len(row["prompt_ids"])
    expected = logprobs_of(merged, ids, first)
    np.testing.assert_allclose(row["sampler_logprobs"], expected, atol=2e-4)
    of_base = hash_weights(describe_teacher(TeacherConfig(path=str(base)))).info.fingerprint
    assert made.source["sampler"]["fingerprint"] != of_base


def test_a_cache_of_samples_is_scored_again(
    settings: DumpConfig, sampled: Path, teacher_path: Path, tmp_path: Path
) -> None:
    """With more of the teacher, or by another one: the sampler's log probs go along."""
    out = tmp_path / "again"
    again = SourceConfig(path=str(sampled), format="cache")
    config = dataclasses.replace(settings, source=again, truncation=Truncation(k=8))
    dump(dataclasses.replace(config, output=str(out)))
    ours, theirs = CacheReader(out), CacheReader(sampled)
    assert ours.manifest.source["sampler"] == theirs.manifest.source["sampler"]
    for one, other in zip(ours, theirs, strict=True):
        assert one.token_ids.shape[1] == 8
        np.testing.assert_array_equal(one.sampler_logprobs, other.sampler_logprobs)
    with pytest.raises(ValueError, match="keeps its sampler's log probs, which no records bring"):
        dump(
            dataclasses.replace(
                change(settings, "source.generate", GenerateConfig()), output=str(out)
            ),
            extend="refuse",
        )


def test_a_sampler_that_changed_is_refused(
    settings: DumpConfig, sampled: Path, student: Path, tmp_path: Path
) -> None:
    """Before the cache is started and after; another teacher may score what is there."""
    config = dataclasses.replace(settings, output=str(tmp_path / "cache"))
    shutil.copytree(sampled / "generated", tmp_path / "cache" / "generated")
    other = tmp_path / "trained"
    models.save_teacher(other, seed=8, vocab_size=333)
    shutil.copy(student / "generation_config.json", other)
    changed = change(config, "source.generate.by", str(other))
    with pytest.raises(
        GenerationChanged, match=r"responses of another sampler: .*trained has fing"
    ):
        dump(changed)
    assert generated_files(tmp_path / "cache") == generated_files(sampled)
    dump(config)
    with pytest.raises(ConfigChanged, match=r"source\.sampler\.fingerprint: the cache has"):
        dump(changed)
    teacher = tmp_path / "teacher"
    models.save_teacher(teacher, seed=5)
    another = change(config, "teacher.path", str(teacher))
    shutil.copytree(sampled / "generated", tmp_path / "two" / "generated")
    dump(dataclasses.replace(another, output=str(tmp_path / "two")))
    assert generated_files(tmp_path / "two") == generated_files(sampled)


@pytest.mark.parametrize(
    ("by", "match"),
    [
        ("{tmp}/absent", r"source\.generate\.by .*absent does not exist \(seen from"),
        ("runs/of/nobody", r"source\.generate\.by runs/of/nobody does not exist"),
        ("{tmp}/file", r"source\.generate\.by .*file is a file, expected a model's directory"),
        ("{tmp}/empty", r"source\.generate\.by .*empty: no model configuration"),
        ("{tmp}/bare", r"source\.generate\.by .*its tokenizer must lie beside its weights"),
        ("{tmp}/other", r"has another tokenizer than the teacher .*ids differ, first .*\(teacher"),
        ("{tmp}/few", r"source\.generate\.by .*few only 299 output rows: they do not belong"),
        ("{tmp}/short", r"source\.generate\.by .*short takes at most 32 positions"),
    ],
)
def test_what_cannot_sample_is_named(
    by: str, match: str, settings: DumpConfig, tmp_path: Path
) -> None:
    """Before anything is loaded, and nothing is written."""
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    models.build_model().save_pretrained(tmp_path / "bare")
    models.build_model().save_pretrained(tmp_path / "other")
    models.build_tokenizer(290).save_pretrained(tmp_path / "other")
    models.save_teacher(tmp_path / "few", vocab_size=299)
    models.save_teacher(tmp_path / "short", max_position_embeddings=32)
    config = change(settings, "source.generate.by", by.format(tmp=tmp_path))
    with pytest.raises(ValueError, match=match) as caught:
        dump(dataclasses.replace(config, output=str(tmp_path / "cache")))
    assert "teacher.path" not in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "cache").exists() or not any((tmp_path / "cache").iterdir())


def test_other_special_tokens_are_no_other_tokenizer(settings: DumpConfig, tmp_path: Path) -> None:
    """A student of a base model ends and pads otherwise, and may have more tokens, never said."""
    models.save_teacher(tmp_path / "base")
    tokenizer = models.build_tokenizer()
    tokenizer.eos_token, tokenizer.pad_token, tokenizer.chat_template = "<|end|>", "<s>", None
    tokenizer.add_tokens(["<|think|>"])
    tokenizer.save_pretrained(tmp_path / "base")
    config = change(settings, "source.generate.by", str(tmp_path / "base"))
    dump(dataclasses.replace(config, output=str(tmp_path / "cache")))
    said = [token for row in responses(tmp_path / "cache") for token in row["response_ids"]]
    assert max(said) < models.VOCAB_SIZE


def test_prompts_that_are_all_too_long_are_an_error(settings: DumpConfig, tmp_path: Path) -> None:
    """No sample can be had of them; nothing stays."""
    source = save_records(tmp_path / "a.jsonl", {"prompt": "lazy dog " * 60}, {"prompt": "a " * 99})
    config = change(settings, "source.path", str(source))
    with pytest.raises(SourceError, match=r"max_length=64: all 2 are too long, so there is no sam"):
        dump(dataclasses.replace(config, output=str(tmp_path / "cache")))
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == [source]


def test_what_does_not_go_together_is_refused(settings: DumpConfig) -> None:
    """Targets that nobody sampled, engines that cannot sample, options without effect."""
    with pytest.raises(ValueError, match=r"targets of prompts, which source\.generate\.by did"):
        dump(change(settings, "sequences.targets", "all"))
    with pytest.raises(ValueError, match="by_engine is 'http': expected transformers or vllm"):
        GenerateConfig(n=1, by="a", by_engine="http")
    with pytest.raises(ValueError, match="by_engine: vllm has no effect without by"):
        GenerateConfig(n=1, by_engine="vllm")
    with pytest.raises(ValueError, match=r"\['by'\] have no effect with n: 0"):
        GenerateConfig(by="a")


def test_a_sampler_that_gives_nan_is_named(
    settings: DumpConfig, student: Path, tmp_path: Path
) -> None:
    """As the sampler, with the prompt."""
    model = models.build_model(seed=7)
    (token,) = models.build_tokenizer()("Z")["input_ids"]
    with torch.no_grad():
        model.get_input_embeddings().weight[token] = torch.nan
    model.save_pretrained(tmp_path / "nan")
    models.build_tokenizer().save_pretrained(tmp_path / "nan")
    source = save_records(tmp_path / "a.jsonl", {"id": "odd", "prompt": "the Z"})
    config = change(settings, "source.path", str(source))
    config = change(config, "source.generate.by", str(tmp_path / "nan"))
    with pytest.raises(EngineError, match=r"by .*nan: the sampler gives NaN .* answers sample odd"):
        dump(dataclasses.replace(config, output=str(tmp_path / "cache")))


def test_a_plan_samples_with_the_sampler(settings: DumpConfig, sampled: Path) -> None:
    """Its bytes include the column: 4 to 5 a target beside the tokens of labels alone."""
    predicted = predict(dataclasses.replace(settings, output="nowhere"), sample=10)
    manifest = CacheReader(sampled).manifest
    assert predicted.counts.targets == pytest.approx(manifest.num_targets, rel=0.3)
    teacher_alone = change(settings, "source.generate.by", "")
    without = predict(dataclasses.replace(teacher_alone, output="nowhere"), sample=10)
    assert predicted.bytes_per_target > without.bytes_per_target + 1
