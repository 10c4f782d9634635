"""Models against a cache: as dense float64 references where all is known, bounds elsewhere."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen2Config

from decant.schemas import FormatError, Truncation
from decant.storage import CacheReader
from decant.student_train.config.verdict import ModelOptions
from decant.student_train.evaluation.gathered import binned, intervals
from decant.student_train.evaluation.model_text import number
from decant.student_train.versus import Part, measure_models
from decant.teacher_dump import DumpConfig, dump
from tests.support import models
from tests.support.commands import command
from tests.support.gguf_files import save_gguf

V = models.VOCAB_SIZE
KEPT = {
    "all": Truncation(k=V),
    "top": Truncation(k=8),
    "mixed": Truncation(method="topk+sample", k=6, draws=6),
    "drawn": Truncation(method="sample", draws=64),
    "label": Truncation(method="label"),
}


@pytest.fixture(scope="module")
def kept(dump_config: DumpConfig, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Caches of the same sequences and teacher, with different things kept. Never write to them."""
    folder = tmp_path_factory.mktemp("kept")
    for name, truncation in KEPT.items():
        scored = truncation.rule.has_logprobs
        config = dataclasses.replace(
            dump_config,
            output=str(folder / name),
            truncation=truncation,
            temperatures=[1.0],
            precision="f32" if scored else "compact",
            shard_targets=10_000,
        )
        dump(config)
    return {name: folder / name for name in KEPT}


@pytest.fixture(scope="module")
def student(teacher_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The teacher with its weights moved a little; never write to it."""
    path = tmp_path_factory.mktemp("student")
    models.save_teacher(path)
    model = AutoModelForCausalLM.from_pretrained(path)
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.02 * torch.randn_like(weight))
    model.save_pretrained(path)
    return path


def dense(model: torch.nn.Module, cache: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Log probs [N, V] in float64, labels [N], and which sequence each target is of [N]."""
    model = model.double().eval()
    logs, labels, owner = [], [], []
    for index, sequence in enumerate(CacheReader(cache)):
        with torch.no_grad():
            logits = model(torch.tensor(sequence.input_ids[None].astype(int))).logits[0, :, :V]
        logs.append(logits.log_softmax(1)[sequence.positions - 1].numpy())
        labels.append(sequence.labels)
        owner.append(np.full(sequence.num_targets, index))
    return np.concatenate(logs), np.concatenate(labels), np.concatenate(owner)


def load(path: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


@pytest.fixture(scope="module")
def truth(teacher_path: Path, student: Path, kept: dict[str, Path]) -> dict[str, float]:
    """What a dense float64 computation gives of the student against the teacher."""
    p, labels, _ = dense(load(teacher_path), kept["all"])
    q, _, _ = dense(load(student), kept["all"])
    each = np.arange(len(labels))
    chosen, first = q.argmax(1), p.argmax(1)
    gaps = {}
    for name, logs, top in (("model", q, chosen), ("teacher", p, first)):
        bins = binned(np.exp(logs.max(1)), (top == labels).astype(float))
        gaps[name] = np.abs(bins[:, 1] - bins[:, 2]).sum() / len(labels)
    return {
        "cross_entropy": -q[each, labels].mean(),
        "kl_forward": (np.exp(p) * (p - q)).sum(1).mean(),
        "kl_reverse": (np.exp(q) * (q - p)).sum(1).mean(),
        "top1_agreement": (chosen == first).mean(),
        "top1_accuracy": (chosen == labels).mean(),
        "acceptance": np.minimum(np.exp(p), np.exp(q)).sum(1).mean(),
        "teacher_cross_entropy": -p[each, labels].mean(),
        "calibration": gaps["model"],
        "teacher_calibration": gaps["teacher"],
    }


def test_where_every_id_is_kept_all_is_exact(
    student: Path, kept: dict[str, Path], truth: dict[str, float]
) -> None:
    """Every mean is the dense float64 one; no bound differs from the value."""
    report = measure_models([str(student)], str(kept["all"]), batch_size=7)
    (found,) = report.models
    assert report.exact and report.sequences == report.of_sequences
    for name in ("cross_entropy", "kl_forward", "kl_reverse", "top1_agreement", "top1_accuracy"):
        assert found.means[name] == pytest.approx(truth[name], rel=1e-4, abs=1e-6), name
    assert found.means["acceptance"] == pytest.approx(truth["acceptance"], rel=1e-5)
    assert found.means["acceptance_upper"] == pytest.approx(truth["acceptance"], rel=1e-5)
    assert found.means["kl_forward_upper"] == pytest.approx(truth["kl_forward"], rel=1e-4)
    assert found.perplexity == pytest.approx(np.exp(truth["cross_entropy"]), rel=1e-5)
    assert found.calibration_error == pytest.approx(truth["calibration"], abs=1e-5)
    assert report.teacher_calibration_error == pytest.approx(truth["teacher_calibration"], abs=1e-5)
    assert report.teacher_cross_entropy == pytest.approx(truth["teacher_cross_entropy"], rel=1e-5)


@pytest.mark.parametrize("name", ["top", "mixed"])
def test_where_ids_are_missing_the_truth_lies_within_the_bounds(
    name: str, student: Path, kept: dict[str, Path], truth: dict[str, float]
) -> None:
    """KL both ways from below, forward KL from above too, acceptance from both sides."""
    report = measure_models([str(student)], str(kept[name]))
    means = report.models[0].means
    known = {key: value for key, value in means.items() if value is not None}
    assert not report.exact and known["teacher_tail"] > 0.01
    assert 0 < known["kl_forward"] < truth["kl_forward"] < known["kl_forward_upper"]
    assert 0 < known["kl_reverse"] < truth["kl_reverse"]
    assert known["acceptance"] < truth["acceptance"] < known["acceptance_upper"]
    assert known["top1_agreement"] == pytest.approx(truth["top1_agreement"])
    assert known["cross_entropy"] == pytest.approx(truth["cross_entropy"], rel=1e-5)


def test_what_a_cache_does_not_keep_is_not_said(
    student: Path, kept: dict[str, Path], truth: dict[str, float]
) -> None:
    """Of draws an estimate of the forward KL; of labels alone no divergence."""
    drawn = measure_models([str(student)], str(kept["drawn"]))
    means = drawn.models[0].means
    assert drawn.estimated and means["kl_reverse"] is None and means["acceptance"] is None
    assert means["kl_forward"] == pytest.approx(truth["kl_forward"], abs=0.05)
    label = measure_models([str(student)], str(kept["label"]))
    means = label.models[0].means
    assert means["kl_forward"] is None and label.models[0].worst_targets[0].kl_forward is None
    assert means["cross_entropy"] == pytest.approx(truth["cross_entropy"], rel=1e-5)


def test_the_teacher_is_at_no_distance_from_itself(
    teacher_path: Path, kept: dict[str, Path]
) -> None:
    """KL is 0 both ways, acceptance and agreement are 1, in the chunked head's float32."""
    means = measure_models([str(teacher_path)], str(kept["top"])).models[0].means
    assert means["kl_forward"] == pytest.approx(0, abs=1e-5)
    assert means["kl_reverse"] == pytest.approx(0, abs=1e-5)
    assert means["acceptance_upper"] == pytest.approx(1, abs=1e-4)
    assert means["top1_agreement"] == 1


def test_worst_targets_are_the_worst(
    teacher_path: Path, student: Path, kept: dict[str, Path]
) -> None:
    """In order, where they are, with the actual token's probability and the model's entries."""
    p, labels, owner = dense(load(teacher_path), kept["all"])
    q, _, _ = dense(load(student), kept["all"])
    kl = (np.exp(p) * (p - q)).sum(1)
    report = measure_models([str(student)], str(kept["all"]), worst=5, batch_size=4)
    worst = report.models[0].worst_targets
    reader = CacheReader(kept["all"])
    assert len(worst) == 5
    for found, row in zip(worst, np.argsort(-kl)[:5], strict=True):
        assert found.kl_forward == pytest.approx(kl[row], rel=1e-3)
        at = found.target
        assert at.sequence == owner[row] and at.token_id == labels[row]
        assert reader[at.sequence].input_ids[at.position] == at.token_id
        assert found.model_probability == pytest.approx(np.exp(q[row, labels[row]]), rel=1e-3)
        order = np.argsort(-q[row])[:8]
        assert [e.token_id for e in found.model_entries] == order.tolist()
        assert all(e.text is not None for e in found.model_entries)


def test_two_models_side_by_side(teacher_path: Path, student: Path, kept: dict[str, Path]) -> None:
    """Differences are of paired targets: exactly those of the means, and 0 between equal models."""
    report = measure_models([str(teacher_path), str(student)], str(kept["top"]))
    a, b = report.models
    for key in ("cross_entropy", "kl_forward", "kl_reverse", "top1_agreement", "acceptance"):
        its = report.differences[key]
        assert its.mean == pytest.approx((b.means[key] or 0) - (a.means[key] or 0), abs=1e-9)
        assert its.interval is not None and its.interval[0] <= its.mean <= its.interval[1]
    assert report.differences["kl_forward"].interval[0] > 0  # type: ignore[index]
    same = measure_models([str(student)] * 2, str(kept["top"]), part=Part(limit=10))
    assert all(its.mean == 0 and its.interval == (0, 0) for its in same.differences.values())
    assert same.sequences == 10


def test_intervals_cover_the_mean_at_their_rate() -> None:
    """Over many draws of clustered values, 95% intervals hold the true mean about so often."""
    generator = np.random.default_rng(0)
    held = 0
    for seed in range(50):
        counts = generator.integers(1, 30, (60, 1)).astype(float)
        sums = counts * generator.normal(1.0, 1.0, (60, 1))
        ((low, high),) = filter(None, intervals(sums, counts, seed))
        held += low <= 1 <= high
    assert 43 <= held <= 50
    assert intervals(np.ones((1, 2)), np.ones((1, 2)), 0) == [None, None]


def test_parts_are_the_same_for_the_same_seed(student: Path, kept: dict[str, Path]) -> None:
    """A sample is chosen by its seed; the first ones are the first."""
    chosen = Part(sample=7, seed=3).choose(50)
    assert len(set(chosen)) == 7 and (chosen == Part(sample=7, seed=3).choose(50)).all()
    assert (chosen != Part(sample=7, seed=4).choose(50)).any()
    assert Part(limit=5).choose(3).tolist() == [0, 1, 2]
    report = measure_models([str(student)], str(kept["top"]), part=Part(sample=5, seed=1))
    assert report.sequences == 5 and report.of_sequences == len(CacheReader(kept["top"]))


@pytest.mark.parametrize("kind", ["F32", "Q8_0"])
def test_a_gguf_file_is_measured(kind: str, dump_config: DumpConfig, tmp_path: Path) -> None:
    """Against the cache of what it was made from: nothing is lost but what its form rounds."""
    pytest.importorskip("gguf")
    sizes = models.DECODER | {"intermediate_size": 64}
    torch.manual_seed(0)
    settings = Qwen2Config(**sizes, tie_word_embeddings=False)
    model = AutoModelForCausalLM.from_config(settings, dtype=torch.float32)
    model.save_pretrained(tmp_path / "teacher")
    tokenizer = models.build_tokenizer()
    tokenizer.save_pretrained(tmp_path / "teacher")
    save_gguf(tmp_path / "model.gguf", model, tokenizer, kind)
    teacher = dataclasses.replace(dump_config.teacher, path=str(tmp_path / "teacher"))
    source = dataclasses.replace(dump_config.source, limit=10)
    config = dataclasses.replace(
        dump_config, output=str(tmp_path / "cache"), teacher=teacher, source=source
    )
    dump(config)
    report = measure_models([str(tmp_path / "model.gguf")], str(tmp_path / "cache"))
    kl = report.models[0].means["kl_forward"]
    assert kl is not None and "GGUF" in report.models[0].form
    assert abs(kl) < 1e-5 if kind == "F32" else 1e-6 < kl < 0.05


def test_adapters_and_quantised_weights(
    teacher_path: Path, kept: dict[str, Path], tmp_path: Path
) -> None:
    """An adapter that changes nothing is the base; 4-bit weights are not."""
    adapted = peft.get_peft_model(load(teacher_path), peft.LoraConfig(target_modules=["q_proj"]))
    adapted.save_pretrained(tmp_path / "lora")
    cache = str(kept["top"])
    some = Part(limit=20)
    options = ModelOptions(base=str(teacher_path))
    report = measure_models([str(tmp_path / "lora")], cache, options, part=some)
    assert report.models[0].means["kl_forward"] == pytest.approx(0, abs=1e-5)
    options = ModelOptions(quantization="4bit", device="cpu")
    report = measure_models([str(teacher_path)], cache, options, part=some)
    (found,) = report.models
    assert found.means["kl_forward"] is not None and found.means["kl_forward"] > 1e-4
    assert "4bit" in found.form


def test_the_command(student: Path, teacher_path: Path, kept: dict[str, Path]) -> None:
    """Text, JSON and the page say the same of two models."""
    page = kept["top"].parent / "page.html"
    words = ("evaluate", "--cache", str(kept["top"]), "--limit", "20", "--worst", "3")
    words = (*words, "--model", str(teacher_path), "--model", str(student))
    done = command("decant", *words, "--json", "--html", str(page))
    assert done.code == 0, done.stderr
    found = json.loads(done.stdout)
    means = found["models"][1]["means"]
    text = command("decant", *words).stdout
    assert max(map(len, text.splitlines())) <= 140 and "Unknown: how the teacher spreads" in text
    (line,) = re.findall(r"^KL\(teacher \|\| model\).*$", text, re.MULTILINE)
    assert f">= {number(means['kl_forward'])} [" in line
    assert number(found["differences"]["kl_forward"]["mean"], "+") in line
    html = page.read_text()
    assert "<script" not in html and f"&gt;= {number(means['kl_forward'])}" in html


def test_what_cannot_be_measured_is_one_line(
    student: Path, other_teacher_path: Path, kept: dict[str, Path], tmp_path: Path
) -> None:
    """Exit code 2: no model, another tokenizer, options that have no effect."""
    cache = str(kept["top"])
    with pytest.raises(FormatError, match=r"evaluate --model .* --tokenizer-mismatch align`$"):
        measure_models([str(other_teacher_path)], cache)
    broken = load(student)
    with torch.no_grad():
        broken.get_output_embeddings().weight[7, 3] = torch.nan  # type: ignore[operator]
    shutil.copytree(student, tmp_path / "broken")
    broken.save_pretrained(tmp_path / "broken")  # type: ignore[operator]
    with pytest.raises(ValueError, match="the log prob nan"):
        measure_models([str(tmp_path / "broken")], cache)
    for more, said in (
        (["--model", str(tmp_path / "none")], "cannot be"),
        (["--model", str(tmp_path / "none.gguf")], "no such file"),
        (["--model", str(student), "--kind", "rkl"], "--kind has no effect with --model"),
        (["--student", str(student), "--limit", "3"], "--limit has no effect with --student"),
        (["--model", str(student), "--limit", "3", "--sample", "2"], "exclude each other"),
        ([], "give --student, or --model"),
        (["--model", str(student), "--base", "x"], "is no PEFT adapter"),
    ):
        done = command("decant", "evaluate", "--cache", cache, *more)
        assert done.code == 2 and said in done.stderr.splitlines()[0], done.stderr
