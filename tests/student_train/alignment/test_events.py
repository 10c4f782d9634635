"""Events of chunks, and losses of them, against a reference that enumerates what may be said."""

import dataclasses

import numpy as np
import pytest
import torch

from decant.student_train.alignment.events import Events, Matching, events_of
from decant.student_train.alignment.pieces import Aligned
from decant.student_train.losses import DIVERGENCES, EventTargets, sparse_divergence
from decant.student_train.losses.kinds import RANKINGS
from tests.support import alignments, caches
from tests.support.alignments import STUDENT, TEACHER
from tests.support.dense_reference import divergence

MATCHING = Matching(alignments.table(TEACHER), alignments.table(STUDENT))
WITH_CONSTANTS = ("akl", "acceptance_hybrid")
WITH_CORNERS = ("tvd", "acceptance", "acceptance_hybrid")
"""Kinds that have no gradient where both sides are equal, but a corner."""
KEPT = (0, 1, 4, len(TEACHER))


class Problem:
    """A random text in two random tokenisations, with dense distributions of both sides."""

    def __init__(self, seed: int, k: int, length: int = 24) -> None:
        generator = np.random.default_rng(seed)
        text = "".join(generator.choice(list("abc"), length))
        self.k = k
        self.teacher_ids = [*alignments.split(text, TEACHER, generator), TEACHER.index("<end>")]
        self.student_ids = [*alignments.split(text, STUDENT, generator), STUDENT.index("<end>")]
        self.log_p = caches.random_logprobs(generator, len(self.teacher_ids), len(TEACHER), 2.0)
        self.log_q = caches.random_logprobs(generator, len(self.student_ids), len(STUDENT), 2.0)
        self.both: Aligned = alignments.both_of(self.teacher_ids, self.student_ids, MATCHING)
        rows = alignments.rows_of(self.teacher_ids, self.log_p, k)
        self.events: Events = events_of(
            self.both, alignments.at_ends(self.both, rows), rows.label_logprob, MATCHING
        )
        self.targets: EventTargets = alignments.event_targets(self.both, self.events)

    def classes(self) -> list[tuple[list[float], list[float]]]:
        """What the reference says of each chunk."""
        chunks = self.both.chunks
        spans = zip(
            chunks.teacher_first,
            chunks.num_teacher,
            chunks.student_first,
            chunks.num_student,
            strict=True,
        )
        return [
            alignments.reference_classes(
                self.teacher_ids[t : t + m],
                self.student_ids[s : s + n],
                self.log_p[t : t + m],
                self.log_q[s : s + n],
                self.k,
            )
            for t, m, s, n in spans
        ]


@pytest.mark.parametrize("k", KEPT)
@pytest.mark.parametrize("seed", range(6))
def test_events_and_rest_have_the_masses_of_enumerated_strings(seed: int, k: int) -> None:
    """P of every event and of the rest, in float64; they add up to 1 to 1e-12."""
    problem = Problem(seed, k)
    events = problem.events
    assert len(problem.both.chunks) > 3
    for chunk, (p, _) in enumerate(problem.classes()):
        used = events.token_ids[chunk] >= 0
        found = np.exp(np.append(np.sort(events.log_p[chunk][used])[::-1], events.log_rest[chunk]))
        np.testing.assert_allclose(found, p, rtol=0, atol=1e-12)
        assert abs(found.sum() - 1) < 1e-12


@pytest.mark.parametrize("kind", DIVERGENCES)
@pytest.mark.parametrize("k", KEPT)
def test_losses_are_those_of_enumerated_classes(kind: str, k: int) -> None:
    """Of every kind, chunk by chunk; in the last row of each, the others having 0."""
    for seed in range(3):
        problem = Problem(seed, k)
        loss = sparse_divergence(torch.from_numpy(problem.log_q), problem.targets, kind)
        last = problem.targets.last_rows
        for found, (p, q) in zip(loss[last].tolist(), problem.classes(), strict=True):
            expected = divergence(
                kind,
                torch.tensor(p, dtype=torch.float64),
                torch.tensor(q, dtype=torch.float64),
                has_bucket=True,
            )
            assert found == pytest.approx(float(expected), abs=1e-9, rel=1e-9)
        assert float(loss.sum()) == pytest.approx(float(loss[last].sum()), abs=1e-12)


@pytest.mark.parametrize("kind", [kind for kind in DIVERGENCES if kind not in WITH_CONSTANTS])
def test_gradients_are_those_of_the_values(kind: str) -> None:
    """By finite differences in float64, over chunks of one and of several rows.

    Not of kinds whose weights are constants to the gradient.
    """
    problem = Problem(2, 4, length=9)
    assert int(problem.targets.sizes.max()) > 1
    logits = torch.from_numpy(problem.log_q).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: sparse_divergence(x, problem.targets, kind), logits, atol=1e-6
    )


@pytest.mark.parametrize("kind", [kind for kind in DIVERGENCES if kind not in RANKINGS])
def test_a_student_that_agrees_on_every_event_has_loss_zero(kind: str) -> None:
    """And gradient zero; whatever it says elsewhere. Every perturbation of it costs something."""
    problem = Problem(1, len(TEACHER))
    agreeing = agreeing_logits(problem).requires_grad_()
    loss = sparse_divergence(agreeing, problem.targets, kind)
    (gradient,) = torch.autograd.grad(loss.sum(), agreeing)
    assert float(loss.detach().abs().max()) < 1e-9
    if kind not in WITH_CORNERS:
        assert float(gradient.abs().max()) < 1e-9
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        noise = torch.randn(agreeing.shape, generator=generator, dtype=torch.float64)
        perturbed = sparse_divergence(agreeing.detach() + noise, problem.targets, kind)
        assert float(perturbed.sum()) > 1e-4


def agreeing_logits(problem: Problem) -> torch.Tensor:
    """A student whose classes are the teacher's: rows before the last leave as the teacher does."""
    targets, events = problem.targets, problem.events
    logits = torch.zeros(len(targets), len(STUDENT), dtype=torch.float64)
    row = 0
    for chunk, size in enumerate(targets.sizes.tolist()):
        used = events.token_ids[chunk] >= 0
        ids = torch.from_numpy(events.token_ids[chunk][used]).long()
        p = torch.from_numpy(np.exp(events.log_p[chunk][used]))
        # Each step before the last keeps to the label with the same probability.
        before = (1 - float(np.exp(events.log_rest[chunk])) / 2) if size > 1 else 1.0
        for step in range(size - 1):
            stays = before ** (1 / (size - 1))
            logits[row + step] = math_rest(1 - stays, len(STUDENT) - 1)
            logits[row + step, int(targets.labels[row + step])] = np.log(stays)
        rest = 1 - float(p.sum()) / before
        logits[row + size - 1] = math_rest(rest, len(STUDENT) - len(ids))
        logits[row + size - 1, ids] = (p / before).log()
        row += size
    return logits


def math_rest(mass: float, number: int) -> float:
    return float(np.log(max(mass, 1e-300) / max(number, 1)))


def test_what_cannot_be_targets_is_refused() -> None:
    """Ids outside, twice or none, masses that do not add up, sizes, another temperature or tail."""
    targets = Problem(0, 4).targets
    logits = torch.zeros(len(targets), len(STUDENT), dtype=torch.float64)
    ids = targets.token_ids
    for changes, message in (
        ({"token_ids": ids + 100}, "outside"),
        ({"token_ids": torch.ones_like(ids)}, "two slots"),
        ({"token_ids": torch.full_like(ids, -1)}, "no event"),
        ({"log_rest": targets.log_rest + 1}, "add up"),
        ({"sizes": targets.sizes + 1}, "sizes must be"),
    ):
        with pytest.raises(ValueError, match=message):
            sparse_divergence(logits, dataclasses.replace(targets, **changes))
    with pytest.raises(ValueError, match="is that of no string"):
        sparse_divergence(logits, targets, temperature=2.0)
    with pytest.raises(ValueError, match="leave tail='bucket'"):
        sparse_divergence(logits, targets, tail="renormalize")
