"""Conversations in a cache: in the first row of their sequence, read back as they were given."""

import dataclasses
import json
from pathlib import Path

import pyarrow as pa
import pytest

from decant.schemas import Conversation, FormatError, ScoredSequence
from decant.storage import CacheReader, GivenMessages, verify
from decant.storage.cache import rows as rows_codec
from decant.storage.cache import writer
from decant.storage.cache.checks import message_problems
from decant.storage.cache.plan import plan_of
from decant.storage.exchange.export import export
from tests.support import caches

SETTINGS = caches.Settings()
DRAFT = dataclasses.replace(SETTINGS.draft(), messages=True)
SAID = Conversation(
    messages=[
        {"role": "user", "content": "2 + 2 🙂\n<|im_end|>"},
        {"role": "assistant", "content": "", "tool_calls": [{"function": {"z": 1, "a": 2}}]},
    ],
    tools=[{"type": "function", "function": {"name": "add", "parameters": {"z": {}, "a": {}}}}],
    chat_template_kwargs={"enable_thinking": False},
)


def shards_of() -> list[list[ScoredSequence]]:
    """Two shards of four sequences; every second of them is a conversation."""
    shards = caches.random_shards(SETTINGS)
    for shard in shards:
        for index in (0, 2):
            shard[index] = dataclasses.replace(shard[index], messages=SAID.to_text())
    return shards


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Never write to it."""
    path = tmp_path_factory.mktemp("cache")
    shards = shards_of()
    writer.write_cache(path, DRAFT, [s for shard in shards for s in shard], plan_of(shards))
    return path


def test_a_conversation_comes_back_as_it_was_given(cache: Path) -> None:
    """Keys in their order, and None where there is no conversation."""
    found = list(CacheReader(cache))
    assert [s.messages for s in found] == [s.messages for shard in shards_of() for s in shard]
    assert found[0].conversation == SAID and found[1].conversation is None
    assert list(found[2].conversation.tools[0]["function"]["parameters"]) == ["z", "a"]
    assert verify(cache).problems == ()


def test_only_first_rows_hold_text(cache: Path) -> None:
    """All other rows of the column are empty, and nothing else of a shard changes."""
    reader = CacheReader(cache)
    table = reader.read_table(reader.row_groups()[0])
    stored = reader.read_stored(reader.row_groups()[0])
    texts = table.column("messages").to_pylist()
    assert stored.messages == [texts[start] for start in stored.row_starts[:-1]]
    assert sum(map(bool, texts)) == 2
    without = rows_codec.encode(
        [dataclasses.replace(s, messages=None) for s in shards_of()[0]],
        0,
        dataclasses.replace(reader.manifest.layout, has_messages=False),
    )
    assert table.drop_columns("messages").equals(without)


def test_an_export_of_sequences_has_them(cache: Path, tmp_path: Path) -> None:
    """As text, null where there is none."""
    export(cache, tmp_path / "out")
    table = pa.parquet.read_table(tmp_path / "out")
    assert table.column("messages").to_pylist() == [s.messages for s in CacheReader(cache)]


def test_a_rejected_sequence_keeps_its_words(tmp_path: Path) -> None:
    """A later dump may score it."""
    (sequences, _) = shards_of()
    started = writer.CacheWriter.create(tmp_path, DRAFT, plan_of([sequences]))
    with started.shard(0) as shard:
        for s in sequences:
            shard.reject(s.sample_id, s.input_ids, s.is_target, "no", s.messages)
    started.finalize()
    assert [s.messages for s in CacheReader(tmp_path)] == [s.messages for s in sequences]
    assert verify(tmp_path).problems == ()


@pytest.mark.parametrize(
    ("draft", "messages", "match"),
    [
        (SETTINGS.draft(), SAID.to_text(), "messages given, but this cache keeps none"),
        (DRAFT, "hello", "sample s: messages are no JSON"),
        (DRAFT, '{"messages": []}', "expected a list of objects with a role and a content"),
        (DRAFT, '{"messages": [{"role": "user"}]}', "with a role and a content"),
        (DRAFT, '[{"role": "user", "content": "a"}]', "expected an object of messages, tools"),
        (DRAFT, '{"messages": [{"role": "user", "content": "a"}], "x": 1}', "expected an object"),
        (
            DRAFT,
            '{"messages": [{"role": "a", "content": "a"}], "tools": {}}',
            "tools are {}: expected",
        ),
    ],
)
def test_what_is_no_conversation_is_refused(
    draft: object, messages: str, match: str, tmp_path: Path
) -> None:
    """Before it is written, and by name."""
    ((sequence, *_), _) = shards_of()
    sequence = dataclasses.replace(sequence, messages=messages, sample_id="s")
    with pytest.raises(FormatError, match=match):
        writer.write_cache(tmp_path, draft, [sequence])


def test_verify_finds_messages_in_the_wrong_place(cache: Path) -> None:
    """Outside the first row of a sequence, and what is no conversation."""
    reader = CacheReader(cache)
    table, layout = reader.read_table(reader.row_groups()[0]), reader.manifest.layout
    texts = table.column("messages").to_pylist()

    def problems(texts: list[str]) -> list[str]:
        place = table.schema.get_field_index("messages")
        changed = table.set_column(place, table.schema.field(place), pa.array(texts))
        return message_problems(changed, rows_codec.decode(changed, layout))

    assert problems(texts) == []
    (stray,) = problems([texts[0], texts[0], *texts[2:]])
    assert stray == "messages in a row that is not the first of its sequence"
    (broken,) = problems(["{}", *texts[1:]])
    assert broken.startswith("sample sample-0-0: messages are '{}': expected an object")


def test_text_is_json_whatever_a_record_holds() -> None:
    """What JSON has no form for becomes text or null; half a surrogate pair is escaped."""
    odd = {"role": "user", "content": "\ud800", "score": float("nan"), "at": Path("x")}
    text = Conversation(messages=[odd]).to_text()
    assert text.isascii() and Conversation.of_text(text, "here").messages == [
        {"role": "user", "content": "\ud800", "score": None, "at": "x"}
    ]


def test_given_messages_are_found_by_sample_id(tmp_path: Path) -> None:
    """Records and their windows, as `ScoredSequence.messages` would have them."""
    fields = json.loads(SAID.to_text())
    path = tmp_path / "given.jsonl"
    lines = [{"id": f"chat {i}#{i}", **fields, "messages": fields["messages"][i:]} for i in (0, 1)]
    path.write_text("\n\n".join(json.dumps(line) for line in lines))
    given, cut = GivenMessages(path), GivenMessages(path, windows=True)
    assert len(given) == 2
    assert given.of("chat 0#0") == SAID.to_text() == cut.of("chat 0#0#17")
    assert given.of("chat 0#0#17") is given.of("chat 0") is cut.of("chat 0#x") is None


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ('{"id": "a"}\nhello\n', "given.jsonl line 2: no JSON"),
        ('{"messages": []}\n', "line 1: .*expected an object with an id, a string"),
        ('{"id": "a"}\n' * 2, "the id 'a' occurs twice"),
    ],
)
def test_bad_given_messages_are_named(text: str, match: str, tmp_path: Path) -> None:
    """With their line; messages are looked at when they are asked for."""
    path = tmp_path / "given.jsonl"
    path.write_text(text)
    with pytest.raises(FormatError, match=match):
        GivenMessages(path)
    path.write_text('{"id": "a", "messages": "b"}\n')
    with pytest.raises(FormatError, match=r"given.jsonl, id a: messages hold"):
        GivenMessages(path).of("a")
    with pytest.raises(ValueError, match="is compressed"):
        GivenMessages(tmp_path / "given.jsonl.gz")
