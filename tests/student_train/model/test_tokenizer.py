"""Claims about whose tokenizer a student has: the cache's, whatever class transformers takes."""

import json
from pathlib import Path

import pytest
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer

from decant.schemas import FormatError
from decant.storage import CacheReader
from decant.student_train import StudentConfig, train
from decant.student_train.model.student import load_student, load_tokenizer
from decant.teacher_dump.config import DumpConfig
from decant.teacher_dump.engines import TeacherConfig
from decant.teacher_dump.inputs.config import SequenceConfig, SourceConfig
from decant.teacher_dump.job.run import dump
from tests.support import models, trainings

TEXTS = ("the quick brown fox", "jumps over a lazy dog", "and runs away", "from hunters in woods")


def cache_of(folder: Path, teacher: Path) -> Path:
    """A cache of some texts."""
    source = folder / "source.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    dump(
        DumpConfig(
            output=str(folder / "cache"),
            teacher=TeacherConfig(path=str(teacher), device="cpu", dtype="float32"),
            source=SourceConfig(path=str(source)),
            sequences=SequenceConfig(max_length=64),
        )
    )
    return folder / "cache"


def save_as(folder: Path, name: str, tokenizer=None) -> Path:
    """A model whose tokenizer says it is of this class."""
    models.save_teacher(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    file = folder / "tokenizer_config.json"
    settings = {k: v for k, v in json.loads(file.read_text()).items() if k != "backend"}
    file.write_text(json.dumps({**settings, "tokenizer_class": name}))
    return folder


def test_a_class_that_reads_otherwise_is_no_other_tokenizer(tmp_path: Path):
    """A student of the teacher's own files is taken, though transformers misreads both."""
    teacher = save_as(tmp_path / "teacher", "LlamaTokenizerFast")
    misread = AutoTokenizer.from_pretrained(teacher)
    assert misread.decode(misread("the fox")["input_ids"]) == "thefox"
    reader = CacheReader(cache_of(tmp_path, teacher))
    kept = load_tokenizer(reader)
    assert kept.decode(kept("the fox")["input_ids"]) == "the fox"
    _, tokenizer = load_student(StudentConfig(path=str(teacher)), reader, 0)
    assert tokenizer.decode(tokenizer("the fox")["input_ids"]) == "the fox"


def test_another_pre_tokenizer_is_another_tokenizer(tmp_path: Path):
    """The same vocabulary that splits texts otherwise is refused, with a text that shows it."""
    reader = CacheReader(cache_of(tmp_path, save_as(tmp_path / "teacher", "TokenizersBackend")))
    other = models.build_tokenizer()
    other.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    student = save_as(tmp_path / "student", "TokenizersBackend", other)
    with pytest.raises(FormatError, match=r"texts become other ids: 'hello there what.*hellother"):
        load_student(StudentConfig(path=str(student)), reader, 0)


def test_a_student_learns_from_a_vocabulary_with_later_tokens(tmp_path: Path):
    """Added tokens beyond the teacher's rows, padding among them, need no rows of the student."""
    tokenizer = models.build_tokenizer()
    rows = len(tokenizer)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    models.build_model(vocab_size=rows).save_pretrained(tmp_path / "teacher")
    tokenizer.save_pretrained(tmp_path / "teacher")
    cache = cache_of(tmp_path, tmp_path / "teacher")
    assert CacheReader(cache).manifest.shared_vocab_size == rows
    for name, student in (
        ("scratch", StudentConfig(config=trainings.STUDENT)),
        ("pretrained", StudentConfig(path=str(tmp_path / "teacher"))),
    ):
        train(trainings.config(cache, tmp_path / name, student=student, steps=2, batch_size=2))
        assert len(trainings.losses(tmp_path / name)) == 2
        assert len(AutoTokenizer.from_pretrained(tmp_path / name / "student")) == rows + 1
