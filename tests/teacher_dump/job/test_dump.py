"""Claims about the dump job: what it leaves behind, what interrupts it, what it refuses.

Interruptions and command lines run as processes (`tests.commands`), the rest in this one.
"""

import contextlib
import dataclasses
import datetime
import json
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaModel

from decant.schemas import FormatError, Truncation
from decant.storage import Busy, CacheReader, Store, verify
from decant.teacher_dump import (
    ConfigChanged,
    DumpConfig,
    EngineError,
    SequenceConfig,
    SourceError,
    TeacherConfig,
    dump,
)
from decant.teacher_dump.audit.run import audit
from tests.support import models
from tests.support.commands import Command, command
from tests.support.dumps import (
    MODULE,
    assert_whole,
    change,
    committed,
    files,
    rows,
    save_config,
    save_records,
    temporaries,
)

LOADING = 4
"""Forwards while the teacher is loaded: to look at its head, and at what padding does."""
HALF = LOADING + 3
"""Forwards that score some of the shards of `config`."""


@pytest.fixture
def config(dump_config: DumpConfig, tmp_path: Path) -> DumpConfig:
    """The config of `cache`, into a directory that is not there yet."""
    return dataclasses.replace(dump_config, output=str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def half_done(dump_config: DumpConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cache of `config` with some of its shards committed. Never write to it."""
    path = tmp_path_factory.mktemp("half") / "cache"
    with failing_after(HALF), pytest.raises(RuntimeError):
        dump(dataclasses.replace(dump_config, output=str(path)))
    return path


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


# What a dump leaves behind.


def test_a_dump_is_a_whole_cache(cache: Path, config: DumpConfig):
    """Verified, final, without inputs or temporaries, and its ids are the tokenizer's."""
    assert_whole(cache, cache)
    manifest = CacheReader(cache).manifest
    assert manifest.is_final and manifest.num_shards > 2
    assert manifest.shared_vocab_size == models.VOCAB_SIZE
    assert manifest.teacher.vocab_size == models.PADDED_VOCAB_SIZE
    texts = [json.loads(line) for line in Path(config.source.path).read_text().splitlines()]
    tokenizer = models.build_tokenizer()
    for record, sequence in zip(texts, CacheReader(cache), strict=True):
        assert sequence.sample_id == record["id"]
        ids = [*tokenizer(record["text"])["input_ids"], tokenizer.eos_token_id][:64]
        assert sequence.input_ids.tolist() == ids
        assert sequence.is_target.tolist() == [False] + [True] * (len(ids) - 1)


def test_row_t_is_the_prediction_of_token_t(cache: Path, teacher_path: Path):
    """From text file to shard: a stored distribution is row t - 1 of a plain forward."""
    model = models.build_model()
    for index in (0, 17, 89):
        sequence = CacheReader(cache)[index]
        with torch.inference_mode():
            logits = model(torch.tensor(sequence.input_ids).long()[None]).logits[0]
        logp = logits[:-1, : models.VOCAB_SIZE].log_softmax(dim=1)
        labels = torch.tensor(sequence.labels).long()
        expected = logp.gather(1, labels[:, None])[:, 0]
        np.testing.assert_allclose(sequence.label_logprob, expected, atol=2e-4)
        np.testing.assert_allclose(sequence.logprobs, logp.topk(16).values, atol=2e-4)


def test_the_same_input_and_config_give_the_same_cache(cache: Path, config: DumpConfig):
    """Same id, same shard plan to the byte, equal rows."""
    manifest = dump(config)
    assert manifest.cache_id == CacheReader(cache).manifest.cache_id
    assert_whole(config.output, cache)
    plans = [files(Path(folder) / "plan") for folder in (config.output, cache)]
    assert plans[0] == plans[1]


@pytest.mark.parametrize(
    ("truncation", "precision"),
    [
        (Truncation(k=1), "compact"),
        (Truncation(k=models.VOCAB_SIZE), "compact"),
        (Truncation(k=models.VOCAB_SIZE), "f16"),
        (Truncation(method="topp", k=24, p=0.5), "compact"),
        (Truncation(method="topp", k=24, p=0.5), "f16"),
        (Truncation(method="sample", draws=12, seed=1), "compact"),
        (Truncation(method="topk+sample", k=4, draws=6), "f32"),
        (Truncation(method="label"), "compact"),
    ],
    ids=lambda t: t if isinstance(t, str) else f"{t.method}-{t.slots}",
)
def test_every_truncation_and_precision_verifies(config: DumpConfig, truncation, precision):
    """What a dump writes passes the checks of `verify`, at all temperatures that it may have."""
    temperatures = [1.0, 0.5, 4.0] if truncation.rule.has_logprobs else [1.0]
    config = change(change(config, "source.limit", 8), "temperatures", temperatures)
    dump(dataclasses.replace(config, truncation=truncation, precision=precision))
    report = verify(config.output)
    assert report.problems == () and report.sequences == 8


def test_a_complete_cache_is_left_alone(config: DumpConfig):
    """A rerun gives the same manifest and touches no file."""
    first = dump(change(config, "source.limit", 10))

    def state() -> dict[str, tuple[int, bytes]]:
        paths = [path for path in Path(config.output).rglob("*") if path.is_file()]
        return {str(path): (path.stat().st_mtime_ns, path.read_bytes()) for path in paths}

    before = state()
    assert dump(change(config, "source.limit", 10)) == first
    assert state() == before


def test_ready_ids_need_no_tokenizer(config: DumpConfig, tmp_path: Path):
    """teacher.tokenizer: none scores input_ids over all output rows; loss_mask picks targets."""
    last = models.PADDED_VOCAB_SIZE - 1
    source = save_records(
        tmp_path / "ids.jsonl",
        {"id": 7, "input_ids": [5, 6, last, 8]},
        {"input_ids": [5, 6, 7], "loss_mask": [1, 0, 1]},
    )
    config = change(change(config, "source.path", str(source)), "teacher.tokenizer", "none")
    manifest = dump(config)
    assert manifest.shared_vocab_size == models.PADDED_VOCAB_SIZE
    assert manifest.tokenizer.fingerprint == "" and manifest.tokenizer.files == {}
    first, second = CacheReader(config.output)
    assert (first.sample_id, second.sample_id) == ("7", "ids.jsonl:1")
    assert first.labels.tolist() == [6, last, 8]
    assert second.positions.tolist() == [2]


def test_of_prompt_and_response_only_the_response_is_scored(config: DumpConfig, tmp_path: Path):
    """Its tokens and the eos have distributions; the prompt's rows are there, without one."""
    source = save_records(tmp_path / "sft.jsonl", {"prompt": "the fox", "response": " runs away"})
    dump(change(config, "source.path", str(source)))
    (sequence,) = CacheReader(config.output)
    tokenizer = models.build_tokenizer()
    prompt = len(tokenizer("the fox")["input_ids"])
    assert sequence.is_target.tolist() == [False] * prompt + [True] * sequence.num_targets
    assert tokenizer.decode(sequence.labels) == " runs away</s>"


def test_the_order_in_which_files_are_found_does_not_matter(config: DumpConfig, tmp_path: Path):
    """The same files made in another order, elsewhere, are the same source: a resume works."""
    records = {name: {"text": f"the {name} runs"} for name in ("a.jsonl", "b.jsonl", "x/c.jsonl")}
    for folder, names in (("one", list(records)), ("two", list(reversed(records)))):
        for name in names:
            save_records(tmp_path / folder / name, records[name])
    with failing_after(1), pytest.raises(RuntimeError):
        dump(change(config, "source.path", str(tmp_path / "one")))
    dump(change(config, "source.path", str(tmp_path / "two")))
    ids = [sequence.sample_id for sequence in CacheReader(config.output)]
    assert ids == ["a.jsonl:0", "b.jsonl:0", "x/c.jsonl:0"]


def test_an_object_store_works_as_a_directory_does(config: DumpConfig, cache: Path):
    """Through fsspec: start, break, resume, read."""
    config = change(config, "output", "memory://bucket/cache")
    with failing_after(HALF), pytest.raises(RuntimeError):
        dump(config)
    assert 0 < len(CacheReader(config.output, allow_incomplete=True)) < 90
    dump(config)
    assert rows(config.output) == rows(cache)


def test_a_quantised_teacher_is_named_in_the_manifest(config: DumpConfig, tmp_path: Path):
    """Which an audit runs again, and without which a rerun is refused."""
    pytest.importorskip("bitsandbytes")
    models.save_teacher(tmp_path / "teacher", hidden_size=64, intermediate_size=128)
    config = change(change(config, "teacher.path", str(tmp_path / "teacher")), "source.limit", 6)
    quantised = change(config, "teacher.quantization", "bnb-4bit")
    assert dump(quantised).teacher.dtype == "float32+bnb-4bit"
    with pytest.raises(ConfigChanged, match=r"has 'float32\+bnb-4bit', this run gives 'float32'"):
        dump(config)
    report = audit(config.output, TeacherConfig(path=config.teacher.path, device="cpu"), sample=6)
    assert report.ok, report


# Interruptions.


@pytest.fixture(scope="module")
def small_steps(dump_config: DumpConfig) -> DumpConfig:
    """Batches and shards so small that there is time to interrupt."""
    config = change(dump_config, "teacher.max_batch_tokens", 64)
    return dataclasses.replace(config, shard_targets=100)


@pytest.fixture(scope="module")
def undisturbed(small_steps: DumpConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cache of `small_steps`."""
    path = tmp_path_factory.mktemp("undisturbed") / "cache"
    dump(dataclasses.replace(small_steps, output=str(path)))
    return path


def test_a_failure_loses_one_shard(config: DumpConfig, cache: Path):
    """Committed shards survive byte for byte, nothing half-done is left, a rerun completes."""
    with failing_after(HALF), pytest.raises(RuntimeError, match="off the bus"):
        dump(config)
    output = Path(config.output)
    done = committed(output)
    assert 0 < len(done) < len(committed(cache))
    assert files(output / "shards") == done
    assert temporaries(output) == []
    with pytest.raises(FormatError, match="not complete"):
        CacheReader(output)
    dump(config)
    assert committed(output).items() >= done.items()
    assert_whole(output, cache)


def test_a_kill_loses_one_shard(small_steps: DumpConfig, undisturbed: Path, tmp_path: Path):
    """SIGKILL in the middle of a shard: a rerun clears what it left and completes."""
    config = dataclasses.replace(small_steps, output=str(tmp_path / "cache"))
    output = Path(config.output)
    running = Command(MODULE, "run", "--config", save_config(config, tmp_path))
    running.signal_when(
        lambda: bool(committed(output) and list(output.glob("shards/.*.tmp"))), signal.SIGKILL
    )
    assert running.result().code == -signal.SIGKILL
    assert temporaries(output)
    done = committed(output)
    dump(config)
    assert committed(output).items() >= done.items()
    assert_whole(output, undisturbed)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_is_clean(
    small_steps: DumpConfig, undisturbed: Path, tmp_path: Path, number: signal.Signals
):
    """Ctrl-C and a batch system's SIGTERM: exit code 130, nothing half-published, resumable."""
    config = dataclasses.replace(small_steps, output=str(tmp_path / "cache"))
    output = Path(config.output)
    running = Command(MODULE, "run", "--config", save_config(config, tmp_path))
    running.signal_when(lambda: bool(committed(output)), number)
    result = running.result()
    assert result.code == 130
    assert "goes on from there" in result.stderr and "Traceback" not in result.stderr
    done = committed(output)
    assert temporaries(output) == []
    assert len(done) < len(committed(undisturbed))
    dump(config)
    assert committed(output).items() >= done.items()
    assert_whole(output, undisturbed)


def test_a_start_that_was_cut_off_is_begun_anew(config: DumpConfig, cache: Path):
    """Killed before the manifest: the leftovers of tokenising are cleared."""
    output = Path(config.output)
    (output / "inputs").mkdir(parents=True)
    (output / "tokenizer").mkdir()
    for name in ("inputs/part-000000.parquet", "inputs/part-000777.parquet", "tokenizer/old.json"):
        (output / name).write_text("cut off")
    (output / "inputs" / ".part-000001.parquet.1234.tmp").touch()
    (output / ".manifest.json.1234.tmp").touch()
    dump(config)
    assert_whole(output, cache)
    assert not (output / "tokenizer" / "old.json").exists()


def test_temporaries_of_a_dead_writer_are_removed(config: DumpConfig, cache: Path):
    """At the next run, even of a complete cache."""
    output = Path(config.output)
    shutil.copytree(cache, output)
    for name in ("shards/.part-000001.parquet.1234.tmp", ".manifest.json.1234.tmp"):
        (output / name).touch()
    dump(config)
    assert_whole(output, cache)


def test_two_dumps_do_not_share_a_directory(config: DumpConfig, cache: Path, tmp_path: Path):
    """The second is refused at once, by one clean line, while the first holds it."""
    with Store(config.output).lock():
        with pytest.raises(Busy, match="another process"):
            dump(config)
        result = command(MODULE, "run", "--config", save_config(config, tmp_path))
    assert result.code == 2
    assert f"error: {config.output} is being written by another process" in result.stderr
    assert not list(Path(config.output).iterdir())


# Repair.


@pytest.mark.parametrize(
    "lost",
    [
        ["shards/part-000001.parquet"],
        ["shards/part-000002.json"],
        ["shards/part-000000.parquet", "shards/part-000000.json", "shards/part-000002.parquet"],
        ["records/records-000000.parquet"],
        ["tokenizer/tokenizer.json"],
    ],
    ids=lambda names: names[0].split("/")[1],
)
def test_a_rerun_refills_what_was_lost_of_a_complete_cache(
    config: DumpConfig, cache: Path, lost: list[str]
):
    """Lost shards are scored again, from inputs made from the source again; others are kept."""
    output = Path(config.output)
    shutil.copytree(cache, output)
    before = files(output)
    for name in lost:
        (output / name).unlink()
    kept = committed(output)
    dump(config)
    assert committed(output).items() >= kept.items()
    assert_whole(output, cache)
    assert files(output).keys() == before.keys()


def test_a_shard_that_was_cut_short_is_scored_again(config: DumpConfig, cache: Path):
    """As a full disk elsewhere or a broken copy leaves it."""
    shutil.copytree(cache, config.output)
    shard = Path(config.output) / "shards" / "part-000001.parquet"
    shard.write_bytes(shard.read_bytes()[:1000])
    dump(config)
    assert_whole(config.output, cache)


def test_a_failure_while_refilling_can_be_resumed(config: DumpConfig, cache: Path):
    """A complete cache that lost two shards, and broke again after the first of them."""
    output = Path(config.output)
    shutil.copytree(cache, output)
    for index in (0, 3):
        (output / "shards" / f"part-00000{index}.parquet").unlink()
    with failing_after(LOADING + 1), pytest.raises(EngineError):
        dump(config)
    assert not verify(output).ok
    assert not (output / "shards" / "part-000003.json").exists()  # nothing says it is whole
    assert (output / "inputs").exists()
    dump(config)
    assert_whole(output, cache)


def test_lost_inputs_are_made_again(config: DumpConfig, cache: Path, half_done: Path):
    """The folder a hasty user deletes from a half-done cache."""
    shutil.copytree(half_done, config.output)
    shutil.rmtree(Path(config.output) / "inputs")
    dump(config)
    assert_whole(config.output, cache)


@pytest.mark.parametrize(
    ("name", "damage", "way_out"),
    [
        ("manifest.json", "flip", "restore it from a copy"),
        ("manifest.json", "empty", "restore it from a copy"),
        ("plan/plan-000000.jsonl.zst", "flip", "restore it from a copy"),
        ("shards/part-000000.json", "flip", "delete it, and the same command scores its shard"),
        ("inputs/part-000005.parquet", "flip", "delete it, and the same command makes it"),
        ("inputs/part-000005.parquet", "foreign", "delete it, and the same command makes it"),
        ("inputs/part-000005.parquet", "another", "delete it, and the same command makes it"),
    ],
)
def test_damage_to_a_half_done_cache_is_named_with_the_way_out(
    config: DumpConfig, cache: Path, half_done: Path, name: str, damage: str, way_out: str
):
    """The file, what is wrong, what to do; and doing it works."""
    shutil.copytree(half_done, config.output)
    file = Path(config.output) / name
    whole = file.read_bytes()
    middle = len(whole) // 2
    other = (cache / "shards" / "part-000001.parquet").read_bytes()
    file.write_bytes(
        {
            "flip": whole[:middle] + bytes([whole[middle] ^ 8]) + whole[middle + 1 :],
            "empty": b"",
            "foreign": other,
            "another": (half_done / "inputs" / "part-000004.parquet").read_bytes(),
        }[damage]
    )
    with pytest.raises(FormatError) as caught:
        dump(config)
    assert str(file) in str(caught.value) and way_out in str(caught.value)
    assert committed(Path(config.output)).keys() >= committed(half_done).keys()
    if "delete" in way_out:
        file.unlink()
        dump(config)
        assert_whole(config.output, cache)


# Refusals.


@pytest.mark.parametrize(
    ("path", "value", "field"),
    [
        ("truncation.k", 15, "truncation.k: the cache has 16, this run gives 15"),
        ("precision", "f16", "precision: the cache has 'f32', this run gives 'f16'"),
        ("temperatures", [1.0], r"temperatures: the cache has \[1.0, 2.0\]"),
        ("shard_targets", 301, "sequences.shard_targets: the cache has 300"),
        ("sequences.max_length", 63, "sequences.max_length: the cache has 64"),
        ("source.limit", 3, "source.fingerprint: "),
        ("teacher.dtype", "bfloat16", "teacher.dtype: the cache has 'float32'"),
        ("teacher.tokenizer", "none", "tokenizer.fingerprint: "),
    ],
)
def test_another_config_is_refused_by_the_fields_that_differ(
    config: DumpConfig, cache: Path, path: str, value: Any, field: str
):
    """With both values, and without touching the cache."""
    config = dataclasses.replace(config, output=str(cache))
    before = files(cache)
    with pytest.raises(ConfigChanged, match=field):
        dump(change(config, path, value))
    assert files(cache) == before


def test_other_contents_under_the_same_names_are_refused(
    config: DumpConfig, teacher_path: Path, tmp_path: Path
):
    """Source, weights, tokenizer and chat template count by what they hold."""
    teacher = tmp_path / "teacher"
    shutil.copytree(teacher_path, teacher)
    source = save_records(tmp_path / "a.jsonl", {"text": "the quick fox"})
    config = change(change(config, "teacher.path", str(teacher)), "source.path", str(source))
    dump(config)

    def refusal() -> str:
        with pytest.raises(ConfigChanged) as caught:
            dump(config)
        return str(caught.value)

    save_records(source, {"text": "the quick dog"})
    assert "source.fingerprint" in refusal()
    save_records(source, {"text": "the quick fox"})
    weights = load_file(teacher / "model.safetensors")
    weights["model.norm.weight"][3] += 1e-3
    save_file(weights, teacher / "model.safetensors", metadata={"format": "pt"})
    assert "teacher.fingerprint" in refusal()
    shutil.copy(teacher_path / "model.safetensors", teacher)
    (teacher / "chat_template.jinja").write_text("{{ messages }}")
    assert "sequences.chat_template" in refusal()
    shutil.copy(teacher_path / "chat_template.jinja", teacher)
    models.build_tokenizer(299).save_pretrained(teacher)
    assert "tokenizer.fingerprint" in refusal() and "shared_vocab_size" in refusal()
    shutil.copytree(teacher_path, teacher, dirs_exist_ok=True)
    dump(config)  # all is as it was


@pytest.mark.parametrize(
    "name",
    [
        "notes.txt",
        "inputs/data.jsonl",
        "tokenizer/tokenizer.json",
        "plan/plan.md",
        "shards/part-000000.parquet",
        ".hidden",
    ],
)
def test_a_directory_that_holds_something_else_is_left_alone(config: DumpConfig, name: str):
    """Even what is called like a part of ours: the dump removes nothing it did not write."""
    file = Path(config.output) / name
    file.parent.mkdir(parents=True)
    file.write_text("mine")
    with pytest.raises(FileExistsError, match="is not empty and holds no cache"):
        dump(config)
    assert files(Path(config.output)) == {name: b"mine"}


def test_output_and_source_do_not_overlap(config: DumpConfig, texts_path: Path, tmp_path: Path):
    """A source that would read the cache, a cache around its source, a file for an output."""
    data = tmp_path / "data"
    source = data / "inputs" / "part-000000.jsonl"
    source.parent.mkdir(parents=True)
    shutil.copy(texts_path, source)
    for path, output in ((data, data / "cache"), (data, data), (f"{data}/**/*.jsonl", data / "c")):
        with pytest.raises(ValueError, match="lies inside the source"):
            dump(change(change(config, "source.path", str(path)), "output", str(output)))
    with pytest.raises(ValueError, match="lies inside the output"):
        dump(change(change(config, "source.path", str(source)), "output", str(data)))
    with pytest.raises(ValueError, match="is not a directory"):
        dump(change(config, "output", str(source)))
    assert list(files(data)) == ["inputs/part-000000.jsonl"]
    beside = change(config, "source.path", f"{source.parent}/*.jsonl")
    dump(change(beside, "output", str(source.parent / "cache")))  # not matched: fine


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "records.jsonl is empty"),
        ([{"id": 1, "body": "x"}], r"line 1: the record is no kind of sample, .*\['body', 'id'\]"),
        ([{"text": "the fox"}, {"text": ""}], "line 2: text is ''"),
        ([{"input_ids": []}], "line 1: sample 'records.jsonl:0' has 0 token"),
        ([{"input_ids": [5]}], "line 1: sample 'records.jsonl:0' has 1 token"),
        ([{"input_ids": [5, 300]}], "token id 300 at position 1: expected ids from 0 to 299"),
        ([{"input_ids": [5, -1]}], "token id -1 at position 1"),
        ([{"input_ids": [5, 6], "loss_mask": [1, 0]}], "no sequence with a target"),
    ],
)
def test_bad_records_are_named_before_the_teacher_is_loaded(
    config: DumpConfig, tmp_path: Path, lines: list[dict[str, Any]], message: str
):
    """File, line and what was expected; nothing is left in the output."""
    source = save_records(tmp_path / "records.jsonl", *lines)
    with failing_after(0), pytest.raises(SourceError, match=message):
        dump(change(config, "source.path", str(source)))
    assert list(Path(config.output).iterdir()) == []


def test_a_bad_record_behind_many_good_ones_leaves_nothing_either(
    config: DumpConfig, tmp_path: Path
):
    """What was tokenised before it is cleared away."""
    records = [{"text": "the fox"}] * 600 + [{"text": 5}]
    source = save_records(tmp_path / "records.jsonl", *records)
    config = dataclasses.replace(config, shard_targets=1000)
    with pytest.raises(SourceError, match="line 601: text is 5"):
        dump(change(config, "source.path", str(source)))
    assert list(Path(config.output).iterdir()) == []


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("truncation.k", 301, "keeps 301 entries per target, but .* has only 300 ids"),
        ("sequences.max_length", 129, "max_length is 129, but .* takes at most 128 positions"),
        ("teacher.path", "./nowhere", "teacher.path ./nowhere does not exist"),
        ("teacher.tokenizer", "/nowhere", "teacher.tokenizer /nowhere does not exist"),
    ],
)
def test_what_the_teacher_cannot_give_is_refused_first(
    config: DumpConfig, path: str, value: Any, message: str
):
    """Before anything is hashed, tokenised or written: the output is not even made."""
    with pytest.raises(ValueError, match=message):
        dump(change(config, path, value))
    assert not Path(config.output).exists()


@pytest.mark.parametrize(
    "temperatures", [[1.0, 0.0], [1.0, 0.001], [1.0, 2e4], [2.0], [1.0, float("nan")]]
)
def test_impossible_temperatures_are_refused(config: DumpConfig, temperatures: list[float]):
    """They must start with 1 and leave float32 enough digits."""
    with pytest.raises(ValueError, match="temperatures must"):
        change(config, "temperatures", temperatures)


@pytest.mark.parametrize(
    "truncation",
    [Truncation(method="sample", draws=8), Truncation(method="label")],
    ids=lambda truncation: truncation.method,
)
def test_a_precision_of_nothing_is_refused(config: DumpConfig, truncation: Truncation):
    """Draws alone and labels alone have no log probs of kept entries."""
    config = dataclasses.replace(config, truncation=truncation, temperatures=[1.0], precision="f16")
    with pytest.raises(ValueError, match="precision: f16 has no effect with"):
        dump(config)


def test_whole_numbers_are_as_good_as_floats(config: DumpConfig):
    """Temperatures [1, 2] and p=1 in Python give the cache that YAML's floats give."""
    config = change(config, "source.limit", 5)
    whole = Truncation(method="topp", k=8, p=1)
    first = dump(dataclasses.replace(config, temperatures=[1, 2], truncation=whole))
    floats = Truncation(method="topp", k=8, p=1.0)
    again = dataclasses.replace(config, temperatures=[1.0, 2.0], truncation=floats)
    assert dump(again) == first


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"chat_date": "tomorrow"}, "chat_date is 'tomorrow': expected a date"),
        ({"chat_template_kwargs": {"day": datetime.date(2026, 1, 31)}}, "quote dates"),
        ({"chat_template_kwargs": {"x": float("nan")}}, "plain JSON values"),
    ],
)
def test_what_the_manifest_could_not_hold_is_refused_at_once(options: dict[str, Any], message: str):
    """Not after an hour of tokenising."""
    with pytest.raises(ValueError, match=message):
        SequenceConfig(**options)


def test_a_nan_names_the_sample_and_publishes_nothing(
    config: DumpConfig, teacher_path: Path, tmp_path: Path
):
    """The shard with the sample does not appear."""
    teacher = tmp_path / "teacher"
    shutil.copytree(teacher_path, teacher)
    weights = load_file(teacher / "model.safetensors")
    (token,) = models.build_tokenizer()("Z")["input_ids"]
    weights["model.embed_tokens.weight"][token] = float("nan")
    save_file(weights, teacher / "model.safetensors", metadata={"format": "pt"})
    source = save_records(
        tmp_path / "a.jsonl",
        {"id": "fine", "text": "the fox"},
        {"id": "poisoned", "text": "the Z fox"},
    )
    config = change(change(config, "teacher.path", str(teacher)), "source.path", str(source))
    config = dataclasses.replace(config, max_rejected=0.0)
    with pytest.raises(EngineError, match="NaN or infinite logits for sample poisoned"):
        dump(config)
    assert not list(Path(config.output).glob("shards/*"))
    assert temporaries(Path(config.output)) == []


# The command line.


def test_an_unknown_key_is_one_clean_line(config: DumpConfig, tmp_path: Path):
    """In the file or on the command line: exit code 2; --debug adds the traceback."""
    path = Path(save_config(config, tmp_path))
    content = json.loads(path.read_text())
    content["truncation"]["kk"] = 8
    path.write_text(json.dumps(content))
    for arguments in (["--config", str(path)], ["--output", "x", "--truncation.kk", "8"]):
        result = command(MODULE, "run", *arguments)
        assert result.code == 2
        error, hint = result.stderr.splitlines()
        assert error.startswith("error: ") and "truncation.kk" in error and "--help" in error
        assert hint == "(--debug shows the traceback)"
    debug = command(MODULE, "run", "--debug", "--config", str(path))
    assert debug.code == 2 and "Traceback" in debug.stderr


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("output: [", "line 1 is not YAML: "),
        ("truncation: {k: many}", "line 1: truncation.k is many: expected a whole number"),
        ("- output", "line 1: found a list: expected keys with values"),
        (
            "output: x\nteacher: {path: x}\nsource: {path: x}\ntruncation: 64",
            "line 4: truncation is 64",
        ),
        (b"\xff\xfe\x00", "can't decode byte 0xff"),
    ],
)
def test_a_bad_config_file_is_one_clean_line(tmp_path: Path, content: str | bytes, message: str):
    """YAML that is none, a wrong type, a list, not text: the line names the file."""
    path = tmp_path / "dump.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    result = command(MODULE, "run", "--config", str(path))
    assert result.code == 2
    error, _ = result.stderr.splitlines()
    assert error.startswith("error: ") and message in error
    assert str(path) in error


def test_a_relative_path_is_that_of_the_working_directory(
    config: DumpConfig, cache: Path, texts_path: Path, teacher_path: Path, tmp_path: Path
):
    """A run from elsewhere under the same names is another; under the right ones, the same."""
    (tmp_path / "elsewhere").mkdir()
    shutil.copytree(cache, config.output)
    relative = {
        "output": config.output,
        "teacher.path": teacher_path,
        "source.path": texts_path,
    }
    for folder, code in ((tmp_path, 0), (tmp_path / "elsewhere", 2)):
        options = [
            part
            for key, path in relative.items()
            for part in (f"--{key}", os.path.relpath(path, tmp_path))
        ]
        result = command(
            MODULE, "run", "--config", save_config(config, tmp_path), *options, folder=folder
        )
        assert result.code == code, result.stderr
    assert "does not exist (seen from" in result.stderr
    assert_whole(config.output, cache)
