"""Figures on held-out targets against dense float64 references, and what is made of them."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from decant.schemas import Truncation
from decant.storage import CacheReader
from decant.student_train import CacheStream, Distiller, LossConfig
from decant.student_train.data.heldout import heldout_batches
from decant.student_train.evaluation.evaluate import evaluate
from decant.student_train.evaluation.heldout_sums import NUM_BINS, HeldoutSums, sums_of_chunks
from decant.student_train.evaluation.target_figures import target_figures
from decant.student_train.losses import SparseTargets
from tests.support import caches, models

LOSS = LossConfig(kind="rkl", kd_weight=0.7, ce_weight=0.3, temperature=2.0)


def reference(logits: np.ndarray, sequences: list[Any], vocab_size: int) -> dict[str, float]:
    """The figures from dense float64 student logits [N, V], one Python target at a time."""
    rows, n = [], 0
    for sequence in sequences:
        for t in range(sequence.num_targets):
            log_q = logits[n, :vocab_size] - np.logaddexp.reduce(logits[n, :vocab_size])
            hot = logits[n, :vocab_size] / 2 - np.logaddexp.reduce(logits[n, :vocab_size] / 2)
            n += 1
            kept = sequence.token_ids[t] >= 0
            ids, label = sequence.token_ids[t][kept], int(sequence.labels[t])
            others = np.setdiff1d(np.arange(vocab_size), ids)
            p, q = np.exp(sequence.logprobs[t][kept].astype(np.float64)), np.exp(log_q)
            log_p2 = sequence.logprobs[t][kept].astype(np.float64) / 2 - sequence.log_z[t, 1]
            log_p2 = np.append(log_p2, sequence.log_tail[t, 1])
            log_q2 = np.append(hot[ids], np.logaddexp.reduce(hot[others]))
            confidence, chosen = q.max(), int(q.argmax())
            lower = np.minimum(p, q[ids]).sum()
            rest = min(np.exp(np.float64(sequence.log_tail[t, 0])), q[others].sum())
            rows.append(
                {
                    "heldout_ce": -log_q[label],
                    "heldout_divergence": 4 * (np.exp(log_q2) * (log_q2 - log_p2)).sum(),
                    "teacher_ce": -sequence.label_logprob[t],
                    "top1_accuracy": chosen == label,
                    "top1_agreement": chosen == ids[0],
                    "acceptance_lower": lower,
                    "acceptance_upper": lower + rest,
                    "heldout_student_tail": np.exp(log_q2[-1]),
                    "heldout_teacher_tail": np.exp(log_p2[-1]),
                    "bin": min(int(np.ceil(confidence * NUM_BINS)) - 1, NUM_BINS - 1),
                    "confidence": confidence,
                }
            )
    means = {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}
    means["ece"] = sum(
        abs(sum(row["top1_accuracy"] - row["confidence"] for row in rows if row["bin"] == b))
        for b in range(NUM_BINS)
    ) / len(rows)
    means["heldout_perplexity"] = float(np.exp(means["heldout_ce"]))
    means["heldout_loss"] = 0.7 * means["heldout_divergence"] + 0.3 * means["heldout_ce"]
    return {name: value for name, value in means.items() if name not in ("bin", "confidence")}


def dense_logits(student: Any, batch: Any) -> np.ndarray:
    """[N, V] float64."""
    double = student.double().eval()
    with torch.no_grad():
        logits = double(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    student.float()
    return logits.flatten(0, 1)[batch.predictors].numpy()


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt2"])
@pytest.mark.parametrize("fused", [True, False])
def test_figures_are_those_of_dense_float64(cache: Path, architecture: str, fused: bool) -> None:
    """Every one of them, with the student's padding rows cut, by either route to the logits."""
    student = models.build_model(architecture, seed=5)
    model = Distiller(student, LOSS, models.VOCAB_SIZE)
    assert model.head is not None
    if not fused:
        model.head = None
    stream = CacheStream(cache, batch_size=7, temperature=2.0)
    found = evaluate(model, {"": stream}, Accelerator(cpu=True), LOSS.at(0, 1))
    logits = [dense_logits(student, batch) for batch, _ in heldout_batches(stream)]
    expected = reference(np.concatenate(logits), list(CacheReader(cache)), models.VOCAB_SIZE)
    assert found.keys() == expected.keys()
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert 0.01 < found["heldout_teacher_tail"] != found["heldout_student_tail"] > 0.01
    assert 0.01 < found["acceptance_lower"] < found["acceptance_upper"] < 1
    assert found["ece"] > 0.01 and found["top1_accuracy"] > 0


def test_figures_do_not_depend_on_the_chunks(cache: Path) -> None:
    """One target at a time or all at once."""
    batch = next(iter(CacheStream(cache, batch_size=5, temperature=2.0)))
    logits = 3 * torch.randn(
        batch.num_targets, models.VOCAB_SIZE + 9, generator=torch.Generator().manual_seed(0)
    )
    one, other = (
        sums_of_chunks(logits.__getitem__, batch, LOSS.at(0, 1), models.VOCAB_SIZE, rows)
        for rows in (1, None)
    )
    assert one.metrics() == pytest.approx(other.metrics(), rel=1e-6)
    assert (one + other).metrics() == pytest.approx(one.metrics(), rel=1e-6)


def test_the_bounds_of_the_acceptance_rate_meet_where_everything_is_kept(tmp_path: Path) -> None:
    """At k = V they are Σ min(p, q); at smaller k they enclose it."""
    generator = np.random.default_rng(0)
    full = caches.Settings(truncation=Truncation(k=50))
    written = [caches.random_sequence(generator, full, length=20) for _ in range(4)]
    sequences, dense = zip(*written, strict=True)
    caches.write_cache(tmp_path / "full", full, [list(sequences)])
    cut = caches.Settings(truncation=Truncation(k=5))
    shorter = [
        caches.scored_sequence(d, s.input_ids, s.is_target, cut)
        for s, d in zip(sequences, dense, strict=True)
    ]
    caches.write_cache(tmp_path / "cut", cut, [shorter])
    logits = 4 * torch.randn(76, 50, generator=torch.Generator().manual_seed(1))
    q = logits.double().softmax(-1).numpy()
    truth = np.minimum(np.exp(np.concatenate(dense)), q).sum(1).mean()
    figures = {}
    for name in ("full", "cut"):
        stream = CacheStream(tmp_path / name, batch_size=4)
        (batch, _), *_ = heldout_batches(stream)
        terms = LossConfig().at(0, 1)
        figures[name] = sums_of_chunks(logits.__getitem__, batch, terms, 50).metrics()
    assert figures["full"]["acceptance_lower"] == pytest.approx(truth, rel=1e-5)
    assert figures["full"]["acceptance_upper"] == pytest.approx(truth, rel=1e-5)
    lower, upper = (figures["cut"][f"acceptance_{end}"] for end in ("lower", "upper"))
    assert lower < truth < upper


def test_drawn_targets_have_no_top_token_of_the_teacher(tmp_path: Path) -> None:
    """With draws alone agreement and acceptance are left out; with an exact head they are there."""
    for name, truncation in {
        "drawn": Truncation(method="sample", draws=9, seed=1),
        "head": Truncation(method="topk+sample", k=3, draws=9, seed=1),
    }.items():
        form = caches.Settings(truncation=truncation, vocab_size=30)
        caches.write_cache(tmp_path / name, form, caches.random_shards(form, num_shards=1))
        batch = next(iter(CacheStream(tmp_path / name, batch_size=4)))
        logits = torch.zeros(batch.num_targets, 30).scatter(1, batch.labels[:, None], 9.0)
        values = sums_of_chunks(logits.__getitem__, batch, LossConfig().at(0, 1), 30).metrics()
        assert ("top1_agreement" in values) == (name == "head")
        assert ("acceptance_upper" in values) == (name == "head")
        assert values["top1_accuracy"] == 1


def test_labels_alone_tell_no_agreement(tmp_path: Path) -> None:
    """They know the teacher's top token only where it is the label: a share of those misleads."""
    size = models.VOCAB_SIZE
    label = Truncation(method="label")
    form = caches.Settings(truncation=label, vocab_size=size, temperatures=(1.0,))
    caches.write_cache(tmp_path / "labels", form, caches.random_shards(form, num_shards=1))
    loss = LossConfig()
    model = Distiller(models.build_model(seed=5), loss, size)
    stream = CacheStream(tmp_path / "labels", batch_size=4)
    found = evaluate(model, {"": stream}, Accelerator(cpu=True), loss.at(0, 1))
    assert "top1_accuracy" in found and "top1_agreement" not in found


def test_several_caches_are_told_apart_and_together(cache: Path) -> None:
    """Overall means weigh by targets; each cache's loss has its own weights."""
    student = models.build_model(seed=5)
    model = Distiller(student, LOSS, models.VOCAB_SIZE)
    parts = {
        part: CacheStream(cache, batch_size=8, temperature=2.0, part=part, heldout_fraction=0.3)
        for part in ("train", "heldout")
    }
    at_begin = LOSS.at(0, 1)
    terms = tuple(
        dataclasses.replace(at_begin, kd_weight=kd, ce_weight=1 - kd) for kd in (1.0, 0.0)
    )
    found = evaluate(model, parts, Accelerator(cpu=True), terms)
    whole = evaluate(
        model,
        {"": CacheStream(cache, batch_size=8, temperature=2.0)},
        Accelerator(cpu=True),
        LOSS.at(0, 1),
    )
    for name in ("heldout_ce", "ece", "acceptance_upper"):
        assert found[name] == pytest.approx(whole[name], rel=1e-4)
    assert found["heldout_loss/train"] == found["heldout_divergence/train"]
    assert found["heldout_loss/heldout"] == found["heldout_ce/heldout"]


@pytest.mark.parametrize("name", ["kl_forward", "kl_reverse"])
def test_what_f16_rounds_off_a_mass_is_no_divergence(name: str, tmp_path: Path) -> None:
    """Of the teacher itself against its cache: both KLs are its decoding error, and not below 0."""
    form = caches.Settings(truncation=Truncation(k=32), vocab_size=400, precision="f16")
    sequence, dense = caches.random_sequence(np.random.default_rng(0), form, length=60)
    caches.write_cache(tmp_path / "cache", form, [[sequence]])
    batch = next(iter(CacheStream(tmp_path / "cache", batch_size=1)))
    targets = batch.targets_at(1.0)
    assert isinstance(targets, SparseTargets)
    missing = 1 - targets.kept_mass() - targets.log_tail.exp()
    assert missing.abs().mean() > 1e-5
    logits = torch.from_numpy(dense).float()
    found = target_figures(logits, batch.labels, targets)[name]
    assert found.min() > -1e-6 and found.mean() < 2e-6


def test_no_targets_are_no_error() -> None:
    """A part whose sequences were all rejected has figures of 0, not NaN."""
    assert json.loads(json.dumps(HeldoutSums.zero().metrics()))["heldout_ce"] == 0
