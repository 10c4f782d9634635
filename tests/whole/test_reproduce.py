"""The experiments of examples/reproduce: the figures of docs/reproduction.md, in seconds."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch

from decant.student_train.losses import EventTargets, sparse_divergence
from examples.reproduce import (
    akl_toy,
    calibration_toy,
    common,
    convergence,
    gaussians,
    gold,
    selection,
    softmax_layer,
    study,
)


def test_dense_targets_give_the_full_divergences():
    """A dense teacher as sparse targets gives Σ p log(p/q) and Σ q log(q/p), nothing else."""
    generator = torch.Generator().manual_seed(0)
    logits, other = torch.randn(2, 5, 40, generator=generator, dtype=torch.float64)
    log_p, log_q = other.log_softmax(1), logits.log_softmax(1)
    targets = common.dense_targets(log_p)
    for kind, expected in (
        ("fkl", (log_p.exp() * (log_p - log_q)).sum(1)),
        ("rkl", (log_q.exp() * (log_q - log_p)).sum(1)),
    ):
        torch.testing.assert_close(sparse_divergence(logits, targets, kind=kind), expected)


@pytest.mark.parametrize("vocab", [5, 12])
def test_golds_rule_chunk_by_chunk(vocab: int):
    """The sums over whole sorted vocabularies, the shorter one filled up with zeros."""
    generator = torch.Generator().manual_seed(vocab)
    logits = torch.randn(3, vocab, generator=generator, dtype=torch.float64)
    p = torch.randn(2, 7, generator=generator, dtype=torch.float64).softmax(1)
    ids = torch.tensor([[2, -1, 0, -1, -1, 3, -1]] * 2)
    labels = torch.tensor([1, 3, 0])
    targets = EventTargets(
        token_ids=ids,
        log_p=p.log(),
        log_rest=torch.full((2,), -math.inf),
        labels=labels,
        sizes=torch.tensor([2, 1]),
    )
    is_matched = torch.zeros(vocab, dtype=torch.bool)
    is_matched[[0, 2, 3]] = True
    q = logits.softmax(1)
    of_chunks = torch.stack([q[0] * q[1, 3], q[2]])  # the first token's, times the further one's
    expected = []
    for ours, theirs in zip(of_chunks, p, strict=True):
        matched = sum(
            theirs[slot] * (theirs[slot] / ours[ids[0, slot]]).log() for slot in (0, 2, 5)
        )
        padded = [torch.zeros(12, dtype=torch.float64) for _ in range(2)]
        padded[0][: vocab - 3] = ours[~is_matched].sort(descending=True).values
        padded[1][:4] = theirs[ids[0] < 0].sort(descending=True).values
        expected.append(0.3 * matched + 0.7 * (padded[0] - padded[1]).abs().sum())
    found = gold.gold_loss(logits, targets, is_matched, (0.3, 0.7))
    torch.testing.assert_close(found, torch.stack(expected))


def test_calibration_of_an_overconfident_student():
    """Confidence 0.9 and right half the time: an ECE of 0.4, in one bin."""
    log_q = torch.tensor([[0.9, 0.1]]).log().expand(10, 2)
    result = common.calibration(log_q, torch.arange(10) % 2)
    assert result == pytest.approx({"confidence": 0.9, "accuracy": 0.5, "ece": 0.4}, abs=1e-6)


@pytest.fixture(scope="module")
def toy() -> dict[str, akl_toy.Fit]:
    return {kind: akl_toy.fit(kind) for kind in common.COLORS}


def test_akl_toy_ends_where_the_authors_end(toy: dict[str, akl_toy.Fit]):
    """After 800 steps the loss is 1.149e-6 for FKL and 5.116e-6 for RKL, and all have converged."""
    assert toy["fkl"].losses[-1] == pytest.approx(1.149e-6, rel=1e-2)
    assert toy["rkl"].losses[-1] == pytest.approx(5.116e-6, rel=1e-2)
    assert max(fit.gaps["head"][-1] + fit.gaps["tail"][-1] for fit in toy.values()) < 0.02


def test_akl_toy_head_and_tail(toy: dict[str, akl_toy.Fit]):
    """FKL leads in head and tail up to step 10, RKL in the far tail; at 20, AKL in both."""
    at_1, at_5, at_10, at_20, _ = (
        {kind: {part: gap[e] for part, gap in fit.gaps.items()} for kind, fit in toy.items()}
        for e in akl_toy.MEASURED
    )
    for early in (at_1, at_5, at_10):
        assert early["fkl"]["head"] < early["rkl"]["head"]
        assert early["fkl"]["tail"] < early["rkl"]["tail"]
        assert early["rkl"]["far tail"] < early["fkl"]["far tail"]
    for part in ("head", "tail"):
        assert at_20["akl"][part] < min(at_20["fkl"][part], at_20["rkl"][part])


@pytest.mark.parametrize("name", akl_toy.TEACHERS)
def test_a_free_softmax_seeks_neither_mean_nor_mode(name: str):
    """200 steps bring every loss within 0.0006 of each of the authors' teachers."""
    for kind in common.COLORS:
        distances = akl_toy.total_variations(kind, name)
        assert distances[1] > 0.1
        assert distances[akl_toy.FREE_STEPS] <= 6e-4


def test_one_gaussian_seeks_the_mean_or_a_mode():
    """FKL fits the mixture's moments, RKL one mode at the price of ln 2."""
    forward = gaussians.fit("fkl", [(-1.0, 1.0)], steps=400)
    reverse = gaussians.fit("rkl", [(-1.0, 1.0)], steps=400)
    assert forward.means + forward.widths == pytest.approx([0.0, 3.105], abs=0.01)
    assert reverse.means + reverse.widths == pytest.approx([-3.0, 0.80], abs=0.01)
    assert reverse.losses[-1] == pytest.approx(math.log(2), abs=1e-3)


@pytest.mark.parametrize(("init", "first", "second"), [(0, "rkl", "fkl"), (1, "fkl", "rkl")])
def test_two_gaussians_converge_in_an_order_of_the_start(init: int, first: str, second: str):
    """Two on two: both reach the mixture; who is first depends on where they start."""
    start = list(gaussians.INITS.values())[init]
    earlier = gaussians.fit(first, start, steps=300)
    later = gaussians.fit(second, start, steps=620)
    assert earlier.steps is not None
    assert later.steps is not None
    assert earlier.steps < later.steps


@pytest.mark.parametrize("rank", [2, 64])
def test_the_start_decides_who_is_first_in_a_softmax_layer(rank: int):
    """By gradient descent RKL leads from a flat student, FKL from a sharp one, AKL between."""
    ends = {
        init: {
            kind: (fit.probs[-1], fit.weights[-1])
            for kind in common.COLORS
            for fit in [softmax_layer.fit(kind, rank, init, steps=160)]
        }
        for init in softmax_layer.INITS
    }
    for metric in (0, 1):
        flat, sharp = (
            {k: v[metric] for k, v in ends[init].items()} for init in softmax_layer.INITS
        )
        assert flat["rkl"] <= flat["akl"] <= flat["fkl"]
        assert sharp["fkl"] < sharp["akl"] < sharp["rkl"]


def test_rkl_begins_faster_with_the_blogs_teacher():
    """After 400 steps of Adam RKL is ahead at rank 2, in probabilities and weights."""
    forward, reverse = (softmax_layer.blog_fits(kind, 400, ranks=(2,)) for kind in ("fkl", "rkl"))
    for combination, fit in forward.items():
        theirs = reverse[combination].at(400)
        assert all(ours > other for ours, other in zip(fit.at(400), theirs, strict=True))


def test_a_student_that_can_be_the_teacher_comes_near_it():
    """5 epochs bring each loss more than half the way, while narrow students grow apart."""
    wide, narrow = (
        {kind: convergence.fit(kind, width, epochs=5) for kind in ("fkl", "rkl")}
        for width in convergence.WIDTHS.values()
    )
    assert max(fit.distances[4] for fit in wide.values()) < 0.5 * wide["fkl"].distances[0]
    apart = {
        epoch: convergence.total_variation(narrow["fkl"].q[epoch], narrow["rkl"].q[epoch])
        for epoch in (1, 5)
    }
    assert apart[5] > 2 * apart[1]
    assert min(fit.distances[4] for fit in narrow.values()) > 0.5


def test_akl_is_ahead_at_few_epochs_with_one_rate_for_all_only():
    """At 0.01 AKL leads after 5 epochs; at rates of their own FKL is level or ahead."""
    width, seed = convergence.TEACHER_WIDTH, convergence.SEED_OF_RATES
    shared = {kind: convergence.fit(kind, width, epochs=5).distances[-1] for kind in common.COLORS}
    assert shared["akl"] < shared["rkl"] < shared["fkl"]
    best = {
        kind: min(
            convergence.fit(kind, width, seed, 5, rate, decay=5).distances[-1]
            for rate in (0.02, 0.04, 0.08)
        )
        for kind in common.COLORS
    }
    assert best["fkl"] < 0.9 * shared["akl"]
    assert best["fkl"] < best["akl"] * 1.01 < best["rkl"] * 1.01


def test_renormalised_top_k_miscalibrates_and_the_rest_does_not():
    """Confidence .57 at accuracy .30; with the bucket, draws, or both the ECE is at most .01."""
    worst = calibration_toy.evaluate(calibration_toy.fit("topk", "teacher_renormalize", steps=600))
    assert worst["confidence"] == pytest.approx(0.568, abs=0.03)
    assert worst["accuracy"] == pytest.approx(0.30, abs=0.02)
    for method in ("topk", "sample", "topk+sample"):
        result = calibration_toy.evaluate(calibration_toy.fit(method, "bucket", steps=250))
        assert result["ece"] <= 0.01, method


def test_sampled_targets_are_unbiased():
    """The weights of a head and draws average to p."""
    _, _, log_p = calibration_toy.inputs(2, torch.Generator().manual_seed(5))
    many = log_p[:1].expand(4000, -1)
    targets = calibration_toy.sampled_targets(many, 4, 20, torch.Generator().manual_seed(6))
    weights = targets.validate(log_p.shape[1]).draw_weights(torch.float32)
    ids = targets.filled_ids()
    mean = torch.zeros(log_p.shape[1]).index_add(0, ids.flatten(), weights.flatten()) / len(many)
    torch.testing.assert_close(mean, log_p[0].exp(), atol=4e-3, rtol=0)


@pytest.mark.parametrize("module", [akl_toy, gaussians, softmax_layer])
def test_scripts_print_a_table_and_write_a_plot(
    module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """Each script runs with --fast and leaves a plot of its name."""
    monkeypatch.setattr(sys, "argv", ["x", "--fast", "--out", str(tmp_path)])
    module.main()
    name = module.__name__.rpartition(".")[2]
    assert (tmp_path / f"{name}.png").stat().st_size > 5_000
    assert "| FKL" in capsys.readouterr().out


def test_study_reports_from_its_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """Finished runs are skipped on a rerun; table and plot come from runs.jsonl alone."""
    lines = [
        {"cache": run.cache, "kind": run.kind, "tail": run.tail, "seed": run.seed}
        | {"ce": 4.0 + run.seed, "ece": 0.1, "confidence": 0.4, "accuracy": 0.3, "agreement": 0.5}
        for run in study.runs(3)
    ]
    (tmp_path / "runs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    monkeypatch.setattr(study, "prepare", lambda work, fast: None)
    monkeypatch.setattr(study, "measure", None)
    monkeypatch.setattr(
        sys, "argv", ["study", "--work", str(tmp_path), "--out", str(tmp_path / "plots")]
    )
    study.main()
    assert "5.000 ± 1.000" in capsys.readouterr().out
    assert (tmp_path / "plots" / "study.png").stat().st_size > 10_000


def test_the_selection_of_targets_reports_from_its_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """Finished runs are skipped on a rerun; ratios are to the run on all targets."""
    figures = {"ce": 4.0, "ece": 0.1, "agreement": 0.5}
    lines = [
        {"name": name, "cache_bytes": 1000 // (1 + i), "step_s": 0.4 / (1 + i), **figures}
        for i, name in enumerate(selection.RUNS)
    ]
    (tmp_path / "study").mkdir()
    (tmp_path / "study/selection.jsonl").write_text("".join(f"{json.dumps(x)}\n" for x in lines))
    monkeypatch.setattr(selection, "prepare", lambda work, fast: None)
    monkeypatch.setattr(selection, "measure", None)
    monkeypatch.setattr(sys, "argv", ["selection", "--out", str(tmp_path)])
    selection.main()
    assert (
        "| student's entropy              | 333 (0.33)   | 0.133 (0.33) " in capsys.readouterr().out
    )
