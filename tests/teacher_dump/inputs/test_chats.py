"""Claims about conversations: every way in which people write them."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from decant.teacher_dump.inputs.config import SourceConfig
from decant.teacher_dump.inputs.records import SourceError, Unrenderable
from decant.teacher_dump.inputs.sources import iter_records
from tests.support.conversations import (
    ANSWERED,
    ASKED,
    CHAT,
    CHATML,
    END,
    HEADER,
    calling,
    chats,
    encoded,
    record,
    targets,
    tool_template,
)
from tests.support.templates import trl_templates

# What people write


def test_text_parts_are_joined():
    """A list of parts is the same as one string, for templates that take strings or parts."""
    parts = [{"type": "text", "text": "the"}, {"text": "re"}, "!", {"type": "text", "text": None}]
    for template in (CHATML, CHATML.replace("m.content", "m.content[0].text")):
        joined = encoded(template, [ASKED, {"role": "assistant", "content": "there!"}])
        assert encoded(template, [ASKED, {"role": "assistant", "content": parts}]) == joined
        assert joined[1] == "there!" + END


@pytest.mark.parametrize(
    "part", [{"type": "image_url", "image_url": {"url": "a"}}, {"type": "audio", "text": "a"}, 5]
)
def test_what_is_no_text_is_refused(part):
    """An image or a sound cannot be read, so the record is refused with the type of the part."""
    with pytest.raises(Unrenderable, match=r"line 3: message 1 holds a part of type '\w+'.*text"):
        encoded(CHATML, [{"role": "user", "content": ["look", part]}, ANSWERED])


@pytest.mark.parametrize("content", [5, {"a": 1}, True])
def test_content_of_another_kind_is_refused(content):
    """A number or an object is no content."""
    with pytest.raises(Unrenderable, match=r"content of message 2 is .*expected a string"):
        encoded(CHATML, [ASKED, {"role": "assistant", "content": content}])


def test_null_content_is_empty():
    """A null, or no content at all, is never written as None."""
    assert targets(CHATML, [ASKED, {"role": "assistant", "content": None}]) == END
    assert targets(CHATML, [ASKED, {"role": "assistant"}]) == END


def test_json_strings_are_decoded():
    """Messages, tools, tool calls and variables may be the JSON of what they are."""
    template = "{{ tools | tojson if tools }}{{ mood }}" + CHATML.replace(
        "{{ m.content", "{{ (m.tool_calls | tojson if m.tool_calls else '') + m.content"
    )
    calls = [{"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}]
    tools = [{"type": "function", "function": {"name": "add"}}]
    chat = [ASKED, {"role": "assistant", "content": "", "tool_calls": calls}]
    plain = encoded(template, chat, {"tools": tools, "chat_template_kwargs": {"mood": "~"}})
    written = [ASKED, chat[1] | {"tool_calls": json.dumps(calls)}]
    fields = {"tools": [json.dumps(tools[0])], "chat_template_kwargs": '{"mood": "~"}'}
    assert encoded(template, json.dumps(written), fields) == plain
    assert encoded(template, written, fields | {"tools": json.dumps(tools)}) == plain
    assert "~" in plain[0] and json.dumps(calls) in plain[1]


@pytest.mark.parametrize(
    ("messages", "fields", "message"),
    [
        ("[", {}, "messages is the string '\\['.*no JSON"),
        ("{}", {}, "expected a non-empty list of objects with a role"),
        (CHAT, {"tools": "no"}, "tools is the string 'no'.*no JSON"),
        (CHAT, {"tools": {"a": 1}}, "expected a list of objects"),
        (CHAT, {"tools": ["no"]}, "tools holds 'no': expected objects"),
        (CHAT, {"chat_template_kwargs": [1]}, "chat_template_kwargs is .*expected an object"),
        (
            CHAT,
            {"chat_template_kwargs": {"tokenize": 1}},
            r"sets \['tokenize'\], which no template",
        ),
        ([ASKED, ANSWERED | {"weight": 0.5}], {}, "message 2 has 'weight': 0.5: expected 0 or 1"),
        ([ASKED, ANSWERED | {"loss_mask": 1}], {}, "message 2 has 'loss_mask'"),
        ([ASKED, ANSWERED | {"train_detail": []}], {}, "message 2 has 'train_detail'"),
        ([ASKED, ANSWERED | {"weight": 0, "train": True}], {}, "message 2 contradicts itself"),
        ([ASKED | {"train": True}, ANSWERED], {}, "message 1 of the user has .*only answers"),
    ],
)
def test_what_no_record_may_be_stops_the_job(messages, fields, message):
    """Fields of another form, and masks that are not understood, are errors with their place."""
    with pytest.raises(SourceError, match=f"line 3: .*{message}") as caught:
        encoded(CHATML, messages, fields)
    assert not isinstance(caught.value, Unrenderable)


def test_the_config_sets_variables_only():
    """Options of the rendering itself are refused in the config as in records."""
    with pytest.raises(SourceError, match=r"the config: .*\['add_generation_prompt'\]"):
        chats(CHATML, chat_template_kwargs={"add_generation_prompt": True})


def test_variables_of_a_record_go_before_those_of_the_config():
    """chat_template_kwargs of a record are merged over the config's."""
    template = "{{ a }}{{ b }}" + CHATML
    encoder = chats(template, chat_template_kwargs={"a": "1", "b": "2"})
    both = [record(CHAT, chat_template_kwargs={"b": "3", "a": None}), record(CHAT)]
    starts = [encoder.tokenizer.decode(ids)[:2] for ids, _ in encoder.encode(both)]
    assert starts == ["13", "12"]


# Which messages are targets


@pytest.mark.parametrize("field", [{"weight": 0}, {"loss": 0.0}, {"train": False}, {"loss": False}])
@pytest.mark.parametrize("template", ["plain", "blocks"])
def test_messages_may_exclude_themselves(field, template):
    """An answer that says so is no target, and what says it is not rendered."""
    blocks = CHATML.replace(
        "{{ m.content + '<|im_end|>\n' }}",
        "{% if m.role == 'assistant' %}{% generation %}{{ m.content + '<|im_end|>\n' }}"
        "{% endgeneration %}{% else %}{{ m.content + '<|im_end|>\n' }}{% endif %}",
    )
    source = {"plain": CHATML, "blocks": blocks}[template]
    source = source.replace(HEADER, "{{ m | length }}" + HEADER)
    weighed = [*CHAT[:1], CHAT[1] | field, CHAT[2] | field, CHAT[3] | {"weight": 1}]
    text, found = encoded(source, weighed)
    assert (text, found) == (encoded(source, CHAT)[0], "four" + END)
    everything = encoded(source, weighed[:2] + weighed[3:], targets="all")
    assert everything[1] == everything[0].replace("there" + END, "")


def test_only_answers_are_excluded_from_all():
    """With targets: all a user's message that says it is none is refused."""
    with pytest.raises(
        Unrenderable, match=r"targets: all scores every message, but messages \[1\]"
    ):
        encoded(CHATML, [ASKED | {"weight": 0}, ANSWERED], targets="all")


# Tool calls


@pytest.mark.parametrize("given", [{"a": 2}, '{"a": 2}'], ids=["object", "JSON"])
@pytest.mark.parametrize(
    "template",
    [
        tool_template("(c.function.arguments | tojson)"),
        tool_template("c.function.arguments"),
        tool_template(
            "(c.function.arguments if c.function.arguments is string"
            " else c.function.arguments | tojson)"
        ),
        tool_template("c.function.arguments", "m.content is none"),
    ],
    ids=["encodes", "wants JSON", "takes both", "wants null and JSON"],
)
def test_arguments_are_encoded_once(given, template):
    """Whether a template wants arguments as an object or as JSON, they are written once."""
    assert targets(template, calling(given)) == 'add {"a": 2}' + END


def test_arguments_keep_their_spelling_where_the_template_takes_json():
    """JSON that a template puts down as it is stays word for word."""
    assert targets(tool_template("c.function.arguments"), calling('{"a":2}')) == 'add {"a":2}' + END


@pytest.mark.parametrize("given", ["2 and 2", "[1]", [1], 5])
def test_arguments_that_are_no_object_are_refused(given):
    """What a template would encode a second time, or cannot encode, is refused."""
    with pytest.raises(Unrenderable, match=r"arguments .*expected an? (JSON )?object"):
        encoded(tool_template("(c.function.arguments | tojson)"), calling(given))


def test_calls_without_wrapping_are_wrapped():
    """A call of name and arguments alone is what the same call inside "function" is."""
    template = tool_template("(c.function.arguments | tojson)")
    bare = [ASKED, {"role": "assistant", "tool_calls": [{"name": "add", "arguments": {"a": 2}}]}]
    assert targets(template, bare) == targets(template, calling({"a": 2}))


ROWS = [
    {
        "messages": calling({"a": 2, "deep": {"x": 1, "list": [{"p": 1}, {"q": "r"}]}}),
        "tools": [
            {
                "type": "function",
                "function": {
                    "name": "add",
                    "description": "adds",
                    "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}},
                },
            }
        ],
    },
    {
        "messages": [*calling({"deep": {"y": "z"}, "city": "Paris"}, content=None)],
        "tools": [
            {
                "type": "function",
                "function": {
                    "name": "add",
                    "description": "w",
                    "parameters": {
                        "type": "object",
                        "properties": {"city": {"type": "string", "enum": ["C", "F"]}},
                    },
                },
            }
        ],
    },
    {"messages": [ASKED, {"role": "assistant", "content": "there", "weight": 0}, *CHAT[2:]]},
    {"messages": CHAT, "chat_template_kwargs": {"mood": "!"}},
]


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> dict[str, Path]:
    """Write the same records as JSON lines, as Parquet and as a saved dataset."""
    datasets = pytest.importorskip("datasets")
    folder = tmp_path_factory.mktemp("sources")
    rows = [{"id": str(n), **row} for n, row in enumerate(ROWS)]
    (folder / "a.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    pq.write_table(pa.Table.from_pylist(rows), folder / "a.parquet")
    datasets.Dataset.from_list(rows).save_to_disk(folder / "saved")
    return {name: folder / name for name in ("a.jsonl", "a.parquet", "saved")}


@pytest.mark.parametrize("name", ["qwen2_5", "qwen3", "glm4moe", "gptoss", "lfm2_v2", "llama3_1"])
def test_sequences_do_not_depend_on_the_file_format(sources, name):
    """Nulls that Arrow puts everywhere change nothing: not in calls, nor tools, nor variables."""
    if name not in trl_templates():
        pytest.skip("the templates are those of TRL, which is not installed")
    encoder = chats(trl_templates()[name], chat_date="2026-01-31")
    found = []
    for path in sources.values():
        kept = encoder.encode(list(iter_records(SourceConfig(path=str(path)))))
        found.append([(ids.tolist(), mask.tolist()) for ids, mask in kept])
    assert found[0] == found[1] == found[2]
    texts = [encoder.tokenizer.decode(ids) for ids, _ in found[0]]
    assert not any(word in text for text in texts for word in ("null", "None", "weight"))
