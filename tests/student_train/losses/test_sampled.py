"""opd: the loss of sampled tokens follows the reverse KL, and PPO's clip where it has one."""

import math

import pytest
import torch
from torch import Tensor

from decant.student_train.losses import (
    EventTargets,
    SparseTargets,
    fused_linear_divergence,
    sparse_divergence,
)
from tests.support import dense_reference as reference

VOCAB_SIZE = 7


def opd_gradient(logits: Tensor, teacher: Tensor, tokens: Tensor, **options: float) -> Tensor:
    """[N, V] gradient of the loss of each of the tokens with respect to its logits."""
    leaf = logits.clone().requires_grad_()
    log_p = teacher.log_softmax(1).gather(1, tokens[:, None])[:, 0]
    targets = SparseTargets.of_labels(tokens, log_p)
    (gradient,) = torch.autograd.grad(
        sparse_divergence(leaf, targets, "opd", **options).sum(), leaf
    )
    return gradient


def rkl_gradient(logits: Tensor, teacher: Tensor) -> Tensor:
    """[N, V] exact gradient of KL(q‖p), by autograd on whole distributions."""
    leaf = logits.clone().requires_grad_()
    log_q, log_p = leaf.log_softmax(1), teacher.log_softmax(1)
    (gradient,) = torch.autograd.grad((log_q.exp() * (log_q - log_p)).sum(), leaf)
    return gradient


def test_the_expected_gradient_over_all_tokens_is_that_of_the_reverse_kl() -> None:
    """Summed over the vocabulary with the student's probabilities: exactly, and so is the value."""
    logits = reference.random_logits(0, 1, VOCAB_SIZE)
    teacher = reference.random_logits(1, 1, VOCAB_SIZE)
    q = logits.softmax(1)[0]
    every = torch.arange(VOCAB_SIZE)
    rows, theirs = logits.expand(VOCAB_SIZE, -1), teacher.expand(VOCAB_SIZE, -1)
    expected = (q[:, None] * opd_gradient(rows, theirs, every)).sum(0)
    torch.testing.assert_close(expected, rkl_gradient(logits, teacher)[0], rtol=1e-12, atol=1e-12)
    log_p = teacher.log_softmax(1)[0]
    values = sparse_divergence(rows, SparseTargets.of_labels(every, log_p), "opd")
    exact = (q * (q.log() - log_p)).sum()
    torch.testing.assert_close((q * values).sum(), exact, rtol=1e-12, atol=1e-12)


def test_the_mean_over_samples_is_unbiased_within_its_confidence_interval() -> None:
    """Of 40,000 tokens sampled from the student: within 4 standard errors in every component."""
    logits = reference.random_logits(2, 1, VOCAB_SIZE)
    teacher = reference.random_logits(3, 1, VOCAB_SIZE)
    count = 40_000
    generator = torch.Generator().manual_seed(0)
    tokens = torch.multinomial(logits.softmax(1)[0], count, replacement=True, generator=generator)
    found = opd_gradient(logits.expand(count, -1), teacher.expand(count, -1), tokens)
    error = found.std(0) / math.sqrt(count)
    assert ((found.mean(0) - rkl_gradient(logits, teacher)[0]).abs() < 4 * error).all()
    assert (error < 0.02).all()


@pytest.mark.parametrize("clip", [0.2, 0.05])
def test_the_clip_is_that_of_ppo_on_both_sides(clip: float) -> None:
    """Value and gradient against the textbook's min, with ratios within and beyond either bound."""
    generator = torch.Generator().manual_seed(5)
    n = 64
    logits = reference.random_logits(4, n, VOCAB_SIZE)
    tokens = torch.randint(0, VOCAB_SIZE, (n,), generator=generator)
    log_q = logits.log_softmax(1).gather(1, tokens[:, None])[:, 0]
    log_p = log_q + torch.randn(n, generator=generator, dtype=torch.float64)
    sampler = log_q + 0.3 * torch.randn(n, generator=generator, dtype=torch.float64)
    log_p, sampler = log_p.clamp(max=-1e-3), sampler.clamp(max=-1e-3)
    ours, theirs = (logits.clone().requires_grad_() for _ in range(2))
    targets = SparseTargets.of_labels(tokens, log_p, sampler)
    found = sparse_divergence(ours, targets, "opd", clip=clip)
    current = theirs.log_softmax(1)[torch.arange(n), tokens]
    losses, sides = [], set()
    for row in range(n):
        advantage = float(log_p[row] - current[row].detach())
        ratio = (current[row] - sampler[row]).exp()
        bounded = min(max(float(ratio.detach()), 1 - clip), 1 + clip)
        is_bound = bounded * advantage < float(ratio.detach()) * advantage
        sides.add((is_bound, advantage > 0))
        losses.append(-bounded * advantage if is_bound else -ratio * advantage)
    assert len(sides) == 4  # clipped and not, with either sign
    expected = torch.stack([torch.as_tensor(loss, dtype=torch.float64) for loss in losses])
    torch.testing.assert_close(found, expected)
    gradients = [
        torch.autograd.grad(loss, leaf)[0]
        for loss, leaf in (
            (found.sum(), ours),
            (sum(x for x in losses if isinstance(x, Tensor)), theirs),
        )
    ]
    torch.testing.assert_close(gradients[0], gradients[1])


def test_a_clip_counts_for_nothing_on_the_samplers_own_tokens() -> None:
    """At ratio 1 value and gradient are those without a ratio."""
    logits = reference.random_logits(6, 5, VOCAB_SIZE)
    tokens = torch.tensor([0, 3, 6, 2, 2])
    log_q = logits.log_softmax(1).gather(1, tokens[:, None])[:, 0]
    log_p = reference.random_logits(7, 5, VOCAB_SIZE).log_softmax(1)[torch.arange(5), tokens]
    results = []
    for clip in (0.0, 0.2):
        leaf = logits.clone().requires_grad_()
        loss = sparse_divergence(
            leaf, SparseTargets.of_labels(tokens, log_p, log_q), "opd", clip=clip
        )
        results.append((loss.detach(), *torch.autograd.grad(loss.sum(), leaf)))
    torch.testing.assert_close(results[0], results[1])


@pytest.mark.parametrize("clip", [0.0, 0.1])
def test_the_fused_head_has_the_loss_of_the_logits(clip: float) -> None:
    """Loss and gradients of hidden states and head, in chunks, beside a cross-entropy."""
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    hidden, head = normal(9, 4), normal(VOCAB_SIZE, 4)
    tokens = torch.randint(0, VOCAB_SIZE, (9,), generator=generator)
    targets = SparseTargets.of_labels(tokens, -normal(9).abs(), -normal(9).abs())
    results = []
    for is_fused in (True, False):
        h, w = hidden.clone().requires_grad_(), head.clone().requires_grad_()
        if is_fused:
            loss = fused_linear_divergence(
                h, w, targets, tokens, "opd", ce_weight=0.3, chunk_size=2, clip=clip
            ).loss
        else:
            logits = h @ w.T
            kd = sparse_divergence(logits, targets, "opd", clip=clip)
            ce = torch.nn.functional.cross_entropy(logits, tokens, reduction="none")
            loss = (kd + 0.3 * ce).mean()
        results.append((loss.detach(), *torch.autograd.grad(loss, (h, w))))
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-5)


def test_what_opd_cannot_be_had_of_is_refused() -> None:
    """A cut-off label, another temperature, a clip without sampler, whole distributions, chunks."""
    logits = torch.zeros(2, VOCAB_SIZE)
    tokens, known = torch.tensor([1, 2]), torch.tensor([-1.0, -2.0])
    targets = SparseTargets.of_labels(tokens, known)
    cut = SparseTargets.of_labels(tokens, torch.tensor([-1.0, -torch.inf]))
    with pytest.raises(ValueError, match=r"target 1 of 2: .*finite, got -inf.*label_logprob"):
        sparse_divergence(logits, cut, "opd")
    unknown = SparseTargets.of_labels(tokens, known, torch.tensor([-1.0, torch.nan]))
    with pytest.raises(ValueError, match=r"target 1 of 2: the sampler's log prob .* got nan"):
        sparse_divergence(logits, unknown, "opd", clip=0.2)
    with pytest.raises(ValueError, match="temperature 2 has no meaning, leave it at 1"):
        sparse_divergence(logits, targets, "opd", temperature=2.0)
    with pytest.raises(ValueError, match=r"whose log probs are not given: .*or clip 0"):
        sparse_divergence(logits, targets, "opd", clip=0.2)
    with pytest.raises(ValueError, match=r"clip must be in \[0, 1\), 0 being off, got 1"):
        sparse_divergence(logits, targets, "opd", clip=1.0)
    with pytest.raises(ValueError, match="looks at the sampled token alone: tail='uniform'"):
        sparse_divergence(logits, targets, "opd", tail="uniform")
    teacher = reference.random_logits(0, 2, VOCAB_SIZE)
    whole = reference.targets_of(teacher, [[0, 1], [1, 2]], 1.0)
    with pytest.raises(ValueError, match=r"of the sampled token alone: give .*of_labels"):
        sparse_divergence(logits, whole, "opd")
    chunk = EventTargets(
        token_ids=tokens[:, None][:1],
        log_p=known[:1, None],
        log_rest=torch.log1p(-known[:1].exp()),
        labels=tokens,
        sizes=torch.tensor([2]),
    )
    with pytest.raises(ValueError, match="of the sampled token alone"):
        sparse_divergence(logits, chunk, "opd")
