"""Claims about the border check: what tokens do not say of a record stops before it is scored."""

import copy
import logging
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, normalizers, pre_tokenizers

from decant.storage.inspect.marked import marked, stretches
from decant.teacher_dump.inputs.border import BorderCheck, difference
from decant.teacher_dump.inputs.counts import SequenceCounts, summary, warnings
from decant.teacher_dump.inputs.kinds import formed
from decant.teacher_dump.inputs.records import SourceError, Unrenderable
from decant.teacher_dump.inputs.sequences import SequenceConfig, make_encoder
from tests.support.records import (
    CHAT,
    HEADER,
    MARKED_TEMPLATE,
    MARKED_TOKENIZER,
    PLAIN_TEMPLATE,
    TOKENIZER,
    build_tokenizer,
    record,
    run,
)


def without_spaces():
    """A tokenizer that loses every space, as one of another family's pre-tokenizer does."""
    tokenizer = copy.deepcopy(TOKENIZER)
    backend = tokenizer.backend_tokenizer
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    return tokenizer


TEXTS = {
    "text": {"text": "hello world how are you"},
    "prompt + response": {"prompt": "hello world", "response": " how are you"},
    "messages": {"messages": [CHAT[0], {"role": "assistant", "content": "how are you"}]},
}


@pytest.mark.parametrize("name", TEXTS)
def test_lost_spaces_stop_the_dump(name):
    """Of every kind of record; the message shows what is read, and the way on."""
    with pytest.raises(SourceError, match=r"line of s: .* other spaces.*accept_rendering: true"):
        run(record(**TEXTS[name]), tokenizer=without_spaces())


def test_the_user_may_know_better(caplog):
    """With accept_rendering what does not fit is said, and goes on."""
    sequences, _ = run(record(**TEXTS["text"]), tokenizer=without_spaces(), accept_rendering=True)
    assert len(sequences) == 1
    assert "accepted: data.jsonl line of s" in caplog.text


def encoded(fields, tokenizer=TOKENIZER, **options):
    """A record in its form, and its ids and mask; None if the template cannot render it."""
    found = formed(record(**fields))
    [result] = make_encoder(SequenceConfig(**options), tokenizer)([found])
    return None if isinstance(result, Unrenderable) else (found, *result)


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ("{{ m.content }}{{ m.content }}", "message 2 .*is a target once more"),
        ("{{ m.content | upper }}", "message 2 .*is not there"),
        ("{{ m.content | replace(' ', '') }}", "message 2 .*with other spaces"),
    ],
)
def test_templates_that_change_an_answer_are_caught(block, message):
    """An answer that is said twice, or otherwise than in the record."""
    template = MARKED_TEMPLATE.replace("{{ m.content + '<|end|>' }}{% endg", f"{block}{{% endg")
    tokenizer = build_tokenizer(template=template)
    chat = [CHAT[0], {"role": "assistant", "content": "the assistant answers"}]
    found, ids, mask = encoded({"messages": chat}, tokenizer, accept_rendering=True)
    problem = difference(found, tokenizer, ids, mask, everything=False)
    assert re.search(message, problem)


def test_a_mask_that_slips_is_caught():
    """Targets that begin too early, too late, or in another turn."""
    found, ids, mask = encoded({"messages": CHAT}, MARKED_TOKENIZER)
    assert not difference(found, MARKED_TOKENIZER, ids, mask, everything=False)
    for wrong in (~mask, mask & False, mask | True):
        assert difference(found, MARKED_TOKENIZER, ids, wrong, everything=False)
    shorter = mask.copy()
    shorter[mask.nonzero()[0][0]] = False
    assert "target in part" in difference(found, MARKED_TOKENIZER, ids, shorter, everything=False)
    found, ids, mask = encoded({"prompt": "hello", "response": " how are you"})
    assert not difference(found, TOKENIZER, ids, mask, everything=False)
    wider = mask.copy()
    wider[1:] = True
    assert not difference(found, TOKENIZER, ids, wider, everything=True)
    assert difference(found, TOKENIZER, ids, mask & False, everything=False)


@settings(max_examples=60, deadline=None)
@given(st.text(min_size=1, max_size=20), st.text(max_size=20))
def test_whatever_is_right_passes(one, other):
    """Any letters, spaces and bytes of texts, answers and chats."""
    records = [
        {"text": one},
        {"prompt": one, "response": other},
        {"prompt": other, "response": one},
    ]
    chat = [{"role": "user", "content": one}, {"role": "assistant", "content": other}]
    records.append({"messages": chat})
    for fields in records:
        tokenizer = MARKED_TOKENIZER if "messages" in fields else TOKENIZER
        if result := encoded(fields, tokenizer):
            found, ids, mask = result
            assert not difference(found, tokenizer, ids, mask, everything=False)


def test_normalisers_are_no_fault():
    """A tokenizer that folds letters by its own normaliser loses nothing that it could keep."""
    tokenizer = copy.deepcopy(TOKENIZER)
    lowered = [normalizers.NFKD(), normalizers.StripAccents(), normalizers.Lowercase()]
    tokenizer.backend_tokenizer.normalizer = normalizers.Sequence(lowered)
    assert len(run(record(text="Hello Wörld"), tokenizer=tokenizer)[0]) == 1


def test_a_spread_of_records_is_looked_at():
    """The first of each kind, then fewer and fewer: a fault that is frequent is found."""
    check = BorderCheck(TOKENIZER, targets="response")
    looked = []
    found, ids, mask = encoded({"text": "hello"})
    empty = mask & False
    for number in range(3000):
        try:
            check.look(found, ids, empty if number >= 16 else mask)
        except SourceError:
            looked.append(number)
    assert looked[0] == 16 and 10 < len(looked) < 40 and looked[-1] > 2000


def test_an_example_of_each_kind_is_in_the_log(caplog):
    """With its targets between marks."""
    with caplog.at_level(logging.INFO):
        run(
            record("a", **TEXTS["prompt + response"]),
            record("b", text="hello"),
            record("c", text="b"),
        )
    assert "⟦ how are you</s>⟧" in caplog.text and "<s>⟦hello</s>⟧" in caplog.text
    assert caplog.text.count("targets between") == 2


def test_a_bos_that_is_not_put_is_said(caplog):
    """Once, where the tokenizer has one that is not the eos as well."""
    tokenizer = build_tokenizer(adds_bos=False)
    run(record("a", text="hello"), record("b", text="b"), tokenizer=tokenizer)
    assert caplog.text.count("records of kind text begin without <s>") == 1
    caplog.clear()
    run(record(text="hello"), tokenizer=tokenizer, add_bos=True)
    run(record(text="hello"), tokenizer=build_tokenizer(adds_bos=False, bos_token="</s>"))
    run(record(input_ids=[5, 6]), tokenizer=tokenizer)
    assert "begin without" not in caplog.text


def test_stretches_join_to_the_text():
    """Bytes of one letter, and spaces that decoders drop at a start, stay in the whole."""
    text = "日本 hello  you é"
    ids = TOKENIZER(text, add_special_tokens=False)["input_ids"]

    def plain(some):
        return TOKENIZER.backend_tokenizer.decode(some, skip_special_tokens=False)

    for step in (1, 2, 3):
        mask = np.arange(len(ids)) // step % 2 == 0
        assert "".join(part for part, _ in stretches(ids, mask, plain)) == text
    assert marked(ids, np.ones(len(ids), bool), plain) == f"⟦{text}⟧"
    spaced = copy.deepcopy(TOKENIZER.backend_tokenizer)
    spaced.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)])
    ids = TOKENIZER(" a b c", add_special_tokens=False)["input_ids"]
    parts = stretches(ids, np.arange(len(ids)) == 1, spaced.decode)
    assert "".join(part for part, _ in parts) == "a b c"


def test_long_examples_are_shortened():
    """An example shows both ends of what is long, and escapes what a terminal would obey."""
    shown = marked([0] * 5000, np.arange(5000) > 2500, lambda ids: "x\x1b" * len(ids))
    assert len(shown) < 2500 and "…" in shown and "\x1b" not in shown and "\\x1b" in shown


def test_the_summary_says_what_happened():
    """One line; a warning where more than a few per cent of the tokens or records are left out."""
    counts = SequenceCounts(records=100, sequences=99, tokens=1000, targets=900)
    assert summary(counts) == "100 records give 99 sequences, 1,000 tokens, 900 targets"
    assert not warnings(counts, 64)
    counts.dropped_tokens, counts.truncated_records, counts.unrenderable_records = 3000, 40, 5
    line = summary(counts)
    assert "3,000 tokens cut (75.0 %), 40 records truncated, 5 that the template" in line
    cut, left_out = warnings(counts, 64)
    assert cut.startswith("75.0 % of the tokens are cut, beyond sequences.max_length=64: raise it,")
    counts.truncated_records, counts.split_records = 0, 40
    assert "in windows or records without targets" in warnings(counts, 64)[0]
    assert "5 of 100 records are left out whole" in left_out


def test_templates_are_compared_with_the_records_of_their_turns():
    """A template that lets the user speak inside the answer's block is caught."""
    template = PLAIN_TEMPLATE.replace(HEADER, HEADER + "{% generation %}").replace(
        "'<|end|>' }}{% endfor", "'<|end|>' }}{% endgeneration %}{% endfor"
    )
    tokenizer = build_tokenizer(template=template)
    with pytest.raises(SourceError, match=r"line of s"):
        run(record(messages=CHAT), tokenizer=tokenizer, max_unrenderable=0)
