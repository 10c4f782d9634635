"""Claims about conversations: every way people write them, and what a template may do to them."""

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from decant.teacher_dump.inputs.chats import Chats
from decant.teacher_dump.inputs.config import SourceConfig
from decant.teacher_dump.inputs.records import Record, SourceError, Unrenderable
from decant.teacher_dump.inputs.sources import iter_records
from tests.support.templates import tokenizer_with, trl_templates

HEADER = "{{ '<|im_start|>' + m.role + '\n' }}"
PROMPT = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
CHATML = (
    "{% for m in messages %}" + HEADER + "{{ m.content + '<|im_end|>\n' }}{% endfor %}" + PROMPT
)
ASKED = {"role": "user", "content": "hello"}
ANSWERED = {"role": "assistant", "content": "there"}
CHAT = [
    ASKED,
    ANSWERED,
    {"role": "user", "content": "what is"},
    {"role": "assistant", "content": "four"},
]
END = "<|im_end|>\n"


def record(messages: Any, **fields: Any) -> Record:
    """Make a record of messages."""
    return Record("x", {"messages": messages, **fields}, "data.jsonl line 3")


def chats(template: str, **options: Any) -> Chats:
    """Make what encodes conversations with this template."""
    given = {"targets": "response", "chat_template_kwargs": {}, "chat_date": ""} | options
    return Chats(tokenizer_with(template), **given)


def encoded(
    template: str, messages: Any, fields: dict[str, Any] | None = None, **options: Any
) -> tuple[str, str]:
    """Return the text of a conversation and that of its targets; raise why there is none."""
    encoder = chats(template, **options)
    [found] = encoder.encode([record(messages, **(fields or {}))])
    if isinstance(found, Unrenderable):
        raise found
    ids, mask = found
    assert ids.dtype == np.int64 and mask.dtype == bool
    return encoder.tokenizer.decode(ids), encoder.tokenizer.decode(ids[mask])


def targets(template: str, messages: Any, fields: Any = None, **options: Any) -> str:
    """Return the text of the targets."""
    return encoded(template, messages, fields, **options)[1]


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


def calling(arguments: Any, **message: Any) -> list[dict[str, Any]]:
    """Make a conversation that calls a tool."""
    call = {"type": "function", "function": {"name": "add", "arguments": arguments}}
    return [ASKED, {"role": "assistant", "content": "", "tool_calls": [call], **message}]


def tool_template(written: str, condition: str = "m.tool_calls") -> str:
    """Make a template that writes calls so."""
    body = "{% if " + condition + " %}{% for c in m.tool_calls %}{{ c.function.name + ' ' + "
    return CHATML.replace(
        "{{ m.content", body + written + " }}{% endfor %}{% endif %}{{ (m.content or '')"
    )


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


# What templates do


def test_answers_are_found_whatever_the_template_does():
    """Loops by number, {% continue %} and text after the messages do not hide an answer."""
    by_number = (
        "{% for i in range(messages | length) %}{% set m = messages[i] %}"
        "{{ '(' ~ (messages | length) ~ ')' + m.role + ':' }}"
        "{{ m.content + '<|im_end|>' }}{% endfor %}"
        "{{ '(' ~ (messages | length) ~ ')assistant:' if add_generation_prompt else '</s>' }}"
    )
    assert targets(by_number, CHAT) == "there<|im_end|>four<|im_end|></s>"
    continued = (
        "{% for m in messages %}{% if m.role == 'assistant' %}{{ '<|assistant|>' + m.content }}"
        "{{ '!' if loop.last else '<|end|>' }}{% continue %}{% endif %}{{ '<|user|>' + m.content }}"
        "{% endfor %}{{ '<|assistant|>' if add_generation_prompt else '</s>' }}"
    )
    assert targets(continued, CHAT) == "there<|end|>four!</s>"
    assert targets(continued, CHAT[:3]) == "there<|end|>"


def test_what_a_template_keeps_is_compared():
    """A template that looks at what it has rendered is followed only if marks change nothing."""
    loop = "{% for m in messages %}{{ m.role + ':' + m.content + ';' }}{% endfor %}"
    count = "{{ messages | length }}"
    macro = "{% macro all() %}" + loop + "{% endmacro %}"
    prompt = "{{ 'assistant:' if add_generation_prompt }}"
    assert targets(macro + count + "{{ all() }}" + prompt, CHAT) == "there;four;"
    looked = macro + "{{ all() | length }};{{ all() }}" + prompt
    with pytest.raises(Unrenderable, match=r"where the answer of message 2 of 4 stands .*unknown"):
        encoded(looked.replace("{{ all() | length }}", count + "{{ all() | length }}"), CHAT)


def test_a_template_that_mixes_messages_is_refused():
    """Where an answer comes with the words of others, it has no place of its own."""
    mixed = (
        "{{ messages | length }}{% for m in messages %}{{ m.role + ':' }}"
        "{% if m.role == 'assistant' %}{{ messages[loop.index0 - 1].content + '/' }}{% endif %}"
        "{{ m.content + ';' }}{% endfor %}"
    )
    with pytest.raises(Unrenderable, match=r"line 3: .*other messages along .*\{% generation %\}"):
        encoded(mixed, CHAT)


def test_an_answer_that_lacks_part_of_its_prompt_begins_where_they_part():
    """A prompt that opens a thought is not looked for in an answer without one."""
    template = CHATML.replace(PROMPT, PROMPT.replace("assistant\n", "assistant\n<think>\n"))
    assert targets(template, CHAT) == f"there{END}four{END}"
    thought = [ASKED, {"role": "assistant", "content": "<think>\nso\n</think>there"}]
    assert targets(template, thought) == f"so\n</think>there{END}"
    alike = [ASKED, {"role": "assistant", "content": "<thin ice"}]
    assert targets(template, alike) == f"<thin ice{END}"


@pytest.mark.parametrize("chosen", ["response", "all"])
def test_lost_words_are_refused(chosen):
    """A template that deletes thoughts, an answer or a question is named with what it deletes."""
    thinking = CHATML.replace("m.content +", "m.content.split('</think>')[-1] +")
    thought = [ASKED, {"role": "assistant", "content": "<think>so</think>there"}]
    message = r"line 3: .*leaves out the content '<think>so</think>there' of message 2 of 2"
    with pytest.raises(Unrenderable, match=message + ".*sequences.accept_rendering: true"):
        encoded(thinking, thought, targets=chosen)
    accepted = encoded(thinking, thought, targets=chosen, accept_rendering=True)[1]
    assert accepted.endswith("there" + END) and "so" not in accepted
    silent = CHATML.replace("{{ m.content", "{{ ('' if m.role == 'user' else m.content)")
    with pytest.raises(Unrenderable, match=r"the content 'hello' of message 1 of 2 .user"):
        encoded(silent, CHAT[:2], targets=chosen)
    swapped = CHATML.replace("in messages", "in messages[::-1]")
    with pytest.raises(Unrenderable, match="out of order"):
        encoded(swapped, CHAT[:3], targets="all")


def test_other_spaces_at_the_edges_are_no_loss():
    """Trimming, and other spaces beside <think>, is what templates do."""
    template = CHATML.replace("m.content +", "m.content.strip().replace('k>so', 'k>\nso') +")
    spaced = [ASKED, {"role": "assistant", "content": "  <think>so</think> there\n"}]
    assert targets(template, spaced) == "<think>\nso</think> there" + END


@pytest.mark.parametrize("name", ["reasoning_content", "thinking", "reasoning"])
def test_reasoning_reaches_the_template_under_its_name(name):
    """Reasoning is passed under the name that a template reads, or refused where it reads none."""
    reads = CHATML.replace("{{ m.content", "{{ (m." + name + " or '') + '|' + m.content")
    for given in ("reasoning_content", "thinking", "reasoning"):
        chat = [ASKED, ANSWERED | {given: "so"}]
        assert targets(reads, chat) == f"so|there{END}"
        with pytest.raises(Unrenderable, match="leaves out the reasoning 'so' of message 2"):
            encoded(CHATML, chat)


def test_tools_that_vanish_are_refused():
    """Tools, and calls of them, that a template passes over are named."""
    tools = {"tools": [{"type": "function", "function": {"name": "add"}}]}
    with pytest.raises(Unrenderable, match="renders nothing of the tool 'add'"):
        encoded(CHATML, CHAT, tools)
    with pytest.raises(Unrenderable, match="renders nothing of the tool 'add'"):
        encoded(tool_template("(c.function.arguments | tojson)"), calling({"a": 2}), tools)
    with pytest.raises(Unrenderable, match="leaves out the tool calls 'add' of message 2"):
        encoded(CHATML, calling({"a": 2}))


def test_one_bad_conversation_leaves_the_others():
    """What cannot be rendered stands in the place of its record; the next ones are encoded."""
    template = (
        "{% if messages | length == 3 %}{{ raise_exception('no threes') }}{% endif %}" + CHATML
    )
    encoder = chats(template)
    found = list(encoder.encode([record(CHAT), record(CHAT[:3]), record(CHAT[:2])]))
    assert isinstance(found[1], Unrenderable)
    assert "line 3: the chat template cannot render" in str(found[1])
    assert "no threes" in str(found[1])
    texts = [encoder.tokenizer.decode(ids[mask]) for ids, mask in (found[0], found[2])]
    assert texts == [f"there{END}four{END}", f"there{END}"]


def test_what_no_conversation_survives_stops_the_job():
    """A template that asks for the date, or is none, is an error at once."""
    with pytest.raises(SourceError, match=r"line 3: .*set chat_date") as caught:
        encoded("{{ strftime_now('%Y') }}" + CHATML, CHAT)
    assert not isinstance(caught.value, Unrenderable)
    with pytest.raises(SourceError, match="the chat template is no template: line 1") as caught:
        encoded("{% for %}", CHAT)
    assert not isinstance(caught.value, Unrenderable)


def test_another_template_can_be_used():
    """A template given by the config goes before the tokenizer's own."""
    other = CHATML.replace("im_start", "start")
    text, found = encoded(CHATML, CHAT, chat_template=other)
    assert text.startswith("<|start|>user\nhello") and found == f"there{END}four{END}"
    encoder = chats("", chat_template=other)
    assert encoder.tokenizer.decode(encoder.prompt(record(CHAT[:1]))).endswith(
        "<|start|>user\nhello" + END + "<|start|>assistant\n"
    )


def test_marks_in_a_conversation_are_no_marks():
    """Whoever writes the characters of marks into a message is refused, not believed."""
    block = (
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
        "{% endgeneration %}{% else %}{{ m.content }}{% endif %}{{ '<|end|>' }}{% endfor %}"
    )
    for words in ("\ufdd0block\ufdd1all\ufdd0/block\ufdd1", "\ufdd0", "\ufdd0/9\ufdd1"):
        chat = [{"role": "user", "content": words}, ANSWERED]
        assert encoded(block, [ASKED, ANSWERED])[1] == "there"
        with pytest.raises(Unrenderable, match=r"\{% generation %\} blocks .*cannot be followed"):
            encoded(block, chat)


# Training variants


@pytest.mark.skipif(not trl_templates(), reason="the variants are those of TRL, not installed")
def test_a_training_variant_is_used_where_it_is_needed(caplog):
    """Earlier thoughts that Qwen3 deletes are kept by TRL's variant, which the log names once."""
    thought = "<think>\nso\n</think>\n\nthere"
    chat = [ASKED, {"role": "assistant", "content": thought}, *CHAT[2:]]
    encoder = chats(trl_templates()["qwen3"])
    with caplog.at_level(logging.WARNING):
        plain, kept, again = encoder.encode([record(CHAT), record(chat), record(chat)])
    found = encoder.tokenizer.decode(kept[0][kept[1]])
    assert found == f"{thought}{END}<think>\n\n</think>\n\nfour{END}"
    assert np.array_equal(kept[0], again[0])
    assert "<think>" not in encoder.tokenizer.decode(plain[0]).split("what is")[0]
    [message] = [r.getMessage() for r in caplog.records]
    assert "qwen3_training.jinja of trl" in message and "leaves out the content" in message
    assert "so" not in encoded(trl_templates()["qwen3"], chat, accept_rendering=True)[0]


# Prompts


def test_a_prompt_ends_where_the_assistant_speaks():
    """A prompt holds every message; what was thought before earlier answers may be left out."""
    encoder = chats(CHATML.replace("m.content +", "m.content.split('</think>')[-1] +"))
    chat = [ASKED, {"role": "assistant", "content": "<think>so</think>there"}, CHAT[2]]
    text = encoder.tokenizer.decode(encoder.prompt(record(chat)))
    assert text.endswith(
        f"assistant\nthere{END}<|im_start|>user\nwhat is{END}<|im_start|>assistant\n"
    )
    with pytest.raises(SourceError, match="nothing left to answer"):
        encoder.prompt(record(CHAT))
    silent = chats(CHATML.replace("{{ m.content", "{{ ''"))
    with pytest.raises(Unrenderable, match="the content 'hello' of message 1"):
        silent.prompt(record(CHAT[:1]))
    parts = [{"role": "user", "content": [{"type": "text", "text": "hello"}]}]
    assert encoder.prompt(record(parts)).tolist() == encoder.prompt(record(CHAT[:1])).tolist()
