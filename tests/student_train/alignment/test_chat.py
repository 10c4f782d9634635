"""Conversations: aligned inside of the assistant's messages, and where those end."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from decant.schemas import Truncation
from decant.storage import CacheReader
from decant.student_train.alignment.aligner import AlignedRows, Aligner
from decant.teacher_dump import DumpConfig, SequenceConfig, SourceConfig, TeacherConfig, dump
from tests.support import alignments
from tests.support.models import build_tokenizer

ANSWERS = ["fox jumps over", " the lazy 日本 dog\n", "deep woods, 201"]
CONVERSATION = [
    {"role": "user", "content": "quick"},
    {"role": "assistant", "content": ANSWERS[0]},
    {"role": "user", "content": "fox jumps over"},
    {"role": "assistant", "content": ANSWERS[1]},
]
RECORDS = [
    {"id": "two", "messages": CONVERSATION},
    {"id": "one", "messages": [*CONVERSATION[:1], {"role": "assistant", "content": ANSWERS[2]}]},
]
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'assistant' %}Answer: {{ m.content|trim }}<end>\n"
    "{% else %}[{{ m.content }}] {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}Answer: {% endif %}"
)


@pytest.fixture(scope="module", params=[True, False], ids=["kept", "given again"])
def found(
    request: pytest.FixtureRequest, teacher_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[CacheReader, Any, AlignedRows, Aligner]:
    """A chat cache, a student's tokenizer with another template, and what became of them."""
    folder = tmp_path_factory.mktemp("chat")
    chats = given_again(folder)
    alignments.save(alignments.byte_level(300, digits=True), folder / "student", TEMPLATE)
    dump(
        DumpConfig(
            output=str(folder / "cache"),
            teacher=TeacherConfig(path=str(teacher_path), dtype="float32"),
            source=SourceConfig(path=str(chats)),
            sequences=SequenceConfig(max_length=128, keep_messages=request.param),
            truncation=Truncation(k=300),
            precision="f32",
        )
    )
    reader = CacheReader(folder / "cache")
    student = AutoTokenizer.from_pretrained(folder / "student")
    given = "" if request.param else str(chats)
    aligner = Aligner(reader, student, where="student", messages=given)
    return reader, student, aligner(reader.read_stored(reader.row_groups()[0])), aligner


def test_the_student_reads_its_own_template(found: Any) -> None:
    """Not a token of the teacher's template reaches it."""
    _, student, rows, _ = found
    for i, record in enumerate(RECORDS):
        ids = rows.token_id[rows.row_starts[i] : rows.row_starts[i + 1]].tolist()
        expected = student.apply_chat_template(record["messages"], tokenize=False)
        assert student.decode(ids) == expected


def test_targets_are_what_the_assistant_says_and_where_it_ends(found: Any) -> None:
    """Every byte of each message but white space around it, and the student's own end of a turn.

    But for the end of one behind white space that the student's template leaves out.
    """
    _, student, rows, aligner = found
    assert aligner.figures.left_out == 0
    said = []
    for i in range(len(RECORDS)):
        chunks = slice(rows.chunk_starts[i], rows.chunk_starts[i + 1])
        first, size = rows.first[chunks], rows.size[chunks]
        ids = np.concatenate([rows.token_id[f : f + n] for f, n in zip(first, size, strict=True)])
        said.append(student.decode(ids.tolist()))
    end = alignments.END
    # A space before a message may be a part of its first token, and is none of the message.
    expected = [f" {ANSWERS[0]}{end}{ANSWERS[1].strip()}", f"{ANSWERS[2]}{end}"]
    assert said == expected


def test_the_end_of_a_turn_is_matched_by_its_role(found: Any) -> None:
    """Wherever the teacher may end its turn, the event is that the student ends its own."""
    reader, student, rows, _ = found
    teacher_end = build_tokenizer().convert_tokens_to_ids("<|end|>")
    ours = student.convert_tokens_to_ids(alignments.END)
    events = rows.events
    ends = rows.token_id[rows.first + rows.size - 1] == ours
    assert int(ends.sum()) == 2
    assert (events.token_ids[ends] == ours).any(axis=1).all()
    kept = np.concatenate([s.token_ids for s in reader])
    assert int((events.token_ids[~ends] == ours).sum()) > 0 and (kept == teacher_end).any()


def test_a_conversation_that_the_template_cannot_say_is_left_out(found: Any) -> None:
    """With the template's own words; a student without a template is refused at once."""
    reader, student, _, aligner = found
    rows = reader.read_stored(reader.row_groups()[0])
    kept = student.chat_template
    student.chat_template = "{{ raise_exception('no system here') }}"
    try:
        _, figures = aligner.measured(rows)
    finally:
        student.chat_template = kept
    assert figures.left_out == 2 and "no system here" in figures.examples[0]
    student.chat_template = "{% for m in messages %}{{ m.role }}{% endfor %}"
    try:
        _, figures = aligner.measured(rows)
    finally:
        student.chat_template = kept
    assert "does not write what the assistant says" in figures.examples[0]


def test_a_student_without_a_template_is_refused(found: Any, tmp_path: Path) -> None:
    """As it is the student's own that is rendered."""
    reader, *_ = found
    alignments.save(alignments.byte_level(300), tmp_path)
    bare = AutoTokenizer.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has no chat template, and the cache holds conversations"):
        Aligner(reader, bare, where="student", messages=str(given_again(tmp_path)))


def given_again(folder: Path) -> Path:
    """The conversations as a file."""
    path = folder / "messages.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    return path
