"""Claims about records that are tokenised already: every mask that others write is honoured."""

import numpy as np
import pytest

from decant.teacher_dump.inputs.kinds import TARGET_MASKS
from decant.teacher_dump.inputs.records import SourceError
from tests.support.records import build_tokenizer, one, record, run

IDS = [5, 6, 7, 8]


def padded_tokenizer():
    """A tokenizer with a padding token of its own."""
    tokenizer = build_tokenizer()
    tokenizer.pad_token = "<|start|>"
    return tokenizer


PADDED = padded_tokenizer()
PAD = PADDED.pad_token_id


@pytest.mark.parametrize("name", TARGET_MASKS)
@pytest.mark.parametrize("kind", [int, bool, float, np.int8])
def test_masks_choose_the_targets(name, kind):
    """One 0 or 1 for each id, under the names of axolotl, TRL and verl, in any type."""
    mask = [kind(value) for value in (0, 0, 1, 0)]
    assert one(record(input_ids=IDS, **{name: mask})) == (IDS, [7])


def test_labels_choose_the_targets():
    """-100 is not a target; the others must be the ids themselves."""
    assert one(record(input_ids=IDS, labels=[-100, -100, 7, 8])) == (IDS, [7, 8])
    assert one(record(input_ids=IDS, labels=IDS)) == (IDS, [6, 7, 8])


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([6, 7, 8, -100], "labels are shifted by one: each is the id of the next position"),
        ([-100, 7, 8, -100], "shifted by one.*next"),
        ([-100, 5, 6, 7], "shifted by one.*previous"),
        ([-100, 6, 9, 8], "labels has 9 at position 2, input_ids 7: expected each label to be"),
        ([-1, 6, 7, 8], "labels has -1 at position 0"),
        ([-100, 6, 7], "labels has 3 values: expected one for each of the 4"),
    ],
)
def test_other_labels_are_refused(labels, message):
    """Labels that are shifted, of other ids, or of another length are named."""
    with pytest.raises(SourceError, match=f"line of s: .*{message}"):
        one(record(input_ids=IDS, labels=labels))


@pytest.mark.parametrize(
    ("ids", "attended"),
    [
        ([PAD, PAD, 5, 6, 7], [0, 0, 1, 1, 1]),
        ([5, 6, 7, PAD, PAD], [1, 1, 1, 0, 0]),
        ([PAD, 5, 6, 7, PAD], [0, 1, 1, 1, 0]),
        ([1, 1, 5, 6, 7], [False, False, True, True, True]),
    ],
)
def test_padding_is_left_out(ids, attended):
    """What is not attended to is neither read nor learnt, on either side, with its labels."""
    found = one(record(input_ids=ids, attention_mask=attended), tokenizer=PADDED)
    assert found == ([5, 6, 7], [6, 7])
    labels = [i if a and i != 6 else -100 for i, a in zip(ids, attended, strict=True)]
    fields = {"input_ids": ids, "attention_mask": attended, "labels": labels}
    assert one(record(**fields), tokenizer=PADDED) == ([5, 6, 7], [7])
    positions = np.maximum(np.cumsum(attended) - 1, 0)
    assert one(record(**fields, position_ids=positions), tokenizer=PADDED)[1] == [7]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"attention_mask": [1, 0, 1, 1]}, "zeros between ones"),
        ({"attention_mask": [1, 1, 2, 2]}, "attention_mask has 4 values.*packed samples"),
        ({"attention_mask": [1, 1]}, "attention_mask has 2 values"),
        ({"attention_mask": [0, 0, 0, 0]}, r"has 0 token\(s\)"),
        ({"position_ids": [0, 1, 0, 1]}, "position_ids do not count from 0 up"),
        ({"loss_mask": [0, 1]}, "loss_mask has 2 values.* each of the 4"),
        ({"assistant_masks": [0, 0.5, 1, 1]}, "assistant_masks has 4 values.*0.5"),
        ({"completion_mask": "0111"}, "completion_mask has"),
    ],
)
def test_masks_that_cannot_be_are_refused(fields, message):
    """Padding inside, packed samples, other lengths and values are named."""
    with pytest.raises(SourceError, match=f"line of s: .*{message}"):
        one(record(input_ids=IDS, **fields))


def test_masks_must_agree():
    """Two that say the same are one; two that contradict each other are refused."""
    fields = {"input_ids": IDS, "loss_mask": [0, 0, 1, 1]}
    assert one(record(**fields, labels=[-100, -100, 7, 8])) == (IDS, [7, 8])
    assert one(record(**fields, response_mask=[1, 0, 1, 1])) == (IDS, [7, 8])
    with pytest.raises(SourceError, match=r"contradict one another.*loss_mask 2, labels 1"):
        one(record(**fields, labels=[-100, -100, 7, -100]))
    with pytest.raises(SourceError, match="contradict one another"):
        one(record(**fields, completion_mask=[0, 1, 1, 1]))


def test_completion_and_assistant_masks_both_take_away():
    """As in TRL, a target is what both have; if that is nothing, they contradict each other."""
    fields = {"input_ids": IDS, "completion_mask": [0, 0, 1, 1]}
    assert one(record(**fields, assistant_masks=[0, 1, 0, 1])) == (IDS, [8])
    labels = [-100, -100, -100, 8]
    assert one(record(**fields, assistant_masks=[0, 1, 0, 1], labels=labels)) == (IDS, [8])
    with pytest.raises(SourceError, match="completion_mask 2, assistant_masks 1"):
        one(record(**fields, assistant_masks=[0, 1, 0, 0]))


@pytest.mark.parametrize("name", ["train_mask", "my_labels", "loss_weights", "Mask"])
def test_what_looks_like_a_mask_is_refused(name):
    """A list of as many values under such a name says something, so it is not passed over."""
    with pytest.raises(SourceError, match=rf"{name} looks like a mask of the 4 input_ids"):
        one(record(input_ids=IDS, **{name: [0, 1, 1, 1]}))
    assert one(record(input_ids=IDS, **{name: None}))[0] == IDS
    assert one(record(input_ids=IDS, **{name: "positive"}))[0] == IDS
    assert one(record(input_ids=IDS, special_tokens_mask=[1, 0, 0, 0]))[0] == IDS


def test_masks_belong_to_ids():
    """Beside a text they have no effect, which is an error."""
    for name in TARGET_MASKS:
        with pytest.raises(SourceError, match=f"{name} belongs to input_ids and has no effect on"):
            one(record(text="hello", **{name: [1]}))


def test_padding_that_nothing_marks_is_refused():
    """Where the tokenizer has a token for it, padding without a mask is not text."""
    for ids, word in (([PAD, 5, 6], "begin"), ([5, 6, PAD], "end")):
        with pytest.raises(SourceError, match=f"input_ids {word} with the padding token {PAD}"):
            run(record(input_ids=ids), tokenizer=PADDED)
    found = one(record(input_ids=[5, 6, PAD], labels=[5, 6, -100]), tokenizer=PADDED)
    assert found == ([5, 6, PAD], [6])
    assert one(record(input_ids=[5, 6, 1]))[1] == [6, 1]
