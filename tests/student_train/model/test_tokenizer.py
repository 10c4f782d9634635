"""Claims about whose tokenizer a student has: the cache's, whatever class transformers takes."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from decant.schemas import FormatError
from decant.storage import CacheReader
from decant.storage.inspect.diff import diff
from decant.student_train import CacheStream, LossConfig, StudentConfig, train
from decant.student_train.data.batch import Batch
from decant.student_train.data.mixture import MixtureStream
from decant.student_train.dry_run import dry_run
from decant.student_train.losses import sparse_divergence
from decant.student_train.model.distiller import Distiller
from decant.student_train.model.student import load_student, load_tokenizer, student_vocab_size
from decant.student_train.verdict import evaluate_student
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


@pytest.fixture(scope="module")
def chat_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of the instruction-tuned teacher, whose texts end with <|end|>."""
    folder = tmp_path_factory.mktemp("instruct")
    models.build_model(eos_token_id=3).save_pretrained(folder / "teacher")
    tokenizer = models.build_tokenizer()
    tokenizer.eos_token = tokenizer.pad_token = "<|end|>"
    tokenizer.save_pretrained(folder / "teacher")
    return cache_of(folder, folder / "teacher")


def base_model(folder: Path, change: Callable[[Any], object] = lambda _: None, **options) -> Path:
    """A base model, whose texts end with </s>."""
    student = models.build_model(seed=3, **options)
    student.generation_config.update(eos_token_id=1, bos_token_id=0, pad_token_id=1)
    student.save_pretrained(folder)
    tokenizer = models.build_tokenizer()
    tokenizer.chat_template = None
    change(tokenizer)
    tokenizer.save_pretrained(folder)
    return folder


def ends(folder: Path) -> tuple[Any, Any, Any]:
    """The end token of a saved model: its configuration's, its generation's, its tokenizer's."""
    return (
        AutoConfig.from_pretrained(folder).eos_token_id,
        GenerationConfig.from_pretrained(folder).eos_token_id,
        AutoTokenizer.from_pretrained(folder).eos_token_id,
    )


def test_a_base_student_learns_from_an_instruct_teacher(
    chat_cache: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    """Other special tokens are told, also by a dry run; what is saved ends texts as the cache."""
    caplog.set_level("INFO")
    student = StudentConfig(path=str(base_model(tmp_path / "base")))
    assert ends(tmp_path / "base") == (1, 1, 1)
    run = trainings.config(chat_cache, tmp_path / "run", student=student, steps=2, batch_size=2)
    dry_run(run)
    told = "differs in: eos_token '</s>' where the cache has '<|end|>'; pad_token"
    assert told in caplog.text and "eos_token_id 1 becomes 3" in caplog.text
    caplog.clear()
    train(run)
    assert told in caplog.text
    saved = tmp_path / "run/student"
    assert ends(saved) == (3, 3, 3)
    assert GenerationConfig.from_pretrained(saved).pad_token_id == 3
    assert AutoTokenizer.from_pretrained(saved).chat_template == models.CHAT_TEMPLATE


def test_several_end_tokens_stay(chat_cache: Path, tmp_path: Path):
    """If the tokenizer's is among them."""
    path = base_model(tmp_path / "base")
    both = GenerationConfig.from_pretrained(path)
    both.eos_token_id = [1, 3]
    both.save_pretrained(path)
    student, _ = load_student(StudentConfig(path=str(path)), CacheReader(chat_cache), 0)
    assert student.generation_config.eos_token_id == [1, 3] and student.config.eos_token_id == 3


def think(tokenizer: Any) -> None:
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.add_tokens(["<think>", "</think>"])


def test_a_student_of_more_tokens_learns_not_to_say_them(chat_cache: Path, tmp_path: Path):
    """The teacher gives the further ids nothing, and the student less and less; they stay."""
    path = base_model(tmp_path / "base", think)
    reader = CacheReader(chat_cache)
    student, tokenizer = load_student(StudentConfig(path=str(path)), reader, 0)
    size = student_vocab_size(student, tokenizer, reader, "bucket")
    assert size == models.VOCAB_SIZE + 3 < models.PADDED_VOCAB_SIZE
    assert student_vocab_size(student, tokenizer, reader, "uniform") == models.VOCAB_SIZE
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|end|>", "[PAD]")
    assert tokenizer.chat_template == models.CHAT_TEMPLATE

    batch = next(iter(CacheStream(chat_cache, batch_size=4)))
    for kind in ("fkl", "rkl", "akl"):
        distiller = Distiller(student, LossConfig(kind=kind), size)
        loss = distiller(batch).loss
        (gradient,) = torch.autograd.grad(loss, [student.lm_head.weight])
        assert torch.isfinite(loss) and gradient[models.VOCAB_SIZE : size].abs().sum() > 0
        assert gradient[size:].abs().sum() == 0  # padding of the output layer
        logits = student(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
        logits = logits.flatten(0, 1)[batch.predictors]
        unfused = sparse_divergence(logits, batch.targets, kind=kind, vocab_size=size)
        assert loss.item() == pytest.approx(unfused.mean().item(), rel=1e-5)

    run = trainings.config(
        chat_cache,
        tmp_path / "run",
        student=StudentConfig(path=str(path)),
        loss=LossConfig(kind="fkl"),
        steps=40,
        batch_size=4,
    )
    train(run)
    saved = tmp_path / "run/student"
    tokenizer = AutoTokenizer.from_pretrained(saved)
    assert len(tokenizer) == models.VOCAB_SIZE + 3 and tokenizer.convert_tokens_to_ids("<think>")
    assert ends(saved) == (3, 3, 3)
    before, after = (
        further_mass(AutoModelForCausalLM.from_pretrained(where), batch, size)
        for where in (path, saved)
    )
    assert after < before / 2
    verdict = evaluate_student(StudentConfig(path=str(saved)), str(chat_cache))
    assert math.isfinite(verdict.metrics["heldout_ce"])


def further_mass(student: Any, batch: Batch, size: int) -> float:
    """What a student gives the ids that the teacher has not, on the mean."""
    with torch.no_grad():
        logits = student(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    q = logits.flatten(0, 1)[batch.predictors, :size].softmax(1)
    return float(q[:, models.VOCAB_SIZE :].sum(1).mean())


def test_caches_of_one_vocabulary_are_mixed_and_compared(
    chat_cache: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    """Those of a base teacher and its instruction-tuned one: by the tokenizers that they keep."""
    caplog.set_level("INFO")
    base = cache_of(tmp_path, base_model(tmp_path / "teacher"))
    stream = MixtureStream([base, chat_cache], [1, 1], batch_size=2)
    assert next(iter(stream)).num_targets
    assert "differs in: eos_token '<|end|>' where the cache has '</s>'" in caplog.text
    with pytest.raises(ValueError, match="hold other data"):  # the end tokens of the texts
        diff(base, chat_cache)
    other = models.save_teacher(tmp_path / "other") and tmp_path / "other"
    models.build_tokenizer(280).save_pretrained(other)
    (tmp_path / "more").mkdir()
    apart = cache_of(tmp_path / "more", other)
    match = r"more.cache has another tokenizer .*ids differ, first \d+: '"
    with pytest.raises(ValueError, match=match):
        MixtureStream([base, apart], [1, 1], batch_size=2)
    with pytest.raises(ValueError, match=f"cannot be compared: .*{match}"):
        diff(base, apart)
