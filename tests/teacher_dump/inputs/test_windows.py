"""Claims about lengths: how records are cut, split and packed, and that every token is counted."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from decant.teacher_dump.inputs.records import SourceError
from tests.support.records import (
    BOS,
    CHAT,
    EOS,
    PLAIN_TEMPLATE,
    VOCAB_SIZE,
    bare,
    build_tokenizer,
    one,
    record,
    run,
)


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
        record("long", input_ids=list(range(1, 8))),
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
    """Without heads the windows of a text are the text, but for a last single token."""
    options = {"max_length": max_length, "overlong": "split", "window_head": "none"}
    sequences, counts = run(record(text=text), **options)
    joined = [i for s in sequences for i in s.input_ids.tolist()]
    whole = [BOS, *bare(text), EOS]
    assert joined == whole[: len(whole) - counts.dropped_tokens]
    assert counts.dropped_tokens == (len(whole) % max_length == 1)


@settings(max_examples=50, deadline=None)
@given(TEXTS, st.integers(2, 9))
def test_packed_windows_join_to_the_documents(texts, max_length):
    """Without heads, packed windows are full, but for the last, and join to the documents."""
    records = [record(f"d{n}", text=text) for n, text in enumerate(texts)]
    options = {"max_length": max_length, "packing": "concat", "window_head": "none"}
    sequences, counts = run(*records, **options)
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


# The head of windows


@settings(max_examples=80, deadline=None)
@given(st.text("abc hello\n", min_size=1, max_size=60), st.integers(2, 9))
def test_every_window_of_a_text_begins_with_its_head(text, max_length):
    """Later windows repeat the bos as no target; behind it they join to the text, all counted."""
    sequences, counts = run(record(text=text), max_length=max_length, overlong="split")
    whole = [BOS, *bare(text), EOS]
    heads = [s.input_ids[0] for s in sequences]
    assert heads == [BOS] * len(sequences)
    assert [i for s in sequences for i in s.input_ids[1:].tolist()] == whole[1:]
    assert all(len(s.input_ids) == max_length for s in sequences[:-1])
    assert all(not s.is_target[0] and s.is_target[1:].all() for s in sequences)
    assert (counts.repeated_tokens, counts.dropped_tokens) == (len(sequences) - 1, 0)
    assert counts.tokens - counts.repeated_tokens == len(whole)
    assert counts.targets == len(whole) - 1


@settings(max_examples=80, deadline=None)
@given(TEXTS, st.integers(2, 9))
def test_every_packed_window_begins_with_the_head(texts, max_length):
    """A packed window begins with a bos, its document's own or a repeated one; none is doubled."""
    records = [record(f"d{n}", text=text) for n, text in enumerate(texts)]
    sequences, counts = run(*records, max_length=max_length, packing="concat")
    whole = [i for r in records for i in [BOS, *bare(r.fields["text"]), EOS]]
    joined, repeated, place = [], 0, 0
    for sequence in sequences:
        ids = sequence.input_ids.tolist()
        assert ids[0] == BOS and len(ids) <= max_length
        own = whole[place] == BOS
        repeated += not own
        joined += ids if own else ids[1:]
        place = len(joined)
        assert sequence.is_target[1:].all() and not sequence.is_target[0]
    assert joined == whole[: len(whole) - counts.dropped_tokens]
    assert counts.repeated_tokens == repeated
    assert counts.tokens - counts.repeated_tokens + counts.dropped_tokens == len(whole)
    assert all(len(s.input_ids) == max_length for s in sequences[:-1])


def test_a_head_of_several_tokens_is_repeated_whole():
    """Whatever the tokenizer puts first, add_bos included, comes again in front of each window."""
    tokenizer = build_tokenizer(head="<|start|> <|end|>")
    start, end = tokenizer.convert_tokens_to_ids(["<|start|>", "<|end|>"])
    text, body = "a b c", bare("a b c")
    for options, head in (({}, [start, end]), ({"add_bos": True}, [BOS, start, end])):
        sequences, counts = run(
            record(text=text),
            tokenizer=tokenizer,
            max_length=len(head) + 2,
            overlong="split",
            **options,
        )
        assert [s.input_ids.tolist()[: len(head)] for s in sequences] == [head] * len(sequences)
        assert [i for s in sequences for i in s.input_ids[len(head) :].tolist()] == [*body, EOS]
        later = sequences[1]
        assert later.is_target.tolist() == [False] * len(head) + [True] * 2
        assert counts.repeated_tokens == len(head) * (len(sequences) - 1)
    with pytest.raises(SourceError, match="windows of max_length=2 have no room behind the 2"):
        run(record(text=text), tokenizer=tokenizer, max_length=2, overlong="split")


def test_windows_of_ready_ids_and_chats_repeat_their_bos():
    """A bos that a record or a chat template begins with comes again, though nobody added it."""
    options = {"max_length": 4, "overlong": "split"}
    ids = [BOS, 5, 6, 7, 8, 9]
    sequences, _ = run(record(input_ids=ids, loss_mask=[0, 0, 0, 1, 0, 1]), **options)
    assert [s.input_ids.tolist() for s in sequences] == [[BOS, 5, 6, 7], [BOS, 8, 9]]
    assert [s.is_target.tolist() for s in sequences] == [[False] * 3 + [True], [False, False, True]]
    sequences, _ = run(record(input_ids=ids[1:]), **options)
    assert [s.input_ids.tolist() for s in sequences] == [[5, 6, 7, 8]]
    sequences, _ = run(record(input_ids=ids), tokenizer=None, **options)
    assert [s.input_ids.tolist() for s in sequences] == [[BOS, 5, 6, 7], [8, 9]]
    tokenizer = build_tokenizer(adds_bos=False, template="<s>" + PLAIN_TEMPLATE)
    sequences, _ = run(record(messages=CHAT), tokenizer=tokenizer, **options)
    assert len(sequences) > 2 and all(s.input_ids[0] == BOS for s in sequences)


def test_a_window_without_room_repeats_nothing_where_nothing_stands_first():
    """Tokenizers that put nothing first give windows as they are."""
    tokenizer = build_tokenizer(adds_bos=False)
    text = "hello world, how are you?"
    with_head, counts = run(record(text=text), tokenizer=tokenizer, max_length=3, overlong="split")
    without, _ = run(
        *[record(text=text)],
        tokenizer=tokenizer,
        max_length=3,
        overlong="split",
        window_head="none",
    )
    assert [s.input_ids.tolist() for s in with_head] == [s.input_ids.tolist() for s in without]
    assert counts.repeated_tokens == 0


def test_a_token_that_is_bos_and_eos_begins_packed_windows_once():
    """Where eos is bos, a window behind the end of a document begins with one of them."""
    tokenizer = build_tokenizer(adds_bos=False, bos_token="</s>")
    records = [record("x", text="a"), record("y", text="b")]
    options = {"packing": "concat", "add_bos": True, "max_length": 3}
    sequences, counts = run(*records, tokenizer=tokenizer, **options)
    assert [s.input_ids.tolist() for s in sequences] == [
        [EOS, *bare("a"), EOS],
        [EOS, *bare("b"), EOS],
    ]
    assert counts.repeated_tokens == 1


def test_heads_need_windows():
    """To ask for windows without heads is an error where there are no windows."""
    with pytest.raises(ValueError, match="window_head: none has no effect without overlong: split"):
        one(record(text="a"), window_head="none")
