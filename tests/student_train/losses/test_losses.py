"""The divergences against a dense float64 reference, in value and gradient.

One file, as every claim is made of every divergence by the same parametrised cases.
"""

from __future__ import annotations

import dataclasses
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
from decant.student_train.losses.kinds import RANKINGS
from decant.student_train.losses.targets import LOG_FLOOR
from tests.support import dense_reference as reference
from tests.support.dense_reference import random_logits, value_and_gradient

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
    ("tail_kl", {"head": 2, "beta": 0.3}),
    ("acceptance", {"bound": "upper"}),
    ("hinge", {"margin": 0.2}),
]
VARIANTS = [(kind, {**reference.SMALL.get(kind, {}), **options}) for kind, options in VARIANTS]
NAMES = [f"{kind}{options or ''}" for kind, options in VARIANTS]
DETACHED = ("akl", "acceptance_hybrid")
"""Kinds with weights that are constants to the gradient."""
KINKED = ("tvd", "acceptance", "acceptance_hybrid", "hinge")
"""Kinds whose slope jumps where p = q, so that rounding decides it there."""


CASES = [(k, o, t) for k, o in VARIANTS for t in TAIL_MODES if reference.allows(k, t, o)]
PLAIN_TAILS = [tail for tail in TAIL_MODES if tail != "label"]
ANY_SHAPE = [kind for kind in DIVERGENCES if kind not in (*RANKINGS, "tail_kl")]
"""Kinds that neither jump where two of the teacher's ids are equal nor want several ids."""
BOUNDED = ["fkl", "rkl", "jeffreys", "jsd", "tvd", "skew_fkl", "skew_rkl", "acceptance"]
"""Kinds that merging classes never raises."""
NOT_ZERO = [("logistic", {}), ("hinge", {"margin": 0.2}), ("acceptance", {"bound": "upper"})]
"""Kinds that are not 0 at p = q."""


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
@pytest.mark.parametrize(("kind", "options", "tail"), CASES)
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
    """Whether no cumulative mass comes so near to mu that rounding decides akl's head.

    Nor which of a kept id and one of a uniform tail is the more probable.
    """
    for row, ids in zip(teacher, kept, strict=True):
        p = torch.softmax(row / temperature, 0)
        num_tail = len(p) - len(ids)
        each = (1 - p[ids].sum()) / max(num_tail, 1)
        if tail == "uniform" and num_tail and bool(((p[ids] - each).abs() < 1e-5).any()):
            return False
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
    tail = data.draw(st.sampled_from(PLAIN_TAILS), label="tail")
    no_tail = data.draw(st.booleans(), label="r = 0")
    kinds = ["fkl", "jsd", "tvd", "skew_fkl", "skew_rkl"] if no_tail else ANY_SHAPE
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
    assume(kind not in KINKED or teacher_spread + student_spread > 0)
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
    kind = data.draw(st.sampled_from([k for k in ANY_SHAPE if k != "akl"]), label="kind")
    tail = data.draw(st.sampled_from([mode for mode in PLAIN_TAILS if mode != "uniform"]))
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
        st.sampled_from([v for v in VARIANTS if v[0] in BOUNDED and v not in NOT_ZERO])
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


@pytest.mark.parametrize(
    ("kind", "options", "tail"), [case for case in CASES if case[0] not in DETACHED]
)
def test_gradcheck(kind: str, options: dict[str, Any], tail: str) -> None:
    """The gradient is that of the value (but for detached weights: see their own tests)."""
    teacher, student = random_logits(2, 1, 5), random_logits(3, 1, 5, spread=1.0)
    targets = reference.targets_of(
        teacher, reference.top_kept(teacher, [2]), 1.5, num_slots=3, dtype=torch.float64
    )
    assert torch.autograd.gradcheck(
        lambda x: sparse_divergence(x, targets, kind, 1.5, tail, **options),
        student.requires_grad_(),
        fast_mode=True,
    )


@pytest.mark.parametrize("tail", PLAIN_TAILS)
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


@pytest.mark.parametrize(
    ("kind", "options", "tail"), [case for case in CASES if case[:2] not in NOT_ZERO]
)
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
    assert gradient.abs().max() < (1.0 if kind in KINKED else 1e-5)


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
    for kind, options, tail in CASES:
        if len(targets.token_ids[0]) > options.get("head", 0):
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
        for tail in PLAIN_TAILS:
            if not reference.allows(kind, tail, options) or options.get("head", 0) > 1:
                continue
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


def test_uniform_is_float64_where_the_logits_are() -> None:
    """With k of V = 5,000 the log of what shares the tail keeps the digits of float64."""
    student, teacher = (reference.random_logits(seed, 3, 5000) for seed in (1, 2))
    kept = reference.top_kept(teacher, [3, 3, 3])
    targets = reference.targets_of(teacher, kept, dtype=torch.float64)
    ours = sparse_divergence(student, targets, "fkl", tail="uniform")
    theirs = reference.reference_divergence(student, teacher, kept, "fkl", tail="uniform")
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_t_squared_multiplies_value_and_gradient(kind: str) -> None:
    """scale_by_t2 multiplies both value and gradient by T², and is on by default."""
    teacher, student = random_logits(11, 3, 8), random_logits(12, 3, 8)
    targets = reference.targets_of(teacher, reference.top_kept(teacher, [3] * 3), 3.0)
    student = student.float().requires_grad_()
    options = reference.SMALL.get(kind, {})
    loss, gradient = value_and_gradient(
        sparse_divergence(student, targets, kind, 3.0, **options), student
    )
    plain, plain_gradient = value_and_gradient(
        sparse_divergence(student, targets, kind, 3.0, scale_by_t2=False, **options), student
    )
    torch.testing.assert_close(loss, 9 * plain, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient, 9 * plain_gradient, rtol=1e-5, atol=1e-6)


def test_low_precision_logits_are_computed_in_float32() -> None:
    """bf16 logits give the loss of the same numbers in float32, with or without autocast."""
    teacher, student = random_logits(25, 3, 9), random_logits(26, 3, 9).bfloat16()
    targets = reference.targets_of(teacher, reference.top_kept(teacher, [3] * 3))
    loss = sparse_divergence(student, targets)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, sparse_divergence(student.float(), targets))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(loss, sparse_divergence(student, targets))
