"""Encoding with a memory."""

import pytest

from decant.student_train.alignment.encoder import Encoder
from tests.support import alignments

TEXTS = [["the quick", "", "brown"], ["fox"], ["", ""], []]


@pytest.mark.parametrize("remembered", [0, 12, 1 << 20])
def test_what_is_remembered_is_what_is_encoded(remembered: int) -> None:
    """However much room there is, the second time too; no more than the room is kept."""
    tokenizer = alignments.byte_level(290)
    encode = Encoder(tokenizer, special_as_text=True, remembered=remembered)
    backend = tokenizer.backend_tokenizer
    for _ in range(2):
        for texts in TEXTS:
            expected = [backend.encode(text, add_special_tokens=False).ids for text in texts]
            assert [ids.tolist() for ids in encode(texts)] == expected
    assert encode.held <= remembered
    assert bool(encode.held) == bool(remembered)


def test_the_same_letters_in_other_texts_are_not_mixed_up() -> None:
    """Texts that join to the same string keep their borders."""
    encode = Encoder(alignments.byte_level(290), special_as_text=True)
    lengths = [[len(ids) for ids in encode(texts)] for texts in (["ab", "c"], ["a", "bc"])]
    assert lengths == [[2, 1], [1, 2]]
