"""Claims about the words of conversations that a dump keeps, and the file that has them else."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from decant.storage import CacheReader, GivenMessages, Store, verify
from decant.storage.cache import paths
from decant.storage.files.sealed import publish_json, read_json
from decant.teacher_dump import DumpConfig, TeacherConfig, dump
from decant.teacher_dump.job.start import open_or_create
from decant.teacher_dump.teacher import describe_teacher, hash_weights
from tests.support.commands import command
from tests.support.dumps import (
    HALF,
    MODULE,
    assert_same,
    change,
    failing_after,
    rows,
    save_config,
    save_records,
)
from tests.support.services import unreliable

CALL = {"type": "function", "function": {"name": "add", "arguments": {"b": 2, "a": 2}}}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
TALK = [{"role": "user", "content": "the fox"}, {"role": "assistant", "content": "jumps 🙂"}]
RECORDS: list[dict[str, Any]] = [
    {"id": "plain", "text": "the quick brown fox"},
    {"id": "talk", "messages": TALK},
    {
        "id": "tools",
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "2 + 2?"}]},
            {
                "role": "assistant",
                "content": None,
                "reasoning_content": "a sum",
                "tool_calls": [{**CALL, "function": {**CALL["function"], "arguments": "{}"}}],
            },
            {"role": "tool", "content": {"sum": 4}},
            {"role": "assistant", "content": "4"},
        ],
        "tools": json.dumps([TOOL]),
        "chat_template_kwargs": {"enable_thinking": False},
    },
    {
        "id": "masked",
        "messages": [*TALK[:1], {**TALK[1], "weight": 0}, *TALK],
    },
    {
        "id": "shared",
        "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}],
    },
    {"id": "pair", "prompt": TALK, "completion": TALK[1:]},
    {"id": "texts", "prompt": "a fox", "response": " runs"},
    *({"id": f"more {i}", "messages": TALK * (1 + i % 4)} for i in range(12)),
    {"id": "ids", "input_ids": [5, 6, 7]},
]
EXPECTED = {
    "talk": {"messages": TALK},
    "tools": {
        "messages": [
            {"role": "user", "content": "2 + 2?"},
            {
                "role": "assistant",
                "content": "",
                "reasoning_content": "a sum",
                "tool_calls": [{**CALL, "function": {"name": "add", "arguments": {}}}],
            },
            {"role": "tool", "content": '{"sum": 4}'},
            {"role": "assistant", "content": "4"},
        ],
        "tools": [TOOL],
        "chat_template_kwargs": {"enable_thinking": False},
    },
    "masked": {"messages": [TALK[0], {**TALK[1], "weight": 0}, *TALK]},
    "shared": {
        "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    },
    "pair": {"messages": [TALK[0], {**TALK[1], "weight": 0}, TALK[1]]},
    "plain": None,
    "texts": None,
    "ids": None,
}


@pytest.fixture(scope="module")
def settings(dump_config: DumpConfig, tmp_path_factory: pytest.TempPathFactory) -> DumpConfig:
    """A source of every kind of record, in shards of a few sequences."""
    source = save_records(tmp_path_factory.mktemp("records") / "records.jsonl", *RECORDS)
    config = change(dump_config, "source.path", str(source))
    config = change(config, "sequences.accept_rendering", True)
    return dataclasses.replace(config, shard_targets=40)


@pytest.fixture(scope="module")
def kept(settings: DumpConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cache of `settings`. Never write to it."""
    path = tmp_path_factory.mktemp("kept") / "cache"
    dump(dataclasses.replace(settings, output=str(path)))
    return path


def words(cache: str | Path) -> list[str | None]:
    return [sequence.messages for sequence in CacheReader(cache)]


def test_the_words_of_each_conversation_are_kept(kept: Path) -> None:
    """In one form, whoever wrote them; nothing of a template, and nothing of other records."""
    found = {s.sample_id: s.messages and json.loads(s.messages) for s in CacheReader(kept)}
    assert {name: found[name] for name in EXPECTED} == EXPECTED
    assert verify(kept).problems == ()
    assert CacheReader(kept).manifest.messages
    assert "<|" not in "".join(text or "" for text in words(kept))


def test_what_is_kept_is_a_record_again(settings: DumpConfig, kept: Path, tmp_path: Path) -> None:
    """Its dump has the same tokens, targets and words."""
    records = [
        {"id": s.sample_id, **json.loads(s.messages)} for s in CacheReader(kept) if s.messages
    ]
    again = change(settings, "source.path", str(save_records(tmp_path / "a.jsonl", *records)))
    dump(dataclasses.replace(again, output=str(tmp_path / "again")))
    before = [sequence for sequence in CacheReader(kept) if sequence.messages]
    for found, expected in zip(CacheReader(tmp_path / "again"), before, strict=True):
        assert found.messages == expected.messages
        np.testing.assert_array_equal(found.input_ids, expected.input_ids)
        np.testing.assert_array_equal(found.is_target, expected.is_target)


def test_without_them_nothing_else_changes_and_a_file_gives_them_again(
    settings: DumpConfig, kept: Path, tmp_path: Path
) -> None:
    """`keep_messages: false` leaves the column out; `messages` writes what it would have held."""
    config = change(settings, "sequences.keep_messages", False)
    config = dataclasses.replace(config, output=str(tmp_path / "cache"))
    assert not dump(config).messages
    assert [s.messages for s in CacheReader(config.output)] == [None] * len(RECORDS)
    reader, other = CacheReader(config.output), CacheReader(kept)
    for ours, theirs in zip(reader.row_groups(), other.row_groups(), strict=True):
        assert reader.read_table(ours).equals(other.read_table(theirs).drop_columns("messages"))
    out = tmp_path / "messages.jsonl"
    done = command(MODULE, "messages", "--config", save_config(config, tmp_path), "--out", str(out))
    assert (done.code, done.stdout) == (0, f"{out}: 17 conversations of 20 records\n")
    given = GivenMessages(out)
    assert [given.of(s.sample_id) for s in CacheReader(kept)] == words(kept)
    again = command(
        MODULE, "messages", "--config", save_config(config, tmp_path), "--out", str(out)
    )
    assert again.code == 2 and "exists already" in again.stderr


def test_texts_have_no_column_of_words(cache: Path, config: DumpConfig) -> None:
    """Where no record is a conversation the choice changes nothing but what the manifest says."""
    dump(change(config, "sequences.keep_messages", False))
    assert rows(config.output) == rows(cache)
    both = [CacheReader(place).manifest for place in (config.output, cache)]
    assert [m.messages for m in both] == [False, False]
    reader = CacheReader(cache)
    assert "messages" not in reader.read_table(reader.row_groups()[0]).column_names


def test_every_window_of_a_conversation_has_all_of_it(
    settings: DumpConfig, kept: Path, tmp_path: Path
) -> None:
    """A file finds them too, by the record's id."""
    config = change(change(settings, "sequences.overlong", "split"), "sequences.max_length", 24)
    dump(dataclasses.replace(config, output=str(tmp_path / "cache")))
    whole = {s.sample_id: s.messages for s in CacheReader(kept)}
    found = list(CacheReader(tmp_path / "cache"))
    assert sum(s.sample_id.startswith("tools#") for s in found) > 1
    assert [s.messages for s in found] == [whole[s.sample_id.split("#")[0]] for s in found]
    out = tmp_path / "messages.jsonl"
    lines = ({"id": name, **json.loads(text)} for name, text in whole.items() if text)
    given = GivenMessages(save_records(out, *lines), windows=True)
    assert [given.of(s.sample_id) for s in found] == [s.messages for s in found]


def test_a_rerun_keeps_them_too(settings: DumpConfig, kept: Path, tmp_path: Path) -> None:
    """Also where the inputs were lost and are made from the source again."""
    config = dataclasses.replace(settings, output=str(tmp_path / "cache"))
    with failing_after(HALF - 1), pytest.raises(RuntimeError):
        dump(config)
    shutil.rmtree(tmp_path / "cache" / paths.INPUTS)
    dump(config)
    assert_same(tmp_path / "cache", kept)


def test_a_teacher_elsewhere_gives_the_same(
    settings: DumpConfig, kept: Path, teacher_path: Path, tmp_path: Path
) -> None:
    """The words stay with the dump: a service sees token ids alone."""
    with unreliable(teacher_path) as service:
        teacher = TeacherConfig(engine="http", endpoints=(service.url,))
        config = dataclasses.replace(settings, teacher=teacher)
        dump(dataclasses.replace(config, output=str(tmp_path / "cache")))
    assert words(tmp_path / "cache") == words(kept)


def test_an_older_start_is_completed_without_them(
    settings: DumpConfig, kept: Path, tmp_path: Path
) -> None:
    """A cache that was started before there was a choice keeps none, whatever the config says."""
    config = dataclasses.replace(settings, output=str(tmp_path / "cache"))
    teacher = hash_weights(describe_teacher(config.teacher))
    store = Store(config.output)
    begun = change(config, "sequences.keep_messages", False)
    manifest = open_or_create(begun, store, teacher, lambda _: None).manifest
    del manifest.sequences["keep_messages"]
    manifest = dataclasses.replace(manifest, cache_id="")
    older = dataclasses.replace(manifest, cache_id=manifest.identity_hash())
    publish_json(store, paths.MANIFEST, older.to_json())
    assert "keep_messages" not in read_json(store, paths.MANIFEST)["sequences"]
    shutil.rmtree(tmp_path / "cache" / paths.INPUTS)
    dump(config)
    assert verify(config.output).problems == ()
    assert words(config.output) == [None] * len(RECORDS)
