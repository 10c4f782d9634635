"""Claims about token sequences: what is read, what is a target, and that nothing gets lost."""

import dataclasses
import json
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from tokenizers.decoders import ByteLevel
from transformers import PreTrainedTokenizerFast

from decant.teacher_dump.inputs.records import Record, SourceError, TokenSequence
from decant.teacher_dump.inputs.sequences import SequenceConfig, SequenceCounts, iter_sequences

VOCAB_SIZE = 300
SENTENCES = ["hello world, how are you?", "the user asks and the assistant answers", "a b c \n"]
CHAT = [
    {"role": "user", "content": "hello"},
    {"role": "assistant", "content": " world"},
    {"role": "user", "content": "how are you?"},
    {"role": "assistant", "content": "the answers"},
]
ANSWERS = " world<|end|>the answers<|end|>"
HEADER = "{{ '<|start|>' + m.role + '\n' }}"
PLAIN_TEMPLATE = (
    "{% for m in messages %}" + HEADER + "{{ m.content + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}"
)
MARKED_TEMPLATE = (
    "{% for m in messages %}" + HEADER + "{% if m.role == 'assistant' %}{% generation %}"
    "{{ m.content + '<|end|>' }}{% endgeneration %}"
    "{% else %}{{ m.content + '<|end|>' }}{% endif %}{% endfor %}"
)


def build_tokenizer(*, adds_bos: bool = True, template: str = PLAIN_TEMPLATE, **special: str):
    """A byte-level BPE that trims spaces from its offsets, as that of Llama 3 does."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevel()
    tokenizer.train_from_iterator(
        SENTENCES,
        trainers.BpeTrainer(
            vocab_size=VOCAB_SIZE,
            special_tokens=["<s>", "</s>", "<|start|>", "<|end|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    trim: Any = processors.ByteLevel(trim_offsets=True)
    bos = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer.post_processor = processors.Sequence([trim, bos]) if adds_bos else trim
    tokens = {"bos_token": "<s>", "eos_token": "</s>"} | special
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **tokens)
    wrapped.chat_template = template
    return wrapped


TOKENIZER = build_tokenizer()
MARKED_TOKENIZER = build_tokenizer(template=MARKED_TEMPLATE)
BOS, EOS = TOKENIZER.bos_token_id, TOKENIZER.eos_token_id


def bare(text: str) -> list[int]:
    """Return the tokens of the text alone."""
    return TOKENIZER(text, add_special_tokens=False)["input_ids"]


def record(sample_id: str = "s", **fields: Any) -> Record:
    """Make a record of the fields."""
    return Record(sample_id, fields, f"data.jsonl line of {sample_id}")


def run(
    *records: Record, tokenizer: Any = TOKENIZER, **options: Any
) -> tuple[list[TokenSequence], SequenceCounts]:
    """Return the sequences of the records and their tally."""
    counts = SequenceCounts()
    config = SequenceConfig(**options)
    found = iter_sequences(records, tokenizer, config, vocab_size=VOCAB_SIZE, counts=counts)
    return list(found), counts


def one(fields: Record, **options: Any) -> tuple[list[int], list[int]]:
    """Return the ids of the only sequence, and those of them that are targets."""
    [sequence], _ = run(fields, **options)
    return sequence.input_ids.tolist(), sequence.input_ids[sequence.is_target].tolist()


def chat_targets(tokenizer: Any, messages: Any = CHAT, **options: Any) -> str:
    """Return the text of the targets of a conversation."""
    _, targets = one(record(messages=messages), tokenizer=tokenizer, **options)
    return tokenizer.decode(targets)


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


# Prompt and response


def test_the_boundary_of_prompt_and_response_is_exact():
    """Prompt and response are tokenised apart, also where one call would merge their tokens."""
    prompt, response = bare("hel"), bare("lo you")
    assert prompt + response != bare("hello you")
    fields = record(prompt="hel", response="lo you")
    assert one(fields) == ([BOS, *prompt, *response, EOS], [*response, EOS])
    assert one(fields, targets="all")[1] == [*prompt, *response, EOS]
    assert one(fields, add_eos=False)[1] == response


def test_an_empty_prompt_leaves_the_response_whole():
    """Without a prompt, all but the very first token is a target."""
    assert one(record(prompt="", response="hello you"))[1] == [*bare("hello you"), EOS]


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


def test_a_refusing_template_names_the_record():
    """Of many conversations, the error names the one that the template cannot render."""
    template = "{% if messages[0].role != 'user' %}{{ raise_exception('user first') }}{% endif %}"
    tokenizer = build_tokenizer(template=template + MARKED_TEMPLATE)
    good, bad = record("good", messages=CHAT), record("bad", messages=CHAT[1:])
    with pytest.raises(SourceError, match=r"line of bad: .*user first"):
        run(good, bad, tokenizer=tokenizer)


def test_messages_need_a_template():
    """Chats are refused without a chat template."""
    with pytest.raises(ValueError, match="has no chat template"):
        run(record(messages=CHAT), tokenizer=build_tokenizer(template=""))


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


# Length


def test_overlong_records_are_truncated_by_default():
    """The end is cut off, and counted."""
    sequences, counts = run(record(input_ids=list(range(10))), max_length=4)
    assert [s.input_ids.tolist() for s in sequences] == [[0, 1, 2, 3]]
    assert (counts.truncated_records, counts.dropped_tokens, counts.targets) == (1, 6, 3)


def test_overlong_records_can_be_errors():
    """With overlong: error the record is named with its length."""
    with pytest.raises(SourceError, match="sample 's' has 5 tokens: expected at most max_length=4"):
        run(record(input_ids=[1] * 5), max_length=4, overlong="error")
    assert one(record(input_ids=[1] * 4), max_length=4, overlong="error")


def test_split_windows_are_numbered():
    """The windows of a split record carry its id and their number; short records keep theirs."""
    sequences, counts = run(
        record("long", input_ids=list(range(7))),
        record("short", input_ids=[1, 2]),
        max_length=3,
        overlong="split",
    )
    assert [s.sample_id for s in sequences] == ["long#1", "long#2", "short"]
    assert (counts.split_records, counts.windows_without_targets, counts.dropped_tokens) == (
        1,
        1,
        1,
    )


def test_records_without_targets_are_left_out_and_counted():
    """What has no target, or lost all by truncation, yields no sequence and stops nothing."""
    sequences, counts = run(
        record("masked", input_ids=[1, 2, 3], loss_mask=[1, 0, 0]),
        record("long prompt", prompt="hello world, how are you?", response="a"),
        record("no answer", messages=CHAT[:1]),
        record("good", input_ids=[1, 2]),
        max_length=3,
    )
    assert [s.sample_id for s in sequences] == ["good"]
    assert (counts.records, counts.sequences, counts.records_without_targets) == (4, 1, 3)
    assert counts.truncated_records == 2


EMPTY = (
    {"text": ""},
    {"messages": []},
    {"input_ids": []},
    {"input_ids": np.zeros(0, np.int32)},
    {"input_ids": [7]},
)


def test_empty_records_can_be_left_out():
    """They are counted, with the one token that some have; what is no record is still an error."""
    records = [record(f"{n}", **fields) for n, fields in enumerate(EMPTY)]
    sequences, counts = run(*records, record("good", input_ids=[1, 2]), empty="drop")
    assert [s.sample_id for s in sequences] == ["good"]
    assert (counts.records, counts.empty_records, counts.dropped_tokens) == (6, 5, 1)
    with pytest.raises(SourceError, match="text is 5"):
        run(record(text=5), empty="drop")


@pytest.mark.parametrize("packing", ["none", "concat"])
def test_duplicates_are_counted_and_can_be_left_out(packing):
    """Of equal tokens and targets under other ids, the first one stays."""
    texts = ["hello", "world", "hello", "hello you", "hello"]
    records = [record(f"{n}", text=text) for n, text in enumerate(texts)]
    sequences, counts = run(*records, packing=packing)
    assert counts.duplicate_records == 2
    left, dropped = run(*records, packing=packing, duplicates="drop")
    assert dropped.duplicate_records == 2
    assert dropped.tokens + dropped.dropped_tokens == counts.tokens
    assert dropped.dropped_tokens == 2 * len([BOS, *bare("hello"), EOS])
    if packing == "none":
        assert [s.sample_id for s in sequences] == list("01234")
        assert [s.sample_id for s in left] == list("013")
        masked = (record(str(n), input_ids=[1, 2, 3], loss_mask=[0, n, 1]) for n in (0, 1))
        assert len(run(*masked, duplicates="drop")[0]) == 2


RECORDS = st.lists(
    st.lists(st.tuples(st.integers(0, VOCAB_SIZE - 1), st.booleans()), min_size=2, max_size=20),
    max_size=8,
)


@settings(max_examples=100, deadline=None)
@given(
    RECORDS,
    st.integers(2, 9),
    st.sampled_from(["truncate", "split"]),
    st.sampled_from(["keep", "drop"]),
)
def test_every_token_is_kept_or_counted(records, max_length, overlong, duplicates):
    """Nothing is a target twice or by mistake, and the counts add up, however records are cut."""
    named = [
        record(f"{n}", input_ids=[i for i, _ in rows], loss_mask=[m for _, m in rows])
        for n, rows in enumerate(records)
    ]
    options = {"max_length": max_length, "overlong": overlong, "duplicates": duplicates}
    sequences, counts = run(*named, tokenizer=None, **options)
    assert counts.records == len(records)
    distinct = {(tuple(i for i, _ in rows), tuple(m for _, m in rows)) for rows in records}
    assert counts.duplicate_records == len(records) - len(distinct)
    dropped = counts.duplicate_records if duplicates == "drop" else 0
    assert counts.sequences == len(sequences)
    assert counts.tokens == sum(len(s.input_ids) for s in sequences)
    assert counts.targets == sum(int(s.is_target.sum()) for s in sequences)
    assert counts.tokens + counts.dropped_tokens == sum(len(rows) for rows in records)
    kept = {s.sample_id.split("#")[0] for s in sequences}
    assert len(kept) + counts.records_without_targets + dropped == len(records)
    for sequence in sequences:
        assert len(sequence.input_ids) <= max_length
        assert sequence.is_target.any()
        assert not sequence.is_target[0]
        name, _, number = sequence.sample_id.partition("#")
        start = (int(number or 1) - 1) * max_length
        rows = records[int(name)][start : start + max_length]
        assert sequence.input_ids.tolist() == [i for i, _ in rows]
        assert sequence.is_target[1:].tolist() == [m for _, m in rows][1:]


TEXTS = st.lists(st.text("abc hello\n", min_size=1, max_size=40), min_size=1, max_size=8)


@settings(max_examples=50, deadline=None)
@given(st.text("abc hello\n", min_size=1, max_size=60), st.integers(2, 9))
def test_split_windows_join_to_the_whole(text, max_length):
    """The windows of a text, one after the other, are the text (but for a last single token)."""
    sequences, counts = run(record(text=text), max_length=max_length, overlong="split")
    joined = [i for s in sequences for i in s.input_ids.tolist()]
    whole = [BOS, *bare(text), EOS]
    assert joined == whole[: len(whole) - counts.dropped_tokens]
    assert counts.dropped_tokens == (len(whole) % max_length == 1)


@settings(max_examples=50, deadline=None)
@given(TEXTS, st.integers(2, 9))
def test_packed_windows_join_to_the_documents(texts, max_length):
    """Packed windows are exactly full, but for the last, and join to the framed documents."""
    records = [record(f"d{n}", text=text) for n, text in enumerate(texts)]
    sequences, counts = run(*records, max_length=max_length, packing="concat")
    whole = [(i, r.sample_id) for r in records for i in [BOS, *bare(r.fields["text"]), EOS]]
    joined = [i for s in sequences for i in s.input_ids.tolist()]
    assert joined == [i for i, _ in whole][: len(whole) - counts.dropped_tokens]
    assert counts.dropped_tokens == (len(whole) % max_length == 1)
    assert all(len(s.input_ids) == max_length for s in sequences[:-1])
    assert all(s.is_target[1:].all() and not s.is_target[0] for s in sequences)
    assert [s.sample_id for s in sequences] == [
        f"{whole[n * max_length][1]}#{n + 1}" for n in range(len(sequences))
    ]


def test_packing_does_not_double_a_token_that_is_bos_and_eos():
    """Where one token ends and begins documents, one stands between them."""
    tokenizer = build_tokenizer(adds_bos=False, bos_token="</s>")
    records = [record("x", text="a"), record("y", text="b")]
    [sequence], _ = run(*records, tokenizer=tokenizer, packing="concat", add_bos=True)
    assert sequence.input_ids.tolist() == [EOS, *bare("a"), EOS, *bare("b"), EOS]


@pytest.mark.parametrize(
    "fields", [{"messages": CHAT}, {"prompt": "a", "response": "b"}, {"input_ids": [1, 2]}]
)
def test_only_texts_are_packed(fields):
    """Packing would lose the loss mask, so other kinds are refused."""
    with pytest.raises(SourceError, match="concat joins plain texts, found"):
        run(record(**fields), packing="concat")


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
