"""Sequence-level divergences by enumeration, and what the sums of step-wise losses make of them.

Two tables of conditionals over all prefixes of a tiny vocabulary stand for teacher and student, in
float64. Shapes: V tokens, L positions, V^L sequences.
"""

import itertools
import math

import pytest
import torch
from torch import Tensor

from decant.student_train.config.loss import LossConfig
from decant.student_train.config.mixture import CacheShare
from decant.student_train.config.presets import losses_of
from decant.student_train.losses import sparse_divergence
from tests.support import dense_reference as reference

V, L = 3, 4
Prefix = tuple[int, ...]
Tables = dict[Prefix, Tensor]


def tables(seed: int, spread: float = 1.5) -> Tables:
    """[V] logits of the next token after each prefix."""
    generator = torch.Generator().manual_seed(seed)
    prefixes = [p for n in range(L) for p in itertools.product(range(V), repeat=n)]
    return {p: spread * torch.randn(V, generator=generator, dtype=torch.float64) for p in prefixes}


def log_prob(model: Tables, tokens: Prefix) -> float:
    return sum(float(model[tokens[:t]].log_softmax(0)[token]) for t, token in enumerate(tokens))


def sequences(model: Tables) -> Tensor:
    """[V^L] log probs of all sequences."""
    every = itertools.product(range(V), repeat=L)
    return torch.tensor([log_prob(model, tokens) for tokens in every], dtype=torch.float64)


def step_wise(preset: str, teacher: Tables, student: Tables, **options: object) -> float:
    """The expected sum over positions of a preset's losses, prefixes weighed by who wrote them.

    With the kinds and weights that a mixture of as many teacher's as student's sequences has; of
    one side alone that of all.
    """
    sides = {"kl": ["teacher"], "rkl": ["student"]}.get(preset, ["teacher", "student"])
    mixture = [CacheShare(cache=side, weight=1, prefixes=side) for side in sides]
    losses = losses_of(LossConfig(preset=preset, options=dict(options)), mixture)
    total = 0.0
    for side, loss in zip(sides, losses, strict=True):
        terms = loss.at(0, 1)
        author = teacher if side == "teacher" else student
        for prefix, logits in student.items():
            targets = reference.targets_of(teacher[prefix][None], [[0, 1, 2]], 1.0)
            value = sparse_divergence(logits[None], targets, **terms.divergence())
            weight = terms.kd_weight * math.exp(log_prob(author, prefix)) / len(sides)
            total += weight * float(value)
    return total


@pytest.fixture(params=range(4))
def pair(request: pytest.FixtureRequest) -> tuple[Tables, Tables]:
    return tables(request.param), tables(100 + request.param)


def test_kl_and_rkl_are_their_sums_of_steps(pair: tuple[Tables, Tables]) -> None:
    """Exactly: each over the prefixes of its first argument."""
    teacher, student = pair
    log_p, log_q = sequences(teacher), sequences(student)
    kl = (log_p.exp() * (log_p - log_q)).sum()
    rkl = (log_q.exp() * (log_q - log_p)).sum()
    assert step_wise("kl", *pair) == pytest.approx(float(kl), rel=1e-6)
    assert step_wise("rkl", *pair) == pytest.approx(float(rkl), rel=1e-6)


def test_js_is_bounded_by_its_sum_of_steps(pair: tuple[Tables, Tables]) -> None:
    """The mean of conditionals stands for the conditional of the mean, which would be exact."""
    teacher, student = pair
    log_p, log_q = sequences(teacher), sequences(student)
    log_m = torch.logaddexp(log_p, log_q) - math.log(2)
    js = 0.5 * (log_p.exp() * (log_p - log_m)).sum() + 0.5 * (log_q.exp() * (log_q - log_m)).sum()
    exact = 0.0
    for prefix, logits in student.items():
        before = [math.exp(log_prob(model, prefix)) for model in pair]
        p, q = teacher[prefix].softmax(0), logits.softmax(0)
        m = (before[0] * p + before[1] * q) / sum(before)
        exact += 0.5 * before[0] * float((p * (p / m).log()).sum())
        exact += 0.5 * before[1] * float((q * (q / m).log()).sum())
    assert exact == pytest.approx(float(js), rel=1e-9)
    assert float(js) < step_wise("js", *pair)
    assert step_wise("js", teacher, teacher) == pytest.approx(0, abs=1e-6)


def test_tvd_is_bounded_by_its_sum_of_steps(pair: tuple[Tables, Tables]) -> None:
    """A quarter of the sums of |q - p| on either side's prefixes, which the paper proves."""
    teacher, student = pair
    tvd = 0.5 * (sequences(teacher).exp() - sequences(student).exp()).abs().sum()
    quarters = 0.0
    for author in pair:
        for prefix, logits in student.items():
            gap = (logits.softmax(0) - teacher[prefix].softmax(0)).abs().sum()
            quarters += 0.25 * math.exp(log_prob(author, prefix)) * float(gap)
    found = step_wise("tvd", *pair)
    assert found == pytest.approx(quarters, rel=1e-6)
    assert float(tvd) < found


def test_the_contrastive_pair_is_skewed_kls_of_either_side(pair: tuple[Tables, Tables]) -> None:
    """Against whole distributions: the forward one on the teacher's text, with weight 2 - beta."""
    teacher, student = pair
    lam, beta = 0.2, 1.4
    expected = 0.0
    for prefix, logits in student.items():
        p, q = teacher[prefix].softmax(0), logits.softmax(0)
        forward = (p * (p / (lam * p + (1 - lam) * q)).log()).sum()
        reverse = (q * (q / ((1 - lam) * p + lam * q)).log()).sum()
        expected += 0.5 * (2 - beta) * math.exp(log_prob(teacher, prefix)) * float(forward)
        expected += 0.5 * beta * math.exp(log_prob(student, prefix)) * float(reverse)
    found = step_wise("contrastive", *pair, lam=lam, beta=beta)
    assert found == pytest.approx(expected, rel=1e-6)
