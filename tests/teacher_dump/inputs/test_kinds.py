"""Claims about kinds of record: what people write becomes what they meant, or is refused."""

import json
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset

from decant.teacher_dump.inputs.config import SourceConfig
from decant.teacher_dump.inputs.kinds import ALPACA, ALPACA_WITH_INPUT, as_question, formed
from decant.teacher_dump.inputs.records import SourceError
from decant.teacher_dump.inputs.sources import describe_source, iter_records
from tests.support.records import (
    ANSWERS,
    BOS,
    CHAT,
    EOS,
    TOKENIZER,
    bare,
    build_tokenizer,
    one,
    record,
    run,
)


def targets_of(**fields: Any) -> str:
    """The text of the targets of a record."""
    return TOKENIZER.decode(one(record(**fields))[1])


def test_prompt_and_completion_are_prompt_and_response():
    """TRL's names of two texts mean what ours mean."""
    ours = one(record(prompt="hello", response=" world"))
    assert one(record(prompt="hello", completion=" world")) == ours


def test_of_a_conversational_completion_its_answers_are_the_targets():
    """A prompt and a completion of messages are one conversation; answers in the prompt are not."""
    ids, targets = one(record(prompt=CHAT[:3], completion=CHAT[3:]))
    assert ids == one(record(messages=CHAT))[0]
    assert TOKENIZER.decode(targets) == "the answers<|end|>"
    assert targets_of(prompt=CHAT[:1], completion=CHAT[1:]) == ANSWERS
    everything = one(record(prompt=CHAT[:1], completion=CHAT[1:]), targets="all")
    assert everything == one(record(messages=CHAT), targets="all")


def test_one_text_and_one_list_of_messages_are_refused():
    """A prompt in words with a completion of messages has no one meaning."""
    with pytest.raises(SourceError, match="expected a string each, or a list of messages each"):
        one(record(prompt="hello", completion=CHAT[1:2]))


@pytest.mark.parametrize("as_json", [False, True])
def test_sharegpt_conversations_are_messages(as_json):
    """Their from and value become role and content, whatever the speakers are called."""
    for user, assistant in (("human", "gpt"), ("user", "assistant"), ("human", "chatgpt")):
        names = {"user": user, "assistant": assistant}
        said: Any = [{"from": names[m["role"]], "value": m["content"]} for m in CHAT]
        said = json.dumps(said) if as_json else said
        assert one(record(conversations=said)) == one(record(messages=CHAT))
    assert one(record(conversations=CHAT)) == one(record(messages=CHAT))


def test_a_system_prompt_beside_a_conversation_comes_first():
    """It is a message of its own; two of them are refused, and so is an unknown speaker."""
    said = [{"from": "human", "value": "hello"}, {"from": "gpt", "value": " world"}]
    system = {"role": "system", "content": "a b"}
    expected = one(record(messages=[system, *CHAT[:2]]))
    assert one(record(conversations=said, system="a b")) == expected
    inside = [{"from": "system", "value": "a b"}, *said]
    assert one(record(conversations=inside)) == expected
    assert one(record(conversations=inside, system="")) == expected
    with pytest.raises(SourceError, match="system is 'c' beside conversations"):
        one(record(conversations=inside, system="c"))
    with pytest.raises(SourceError, match="turn 1 of conversations is from 'function_call'"):
        one(record(conversations=[{"from": "function_call", "value": "{}"}, *said]))


def test_alpaca_records_get_the_alpaca_prompt():
    """Instruction and input become the published prompt, the output its response."""
    plain = ALPACA.format(instruction="hello")
    assert plain.startswith("Below is an instruction") and plain.endswith("### Response:\n")
    for empty in ({}, {"input": ""}, {"input": None}):
        found = one(record(instruction="hello", output="world", **empty))
        assert found == one(record(prompt=plain, response="world"))
    longer = ALPACA_WITH_INPUT.format(instruction="hello", input="{you}")
    assert "### Input:\n{you}\n\n### Response:\n" in longer
    found = one(record(instruction="hello", input="{you}", output="world"))
    assert found == one(record(prompt=longer, response="world"))
    assert targets_of(instruction="hello", output="world") == "world</s>"
    with pytest.raises(SourceError, match="come with history, for which the prompt"):
        one(record(instruction="a", output="b", history=[["c", "d"]]))


@pytest.mark.parametrize(
    ("fields", "readings"),
    [
        ({"text": "a", "input_ids": [1, 2]}, "text and input_ids"),
        ({"text": "a", "conversations": CHAT}, "text and conversations"),
        ({"text": "a", "instruction": "b", "output": "c"}, r"text and instruction \+ output"),
        (
            {"prompt": "a", "response": "b", "completion": "c"},
            r"prompt \+ response and prompt \+ completion",
        ),
        ({"messages": CHAT, "conversations": CHAT}, "messages and conversations"),
    ],
)
def test_records_of_two_kinds_are_refused(fields, readings):
    """Both readings are named, and how to choose."""
    with pytest.raises(SourceError, match=rf"line of s: the record is both {readings}.*source.fi"):
        one(record(**fields))


def test_other_fields_are_ignored():
    """What is of no kind may stand beside a record: classes, scores, a repeated prompt."""
    beside = {"label": True, "labels": "x", "score": 0.5, "output": "a", "prompt_id": "b"}
    assert one(record(text="hello", **beside)) == one(record(text="hello"))
    assert one(record(messages=CHAT, prompt="hello")) == one(record(messages=CHAT))


@pytest.mark.parametrize(
    ("fields", "other", "way_out"),
    [
        ({"prompt": "a", "response": "b"}, "generated", "{response: generated} scores generated"),
        ({"prompt": "a", "completion": "b"}, "prediction", "{completion: prediction} scores"),
        ({"prompt": "a", "response": "b"}, "output", "{response: output} scores output"),
        ({"instruction": "a", "output": "b"}, "response", "{output: response} scores response"),
        ({"messages": CHAT}, "model_output", "source.fields {model_output: ''} scores messages"),
        ({"messages": CHAT}, "completion", "{completion: ''} scores messages"),
        ({"text": "a b"}, "generated_text", "source.fields {generated_text: ''} scores text"),
    ],
)
def test_two_answers_are_refused(fields: dict[str, Any], other: str, way_out: str):
    """What is scored is not guessed where a file of an evaluation has the reference as well.

    Nothing is to be chosen where both say the same, or where the other is no text.
    """
    both = {**fields, other: "another"}
    with pytest.raises(SourceError, match=f"{other} stands beside ") as caught:
        formed(record(**both))
    assert way_out in str(caught.value)
    (scored,) = set(fields) - {"prompt", "instruction"}
    for harmless in (fields[scored], "", None, True, 0.5):
        assert one(record(**{**fields, other: harmless})) == one(record(**fields))


@pytest.mark.parametrize(
    "fields",
    [
        {"text": None},
        {"text": None, "messages": None, "meta": 1},
        {"messages": None},
        {"messages": "[]"},
        {"input_ids": None},
        {"prompt": "a", "response": None},
        {"prompt": None, "completion": "a"},
        {"instruction": "a", "output": None},
        {"conversations": None},
    ],
)
def test_null_is_empty(fields):
    """A record whose content is null is refused, or dropped as an empty one and counted."""
    with pytest.raises(SourceError, match="line of s"):
        run(record(**fields))
    sequences, counts = run(record(**fields), record("t", text="a"), empty="drop")
    assert (len(sequences), counts.empty_records, counts.records) == (1, 1, 2)


def test_json_strings_are_read_where_lists_are_expected():
    """Messages and tools may be the JSON of themselves, as tables without nesting keep them."""
    template = "{{ tools | length if tools else 'no' }}" + TOKENIZER.chat_template
    tokenizer = build_tokenizer(template=template)
    tools = [{"type": "function", "function": {"name": "add"}}]
    plain = one(record(messages=CHAT, tools=tools), tokenizer=tokenizer, accept_rendering=True)
    written = record(messages=json.dumps(CHAT), tools=json.dumps(tools))
    assert one(written, tokenizer=tokenizer, accept_rendering=True) == plain
    with pytest.raises(SourceError, match="messages is the string 'hello', which is no JSON"):
        one(record(messages="hello"))


def test_a_table_of_columns_is_a_list_of_messages():
    """Lists of objects that a writer has turned into an object of lists are read as they were."""
    columns = {name: [m[name] for m in CHAT] for name in ("role", "content")}
    assert one(record(messages=columns)) == one(record(messages=CHAT))


def test_questions_are_found_in_every_kind():
    """What a teacher is to answer: a prompt, an instruction, or all the messages."""
    asked = record(prompt="a", completion="b"), record(prompt="a")
    assert [as_question(r).fields for r in asked] == [{"prompt": "a"}] * 2
    assert as_question(record(prompt=CHAT[:1])).fields == {"messages": CHAT[:1]}
    assert as_question(record(conversations=[{"from": "human", "value": "a"}])).fields == {
        "messages": [{"role": "user", "content": "a"}]
    }
    alpaca = as_question(record(instruction="a", input="", output="b")).fields
    assert alpaca == {"prompt": ALPACA.format(instruction="a")}
    with pytest.raises(SourceError, match="has nothing to answer"):
        as_question(record(text="a"))
    with pytest.raises(SourceError, match="prompt and messages to answer"):
        as_question(record(prompt="a", messages=CHAT[:1]))


# Fields under other names


def write_jsonl(path, *rows: dict[str, Any]) -> str:
    """Write the rows and return the path."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_fields_may_have_other_names(tmp_path):
    """source.fields says which field is read as which, and which is left out."""
    path = write_jsonl(
        tmp_path / "a.jsonl",
        {"question": "hello", "answer": " world", "response": "old", "text": "both"},
    )
    names = {"prompt": "question", "response": "answer", "text": ""}
    [found] = iter_records(SourceConfig(path=path, fields=names))
    assert found.fields == {"prompt": "hello", "response": " world"}
    assert formed(found).kind == "prompt + response"
    plain, renamed = (SourceConfig(path=path, fields=f) for f in ({}, names))
    assert describe_source(plain)["fingerprint"] != describe_source(renamed)["fingerprint"]


def test_wrong_names_of_fields_are_refused(tmp_path):
    """A name that is not read, a field that is nowhere, and one that is read twice."""
    path = write_jsonl(tmp_path / "a.jsonl", {"instruction": "a", "output": "b"})
    with pytest.raises(ValueError, match=r"source fields names \['answer'\]: expected some of"):
        SourceConfig(path=path, fields={"answer": "output"})
    with pytest.raises(ValueError, match="reads one field twice"):
        SourceConfig(path=path, fields={"text": "a", "prompt": "a"})
    with pytest.raises(SourceError, match=r"a\.jsonl line 1: no field 'c', which source\.fields"):
        list(iter_records(SourceConfig(path=path, fields={"text": "c"})))
    with pytest.raises(SourceError, match=r"no record of .* has \['c'\]"):
        list(iter_records(SourceConfig(path=path, fields={"input": "c"})))


# The same records from anywhere

TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "adds",
        "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}},
    },
}
OTHER_TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "w",
        "parameters": {"type": "object", "properties": {"unit": {"enum": ["C", "F"]}}},
    },
}


def call(name: str, **arguments: Any) -> dict[str, Any]:
    """An answer that calls a tool."""
    function = {"name": name, "arguments": arguments}
    calls = [{"type": "function", "function": function}]
    return {"role": "assistant", "content": "", "tool_calls": calls}


ASKED = {"role": "user", "content": "hello"}
UNLIKE = {
    "tools": [
        {"id": "a", "messages": [ASKED, call("add", a=2)], "tools": [TOOL]},
        {"id": "b", "messages": [ASKED, call("weather", city="Paris")], "tools": [OTHER_TOOL]},
        {"id": "c", "messages": [ASKED, {"role": "assistant", "content": "there"}]},
    ],
    "kinds": [
        {"id": "a", "text": "hello"},
        {"id": "b", "messages": CHAT},
        {"id": "c", "prompt": "hello", "completion": " world"},
        {"id": "d", "instruction": "a", "output": "b"},
        {"id": "e", "input_ids": [1, 2, 3], "labels": [-100, 2, 3]},
        {
            "id": "f",
            "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}],
        },
    ],
    "weights": [
        {"id": "a", "messages": [ASKED, {"role": "assistant", "content": "a", "weight": 0}, *CHAT]},
        {"id": "b", "messages": CHAT, "chat_template_kwargs": {"mood": "~"}},
    ],
}
TOOL_TEMPLATE = (
    "{{ mood }}{{ tools | tojson if tools else '' }}{% for m in messages %}"
    "{{ '<|start|>' + m.role + '\n' + m.content }}"
    "{% for c in m.tool_calls or [] %}{{ c.function | tojson }}{% endfor %}{{ '<|end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}"
)


@pytest.mark.parametrize("name", UNLIKE)
def test_records_are_the_same_from_every_format(tmp_path, name):
    """JSON lines, a JSON array, Parquet and a saved data set give equal sequences of records.

    Arrow fills in nulls where records are not alike.
    """
    rows = UNLIKE[name]
    (tmp_path / "array.json").write_text(json.dumps(rows, indent=1))
    names = dict.fromkeys(name for row in rows for name in row)
    full = [{name: row.get(name) for name in names} for row in rows]  # a table has all columns
    pq.write_table(pa.Table.from_pylist(full), tmp_path / "rows.parquet")
    Dataset.from_list(full).save_to_disk(str(tmp_path / "saved"))
    places = [write_jsonl(tmp_path / "rows.jsonl", *rows)]
    places += [str(tmp_path / place) for place in ("array.json", "rows.parquet", "saved")]
    tokenizer = build_tokenizer(template=TOOL_TEMPLATE)
    found = []
    for path in places:
        sequences, counts = run(*iter_records(SourceConfig(path=path)), tokenizer=tokenizer)
        assert counts.sequences == len(rows)
        found.append([(s.sample_id, s.input_ids.tolist(), s.is_target.tolist()) for s in sequences])
    assert found[1:] == found[:1] * 3
    text = "".join(tokenizer.decode(ids) for _, ids, _ in found[0])
    assert "null" not in text and "None" not in text


def test_a_text_is_itself():
    """The simplest kind, for comparison: bos, the text, eos."""
    assert one(record(text="hello")) == ([BOS, *bare("hello"), EOS], [*bare("hello"), EOS])
