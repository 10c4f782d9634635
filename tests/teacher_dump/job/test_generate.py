"""Claims about responses sampled from the teacher: what they are, and that resuming is exact."""

import dataclasses
import json
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from decant.schemas import FormatError
from decant.storage import CacheReader, verify
from decant.teacher_dump import DumpConfig, SourceError, TeacherConfig, dump
from decant.teacher_dump.engines import EngineError
from decant.teacher_dump.engines.opening import open_generator
from decant.teacher_dump.engines.seam import Prompt, Sampling
from decant.teacher_dump.inputs.config import GenerateConfig
from decant.teacher_dump.job.responses import GenerationChanged
from decant.teacher_dump.planning.predict import predict
from decant.teacher_dump.planning.text import plan_text
from tests.support import models
from tests.support.commands import Command, command
from tests.support.dumps import MODULE, change, rows, save_config, save_records

STOPS = tuple(range(1, 40))
"""Ids that end a response of the test teacher: enough of them that many do end."""


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama whose generation config names many end tokens, and settings of its own."""
    path = tmp_path_factory.mktemp("teacher")
    models.save_teacher(path)
    own = {"eos_token_id": list(STOPS), "do_sample": True, "temperature": 0.1, "top_k": 1}
    (path / "generation_config.json").write_text(json.dumps(own | {"repetition_penalty": 5.0}))
    return path


@pytest.fixture(scope="module")
def prompts_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 prompts of uneven length, every third a conversation."""
    generator = np.random.default_rng(0)
    records: list[dict[str, Any]] = []
    for i, size in enumerate(generator.integers(2, 12, 20)):
        text = " ".join(generator.choice(models.WORDS, size))
        chat = [{"role": "system", "content": "dog"}, {"role": "user", "content": text}]
        records.append({"id": f"p{i}", **({"messages": chat} if i % 3 == 0 else {"prompt": text})})
    return save_records(tmp_path_factory.mktemp("prompts") / "prompts.jsonl", *records)


@pytest.fixture(scope="module")
def settings(dump_config: DumpConfig, teacher: Path, prompts_path: Path) -> DumpConfig:
    """Two responses to each prompt, in four parts."""
    config = change(dump_config, "teacher.path", str(teacher))
    config = change(config, "source.path", str(prompts_path))
    generate = GenerateConfig(n=2, temperature=0.9, top_p=0.95, max_new_tokens=12, part_prompts=5)
    return change(config, "source.generate", generate)


@pytest.fixture(scope="module")
def sampled(settings: DumpConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cache of `settings`. Never write to it."""
    path = tmp_path_factory.mktemp("sampled") / "cache"
    dump(dataclasses.replace(settings, output=str(path)))
    return path


def responses(cache: Path) -> list[dict[str, Any]]:
    """The rows of `generated/`, read as any Parquet dataset."""
    return pq.read_table(cache / "generated").sort_by("id").to_pylist()


def generated_files(cache: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (cache / "generated").iterdir()}


def test_what_is_scored_is_what_was_sampled(sampled: Path, settings: DumpConfig, tmp_path: Path):
    """The rows are those of a dump of the same ids and masks, to the last bit."""
    records = [
        {
            "id": row["id"],
            "input_ids": row["prompt_ids"] + row["response_ids"],
            "loss_mask": [0] * len(row["prompt_ids"]) + [1] * len(row["response_ids"]),
        }
        for part in sorted((sampled / "generated").glob("*.parquet"))
        for row in pq.read_table(part).to_pylist()
    ]
    source = dataclasses.replace(
        settings.source,
        path=str(save_records(tmp_path / "ids.jsonl", *records)),
        generate=GenerateConfig(),
    )
    given = dataclasses.replace(settings, source=source, output=str(tmp_path / "given"))
    dump(given)
    assert rows(sampled, without="messages") == rows(given.output, without="messages")
    assert verify(sampled).problems == ()
    assert len(records) == 40 and records[0]["id"] == "p0#1" and records[1]["id"] == "p0#2"


def test_the_cache_is_also_a_dataset(sampled: Path, teacher: Path, prompts_path: Path):
    """Prompt, response and conversation are the text of the ids, and a response ends as it says."""
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    asked = {f["id"]: f for f in map(json.loads, prompts_path.read_text().splitlines())}
    found = responses(sampled)
    reasons = [row["finish_reason"] for row in found]
    assert {"stop", "length"} == set(reasons)
    for row in found:
        record = asked[row["id"].split("#")[0]]
        ids = row["response_ids"]
        stopped = row["finish_reason"] == "stop"
        assert (ids[-1] in STOPS) == stopped and not set(ids[:-1]) & set(STOPS)
        assert stopped or len(ids) == 12
        assert row["response"] == tokenizer.decode(ids, skip_special_tokens=True)
        assert max(ids) < models.VOCAB_SIZE
        if "prompt" in record:
            assert row["prompt"] == record["prompt"] and row["conversation"] is None
            assert row["prompt_ids"] == tokenizer(record["prompt"])["input_ids"]
        else:
            text = tokenizer.apply_chat_template(
                record["messages"], tokenize=False, add_generation_prompt=True
            )
            assert row["prompt"] == text
            assert tokenizer.decode(row["prompt_ids"]) == text
            answer = {"role": "assistant", "content": row["response"]}
            assert json.loads(row["conversation"]) == [*record["messages"], answer]
    stored = {s.sample_id: s for s in CacheReader(sampled)}
    for row in found:
        targets = stored[row["id"]]
        assert targets.labels.tolist() == row["response_ids"]  # the end token is a target
        said = targets.conversation and list(targets.conversation.messages)
        assert said == (row["conversation"] and json.loads(row["conversation"]))


def test_an_interrupted_sampling_goes_on_as_if_nothing_had_happened(
    settings: DumpConfig, sampled: Path, tmp_path: Path
):
    """Killed after the second part: the first are kept; files and rows are as undisturbed."""
    config = dataclasses.replace(settings, output=str(tmp_path / "cache"))
    folder = tmp_path / "cache" / "generated"
    running = Command(MODULE, "run", "--config", save_config(config, tmp_path))
    running.signal_when(lambda: len(list(folder.glob("part-*"))) >= 2, signal.SIGKILL)
    running.result()
    before = {path: path.stat().st_mtime_ns for path in folder.glob("part-*")}
    assert 2 <= len(before) < 4 and not (tmp_path / "cache" / "manifest.json").exists()
    result = command(MODULE, "run", "--config", save_config(config, tmp_path))
    assert result.code == 0, result.stderr
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
    assert generated_files(tmp_path / "cache") == generated_files(sampled)
    assert rows(tmp_path / "cache") == rows(sampled)
    assert verify(tmp_path / "cache").problems == ()


def test_greedy_sampling_is_the_greedy_of_transformers(
    settings: DumpConfig, teacher: Path, tmp_path: Path
):
    """At temperature 0 and next to it; of the saved generation config only end tokens are used."""
    generate = GenerateConfig(n=1, temperature=0, max_new_tokens=12)
    config = change(settings, "source.generate", generate)
    config = dataclasses.replace(config, output=str(tmp_path / "greedy"))
    dump(config)
    cold = change(config, "source.generate", dataclasses.replace(generate, temperature=1e-4))
    dump(dataclasses.replace(cold, output=str(tmp_path / "cold")))
    model = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32)
    model.generation_config = type(model.generation_config)()
    found = responses(tmp_path / "greedy")
    assert len(found) == 20
    for row, other in zip(found, responses(tmp_path / "cold"), strict=True):
        prompt = torch.tensor([row["prompt_ids"]])
        out = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=12,
            do_sample=False,
            suppress_tokens=list(range(models.VOCAB_SIZE, models.PADDED_VOCAB_SIZE)),
            eos_token_id=list(STOPS),
            pad_token_id=0,
        )
        assert row["response_ids"] == out[0, prompt.shape[1] :].tolist()
        assert other["response_ids"] == row["response_ids"]


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.5, 1.0), (1.0, 0.7)])
def test_tokens_are_drawn_from_the_teacher_s_distribution(
    teacher: Path, temperature: float, top_p: float
):
    """First tokens of 3000 responses to one prompt against the dense softmax (chi-squared)."""
    sampling = Sampling(
        temperature=temperature, top_p=top_p, stop_ids=(), vocab_size=models.VOCAB_SIZE
    )
    config = TeacherConfig(path=str(teacher), dtype="float32")
    generator = open_generator(config, str(teacher), sampling=sampling, max_length=64)
    ids = np.array([50, 60, 70], np.int32)
    asked = [Prompt(token_ids=ids, max_new_tokens=1, seed=seed) for seed in range(3000)]
    drawn = np.array([response.token_ids[0] for response in generator.generate(asked)])
    generator.close()
    model = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32)
    with torch.no_grad():
        logits = model(torch.tensor(ids[None].astype(np.int64))).logits[0, -1, : models.VOCAB_SIZE]
    p = torch.softmax(logits.double() / temperature, -1).numpy()
    order = np.argsort(-p)
    kept = order[: int(np.searchsorted(np.cumsum(p[order]), top_p)) + 1]
    allowed = np.zeros(len(p))
    allowed[kept] = p[kept] / p[kept].sum()
    counts = np.bincount(drawn, minlength=len(p))
    assert counts[allowed == 0].sum() == 0
    common = 3000 * allowed >= 5
    observed = np.append(counts[common], counts[~common].sum())
    expected = np.append(3000 * allowed[common], 3000 * allowed[~common].sum())
    observed, expected = observed[expected > 0], expected[expected > 0]
    chi_squared, freedom = ((observed - expected) ** 2 / expected).sum(), len(expected) - 1
    assert chi_squared < freedom + 4 * np.sqrt(2 * freedom)  # four standard deviations


def test_a_response_does_not_depend_on_its_neighbours(teacher: Path):
    """The same prompts and seeds in other batches: the same responses, up to rounding."""
    generator = np.random.default_rng(3)
    asked = [
        Prompt(
            token_ids=generator.integers(40, 300, size).astype(np.int32),
            max_new_tokens=int(room),
            seed=seed,
        )
        for seed, (size, room) in enumerate(generator.integers(1, 20, (30, 2)))
    ]
    found = []
    for tokens in (40, 4000):
        config = TeacherConfig(path=str(teacher), dtype="float32", max_batch_tokens=tokens)
        sampling = Sampling(
            temperature=1.0, top_p=1.0, stop_ids=STOPS, vocab_size=models.VOCAB_SIZE
        )
        one = open_generator(config, str(teacher), sampling=sampling, max_length=40)
        found.append([response.token_ids.tolist() for response in one.generate(asked)])
        one.close()
    assert found[0] == found[1]
    assert all(len(ids) <= p.max_new_tokens for ids, p in zip(found[0], asked, strict=True))
    other = [dataclasses.replace(prompt, seed=prompt.seed + 100) for prompt in asked]
    one = open_generator(config, str(teacher), sampling=sampling, max_length=40)
    assert [response.token_ids.tolist() for response in one.generate(other)] != found[0]
    one.close()


def test_settings_are_pinned(settings: DumpConfig, sampled: Path, tmp_path: Path):
    """Another setting is refused, before and after the cache is started; damage is found."""
    config = dataclasses.replace(settings, output=str(tmp_path / "cache"))
    folder = tmp_path / "cache" / "generated"
    shutil.copytree(sampled / "generated", folder)
    hotter = change(config, "source.generate.temperature", 1.0)
    with pytest.raises(GenerationChanged, match="other prompts, settings or another teacher"):
        dump(hotter)
    assert generated_files(tmp_path / "cache") == generated_files(sampled)
    dump(config)  # with the parts that are there
    assert rows(tmp_path / "cache") == rows(sampled)
    with pytest.raises(ValueError, match=r"source\.fingerprint"):
        dump(hotter)
    part = folder / "part-000002.parquet"
    data = part.read_bytes()
    part.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    (problem,) = verify(tmp_path / "cache").problems
    assert "part-000002.parquet is damaged" in problem
    part.unlink()
    (problem,) = verify(tmp_path / "cache").problems
    assert "part-000002.parquet is missing" in problem


def test_a_damaged_part_is_not_scored(settings: DumpConfig, sampled: Path, tmp_path: Path):
    """It is named; once deleted, the same command samples it again."""
    config = dataclasses.replace(settings, output=str(tmp_path / "cache"))
    shutil.copytree(sampled / "generated", tmp_path / "cache" / "generated")
    part = tmp_path / "cache" / "generated" / "part-000001.parquet"
    data = bytearray(part.read_bytes())
    data[len(data) // 3] ^= 255
    part.write_bytes(bytes(data))
    with pytest.raises(FormatError, match=r"part-000001\.parquet is damaged.*samples it"):
        dump(config)
    part.unlink()
    dump(config)
    assert rows(tmp_path / "cache") == rows(sampled)


def test_prompts_without_room_are_left_out_or_refused(
    settings: DumpConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    """A response never makes a sequence longer than max_length."""
    long = {"id": "long", "prompt": "lazy dog " * 60}
    close = {"id": "close", "prompt": "the " * 30}
    source = save_records(tmp_path / "prompts.jsonl", long, close, {"id": "z", "prompt": "a dog"})
    config = change(settings, "source.path", str(source))
    config = dataclasses.replace(config, output=str(tmp_path / "cache"))
    with pytest.raises(SourceError, match=r"sample 'long' has a prompt of .* no room"):
        dump(change(config, "sequences.overlong", "error"))
    assert dump(config).num_sequences == 4
    assert "1 prompts leave no room" in caplog.text
    lengths = {s.sample_id: len(s.input_ids) for s in CacheReader(tmp_path / "cache")}
    assert set(lengths) == {"close#1", "close#2", "z#1", "z#2"} and max(lengths.values()) <= 64


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"text": "a fox"}, "nothing to answer"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "end with the assistant's"),
        ({"prompt": ""}, "empty prompt"),
        ({"prompt": "a", "messages": [{"role": "user", "content": "a"}]}, "prompt and messages"),
    ],
    ids=["text", "answered", "empty", "both"],
)
def test_records_without_a_question_are_refused(
    settings: DumpConfig, tmp_path: Path, record: dict[str, Any], message: str
):
    """By name, before a teacher is loaded."""
    source = save_records(tmp_path / "prompts.jsonl", {"prompt": "a fox"}, record)
    config = change(settings, "source.path", str(source))
    with pytest.raises(SourceError, match=f"line 2.*{message}"):
        dump(dataclasses.replace(config, output=str(tmp_path / "cache")))


def test_settings_without_effect_are_refused(settings: DumpConfig):
    """And what no engine can sample."""
    with pytest.raises(ValueError, match=r"\['temperature'\] have no effect with n: 0"):
        GenerateConfig(temperature=0.5)
    with pytest.raises(ValueError, match="the same response every time"):
        GenerateConfig(n=2, temperature=0)
    with pytest.raises(ValueError, match="top_p is 0"):
        GenerateConfig(n=1, top_p=0)
    for temperature in (1e40, 1e-50, float("nan")):
        with pytest.raises(ValueError, match="expected 0, or 1e-4 to 1e4"):
            GenerateConfig(n=1, temperature=temperature)
    for option, value in (("overlong", "split"), ("add_eos", False), ("empty", "drop")):
        with pytest.raises(ValueError, match=f"sequences.{option}: .* has no effect"):
            dump(change(settings, f"sequences.{option}", value))
    with pytest.raises(ValueError, match="set packing to none"):
        dump(change(settings, "sequences.packing", "concat"))
    with pytest.raises(ValueError, match="needs a tokenizer"):
        dump(change(settings, "teacher.tokenizer", "none"))
    http = TeacherConfig(engine="http", endpoints=("http://localhost:1",))
    sampling = Sampling(temperature=1, top_p=1, stop_ids=(), vocab_size=5)
    with pytest.raises(EngineError, match=r"cannot sample with teacher\.engine http"):
        open_generator(http, "", sampling=sampling, max_length=9)


def test_a_nan_names_the_sample_and_leaves_nothing(
    settings: DumpConfig, teacher: Path, tmp_path: Path
):
    """So that the output can be used for something else."""
    own = tmp_path / "teacher"
    shutil.copytree(teacher, own)
    weights = load_file(own / "model.safetensors")
    (token,) = models.build_tokenizer()("Z")["input_ids"]
    weights["model.embed_tokens.weight"][token] = torch.nan
    save_file(weights, own / "model.safetensors", metadata={"format": "pt"})
    source = save_records(
        tmp_path / "a.jsonl", {"id": "fine", "prompt": "the fox"}, {"id": "odd", "prompt": "the Z"}
    )
    config = change(change(settings, "teacher.path", str(own)), "source.path", str(source))
    config = dataclasses.replace(config, output=str(tmp_path / "cache"))
    with pytest.raises(EngineError, match="while it answers sample odd; look at the record"):
        dump(config)
    assert [p for p in Path(config.output).rglob("*") if p.is_file()] == []
    (own / "generation_config.json").unlink()
    plain = change(config, "source.generate", GenerateConfig())
    source.write_text('{"text": "the fox"}\n')
    assert dump(plain).num_sequences == 1


def test_a_plan_samples_prompts(settings: DumpConfig, sampled: Path, tmp_path: Path):
    """It says so, writes nothing, and its estimate of the targets is near the dump's."""
    config = dataclasses.replace(settings, output=str(tmp_path / "cache"))
    predicted = predict(config, sample=20)
    manifest = CacheReader(sampled).manifest
    assert predicted.counts.sequences == manifest.num_sequences == 40
    assert predicted.counts.targets == pytest.approx(manifest.num_targets, rel=0.2)
    assert predicted.generate_hours is not None and predicted.generate_hours > 0
    text = plan_text(predicted, config)
    assert "estimated from one response to each of 20 prompts" in text
    assert list(tmp_path.iterdir()) == []
