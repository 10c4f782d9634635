"""Claims about what a dump refuses, and when."""

import dataclasses
import datetime
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from decant.schemas import Truncation
from decant.teacher_dump import (
    ConfigChanged,
    DumpConfig,
    EngineError,
    SequenceConfig,
    SourceError,
    dump,
)
from tests.support import models
from tests.support.commands import command
from tests.support.dumps import (
    MODULE,
    assert_whole,
    change,
    failing_after,
    files,
    save_config,
    save_records,
    temporaries,
)

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
