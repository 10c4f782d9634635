"""What distinguishes the kinds: akl's head and weights, the ends of jsd, alpha_beta's branches."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from decant.student_train.losses import sparse_divergence
from decant.student_train.losses.terms import akl_weights
from tests.support import dense_reference as reference
from tests.support.dense_reference import random_logits, value_and_gradient


@pytest.mark.parametrize("head_rule", ["official", "nucleus"])
def test_akl_is_its_definition_with_detached_weights(head_rule: str) -> None:
    """Akl = w_head FKL + w_tail RKL over sorted classes, gaps |p - q|, no gradient through w."""
    teacher, student = random_logits(13, 8, 12), random_logits(14, 8, 12)
    targets = reference.targets_of(teacher, reference.top_kept(teacher, [12] * 8))
    ours = student.float().requires_grad_()
    loss, gradient = value_and_gradient(
        sparse_divergence(ours, targets, "akl", head_rule=head_rule), ours
    )

    theirs = student.clone().requires_grad_()
    p, q = torch.softmax(teacher, 1), torch.softmax(theirs, 1)
    p_sorted, order = p.sort(1, descending=True)
    errors = (p_sorted - q.detach().gather(1, order)).abs()
    cumulative = p_sorted.cumsum(1)
    if head_rule == "official":
        is_tail = cumulative > 0.5
        is_tail[:, 0] = False
    else:
        is_tail = torch.cat([torch.zeros(8, 1), cumulative[:, :-1]], 1) >= 0.5
    head, tail = (errors * ~is_tail).sum(1), (errors * is_tail).sum(1)
    fkl, rkl = (p * (p / q).log()).sum(1), (q * (q / p).log()).sum(1)
    true_loss, true_gradient = value_and_gradient(
        head / (head + tail) * fkl + tail / (head + tail) * rkl, theirs
    )
    torch.testing.assert_close(loss, true_loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient, true_gradient, rtol=1e-5, atol=1e-6)


def test_akl_head_rules() -> None:
    """The rules differ on who crosses mu; rank 1 is head, the bucket tail, p = q halves."""
    p = torch.tensor([[0.4, 0.3, 0.2, 0.1]])
    q = torch.tensor([[0.3, 0.1, 0.5, 0.1]])
    official, _ = akl_weights(p, q, has_bucket=True, head_rule="official")
    nucleus, _ = akl_weights(p, q, has_bucket=True, head_rule="nucleus")
    assert official.item() == pytest.approx(0.1 / 0.6)
    assert nucleus.item() == pytest.approx(0.3 / 0.6)
    exactly_mu, _ = akl_weights(
        torch.tensor([[0.5, 0.25, 0.25]]),
        torch.tensor([[0.25, 0.5, 0.25]]),
        has_bucket=True,
        mu=0.75,
    )
    assert exactly_mu.item() == 1.0
    big_first, _ = akl_weights(p, q, has_bucket=True, mu=0.05)
    assert big_first.item() == pytest.approx(0.1 / 0.6)
    p, q = torch.tensor([[0.1, 0.9]]), torch.tensor([[0.3, 0.7]])
    assert akl_weights(p, q, has_bucket=True)[0].item() == pytest.approx(0.5)
    assert akl_weights(p, q, has_bucket=False)[0].item() == pytest.approx(0.5)
    assert akl_weights(p, p, has_bucket=True)[0].item() == 0.5


def test_jsd_ends_and_jeffreys_sides() -> None:
    """Jsd at beta 0 and 1 is fkl and rkl; jeffreys' lam weighs the reverse KL."""
    teacher, student = random_logits(15, 4, 9), random_logits(16, 4, 9)
    targets = reference.targets_of(teacher, reference.top_kept(teacher, [4] * 4))
    fkl, rkl = (sparse_divergence(student, targets, kind) for kind in ("fkl", "rkl"))
    assert torch.equal(sparse_divergence(student, targets, "jsd", beta=0.0), fkl)
    assert torch.equal(sparse_divergence(student, targets, "jsd", beta=1.0), rkl)
    torch.testing.assert_close(
        sparse_divergence(student, targets, "jeffreys", lam=0.25), 0.75 * fkl + 0.25 * rkl
    )


def test_alpha_beta_branches_are_limits_and_special_cases() -> None:
    """(1, 0) is fkl, (0, 1) is rkl, (1/2, 1/2) is 2 Σ(√p - √q)², and limits are approached."""
    teacher, student = random_logits(17, 4, 9, 1.0), random_logits(18, 4, 9, 1.0)
    kept = reference.top_kept(teacher, [4] * 4)
    targets = reference.targets_of(teacher, kept, dtype=torch.float64)

    def alpha_beta(alpha: float, beta: float) -> Tensor:
        return sparse_divergence(student, targets, "alpha_beta", alpha=alpha, beta=beta)

    torch.testing.assert_close(alpha_beta(1, 0), sparse_divergence(student, targets, "fkl"))
    torch.testing.assert_close(alpha_beta(0, 1), sparse_divergence(student, targets, "rkl"))
    classes = [
        reference.build_classes(p, q, ids, "bucket")
        for p, q, ids in zip(
            torch.softmax(teacher, 1), torch.softmax(student, 1), kept, strict=True
        )
    ]
    hellinger = torch.stack([2 * ((p.sqrt() - q.sqrt()) ** 2).sum() for p, q in classes])
    torch.testing.assert_close(alpha_beta(0.5, 0.5), hellinger)
    for near, limit in [
        ((0.01, 0.7), (0.0, 0.7)),
        ((0.6, 0.01), (0.6, 0.0)),
        ((0.5, -0.49), (0.5, -0.5)),
        ((0.01, 0.01), (0.0, 0.0)),
    ]:
        torch.testing.assert_close(alpha_beta(*near), alpha_beta(*limit), rtol=0.1, atol=0.05)
