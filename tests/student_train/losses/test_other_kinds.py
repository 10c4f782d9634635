"""What the kinds beyond f-divergences and the tail that goes to the label are for, and refuse."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from decant.student_train import LossConfig
from decant.student_train.losses import (
    SparseTargets,
    fused_linear_divergence,
    sparse_divergence,
)
from tests.support import dense_reference as reference
from tests.support.dense_reference import random_logits, value_and_gradient

LABELLED: list[tuple[str, dict[str, Any]]] = [
    ("fkl", {}),
    ("jsd", {"beta": 0.3}),
    ("tvd", {}),
    ("skew_fkl", {}),
    ("skew_rkl", {"lam": 0.4}),
]


def example() -> tuple[Tensor, Tensor, list[list[int]], list[int]]:
    """Teacher, student, kept ids, and labels of which some are kept and some are not."""
    teacher, student = random_logits(40, 6, 13), random_logits(41, 6, 13)
    kept = reference.top_kept(teacher, [4, 1, 3, 13, 2, 3])
    labels = [kept[0][1], int(teacher[1].argmin()), int(teacher[2].argmin()), 5, kept[4][0], 7]
    return teacher, student, kept, labels


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize(("kind", "options"), LABELLED)
def test_the_tail_on_the_label_is_the_dense_reference(
    kind: str, options: dict[str, Any], temperature: float
) -> None:
    """Value and gradient, whether the label is among the kept ids, alone, or there is no tail."""
    teacher, student, kept, labels = example()
    targets = reference.targets_of(teacher, kept, temperature, num_slots=14)
    arguments: dict[str, Any] = {"temperature": temperature, "tail": "label", **options}
    ours, theirs = student.float().requires_grad_(), student.clone().requires_grad_()
    loss, gradient = value_and_gradient(
        sparse_divergence(ours, targets, kind, labels=labels, **arguments), ours
    )
    truth, true_gradient = value_and_gradient(
        reference.reference_divergence(theirs, teacher, kept, kind, labels=labels, **arguments),
        theirs,
    )
    torch.testing.assert_close(loss, truth, rtol=2e-5, atol=1e-5)
    torch.testing.assert_close(gradient, true_gradient, rtol=2e-5, atol=1e-5)


@pytest.mark.parametrize(("kind", "options"), LABELLED)
def test_the_fused_head_gives_the_label_the_tail_too(kind: str, options: dict[str, Any]) -> None:
    """Loss and gradients in chunks are those of all logits, cross-entropy included."""
    teacher, _, kept, labels = example()
    targets = reference.targets_of(teacher, kept)
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(6, 8, generator=generator, requires_grad=True)
    weight = torch.randn(13, 8, generator=generator, requires_grad=True)
    wanted = torch.tensor(labels)
    fused = fused_linear_divergence(
        hidden, weight, targets, wanted, kind, tail="label", ce_weight=0.5, chunk_size=4, **options
    ).loss
    logits = hidden @ weight.T
    kd = sparse_divergence(logits, targets, kind, tail="label", labels=wanted, **options)
    plain = (kd + 0.5 * torch.nn.functional.cross_entropy(logits, wanted, reduction="none")).mean()
    torch.testing.assert_close(fused, plain)
    for ours, theirs in zip(
        torch.autograd.grad(fused, (hidden, weight)),
        torch.autograd.grad(plain, (hidden, weight)),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_the_bounds_enclose_the_acceptance() -> None:
    """-log Σ min(p, q) lies between the bound with the bucket and that without, near both."""
    teacher, student = random_logits(42, 50, 40), random_logits(43, 50, 40, 1.0)
    truth = -torch.minimum(teacher.softmax(1), student.softmax(1)).sum(1).log()
    gaps = []
    for k in (5, 20, 39):
        targets = reference.targets_of(teacher, reference.top_kept(teacher, [k] * 50))
        lower, upper = (
            sparse_divergence(student, targets, "acceptance", bound=bound).double()
            for bound in ("lower", "upper")
        )
        assert (lower <= truth + 1e-5).all() and (truth <= upper + 1e-5).all()
        gaps.append(float((upper - lower).mean()))
    assert gaps[0] > gaps[1] > gaps[2] and gaps[2] < 0.05


@pytest.mark.parametrize("kind", ["acceptance", "tail_kl"])
@pytest.mark.parametrize("tail", ["bucket", "renormalize"])
def test_unused_slots_do_not_help_a_student_that_is_far_off(kind: str, tail: str) -> None:
    """Thousands of nats away they neither bound the loss nor take its gradient."""
    teacher, student = random_logits(50, 3, 9), random_logits(51, 3, 9)
    student[:, int(teacher.sum(0).argmin())] += 5_000.0
    kept = reference.top_kept(teacher, [3, 2, 3])
    found = []
    for slots in (3, 6):
        x = student.float().requires_grad_()
        targets = reference.targets_of(teacher, kept, num_slots=slots)
        options = reference.SMALL.get(kind, {})
        found.append(
            value_and_gradient(sparse_divergence(x, targets, kind, tail=tail, **options), x)
        )
    torch.testing.assert_close(found[0], found[1])
    assert found[0][0].isfinite().all()
    if (kind, tail) == ("tail_kl", "bucket"):
        assert found[0][0].min() > 100 and found[0][1].abs().max() > 0.1


def test_the_hybrid_holds_its_share_constant() -> None:
    """Its gradient is that of λ KL + (1-λ) TV with λ = exp(-eta Σ min(p, q)) held where it is."""
    teacher, student = random_logits(44, 4, 9), random_logits(45, 4, 9)
    targets = reference.targets_of(teacher, reference.top_kept(teacher, [3] * 4))
    x = student.float().requires_grad_()
    ours, gradient = value_and_gradient(
        sparse_divergence(x, targets, "acceptance_hybrid", eta=2.0), x
    )
    tvd = sparse_divergence(x, targets, "tvd")
    share = torch.exp(-2.0 * (1 - tvd.detach()))
    frozen = share * sparse_divergence(x, targets, "fkl") + (1 - share) * tvd
    expected, expected_gradient = value_and_gradient(frozen, x)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-4, atol=1e-6)


def test_tail_kl_is_fkl_at_beta_1_and_its_parts_elsewhere() -> None:
    """Beta scales the divergence within the tail alone; beta 0 is the head with one bucket."""
    teacher, student = random_logits(46, 5, 12), random_logits(47, 5, 12)
    targets = reference.targets_of(teacher, reference.top_kept(teacher, [6] * 5))

    def tail_kl(beta: float) -> Tensor:
        return sparse_divergence(student, targets, "tail_kl", head=2, beta=beta)

    fkl = sparse_divergence(student, targets, "fkl")
    coarse = reference.targets_of(teacher, reference.top_kept(teacher, [2] * 5))
    torch.testing.assert_close(tail_kl(1.0), fkl)
    torch.testing.assert_close(tail_kl(0.0), sparse_divergence(student, coarse, "fkl"))
    torch.testing.assert_close(tail_kl(3.0), 3 * fkl - 2 * tail_kl(0.0))


@pytest.mark.parametrize("kind", ["hinge", "logistic"])
def test_rankings_ask_for_the_order_alone(kind: str) -> None:
    """A step down the gradient mends a pair that is the wrong way round; other ids do not count."""
    teacher = torch.tensor([[3.0, 2.0, 0.0, -1.0]], dtype=torch.float64)
    targets = reference.targets_of(teacher, [[0, 1]])
    swapped = torch.tensor([[2.0, 3.0, 0.0, -1.0]], requires_grad=True)
    loss, gradient = value_and_gradient(sparse_divergence(swapped, targets, kind), swapped)
    right = sparse_divergence(torch.tensor([[3.0, 2.0, 0.0, -1.0]]), targets, kind)
    assert float(right) < float(loss)
    assert gradient[0, 0] < 0 < gradient[0, 1]
    if kind == "logistic":
        assert float(loss) == pytest.approx(math.log1p(math.e))
        assert gradient[0, 2:].abs().max() == 0
    else:
        p = teacher.softmax(1)
        gap = float(p[0, 0] - p[0, 1])
        q = swapped.detach().softmax(1)
        assert float(loss) == pytest.approx(gap + float(q[0, 1] - q[0, 0]), rel=1e-5)
    one = reference.targets_of(teacher, [[0]])
    assert float(sparse_divergence(swapped.detach(), one, kind)) == 0


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        ("hinge", {"tail": "renormalize"}, "hinge compares kept ids alone: tail='renormalize'"),
        ("logistic", {"tail": "label"}, "logistic compares kept ids alone"),
        ("hinge", {"margin": -0.1}, "margin must be >= 0, got -0.1"),
        ("hinge", {"margin": "wide"}, "unknown margin 'wide'; one of teacher"),
        ("acceptance", {"bound": "middle"}, "unknown bound 'middle'; one of lower, upper"),
        ("acceptance", {"bound": 1.0}, "bound must be one of lower, upper, got 1.0"),
        ("acceptance", {"bound": "upper", "tail": "renormalize"}, "is of tail='bucket'"),
        ("acceptance_hybrid", {"eta": -1.0}, "eta must be >= 0, got -1.0"),
        ("tail_kl", {"head": 0}, "head must be a whole number >= 1, got 0"),
        ("tail_kl", {"head": 1.5}, "head must be a whole number >= 1, got 1.5"),
        ("tail_kl", {"head": 3}, "head 3 of 3 kept ids leaves no tail"),
        ("tail_kl", {"head": 1, "beta": -1.0}, "beta must be >= 0, got -1.0"),
        ("tail_kl", {"tail": "uniform", "head": 1}, "tail_kl ranks ids, and tail='uniform'"),
        ("rkl", {"tail": "label"}, r"the probability 0, where rkl .* is infinite: use fkl, jsd"),
        ("jsd", {"tail": "label", "beta": 1.0}, "is infinite"),
        ("skew_rkl", {"tail": "label", "lam": 0.0}, "is infinite"),
        ("fkl", {"tail": "label"}, "tail='label' needs the labels"),
        ("fkl", {"tail": "label", "labels": [0, -100]}, "one id below 6 for each .* -100 to 0"),
        ("fkl", {"tail": "label", "labels": [0, 6]}, "one id below 6 for each .* from 0 to 6"),
        ("akl", {"head_rule": 3}, "head_rule must be one of official, nucleus, got 3"),
    ],
)
def test_what_cannot_be_had_is_refused(kind: str, arguments: dict[str, Any], message: str) -> None:
    """By name, with what would be valid."""
    teacher = random_logits(48, 2, 6)
    targets = reference.targets_of(teacher, reference.top_kept(teacher, [3, 3]))
    with pytest.raises(ValueError, match=message):
        sparse_divergence(random_logits(49, 2, 6), targets, kind, **arguments)


@pytest.mark.parametrize(
    ("kind", "tail"),
    [("acceptance", "bucket"), ("hinge", "bucket"), ("tail_kl", "bucket"), ("fkl", "label")],
)
def test_draws_do_not_allow_these(kind: str, tail: str) -> None:
    """They weigh each draw, which stands for p in a linear loss with its own tail alone."""
    targets = SparseTargets(
        token_ids=torch.tensor([[0, 1]]),
        logprobs=torch.tensor([[0.5, 0.3]]).log(),
        log_z=torch.zeros(1),
        log_tail=torch.tensor([0.2]).log(),
        draws=torch.tensor([[2, 1]]),
    )
    with pytest.raises(ValueError, match=r"linear in the teacher's|estimate their own tail"):
        sparse_divergence(torch.zeros(1, 4), targets, kind, tail=tail, labels=[1])


def test_a_configuration_names_what_does_not_go_together() -> None:
    """As the losses do, before anything is trained; options may be schedules."""
    LossConfig(kind="acceptance_hybrid", options={"eta": {"values": [0.0, 3.0], "at": [0, 1]}})
    LossConfig(kind="fkl", tail="label")
    with pytest.raises(ValueError, match="compares kept ids alone"):
        LossConfig(kind="logistic", tail="uniform")
    heads = {"values": [2, 5], "at": [0, 1]}
    LossConfig(kind="tail_kl", options={"head": {**heads, "shape": "step"}})
    with pytest.raises(ValueError, match="head is a count: give its schedule shape step"):
        LossConfig(kind="tail_kl", options={"head": heads})
