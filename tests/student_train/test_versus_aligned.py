"""Models of another tokenizer against a cache: what has a meaning is measured, the rest is not."""

import json
from pathlib import Path

import pytest
import tokenizers
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from decant.storage import CacheReader
from decant.student_train import StudentConfig
from decant.student_train.command import run_evaluate
from decant.student_train.config.verdict import EvaluateArguments
from decant.student_train.verdict import evaluate_student
from decant.student_train.versus import Part, measure_models
from tests.support.commands import command

ALIGN = ("--tokenizer-mismatch", "align")


def options(model: Path, cache: Path) -> EvaluateArguments:
    return EvaluateArguments(model=(str(model),), cache=str(cache), tokenizer_mismatch="align")


@pytest.fixture(scope="module")
def renumbered(teacher_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The teacher with its ordinary tokens under other ids: the same words, another tokenizer."""
    path = tmp_path_factory.mktemp("renumbered")
    theirs = AutoTokenizer.from_pretrained(teacher_path)
    fields = json.loads(theirs.backend_tokenizer.to_str())
    vocab = fields["model"]["vocab"]
    ordinary = sorted(vocab.values())[4:]
    new = dict(zip(ordinary, reversed(ordinary), strict=True))
    fields["model"]["vocab"] = {token: new.get(i, i) for token, i in vocab.items()}
    backend = tokenizers.Tokenizer.from_str(json.dumps(fields))
    names = {n: theirs.special_tokens_map[n] for n in ("bos_token", "eos_token", "pad_token")}
    PreTrainedTokenizerFast(tokenizer_object=backend, **names).save_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(teacher_path, dtype=torch.float32)
    with torch.no_grad():
        for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
            layer.weight[list(new.values())] = layer.weight[list(new)].clone()
    model.save_pretrained(path)
    return path


def test_the_teacher_under_other_ids_is_at_no_distance(
    teacher_path: Path, renumbered: Path, cache: Path
) -> None:
    """All chunks are 1:1, agreement is 1, KL 0; the difference is of figures per byte alone."""
    paths = [str(teacher_path), str(renumbered)]
    report = measure_models(paths, str(cache), options(renumbered, cache))
    plain, other = report.models
    assert plain.aligned is None and other.aligned is not None
    assert other.aligned.one_to_one == other.aligned.chunks == other.aligned.tokens
    assert report.targets == CacheReader(cache).manifest.num_targets == other.aligned.tokens
    for key in ("cross_entropy", "bits_per_byte", "top1_accuracy"):
        assert other.means[key] == pytest.approx(plain.means[key], rel=1e-5), key
    assert other.means["kl_forward"] == pytest.approx(0, abs=1e-5)
    assert other.means["kl_reverse"] == pytest.approx(0, abs=1e-5)
    assert other.means["top1_agreement"] == 1
    assert other.means["acceptance"] is None and other.worst_targets == ()
    assert report.differences.keys() == {"bits_per_byte", "kl_forward_per_byte"}
    assert report.differences["bits_per_byte"].mean == pytest.approx(0, abs=1e-5)
    assert report.exact is False and report.estimated is False


def test_figures_are_those_of_a_training_s_evaluation(
    other_teacher_path: Path, cache: Path
) -> None:
    """The same means of tokens and of bytes; the teacher's own are of all of its targets."""
    report = measure_models(
        [str(other_teacher_path)], str(cache), options(other_teacher_path, cache), batch_size=5
    )
    (found,) = report.models
    student = StudentConfig(path=str(other_teacher_path))
    metrics = evaluate_student(student, str(cache), tokenizer_mismatch="align").metrics
    for key, name in (
        ("cross_entropy", "heldout_ce"),
        ("bits_per_byte", "heldout_bits_per_byte"),
        ("kl_forward_per_byte", "heldout_divergence_per_byte"),
        ("top1_accuracy", "top1_accuracy"),
    ):
        assert found.means[key] == pytest.approx(metrics[name], rel=1e-5), key
        low, high = found.intervals[key] or (0, 0)
        assert low < metrics[name] < high
    assert found.calibration_error == pytest.approx(metrics["ece"], abs=1e-6)
    its = found.aligned
    assert its is not None and its.one_to_many + its.many_to_many > 0
    kinds = (its.one_to_one, its.one_to_many, its.many_to_one, its.many_to_many)
    assert sum(kinds) == its.chunks and its.left_out == 0
    teacher = [s.label_logprob for s in CacheReader(cache)]
    total = -sum(float(values.sum()) for values in teacher)
    assert report.teacher_cross_entropy == pytest.approx(total / report.targets, rel=1e-5)
    some = options(other_teacher_path, cache)
    part = measure_models([str(other_teacher_path)], str(cache), some, part=Part(limit=7))
    assert part.sequences == 7 and part.models[0].aligned.chunks < its.chunks  # type: ignore[union-attr]


def test_the_command_says_what_its_figures_are_of(
    other_teacher_path: Path,
    teacher_path: Path,
    cache: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Text and page with both tokenizers side by side; what has no meaning is a dash."""
    page = tmp_path / "page.html"
    arguments = EvaluateArguments(
        model=(str(other_teacher_path), str(teacher_path)),
        cache=str(cache),
        tokenizer_mismatch="align",
        limit=9,
        html=str(page),
    )
    assert run_evaluate(arguments) == 0
    said = capsys.readouterr().out
    assert "A is of another tokenizer, aligned in" in said and "1:N" in said
    rows = {line[:24].strip(): line[24:].split() for line in said.splitlines()}
    assert rows["acceptance"][0] == "-" and rows["and at most"][0] == "-"
    assert len(rows["bits per byte"]) == 3 * 3 and "of another tokenizer" in page.read_text()


def test_what_cannot_be_aligned_is_one_line(
    other_teacher_path: Path, cache: Path, tmp_path: Path
) -> None:
    """With the way out: not asked for, a tokenizer larger than the model, the risks of samples."""
    other, way = str(other_teacher_path), "--tokenizer-mismatch align"
    words = ("--model", other, "--cache", str(cache))
    samples = ("--samples", str(cache))
    large = tmp_path / "large"
    model = AutoModelForCausalLM.from_pretrained(other_teacher_path)
    model.resize_token_embeddings(100)
    model.save_pretrained(large)
    for more, said in (
        (words, f"`decant evaluate --model {other} --cache {cache} {way}`"),
        ((*samples, *words), f"`decant evaluate --model {other} --cache {cache} {way}`"),
        (
            (*samples, *words, *ALIGN),
            "--tokenizer-mismatch has no effect with --samples, whose risks are of the teacher's",
        ),
        (
            ("--model", str(large), "--tokenizer", other, *words[2:], *ALIGN),
            "says 100 ids, but its tokenizer has 280",
        ),
    ):
        done = command("decant", "evaluate", *more)
        (line,) = (line for line in done.stderr.splitlines() if line.startswith("error: "))
        assert done.code == 2 and said in line, done.stderr
