"""Claims about what templates do to conversations, and what is made of it."""

import json
import logging

import numpy as np
import pytest

from decant.teacher_dump.inputs.records import SourceError, Unrenderable
from tests.support.conversations import (
    ANSWERED,
    ASKED,
    CHAT,
    CHATML,
    END,
    PROMPT,
    calling,
    chats,
    encoded,
    record,
    targets,
    tool_template,
)
from tests.support.templates import trl_templates

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


def test_a_tokenizer_may_have_a_template_for_tools():
    """Of named templates, a conversation with tools gets that for tools."""
    with_tools = "{{ tools | tojson }}" + tool_template("(c.function.arguments | tojson)")
    named = {"default": CHATML, "tool_use": with_tools}
    tools = [{"type": "function", "function": {"name": "add", "description": "None of it"}}]
    calls = calling({"a": 2})
    assert targets(named, CHAT) == f"there{END}four{END}"
    text, found = encoded(named, calls, {"tools": tools})
    assert text.startswith(json.dumps(tools)) and found == 'add {"a": 2}' + END
    with pytest.raises(Unrenderable, match="leaves out the tool calls"):
        encoded(named, calls)


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
