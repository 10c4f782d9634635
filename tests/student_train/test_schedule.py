"""Schedules of the loss: their values, what they may hold, and a loss of several temperatures."""

import dataclasses
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from decant.student_train import (
    CacheStream,
    Distiller,
    LossConfig,
    OptimizerConfig,
    Schedule,
    train,
)
from decant.student_train.config.mixture import CacheShare, own_losses
from decant.student_train.losses import fused_linear_divergence, sparse_divergence
from tests.support import models
from tests.support.trainings import config


def test_values_between_places() -> None:
    """Linear, cosine and step, before the first place and behind the last, in both units."""
    knots = {"values": [1.0, 3.0, 2.0], "at": [0.25, 0.5, 1.0]}
    linear = Schedule(**knots)
    # 101 steps: step 25 is a quarter of the run, step 100 is its last.
    assert [linear.value(s, 101) for s in (0, 25, 40, 50, 75, 100)] == pytest.approx(
        [1.0, 1.0, 2.2, 3.0, 2.5, 2.0]
    )
    cosine = Schedule(**knots, shape="cosine")
    assert cosine.value(40, 101) == pytest.approx(1 + 2 * (1 - math.cos(0.6 * math.pi)) / 2)
    step = Schedule(**knots, shape="step")
    assert [step.value(s, 101) for s in (0, 49, 50, 99, 100)] == [1.0, 1.0, 3.0, 3.0, 2.0]
    counted = Schedule(values=[0.0, 1.0], at=[10, 20], unit="steps")
    assert [counted.value(s, 5) for s in (0, 10, 15, 20, 99)] == [0.0, 0.0, 0.5, 1.0, 1.0]


@given(
    values=st.lists(st.floats(-5, 5), min_size=2, max_size=5),
    shape=st.sampled_from(["linear", "cosine", "step"]),
    step=st.integers(0, 300),
    seed=st.integers(0, 9),
)
def test_a_value_lies_between_its_neighbours(
    values: list[float], shape: str, step: int, seed: int
) -> None:
    """Whatever the places; so checking the places checks everything between them."""
    generator = torch.Generator().manual_seed(seed)
    at = (torch.rand(len(values), generator=generator) + 0.1).cumsum(0)
    schedule = Schedule(values=values, at=(at / at[-1]).tolist(), shape=shape)
    found = schedule.value(step, 301)
    assert min(values) - 1e-9 <= found <= max(values) + 1e-9


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"values": [1.0], "at": [0.0]}, "two or more"),
        ({"values": [1.0, 2.0], "at": [0.0]}, "as many places"),
        ({"values": [1.0, 2.0], "at": [0.5, 0.5]}, "must ascend"),
        ({"values": [1.0, 2.0], "at": [0.0, 100]}, "unit: steps"),
        ({"values": [1.0, math.nan], "at": [0.0, 1.0]}, "finite"),
        ({"values": [1.0, 2.0], "at": [0.0, 1.0], "shape": "exp"}, "not one of"),
        ({"values": [1.0, 2.0], "at": [0.0, 1.0], "unit": "epochs"}, "not one of"),
    ],
)
def test_schedules_that_say_nothing_are_refused(options: dict, message: str) -> None:
    """The message says what is wrong."""
    with pytest.raises(ValueError, match=message):
        Schedule(**options)


def test_losses_that_cannot_be_scheduled_are_refused() -> None:
    """A temperature between stored ones, weights below 0, options beyond their range."""
    down = {"values": [2.0, 1.0], "at": [0.0, 1.0]}
    with pytest.raises(ValueError, match="shape step"):
        LossConfig(temperature=Schedule(**down))
    with pytest.raises(ValueError, match="must be >= 0"):
        LossConfig(kd_weight=Schedule(values=[1.0, -0.1], at=[0.0, 1.0]))
    with pytest.raises(ValueError, match="mu must lie between 0 and 1"):
        LossConfig(kind="akl", options={"mu": {"values": [0.5, 1.5], "at": [0, 1]}})
    with pytest.raises(ValueError, match=r"loss.options.mu.*unexpected keyword"):
        LossConfig(kind="akl", options={"mu": {"values": [0.5, 0.6], "places": [0, 1]}})
    with pytest.raises(ValueError, match="branches of its own"):
        LossConfig(kind="alpha_beta", options={"alpha": {"values": [-1, 1], "at": [0, 1]}})


def test_weights_of_single_targets_weigh_value_and_gradient() -> None:
    """One weight per target equals the sum of single targets, for every tail, fused."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(6, 8, generator=generator, dtype=torch.float64).requires_grad_()
    head = torch.randn(20, 8, generator=generator, dtype=torch.float64).requires_grad_()
    from tests.support import dense_reference as reference

    teacher = 2 * torch.randn(6, 20, generator=generator, dtype=torch.float64)
    targets = reference.targets_of(teacher, reference.top_kept(teacher, [4] * 6))
    labels = torch.arange(6)
    kd, ce = (torch.rand(6, generator=generator, dtype=torch.float64) for _ in range(2))
    for tail in ("bucket", "uniform"):
        options = {"kind": "rkl", "tail": tail, "num_targets": 9, "chunk_size": 4}
        out = fused_linear_divergence(
            hidden, head, targets, labels, kd_weight=kd, ce_weight=ce, **options
        )
        found = torch.autograd.grad(out.loss, (hidden, head))
        logits = hidden @ head.T
        kd_N = sparse_divergence(logits, targets, kind="rkl", tail=tail)
        ce_N = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
        loss = (kd * kd_N + ce * ce_N).sum() / 9
        torch.testing.assert_close(out.loss, loss)
        torch.testing.assert_close(out.kd, kd_N.detach().sum() / 9)
        for ours, theirs in zip(found, torch.autograd.grad(loss, (hidden, head)), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-9)


def test_a_scheduled_run_takes_each_step_with_its_own_numbers(cache: Path, tmp_path: Path) -> None:
    """The first losses are those of the constants that hold there, also of the temperature.

    And a run that is cut in two goes on with the schedule where it was.
    """
    scheduled = LossConfig(
        kind="akl",
        kd_weight=Schedule(values=[1.0, 0.2], at=[0.0, 1.0], shape="cosine"),
        ce_weight=Schedule(values=[0.0, 0.8], at=[2, 4], unit="steps"),
        temperature=Schedule(values=[2.0, 1.0], at=[0.0, 0.5], shape="step"),
        options={"mu": {"values": [0.3, 0.7], "at": [0.0, 1.0]}},
    )
    run = config(cache, tmp_path / "run", loss=scheduled, steps=7)
    train(run)
    lines = [json.loads(x) for x in (tmp_path / "run/metrics.jsonl").open()]
    assert [line["temperature"] for line in lines] == [2, 2, 2, 1, 1, 1, 1]
    assert [line["ce_weight"] for line in lines] == pytest.approx([0, 0, 0, 0.4, 0.8, 0.8, 0.8])
    assert lines[-1]["kd_weight"] == pytest.approx(0.2)
    assert lines[3]["mu"] == pytest.approx(0.5)
    for line in lines:
        expected = line["kd_weight"] * line["kd"] + line["ce_weight"] * line["ce"]
        assert line["loss"] == pytest.approx(expected, rel=1e-5)
        assert 0 < line["student_tail"] < 1 and 0 <= line["below_mu"] <= 1
    tails = [line["teacher_tail"] for line in lines]
    assert min(tails[:3]) > max(tails[3:]) > 0  # each at the temperature of its step
    first = LossConfig(kind="akl", temperature=2.0, options={"mu": 0.3})
    once = config(cache, tmp_path / "first", loss=first, optimizer=OptimizerConfig(), steps=1)
    train(once)
    (line,) = [json.loads(x) for x in (tmp_path / "first/metrics.jsonl").open()]
    assert (line["kd"], line["ce"]) == (lines[0]["kd"], lines[0]["ce"])

    saving = dataclasses.replace(run, output=str(tmp_path / "cut"), save_every_steps=4)
    train(saving)
    for name in ("summary.json", "metrics.jsonl"):
        (tmp_path / "cut" / name).unlink()
    shutil.rmtree(tmp_path / "cut/checkpoints/step-00000007")
    train(saving)
    again = [json.loads(x) for x in (tmp_path / "cut/metrics.jsonl").open()]
    assert [x["loss"] for x in again] == [x["loss"] for x in lines[4:]]


def test_both_routes_to_the_logits_weigh_the_caches_of_a_mixture_alike(cache: Path) -> None:
    """The weights of a batch's sources, fused and on the model's own logits."""
    batch = next(iter(CacheStream(cache, batch_size=4)))
    batch = dataclasses.replace(batch, source=torch.arange(batch.num_targets) % 2)
    loss = LossConfig(kind="fkl")
    first, second = own_losses(
        loss,
        [
            CacheShare(cache="a", weight=1, kd_weight=0.5),
            CacheShare(cache="b", weight=1, ce_weight=2.0),
        ],
    )
    terms = (first.at(0, 1), second.at(0, 1))
    assert [(one.kd_weight, one.ce_weight) for one in terms] == [(0.5, 0.0), (1.0, 2.0)]
    found = []
    for fused in (True, False):
        model = Distiller(models.build_model(), loss, models.VOCAB_SIZE)
        if not fused:
            model.head = None
        found.append(model(batch, None, terms).loss.item())
    assert found[0] == pytest.approx(found[1], rel=1e-5)
