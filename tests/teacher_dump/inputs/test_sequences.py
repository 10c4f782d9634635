"""Claims about token sequences: what is read, what is a target, and that nothing gets lost."""

import dataclasses
import json

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from decant.teacher_dump.inputs.config import SequenceConfig
from decant.teacher_dump.inputs.records import SourceError
from tests.support.records import (
    ANSWERS,
    BOS,
    CHAT,
    EOS,
    HEADER,
    MARKED_TEMPLATE,
    MARKED_TOKENIZER,
    PLAIN_TEMPLATE,
    TOKENIZER,
    VOCAB_SIZE,
    bare,
    build_tokenizer,
    chat_targets,
    one,
    record,
    run,
)

# Text


def test_a_text_is_framed_by_bos_and_eos():
    """All of a text and its eos are targets, the bos in front is not."""
    assert one(record(text="hello you")) == (
        [BOS, *bare("hello you"), EOS],
        [*bare("hello you"), EOS],
    )


def test_special_tokens_are_never_doubled():
    """A text that spells out its bos and eos gets no second ones."""
    assert one(record(text="<s>hello</s>"))[0] == [BOS, *bare("hello"), EOS]
    assert one(record(text="<s>hello</s>"), add_bos=True)[0] == [BOS, *bare("hello"), EOS]


@pytest.mark.parametrize("adds_bos", [False, True])
@pytest.mark.parametrize("add_bos", [False, True])
@pytest.mark.parametrize("add_eos", [False, True])
def test_the_config_adds_to_what_the_tokenizer_does(adds_bos, add_bos, add_eos):
    """A bos is there once if the tokenizer or the config wants it, an eos likewise."""
    tokenizer = build_tokenizer(adds_bos=adds_bos)
    ids, _ = one(record(text="hello"), tokenizer=tokenizer, add_bos=add_bos, add_eos=add_eos)
    assert ids == [BOS] * (adds_bos or add_bos) + bare("hello") + [EOS] * add_eos


@pytest.mark.parametrize("name", ["bos", "eos"])
def test_a_missing_special_token_is_an_error(name):
    """add_bos and add_eos need a tokenizer that has such a token."""
    tokenizer = build_tokenizer(adds_bos=False)
    setattr(tokenizer, f"{name}_token", None)
    with pytest.raises(ValueError, match=f"no {name} token, which add_{name} asks for"):
        run(record(text="a"), tokenizer=tokenizer, add_bos=True)


# Messages


@pytest.mark.parametrize("tokenizer", [TOKENIZER, MARKED_TOKENIZER], ids=["plain", "marked"])
def test_the_assistants_tokens_are_the_targets(tokenizer):
    """With generation blocks or without, the targets are the answers and their end tokens."""
    ids, targets = one(record(messages=CHAT), tokenizer=tokenizer)
    assert ids == tokenizer.apply_chat_template(CHAT, return_dict=False)
    assert tokenizer.decode(targets) == ANSWERS
    assert one(record(messages=CHAT), tokenizer=tokenizer, targets="all")[1] == ids[1:]


@settings(max_examples=40, deadline=None)
@given(answers=st.lists(st.text(st.characters(codec="utf-8"), max_size=20), min_size=1, max_size=4))
def test_both_ways_to_find_the_answers_agree(answers):
    """Any answers, also with spaces at their edges and bytes unseen, get the same mask."""
    chat = [
        message
        for answer in answers
        for message in (
            {"role": "user", "content": " b c"},
            {"role": "assistant", "content": answer.replace("<", "")},
        )
    ]
    expected = "".join(m["content"] + "<|end|>" for m in chat[1::2])
    assert chat_targets(TOKENIZER, chat) == expected
    assert chat_targets(MARKED_TOKENIZER, chat) == expected


def test_nothing_is_added_to_what_the_template_renders():
    """Bos and eos of a chat are the template's business, whatever the config says."""
    ids, _ = one(record(messages=CHAT), add_bos=True, add_eos=True)
    assert BOS not in ids
    assert EOS not in ids


def test_answers_are_found_in_an_inconsistent_template():
    """A template that renders earlier answers otherwise than the last one is masked right."""
    template = PLAIN_TEMPLATE.replace("{{ m.content", "{{ mark + m.content").replace(
        HEADER, HEADER + "{% set mark = '!' if loop.last and m.role == 'assistant' else '' %}"
    )
    tokenizer = build_tokenizer(template=template)
    assert chat_targets(tokenizer, CHAT) == " world<|end|>!the answers<|end|>"
    assert chat_targets(tokenizer, CHAT[:2]) == "! world<|end|>"


def test_null_fields_of_arrow_change_nothing():
    """Messages that went through Arrow, which fills in nulls, give the same tokens."""
    template = PLAIN_TEMPLATE.replace("{{ m.content", "{{ ('?' if 'name' in m else '') + m.content")
    tokenizer = build_tokenizer(template=template)
    chat = [CHAT[0] | {"name": "me"}, CHAT[1]]
    [through_arrow] = pa.Table.from_pylist([{"messages": chat}]).to_pylist()
    assert "name" in through_arrow["messages"][1]
    assert chat_targets(tokenizer, through_arrow["messages"]) == " world<|end|>"


def test_tools_and_variables_reach_the_template():
    """The tools of a record and the variables of the config are rendered."""
    template = "{{ tools | length if tools else 'no' }}{{ mood }}" + PLAIN_TEMPLATE
    tokenizer = build_tokenizer(template=template)
    chats = [record(f"{n}", messages=CHAT, **({"tools": [{}] * n} if n else {})) for n in (0, 0, 2)]
    options = {"chat_template_kwargs": {"mood": "~"}}
    sequences, _ = run(*chats, tokenizer=tokenizer, **options)
    starts = [tokenizer.decode(s.input_ids).split("<|start|>")[0] for s in sequences]
    assert starts == ["no~", "no~", "2~"]


def test_todays_date_never_enters_a_sequence():
    """A template that asks for the date gets that of the config, or is refused."""
    tokenizer = build_tokenizer(template="{{ strftime_now('%Y') }}" + PLAIN_TEMPLATE)
    with pytest.raises(SourceError, match="set chat_date"):
        run(record(messages=CHAT), tokenizer=tokenizer)
    ids, _ = one(record(messages=CHAT), tokenizer=tokenizer, chat_date="1999-12-31")
    assert tokenizer.decode(ids).startswith("1999<|start|>")


def test_what_a_template_cannot_render_is_left_out_and_counted(caplog):
    """A conversation that the template refuses is named and left out; others go on."""
    template = "{% if messages[0].role != 'user' %}{{ raise_exception('user first') }}{% endif %}"
    tokenizer = build_tokenizer(template=template + MARKED_TEMPLATE)
    good, bad = record("good", messages=CHAT), record("bad", messages=CHAT[1:])
    sequences, counts = run(good, bad, tokenizer=tokenizer)
    assert [s.sample_id for s in sequences] == ["good"]
    assert (counts.records, counts.unrenderable_records) == (2, 1)
    assert "line of bad" in caplog.text and "user first" in caplog.text
    with pytest.raises(SourceError, match=r"line of bad: .*user first"):
        run(good, bad, tokenizer=tokenizer, max_unrenderable=0)


def test_many_that_cannot_be_rendered_are_an_error():
    """Three may be left out of any number, of many no more than the share that is allowed."""
    template = "{% if messages[0].role != 'user' %}{{ raise_exception('user first') }}{% endif %}"
    tokenizer = build_tokenizer(template=template + MARKED_TEMPLATE)

    def left_out(bad: int, good: int, **options) -> int:
        records = [record(f"good{n}", messages=CHAT) for n in range(good)]
        records += [record(f"bad{n}", messages=CHAT[1:]) for n in range(bad)]
        return run(*records, tokenizer=tokenizer, **options)[1].unrenderable_records

    assert left_out(3, 1) == 3
    with pytest.raises(SourceError, match=r"4 of 24 records cannot be rendered, more than"):
        left_out(4, 20)
    assert left_out(4, 20, max_unrenderable=0.2) == 4
    with pytest.raises(
        SourceError, match=r"none of the first 20 records can be used: .*user first"
    ):
        left_out(300, 0, max_unrenderable=1)


def test_messages_need_a_template():
    """Chats without a chat template are refused, unless a file holds one."""
    tokenizer = build_tokenizer(template="")
    with pytest.raises(ValueError, match="has no chat template"):
        run(record(messages=CHAT), tokenizer=tokenizer)


def test_a_file_may_hold_the_chat_template(tmp_path):
    """It takes the place of the tokenizer's own; a file that is not there is an error."""
    file = tmp_path / "chat.jinja"
    file.write_text(MARKED_TEMPLATE)
    for template in ("", "{{ messages }}"):
        tokenizer = build_tokenizer(template=template)
        assert chat_targets(tokenizer, CHAT, chat_template=str(file)) == ANSWERS
    with pytest.raises(ValueError, match=r"chat_template .* cannot be read"):
        run(record(messages=CHAT), chat_template=str(tmp_path / "none"))


def test_the_assistant_may_speak_first():
    """Its words are targets, what the template puts before them is not."""
    assert chat_targets(TOKENIZER, CHAT[1:]) == ANSWERS


# Ready ids


def test_ready_ids_are_taken_as_they_are():
    """input_ids need no tokenizer; loss_mask selects the targets, but never the first token."""
    assert one(record(input_ids=[5, 6, 7]), tokenizer=None) == ([5, 6, 7], [6, 7])
    masked = record(input_ids=np.array([5, 6, 7]), loss_mask=[True, False, True])
    assert one(masked, tokenizer=None) == ([5, 6, 7], [7])


def test_sequences_have_their_types():
    """Ids are int32 and masks bool, of equal length."""
    [sequence], _ = run(record(input_ids=[5, 6, 7]))
    assert (sequence.input_ids.dtype, sequence.is_target.dtype) == (np.int32, bool)
    assert sequence.input_ids.shape == sequence.is_target.shape == (3,)


# Bad records


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"content": "a"}, r"no kind of sample, its fields are \['content'\].*messages \(\+ tools"),
        ({"prompt": "a", "text": None}, r"its fields are \['prompt'\]: expected exactly one of"),
        ({"text": "a", "input_ids": [1, 2]}, "both text and input_ids"),
        ({"text": "a", "loss_mask": [1]}, "loss_mask belongs to input_ids"),
        ({"text": ""}, "text is '': expected a non-empty string.* or set empty: drop"),
        ({"text": 5}, "text is 5"),
        ({"prompt": ["a"], "response": "b"}, "prompt is .* expected a string"),
        ({"messages": []}, "expected a non-empty list of objects with a role"),
        ({"messages": [{"content": "a"}]}, "expected a non-empty list of objects with a role"),
        ({"messages": CHAT, "tools": "{}"}, "expected a list of objects"),
        ({"input_ids": []}, r"sample 's' has 0 token\(s\): expected at least 2"),
        ({"input_ids": [1]}, r"sample 's' has 1 token\(s\).* or set empty: drop"),
        ({"input_ids": [1, VOCAB_SIZE]}, "token id 300 at position 1: expected ids from 0 to 299"),
        ({"input_ids": [-1, 1]}, "token id -1 at position 0"),
        ({"input_ids": [1.0, 2.0]}, "expected a list of integers"),
        ({"input_ids": [[1, 2], [3]]}, "expected a list of integers"),
        ({"input_ids": "12"}, "expected a list of integers"),
        ({"input_ids": [1, 2], "loss_mask": [1]}, "loss_mask has 1 values.* each of the 2"),
        ({"input_ids": [1, 2], "loss_mask": [0, 2]}, "loss_mask has 2 values"),
    ],
)
def test_bad_records_are_named(fields, message):
    """A record that cannot be used is an error with its place, and never left out in silence."""
    with pytest.raises(SourceError, match=f"line of s: .*{message}"):
        run(record(**fields))


def test_only_ready_ids_go_without_a_tokenizer():
    """Text without a tokenizer is an error."""
    with pytest.raises(SourceError, match="found text but no tokenizer"):
        run(record(text="a"), tokenizer=None)


def test_a_prompt_may_stand_beside_messages():
    """A prompt without a response is no kind of its own: data sets repeat it beside messages."""
    assert one(record(messages=CHAT, prompt="hello")) == one(record(messages=CHAT))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_length": 1}, "max_length is 1"),
        ({"overlong": "drop"}, "overlong is 'drop'"),
        ({"packing": "best"}, "packing is 'best'"),
        ({"empty": "keep"}, "empty is 'keep'"),
        ({"duplicates": "error"}, "duplicates is 'error'"),
        ({"targets": "last"}, "targets is 'last'"),
        ({"packing": "concat", "add_eos": False}, "set add_eos: true"),
        ({"packing": "concat", "overlong": "split"}, "no effect with packing"),
        ({"chat_date": "today"}, "chat_date is 'today'"),
    ],
)
def test_impossible_configs_are_refused(options, message):
    """A config is checked when it is made."""
    with pytest.raises(ValueError, match=message):
        SequenceConfig(**options)


# Order


def test_order_is_kept_over_kinds_and_batches():
    """Batched tokenisation changes neither the order nor the tokens of mixed records."""
    kinds = [
        {"text": "hello"},
        {"input_ids": [1, 2, 3]},
        {"messages": CHAT},
        {"prompt": "a", "response": "b"},
        {"messages": CHAT[:2], "tools": [{}]},
    ]
    records = [record(f"{n}", **kinds[n % 5]) for n in range(600)]
    sequences, counts = run(*records)
    assert [s.sample_id for s in sequences] == [f"{n}" for n in range(600)]
    alone = [run(r)[0][0] for r in records[:5]]
    for n, sequence in enumerate(sequences):
        assert sequence.input_ids.tolist() == alone[n % 5].input_ids.tolist()
        assert sequence.is_target.tolist() == alone[n % 5].is_target.tolist()
    assert counts.records == 600


def test_counts_can_be_reported():
    """The tally is plain integers, ready for JSON."""
    _, counts = run(record(text="hello"))
    assert json.loads(json.dumps(dataclasses.asdict(counts)))["sequences"] == 1
