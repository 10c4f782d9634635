"""Chunks partition the bytes of a text, whatever both tokenisers do with it."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from decant.student_train.alignment.chunks import chunks_of
from decant.student_train.alignment.encoder import Encoder
from decant.student_train.alignment.events import Matching
from decant.student_train.alignment.pieces import Pieces, aligned
from decant.student_train.alignment.texts import text_pieces
from decant.student_train.alignment.token_bytes import TokenTable
from tests.support import alignments

TOKENIZERS = {
    "large": alignments.byte_level(380),
    "digits": alignments.byte_level(300, digits=True),
    "bos": alignments.byte_level(330, bos=True),
    "spaces": alignments.with_spaces(),
}
TABLES = {name: TokenTable.of(tokenizer, name) for name, tokenizer in TOKENIZERS.items()}
WORDS = [
    "the",
    "201",
    "2018",
    " ",
    "  ",
    "\r\n",
    "\t",
    "日本",
    "é",
    "e\u0301",
    "👩‍👩‍👧‍👦",
    "🇫🇷",
    "x = 1",
]
TEXTS = st.lists(
    st.lists(st.sampled_from(WORDS) | st.text(max_size=4), max_size=12).map("".join),
    min_size=1,
    max_size=3,
)


def clean(text: str) -> str:
    return text.replace("▁", "_").encode(errors="ignore").decode()


@pytest.mark.parametrize(
    ("teacher", "student"),
    [("large", "digits"), ("digits", "bos"), ("large", "spaces"), ("spaces", "digits")],
)
@settings(deadline=None, max_examples=40)
@given(texts=TEXTS)
def test_chunks_partition_the_bytes(teacher: str, student: str, texts: list[str]) -> None:
    """Each chunk has the same bytes on both sides, they follow one another, and none is left."""
    texts = [clean(text) or "x" for text in texts]
    rows = alignments.text_rows(texts, TOKENIZERS[teacher])
    matching = Matching(TABLES[teacher], TABLES[student])
    both, reasons = aligned_texts(rows, matching, TOKENIZERS[student])
    assert not reasons
    chunks = both.chunks
    said: list[bytes] = []
    for i in range(len(chunks)):
        t = slice(chunks.teacher_first[i], chunks.teacher_first[i] + chunks.num_teacher[i])
        s = slice(chunks.student_first[i], chunks.student_first[i] + chunks.num_student[i])
        theirs = TABLES[teacher].text_of(both.teacher.ids[t])[int(both.teacher.cut[t].sum()) :]
        ours = TABLES[student].text_of(both.student.ids[s])[int(both.student.cut[s].sum()) :]
        assert theirs == ours
        said.append(ours)
        # As few tokens as possible: no boundary inside is one of both.
        inside = set(both.teacher.starts[t][1:]) & set(both.student.starts[s][1:])
        assert not inside - {chunks.starts[i]}
    assert b"".join(said) == "".join(texts).encode()
    assert int(chunks.num_teacher.sum()) == len(both.teacher.ids)
    num_bos = len(texts) * TABLES[student].puts_bos
    assert int(chunks.num_student.sum()) == len(both.token_ids) - num_bos


def aligned_texts(rows: Any, matching: Matching, student: Any) -> Any:
    pieces = Pieces()
    sequences = list(range(len(rows.sample_ids)))
    reasons = text_pieces(pieces, rows, sequences, matching, Encoder(student, special_as_text=True))
    ids = rows.token_id.astype(np.int64)
    return aligned(pieces, len(sequences), ids, matching.teacher, matching.student), reasons


def test_stretches_that_one_side_does_not_fill_are_in_no_chunk() -> None:
    """Tokens over the edge of a piece, tokens alone, a piece that begins before it should."""

    def cut(teacher: list[int], student: list[int]) -> list[tuple[int, int]]:
        sides = [np.array(side[:-1]) for side in (teacher, student)]
        ends = [np.array(side[1:]) for side in (teacher, student)]
        found = chunks_of(sides[0], ends[0], sides[1], ends[1])
        return list(zip(found.starts.tolist(), found.ends.tolist(), strict=True))

    assert cut([0, 2, 5], [0, 1, 2, 5]) == [(0, 2), (2, 5)]
    assert cut([0, 2, 5], [2, 3, 5]) == [(2, 5)]
    assert cut([1, 3, 6], [0, 3, 6]) == [(3, 6)]
    assert cut([0, 2], [3, 5]) == []
    assert cut([0, 2, 5], [0, 3, 5]) == [(0, 5)]
