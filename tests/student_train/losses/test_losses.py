"""The divergences against a dense float64 reference, in value and gradient."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from decant.student_train.losses import (
    DIVERGENCES,
    TAIL_MODES,
    SparseTargets,
    sparse_divergence,
)
from decant.student_train.losses.targets import LOG_FLOOR
from decant.student_train.losses.terms import akl_weights
from tests.support import dense_reference as reference

VARIANTS: list[tuple[str, dict[str, Any]]] = [
    *((kind, {}) for kind in DIVERGENCES),
    ("akl", {"head_rule": "nucleus", "mu": 0.7}),
    ("jeffreys", {"lam": 0.2}),
    ("jsd", {"beta": 0.1}),
    ("skew_fkl", {"lam": 0.6}),
    ("skew_rkl", {"lam": 0.0}),
    ("alpha_beta", {"alpha": 0.0, "beta": 0.7}),
    ("alpha_beta", {"alpha": 0.6, "beta": 0.0}),
    ("alpha_beta", {"alpha": 0.5, "beta": -0.5}),
    ("alpha_beta", {"alpha": 0.0, "beta": 0.0}),
    ("alpha_beta", {"alpha": 1.3, "beta": -0.4}),
]
NAMES = [f"{kind}{options or ''}" for kind, options in VARIANTS]


def random_logits(seed: int, num_rows: int, vocab_size: int, spread: float = 2.0) -> Tensor:
    """Return [num_rows, vocab_size] float64 logits."""
    generator = torch.Generator().manual_seed(seed)
    shape = (num_rows, vocab_size)
    return torch.randn(shape, generator=generator, dtype=torch.float64) * spread


def value_and_gradient(loss_N: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return the losses and the gradient of their sum, both float64."""
    (gradient,) = torch.autograd.grad(loss_N.sum(), logits)
    return loss_N.detach().double(), gradient.double()


def assert_matches_reference(
    student: Tensor,
    teacher: Tensor,
    kept: list[list[int]],
    kind: str,
    *,
    num_slots: int | None = None,
    vocab_size: int | None = None,
    rtol: float = 2e-5,
    **arguments: Any,
) -> None:
    """Compare value and gradient with the float64 reference over the real vocabulary."""
    targets = reference.targets_of(
        teacher, kept, arguments.get("temperature", 1.0), num_slots=num_slots
    )
    ours = student.float().requires_grad_()
    loss, gradient = value_and_gradient(
        sparse_divergence(ours, targets, kind, vocab_size=vocab_size, **arguments), ours
    )
    theirs = student[:, :vocab_size].clone().requires_grad_()
    true_loss, true_gradient = value_and_gradient(
        reference.reference_divergence(theirs, teacher, kept, kind, **arguments), theirs
    )
    largest = true_gradient.abs().max().item()
    torch.testing.assert_close(loss, true_loss, rtol=rtol, atol=1e-5)
    torch.testing.assert_close(
        gradient[:, :vocab_size], true_gradient, rtol=rtol, atol=3e-6 + rtol * largest
    )
    if vocab_size is not None:
        assert gradient[:, vocab_size:].abs().sum() == 0


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("tail", TAIL_MODES)
@pytest.mark.parametrize(("kind", "options"), VARIANTS, ids=NAMES)
def test_value_and_gradient_equal_the_dense_reference(
    kind: str, options: dict[str, Any], tail: str, temperature: float
) -> None:
    """Every kind with every tail and temperature is the dense float64 divergence."""
    teacher, student = random_logits(0, 5, 13), random_logits(1, 5, 13)
    kept = reference.top_kept(teacher, [4, 1, 3, 4, 2])
    assert_matches_reference(
        student, teacher, kept, kind, tail=tail, temperature=temperature, **options
    )


def splits_clearly(teacher: Tensor, kept: list[list[int]], temperature: float, tail: str) -> bool:
    """Whether no cumulative mass comes so near to mu that rounding decides akl's head."""
    for row, ids in zip(teacher, kept, strict=True):
        p = torch.softmax(row / temperature, 0)
        classes, _ = reference.build_classes(p, p, ids, tail)
        ranked = classes[: len(ids)] if tail == "bucket" else classes
        sums = ranked.sort(descending=True).values.cumsum(0)
        if bool(((sums - 0.5).abs() < 1e-4).any()):
            return False
    return True


@settings(max_examples=250, deadline=None)
@given(data=st.data())
def test_any_shape_equals_the_dense_reference(data: st.DataObject) -> None:
    """Ragged rows, spare slots, k = V, r = 0, padded heads and peaked distributions change nothing.

    With r = 0 the kinds that are finite there; tvd and akl away from their kinks.
    """
    num_rows = data.draw(st.integers(1, 4), label="rows")
    vocab_size = data.draw(st.integers(1, 12), label="vocabulary")
    padding = data.draw(st.integers(0, 3), label="padding rows of the head")
    num_kept = data.draw(
        st.lists(st.integers(1, vocab_size), min_size=num_rows, max_size=num_rows), label="kept"
    )
    spare = data.draw(st.integers(0, 3), label="spare slots")
    seed = data.draw(st.integers(0, 2**20), label="seed")
    temperature = data.draw(st.sampled_from([1.0, 1.7]), label="temperature")
    tail = data.draw(st.sampled_from(TAIL_MODES), label="tail")
    no_tail = data.draw(st.booleans(), label="r = 0")
    kinds = ["fkl", "jsd", "tvd", "skew_fkl", "skew_rkl"] if no_tail else [*DIVERGENCES]
    kind = data.draw(st.sampled_from(kinds), label="kind")
    spreads = st.sampled_from([0.0, 0.1, 3.0, 12.0])
    teacher_spread = data.draw(spreads, label="teacher")
    student_spread = data.draw(spreads, label="student")
    teacher = random_logits(seed, num_rows, vocab_size, teacher_spread)
    student = random_logits(seed + 1, num_rows, vocab_size, student_spread)
    student = torch.cat([student, random_logits(seed + 2, num_rows, padding, 30.0)], dim=1)
    kept = reference.top_kept(teacher, num_kept)
    if no_tail:
        for row, ids in enumerate(kept):
            teacher[row, [v for v in range(vocab_size) if v not in ids]] = -torch.inf
    assume(kind != "tvd" or teacher_spread + student_spread > 0)
    assume(
        kind != "akl"
        or (student_spread != teacher_spread and splits_clearly(teacher, kept, temperature, tail))
    )
    assert_matches_reference(
        student,
        teacher,
        kept,
        kind,
        num_slots=max(num_kept) + spare,
        vocab_size=vocab_size if padding else None,
        tail=tail,
        temperature=temperature,
        rtol=1e-4,
    )


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_student_without_some_of_the_teachers_ids(data: st.DataObject) -> None:
    """Ids that the student lacks and no target keeps are teacher mass the student cannot give."""
    vocab_size = data.draw(st.integers(2, 10), label="the student's vocabulary")
    missing = data.draw(st.integers(1, 3), label="ids only the teacher has")
    num_kept = data.draw(st.lists(st.integers(1, vocab_size - 1), min_size=1, max_size=3))
    seed = data.draw(st.integers(0, 2**20), label="seed")
    kind = data.draw(st.sampled_from([k for k in DIVERGENCES if k != "akl"]), label="kind")
    tail = data.draw(st.sampled_from([mode for mode in TAIL_MODES if mode != "uniform"]))
    teacher = random_logits(seed, len(num_kept), vocab_size + missing)
    student = random_logits(seed + 1, len(num_kept), vocab_size).requires_grad_()
    kept = reference.top_kept(teacher[:, :vocab_size], num_kept)
    loss, gradient = value_and_gradient(
        sparse_divergence(student, reference.targets_of(teacher, kept), kind, tail=tail), student
    )
    absent = torch.full((len(num_kept), missing), -torch.inf)
    whole = torch.cat([student, absent], dim=1)
    truth, true_gradient = value_and_gradient(
        reference.reference_divergence(whole, teacher, kept, kind, tail=tail), student
    )
    torch.testing.assert_close(loss, truth, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(gradient, true_gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("kind", "options"), VARIANTS, ids=NAMES)
def test_a_ruled_out_tail_counts_as_the_floor(kind: str, options: dict[str, Any]) -> None:
    """With r = 0 every kind, the infinite ones too, is the divergence from r = e^-87."""
    teacher, student = random_logits(27, 4, 9), random_logits(28, 4, 9)
    kept = reference.top_kept(teacher, [3] * 4)
    floored = torch.full_like(teacher, -torch.inf)
    for row, ids in enumerate(kept):
        others = [v for v in range(9) if v not in ids]
        floored[row, ids] = teacher[row, ids]
        floored[row, others[0]] = teacher[row, ids].logsumexp(0) + LOG_FLOOR
    ruled_out = torch.where(floored < -40, -torch.inf, floored)
    targets = reference.targets_of(ruled_out, kept)
    assert (targets.log_tail == -torch.inf).all()
    ours, theirs = student.float().requires_grad_(), student.clone().requires_grad_()
    loss, gradient = value_and_gradient(sparse_divergence(ours, targets, kind, **options), ours)
    truth, true_gradient = value_and_gradient(
        reference.reference_divergence(theirs, floored, kept, kind, **options), theirs
    )
    torch.testing.assert_close(loss, truth, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(gradient, true_gradient, rtol=1e-4, atol=1e-5)


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_the_bucket_is_a_lower_bound(data: st.DataObject) -> None:
    """Merging ids into one class never raises an f-divergence: bucket <= full, in any shape."""
    vocab_size = data.draw(st.integers(2, 12), label="vocabulary")
    num_kept = data.draw(st.lists(st.integers(1, vocab_size), min_size=1, max_size=4))
    seed = data.draw(st.integers(0, 2**20), label="seed")
    spreads = st.sampled_from([0.1, 2.0, 8.0])
    teacher = random_logits(seed, len(num_kept), vocab_size, data.draw(spreads))
    student = random_logits(seed + 1, len(num_kept), vocab_size, data.draw(spreads))
    kind, options = data.draw(
        st.sampled_from([v for v in VARIANTS if v[0] not in ("akl", "alpha_beta")])
    )
    temperature = data.draw(st.sampled_from([1.0, 2.0]), label="temperature")
    everything = [list(range(vocab_size))] * len(num_kept)
    targets = reference.targets_of(
        teacher, reference.top_kept(teacher, num_kept), temperature, dtype=torch.float64
    )
    bucket = sparse_divergence(student, targets, kind, temperature, **options)
    full = reference.reference_divergence(
        student, teacher, everything, kind, temperature=temperature, **options
    )
    assert (bucket <= full * (1 + 1e-6) + 1e-9).all()


@pytest.mark.parametrize("tail", TAIL_MODES)
@pytest.mark.parametrize(
    ("kind", "options"), [variant for variant in VARIANTS if variant[0] != "akl"]
)
def test_gradcheck(kind: str, options: dict[str, Any], tail: str) -> None:
    """The gradient is that of the value (akl's detached weights: see its transcription)."""
    teacher, student = random_logits(2, 1, 5), random_logits(3, 1, 5, spread=1.0)
    targets = reference.targets_of(
        teacher, reference.top_kept(teacher, [2]), 1.5, num_slots=3, dtype=torch.float64
    )
    assert torch.autograd.gradcheck(
        lambda x: sparse_divergence(x, targets, kind, 1.5, tail, **options),
        student.requires_grad_(),
        fast_mode=True,
    )


@pytest.mark.parametrize("tail", TAIL_MODES)
@pytest.mark.parametrize("head_rule", ["official", "nucleus"])
def test_gradcheck_of_akl_is_that_of_its_stop_gradient_form(head_rule: str, tail: str) -> None:
    """Numerically: with the weights held at x, the slope of w_h FKL + w_t RKL is akl's gradient."""
    teacher, student = random_logits(2, 1, 6), random_logits(3, 1, 6, spread=1.0)
    kept = reference.top_kept(teacher, [3])
    targets = reference.targets_of(teacher, kept, 1.5, num_slots=4, dtype=torch.float64)
    arguments: dict[str, Any] = {"temperature": 1.5, "tail": tail}
    x = student.clone().requires_grad_()
    akl, gradient = value_and_gradient(
        sparse_divergence(x, targets, "akl", head_rule=head_rule, **arguments), x
    )
    parts = [sparse_divergence(student, targets, kind, **arguments) for kind in ("fkl", "rkl")]
    weight_head = (akl - parts[1]) / (parts[0] - parts[1])
    assert 0.01 < weight_head < 0.99

    def frozen(at: Tensor) -> float:
        fkl, rkl = (sparse_divergence(at, targets, kind, **arguments) for kind in ("fkl", "rkl"))
        return (weight_head * fkl + (1 - weight_head) * rkl).item()

    for v in range(6):
        step = torch.zeros_like(student)
        step[0, v] = 1e-5
        slope = (frozen(student + step) - frozen(student - step)) / 2e-5
        assert slope == pytest.approx(gradient[0, v].item(), rel=1e-5, abs=1e-8)


@pytest.mark.parametrize("tail", TAIL_MODES)
@pytest.mark.parametrize(("kind", "options"), VARIANTS, ids=NAMES)
def test_equal_distributions_have_no_divergence(
    kind: str, options: dict[str, Any], tail: str
) -> None:
    """At p = q the value and the gradient are 0, also for akl's 0/0 weights."""
    logits = random_logits(4, 3, 9)
    kept = reference.top_kept(logits, [9, 9, 9] if tail != "bucket" else [4, 9, 2])
    ours = logits.float().requires_grad_()
    loss, gradient = value_and_gradient(
        sparse_divergence(ours, reference.targets_of(logits, kept), kind, tail=tail, **options),
        ours,
    )
    assert loss.abs().max() < 1e-5
    # tvd has a kink here: rounding decides between the slopes on either side of 0.
    assert gradient.abs().max() < (1.0 if kind == "tvd" else 1e-5)


def corner_cases() -> dict[str, tuple[Tensor, SparseTargets, int | None]]:
    """Return student logits, targets at T=1, and the vocabulary size, by name."""
    teacher, student = random_logits(5, 4, 10), random_logits(6, 4, 10)
    kept = reference.top_kept(teacher, [3, 3, 3, 3])
    usual = reference.targets_of(teacher, kept)
    everything = reference.targets_of(teacher, reference.top_kept(teacher, [10, 10, 10, 10]))
    ragged = reference.targets_of(teacher, reference.top_kept(teacher, [1, 10, 2, 5]))
    masked = teacher.scatter(1, torch.tensor(kept), 50.0) - 50.0
    ruled_out = masked.masked_fill(masked < -40, -torch.inf)
    peaked_teacher = reference.targets_of(teacher * 300, reference.top_kept(teacher, [3] * 4))
    far = student.clone()
    far[:, 0] += 20_000.0
    opposed = student.clone()
    opposed[torch.arange(4), teacher.argmin(1)] += 20_000.0
    only_kept = SparseTargets(
        token_ids=torch.tensor([[0, 1]] * 4),
        logprobs=torch.tensor([[0.5, 0.5]] * 4).log(),
        log_z=torch.zeros(4),
        log_tail=torch.full((4,), -torch.inf),
    )
    ruled_out_but_kept = dataclasses.replace(
        only_kept,
        token_ids=torch.tensor([[0, 1, 2]] * 4),
        logprobs=torch.tensor([[0.5, 0.5, 0.0]] * 4).log(),
    )
    return {
        "a kept id of probability 0": (student, ruled_out_but_kept, None),
        "r = 0 and k < V": (student, reference.targets_of(ruled_out, kept), None),
        "r = 0, two ids": (student, only_kept, None),
        "k = V": (student, everything, None),
        "k = V through padding rows": (student, only_kept, 2),
        "ragged K with k = V": (student, ragged, None),
        "peaked teacher": (student, peaked_teacher, None),
        "peaked student": (far, usual, None),
        "student peaked where the teacher is least": (opposed, usual, None),
        "peaked and opposed": (opposed, peaked_teacher, None),
        "peaked student, k = V": (opposed, everything, None),
    }


@pytest.mark.parametrize("name", corner_cases())
def test_corner_cases_are_finite(name: str) -> None:
    """No corner case gives NaN or infinity, in value or gradient, for any kind and tail."""
    student, targets, vocab_size = corner_cases()[name]
    targets = targets.validate(vocab_size or student.shape[1])
    for kind, options in VARIANTS:
        for tail in TAIL_MODES:
            ours = student.float().requires_grad_()
            loss, gradient = value_and_gradient(
                sparse_divergence(ours, targets, kind, 1.0, tail, vocab_size=vocab_size, **options),
                ours,
            )
            assert loss.isfinite().all(), (kind, options, tail)
            assert gradient.isfinite().all(), (kind, options, tail)


@pytest.mark.parametrize("kind", ["fkl", "akl", "jeffreys"])
def test_a_confidently_wrong_student_keeps_its_gradient(kind: str) -> None:
    """A student 20,000 nats off the teacher's first choice is still pulled towards it."""
    student, targets, _ = corner_cases()["peaked and opposed"]
    ours = student.float().requires_grad_()
    _, gradient = value_and_gradient(sparse_divergence(ours, targets, kind), ours)
    first_choice = targets.token_ids[:, :1]
    assert (gradient.gather(1, first_choice) < -0.4).all()


def test_padding_slots_never_reach_the_tail() -> None:
    """Unused slots (-1) neither mask the last id out of the tail nor change anything else."""
    teacher, student = random_logits(7, 3, 8), random_logits(8, 3, 8)
    kept = [[0, 2], [1, 3], [4, 0]]
    tight, loose = (reference.targets_of(teacher, kept, num_slots=slots) for slots in (2, 5))
    for kind, options in [*VARIANTS, ("alpha_beta", {"alpha": -0.5, "beta": -0.3})]:
        for tail in TAIL_MODES:
            torch.testing.assert_close(
                sparse_divergence(student, tight, kind, tail=tail, **options),
                sparse_divergence(student, loose, kind, tail=tail, **options),
                rtol=1e-6,
                atol=1e-6,
            )
    ours = student.float().requires_grad_()
    targets = reference.targets_of(teacher, kept, num_slots=5)
    _, gradient = value_and_gradient(sparse_divergence(ours, targets, "fkl"), ours)
    assert (gradient[:, 5:].abs() > 0).all()


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_chain_rules_and_the_bucket_as_lower_bound(temperature: float) -> None:
    """FKL = bucket + r KL(tail‖tail), RKL = bucket + q_* KL(tail‖tail), so bucket <= full."""
    teacher, student = random_logits(9, 6, 11), random_logits(10, 6, 11)
    kept = reference.top_kept(teacher, [3] * 6)
    targets = reference.targets_of(teacher, kept, temperature)
    p = torch.softmax(teacher / temperature, 1)
    q = torch.softmax(student / temperature, 1)
    for kind in ("fkl", "rkl"):
        bucket = sparse_divergence(student, targets, kind, temperature, scale_by_t2=False)
        for row, ids in enumerate(kept):
            others = [v for v in range(11) if v not in ids]
            a, b = (p[row], q[row]) if kind == "fkl" else (q[row], p[row])
            full = reference.kl(a, b)
            mass, inside = (
                a[others].sum(),
                reference.kl(a[others] / a[others].sum(), b[others] / b[others].sum()),
            )
            assert bucket[row].item() + (mass * inside).item() == pytest.approx(full.item(), 1e-5)
            assert bucket[row] <= full


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_t_squared_multiplies_value_and_gradient(kind: str) -> None:
    """scale_by_t2 multiplies both value and gradient by T², and is on by default."""
    teacher, student = random_logits(11, 3, 8), random_logits(12, 3, 8)
    targets = reference.targets_of(teacher, reference.top_kept(teacher, [3] * 3), 3.0)
    student = student.float().requires_grad_()
    loss, gradient = value_and_gradient(sparse_divergence(student, targets, kind, 3.0), student)
    plain, plain_gradient = value_and_gradient(
        sparse_divergence(student, targets, kind, 3.0, scale_by_t2=False), student
    )
    torch.testing.assert_close(loss, 9 * plain, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient, 9 * plain_gradient, rtol=1e-5, atol=1e-6)


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


def sampled_targets(
    teacher: Tensor, head: list[int], num_draws: int, generator: torch.Generator
) -> SparseTargets:
    """Return one row: `head` exact, `num_draws` drawn with replacement from all the rest."""
    p = torch.softmax(teacher, 0)
    rest = p.clone()
    rest[head] = 0
    drawn = torch.multinomial(rest, num_draws, replacement=True, generator=generator)
    ids, counts = drawn.unique(return_counts=True)
    kept = [head + ids.tolist()]
    draws = torch.cat([torch.zeros(len(head), dtype=torch.int64), counts])[None]
    return reference.targets_of(teacher[None], kept, draws=draws)


@pytest.mark.parametrize("head_size", [0, 2])
def test_sampled_targets_are_unbiased_for_fkl(head_size: int) -> None:
    """Value and gradient average to the full forward KL, with and without an exact head."""
    teacher, student = random_logits(19, 1, 12, 1.5)[0], random_logits(20, 1, 12, 1.5)
    head = teacher.argsort(descending=True)[:head_size].tolist()
    generator = torch.Generator().manual_seed(0)
    values, gradients = [], []
    for _ in range(600):
        targets = sampled_targets(teacher, head, 4, generator)
        x = student.clone().requires_grad_()
        value, gradient = value_and_gradient(sparse_divergence(x, targets, "fkl"), x)
        values.append(value)
        gradients.append(gradient)
    x = student.clone().requires_grad_()
    p, log_q = torch.softmax(teacher, 0), x.log_softmax(1)
    truth, true_gradient = value_and_gradient((p * (p.log() - log_q)).sum(1), x)
    for estimates, true in ((torch.stack(values), truth), (torch.stack(gradients), true_gradient)):
        error = estimates.mean(0) - true
        allowed = 4.5 * estimates.std(0) / math.sqrt(len(estimates)) + 1e-6
        assert (error.abs() <= allowed).all()


def test_an_exact_head_lowers_the_variance() -> None:
    """With as many draws, exact head entries leave less to chance than drawing everything."""
    teacher, student = random_logits(21, 1, 12)[0], random_logits(22, 1, 12)
    generator = torch.Generator().manual_seed(0)
    spread = [
        torch.stack(
            [
                sparse_divergence(student, sampled_targets(teacher, head, 4, generator), "fkl")
                for _ in range(100)
            ]
        ).std()
        for head in ([], teacher.argsort(descending=True)[:2].tolist())
    ]
    assert spread[1] < spread[0]


def test_sampled_targets_refuse_what_would_be_biased() -> None:
    """Losses not linear in p, tail modes and temperatures are refused for sampled targets."""
    generator = torch.Generator().manual_seed(0)
    targets = sampled_targets(random_logits(23, 1, 12)[0], [], 4, generator)
    student = random_logits(24, 1, 12)
    with pytest.raises(ValueError, match="linear in the teacher's probabilities: use kind='fkl'"):
        sparse_divergence(student, targets, "rkl")
    with pytest.raises(ValueError, match="leave tail='bucket'"):
        sparse_divergence(student, targets, "fkl", tail="renormalize")
    with pytest.raises(ValueError, match="drawn at temperature 1"):
        sparse_divergence(student, targets, "fkl", temperature=2.0)


def broken(**changes: Any) -> SparseTargets:
    """Return two good targets with some fields replaced."""
    good = SparseTargets(
        token_ids=torch.tensor([[0, 1, -1], [2, 3, 4]]),
        logprobs=torch.tensor([[0.5, 0.25, 0.0], [0.5, 0.25, 0.125]]).log(),
        log_z=torch.zeros(2),
        log_tail=torch.tensor([0.25, 0.125]).log(),
    )
    return dataclasses.replace(good, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"token_ids": torch.tensor([[0, 1, -1], [2, 3, 2]])}, r"target 1 of 2: token id 2 stands"),
        ({"token_ids": torch.tensor([[0, 1, -1], [2, 3, 7]])}, r"id 7 is beyond .* of 6"),
        ({"token_ids": torch.tensor([[0, 1, -2], [2, 3, 4]])}, r"token id -2: unused .* -1"),
        ({"token_ids": torch.tensor([[-1, -1, -1], [2, 3, 4]])}, r"target 0 of 2: no kept id"),
        ({"token_ids": torch.tensor([[0, 1, 2], [2, 3, 4]]).int()}, r"int64, got torch.int32"),
        ({"token_ids": torch.tensor([0, 1])}, r"\[N, K\] with K >= 1, got shape \(2,\)"),
        ({"logprobs": torch.zeros(2, 2)}, r"logprobs must have shape \(2, 3\) .* got \(2, 2\)"),
        ({"logprobs": torch.zeros(2, 3).half()}, r"float32 \(or float64\), got torch.float16"),
        ({"logprobs": torch.full((2, 3), torch.nan)}, r"log probs must be <= 0, got \[nan, nan\]"),
        ({"log_z": torch.tensor([0.0, torch.inf])}, r"target 1 of 2: log_z .* log_z=inf"),
        ({"log_tail": torch.tensor([0.25, 0.125])}, r"log_tail=0.25"),
        ({"log_tail": torch.tensor([0.9, 0.1]).log()}, r"add up to 1.65.* of temperature 1.0"),
        ({"draws": torch.tensor([[0, 1, 0], [0, 1, -3]])}, r"draws must be >= 0, got -3"),
        ({"draws": torch.zeros(2, 3)}, r"integer counts, got torch.float32"),
    ],
)
def test_broken_targets_are_refused(changes: dict[str, Any], message: str) -> None:
    """Every broken rule is refused by name, row and number, before any arithmetic."""
    with pytest.raises(ValueError, match=message):
        sparse_divergence(torch.zeros(2, 6), broken(**changes), "fkl")


def test_targets_of_another_temperature_are_refused() -> None:
    """log_z and log_tail of T=1 do not pass for those of T=2."""
    with pytest.raises(ValueError, match=r"must be those of temperature 2\.0"):
        sparse_divergence(torch.zeros(2, 6), broken(), "fkl", temperature=2.0)


def test_targets_are_checked_once() -> None:
    """Validated targets stay validated through slices and moves, for one vocabulary and T."""
    checked = broken().validate(6, 1.0)
    assert checked.validate(6, 1.0) is checked
    assert checked[:1].to("cpu").checked_for == (6, 1.0)
    assert len(checked[1:]) == 1
    assert torch.equal(checked[1:].token_ids, checked.token_ids[1:])
    with pytest.raises(ValueError, match="beyond the student's vocabulary of 4"):
        checked.validate(4, 1.0)


def test_targets_with_little_kept_mass_are_counted() -> None:
    """num_below counts the targets whose kept ids hold less than mu."""
    assert broken().kept_mass().tolist() == pytest.approx([0.75, 0.875])
    assert [broken().num_below(mu) for mu in (0.5, 0.8, 0.9)] == [0, 1, 2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "kl"}, "unknown divergence 'kl'; one of fkl, rkl, akl"),
        ({"tail": "drop"}, "unknown tail 'drop'; one of bucket, renormalize"),
        ({"kind": "fkl", "mu": 0.5}, "fkl has no option mu; its options: scale_by_t2"),
        ({"kind": "akl", "lam": 0.5}, "its options: head_rule, mu, scale_by_t2"),
        ({"kind": "akl", "head_rule": "p > mu"}, "one of official, nucleus"),
        ({"kind": "akl", "mu": 1.0}, "mu must lie between 0 and 1, got 1.0"),
        ({"kind": "jsd", "beta": 1.5}, r"beta must be in \[0, 1\], got 1.5"),
        ({"kind": "skew_fkl", "lam": 1.0}, "at 1 the loss is 0"),
        ({"kind": "jeffreys", "lam": "half"}, "lam must be a finite number, got 'half'"),
        ({"kind": "alpha_beta", "beta": 1e-4}, "beta = 0.0001 is lost to float32 rounding"),
        ({"temperature": 0.0}, "temperature must be > 0 and finite, got 0.0"),
        ({"vocab_size": 7}, "vocab_size 7 does not fit a head of 6 rows"),
    ],
)
def test_wrong_arguments_name_the_right_ones(arguments: dict[str, Any], message: str) -> None:
    """An unknown or impossible argument is refused with what would be valid."""
    with pytest.raises(ValueError, match=message):
        sparse_divergence(torch.zeros(2, 6), broken(), **arguments)


def test_low_precision_logits_are_computed_in_float32() -> None:
    """bf16 logits give the loss of the same numbers in float32, with or without autocast."""
    teacher, student = random_logits(25, 3, 9), random_logits(26, 3, 9).bfloat16()
    targets = reference.targets_of(teacher, reference.top_kept(teacher, [3] * 3))
    loss = sparse_divergence(student, targets)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, sparse_divergence(student.float(), targets))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(loss, sparse_divergence(student, targets))
