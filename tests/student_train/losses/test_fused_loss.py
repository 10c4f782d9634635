"""The fused head against the plain head and loss: same numbers, same gradients, no [N, V].

One file, as every claim is made of the same heads and targets.
"""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from decant.student_train.losses import (
    DIVERGENCES,
    TAIL_MODES,
    SparseTargets,
    fused_linear_divergence,
    sparse_divergence,
)
from decant.student_train.losses.divergences import outside_means
from tests.support import dense_reference as reference

CASES = [
    (kind, tail) for kind in DIVERGENCES for tail in TAIL_MODES if reference.allows(kind, tail, {})
]
"""Kinds with the tail modes that they go with."""


class Problem:
    """Hidden states, a head and targets, small enough to also go the plain way."""

    def __init__(
        self,
        *,
        seed: int = 0,
        num_targets: int = 7,
        vocab_size: int = 23,
        hidden_size: int = 8,
        num_kept: list[int] | None = None,
        temperature: float = 1.0,
        padding: int = 0,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        num_kept = num_kept or [1 + row % 5 for row in range(num_targets)]
        teacher = normal(num_targets, vocab_size) * 2
        self.temperature = temperature
        self.vocab_size = vocab_size
        self.chunk_size = 3
        self.targets = reference.targets_of(
            teacher, reference.top_kept(teacher, num_kept), temperature, num_slots=max(num_kept) + 1
        )
        self.hidden = normal(num_targets, hidden_size).to(dtype)
        self.weight = normal(vocab_size + padding, hidden_size).to(dtype)
        self.bias = normal(vocab_size + padding).to(dtype)
        self.labels = torch.randint(0, vocab_size, (num_targets,), generator=generator)
        self.labels[::3] = -100
        self.labels[1] = self.targets.token_ids[1, 0]

    def leaves(self, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Return fresh leaves of hidden states, head and bias."""
        parts = (self.hidden, self.weight, self.bias)
        return tuple(t.detach().to(dtype or t.dtype).clone().requires_grad_() for t in parts)  # type: ignore[return-value]

    def plain_loss(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        kind: str,
        *,
        kd_weight: float = 1.0,
        ce_weight: float = 0.0,
        logit_scale: float = 1.0,
        softcap: float | None = None,
        num_targets: float | None = None,
        targets: SparseTargets | None = None,
        **options: Any,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return (loss, kd, ce) with all logits in memory."""
        logits = F.linear(hidden, weight, bias) * logit_scale
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        logits = logits[:, : self.vocab_size]
        count = num_targets or len(hidden)
        kd = sparse_divergence(
            logits, targets or self.targets, kind, self.temperature, **options
        ).sum()
        logits = logits if logits.dtype == torch.float64 else logits.float()
        ce = F.cross_entropy(logits, self.labels, ignore_index=-100, reduction="sum")
        return (kd_weight * kd + ce_weight * ce) / count, kd / count, ce / count

    def fused_loss(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, kind: str, **arguments: Any
    ) -> Any:
        """Return the FusedLoss, in chunks of three rows unless said otherwise."""
        return fused_linear_divergence(
            hidden,
            weight,
            arguments.pop("targets", self.targets),
            arguments.pop("labels", self.labels),
            kind,
            temperature=self.temperature,
            bias=bias,
            chunk_size=arguments.pop("chunk_size", self.chunk_size),
            vocab_size=self.vocab_size,
            **arguments,
        )


def assert_fused_is_plain(problem: Problem, kind: str, **arguments: Any) -> None:
    """Compare loss, parts and every gradient at float32 rounding, backward through a factor."""
    ours, theirs = problem.leaves(), problem.leaves()
    fused = problem.fused_loss(*ours, kind, **arguments)
    plain, kd, ce = problem.plain_loss(*theirs, kind, **arguments)
    torch.testing.assert_close(fused.loss, plain, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(fused.kd, kd.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(fused.ce, ce.detach(), rtol=1e-5, atol=1e-6)
    assert not fused.kd.requires_grad and not fused.ce.requires_grad
    (3.0 * fused.loss).backward()
    (3.0 * plain).backward()
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.grad is not None and other.grad is not None
        tolerance = 1e-5 * max(1.0, other.grad.abs().max().item())
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-5, atol=tolerance)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize(("kind", "tail"), CASES)
def test_fused_equals_unfused(kind: str, tail: str, temperature: float) -> None:
    """Loss, parts and the gradients of hidden states, head and bias are those of the plain way."""
    assert_fused_is_plain(
        Problem(temperature=temperature),
        kind,
        tail=tail,
        kd_weight=0.7,
        ce_weight=0.3,
        **reference.SMALL.get(kind, {}),
    )


@pytest.mark.parametrize(
    "arguments",
    [
        {"ce_weight": 0.0},
        {"kd_weight": 0.0, "ce_weight": 1.0},
        {"logit_scale": 0.25, "ce_weight": 0.5},
        {"softcap": 3.0, "ce_weight": 0.5},
        {"softcap": 3.0, "logit_scale": 0.5, "ce_weight": 0.5, "tail": "uniform"},
        {"num_targets": 1000, "ce_weight": 0.5},
        {"scale_by_t2": False, "ce_weight": 0.5},
        {"chunk_size": 1},
        {"chunk_size": 100},
        {"chunk_size": None},
    ],
    ids=str,
)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_every_argument_means_the_same(arguments: dict[str, Any], temperature: float) -> None:
    """Weights, scale, softcap, count, T² switch and chunk size agree with the plain way."""
    plain = {name: value for name, value in arguments.items() if name != "chunk_size"}
    problem = Problem(temperature=temperature, padding=4)
    ours, theirs = problem.leaves(), problem.leaves()
    problem.fused_loss(*ours, "akl", **arguments).loss.backward()
    problem.plain_loss(*theirs, "akl", **plain)[0].backward()
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-5, atol=1e-5)


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_fused_equals_unfused_in_any_shape(data: st.DataObject) -> None:
    """Ragged rows, k = V, padding rows of the head, masked labels and any chunk change nothing."""
    vocab_size = data.draw(st.integers(2, 12))
    num_kept = data.draw(st.lists(st.integers(1, vocab_size), min_size=2, max_size=6))
    problem = Problem(
        seed=data.draw(st.integers(0, 2**20)),
        num_targets=len(num_kept),
        vocab_size=vocab_size,
        num_kept=num_kept,
        temperature=data.draw(st.sampled_from([1.0, 1.7])),
        padding=data.draw(st.integers(0, 3)),
    )
    labels = st.one_of(st.just(-100), st.integers(0, vocab_size - 1))
    problem.labels = torch.tensor([data.draw(labels) for _ in num_kept])
    problem.chunk_size = data.draw(st.integers(1, len(num_kept) + 1))
    cases = [case for case in CASES if case[0] not in ("akl", "tail_kl")]
    kind, tail = data.draw(st.sampled_from(cases))
    assert_fused_is_plain(problem, kind, tail=tail, ce_weight=0.5)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("kind", DIVERGENCES)
def test_peaked_logits_stay_finite(kind: str, temperature: float) -> None:
    """Logits thousands of nats apart give finite losses and gradients, as do r = 0 and k = V."""
    everything = Problem(num_kept=[23] * 7, temperature=temperature)
    for problem in (Problem(temperature=temperature), everything):
        for factor in (1.0, 5_000.0):
            leaves = problem.leaves()
            out = problem.fused_loss(
                leaves[0] * factor,
                *leaves[1:],
                kind,
                ce_weight=0.5,
                **reference.SMALL.get(kind, {}),
            )
            loss = out.loss
            loss.backward()
            assert loss.isfinite()
            assert all(leaf.grad.isfinite().all() for leaf in leaves if leaf.grad is not None)


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_bf16_is_no_worse_than_dense_bf16(kind: str) -> None:
    """Against float64 truth, fused bf16 errs no more than the plain way on the same bf16 inputs."""
    problem = Problem(
        num_targets=64, vocab_size=300, hidden_size=32, num_kept=[16] * 64, dtype=torch.bfloat16
    )
    problem.weight *= 0.2
    ours, theirs, true = problem.leaves(), problem.leaves(), problem.leaves(torch.float64)
    fused = problem.fused_loss(*ours, kind, ce_weight=0.5).loss
    plain = problem.plain_loss(*theirs, kind, ce_weight=0.5)[0]
    truth = problem.plain_loss(*true, kind, ce_weight=0.5)[0]
    assert fused.dtype == torch.float32
    assert (fused - truth).abs() <= 1.05 * (plain - truth).abs() + 1e-5
    for loss in (fused, plain, truth):
        loss.backward()
    for mine, other, right in zip(ours, theirs, true, strict=True):
        assert mine.grad is not None and other.grad is not None and right.grad is not None
        assert mine.grad.dtype == torch.bfloat16
        error = (mine.grad.double() - right.grad).norm()
        assert error <= 1.05 * (other.grad.double() - right.grad).norm()


def test_autocast_computes_products_in_its_dtype_and_keeps_float32_gradients() -> None:
    """Under autocast the fused head equals the plain head under autocast, to bf16 rounding."""
    problem = Problem(num_targets=32, vocab_size=100, num_kept=[8] * 32)
    ours, theirs = problem.leaves(), problem.leaves()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        fused = problem.fused_loss(*ours, "fkl", ce_weight=0.5).loss
        plain = problem.plain_loss(*theirs, "fkl", ce_weight=0.5)[0]
    fused.backward()
    plain.backward()
    torch.testing.assert_close(fused, plain, rtol=1e-2, atol=0)
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.grad is not None and other.grad is not None
        assert mine.grad.dtype == torch.float32
        assert (mine.grad - other.grad).norm() < 0.01 * other.grad.norm()


class Tied(nn.Module):
    """An embedding that is also the head."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(23, 8)
        self.body = nn.Linear(8, 8)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return hidden states."""
        return torch.tanh(self.body(self.embedding(tokens)))


def test_tied_embeddings_get_both_gradients() -> None:
    """A head that is also the embedding collects both gradients."""
    problem = Problem()
    tokens = torch.randint(0, 23, (7,))
    ours = Tied()
    theirs = copy.deepcopy(ours)
    problem.fused_loss(ours(tokens), ours.embedding.weight, None, "fkl").loss.backward()
    problem.plain_loss(theirs(tokens), theirs.embedding.weight, None, "fkl")[0].backward()
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("inside", ["body", "body and loss"])
def test_gradient_checkpointing_changes_nothing(inside: str, use_reentrant: bool) -> None:
    """Recomputing what comes before the loss, or the loss with it, gives the same gradients."""
    problem = Problem()
    tokens = torch.randint(0, 23, (7,)).float()  # reentrant checkpoints want an input with gradient
    ours, theirs = Tied(), Tied()
    theirs.load_state_dict(ours.state_dict())

    def body(model: Tied, tokens: Tensor) -> Tensor:
        return model(tokens.long())

    def loss(model: Tied, tokens: Tensor) -> Tensor:
        return problem.fused_loss(
            body(model, tokens), model.embedding.weight, None, "akl", ce_weight=0.5
        ).loss

    recomputed = functools.partial(checkpoint, use_reentrant=use_reentrant)
    wanted = tokens.clone().requires_grad_()
    if inside == "body":
        hidden = recomputed(body, ours, wanted)
        value = problem.fused_loss(hidden, ours.embedding.weight, None, "akl", ce_weight=0.5).loss
    else:
        value = recomputed(loss, ours, wanted)
    value.backward()
    plain = loss(theirs, tokens)
    plain.backward()
    torch.testing.assert_close(value, plain)
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad)


@pytest.mark.parametrize("wanted", [0, 1, 2])
def test_only_wanted_gradients_are_computed(wanted: int) -> None:
    """A frozen head costs no head gradient; hidden states without gradient cost none either."""
    problem = Problem()
    products: list[str] = []

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            if func.overloadpacket.__name__ in ("mm", "addmm", "addmm_"):
                products.append(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    leaves, plain = problem.leaves(), problem.leaves()
    for index in {0, 1, 2} - {wanted}:
        leaves[index].requires_grad_(False)
    with Count():
        problem.fused_loss(*leaves, "rkl", ce_weight=0.5).loss.backward()
    problem.plain_loss(*plain, "rkl", ce_weight=0.5)[0].backward()
    torch.testing.assert_close(leaves[wanted].grad, plain[wanted].grad, rtol=1e-5, atol=1e-5)
    num_chunks = 3
    assert products.count("addmm_") == (num_chunks if wanted == 1 else 0)
    assert products.count("mm") == num_chunks * (2 if wanted == 0 else 1)


def test_without_gradients_only_the_value_is_computed() -> None:
    """Under no_grad, or with nothing that requires one, the loss carries no gradient."""
    problem = Problem()
    with torch.no_grad():
        value = problem.fused_loss(*problem.leaves(), "fkl").loss
    frozen = problem.fused_loss(problem.hidden, problem.weight, problem.bias, "fkl").loss
    assert not value.requires_grad and not frozen.requires_grad
    assert torch.equal(value, frozen)


def test_microbatches_add_up_to_the_step() -> None:
    """With num_targets of the whole step, losses and gradients of uneven parts add up to it."""
    problem = Problem(num_targets=8)
    whole, parts = problem.leaves(), problem.leaves()
    loss = problem.fused_loss(*whole, "akl", ce_weight=0.5).loss
    loss.backward()
    total = torch.zeros(())
    for rows in (slice(0, 1), slice(1, 6), slice(6, 8)):
        part = problem.fused_loss(
            parts[0][rows],
            *parts[1:],
            "akl",
            ce_weight=0.5,
            targets=problem.targets[rows],
            labels=problem.labels[rows],
            num_targets=8,
        ).loss
        part.backward()
        total += part.detach()
    torch.testing.assert_close(total, loss.detach())
    for mine, other in zip(whole, parts, strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-5, atol=1e-6)


def test_no_targets_give_zero_loss_and_zero_gradients() -> None:
    """An empty microbatch takes part in backward with zeros, so ranks stay in step."""
    problem = Problem()
    hidden, weight, bias = problem.leaves()
    fused = problem.fused_loss(
        hidden[:0], weight, bias, "fkl", targets=problem.targets[:0], labels=problem.labels[:0]
    )
    fused.loss.backward()
    assert fused.loss == 0
    assert weight.grad is not None and weight.grad.abs().sum() == 0


def test_sampled_targets_go_through_the_fused_head() -> None:
    """Importance-weighted targets give the plain way's loss and gradients."""
    problem = Problem(num_kept=[4] * 7)
    draws = torch.tensor([[0, 0, 3, 1, 0]] * 7)
    sampled = SparseTargets(
        problem.targets.token_ids,
        problem.targets.logprobs,
        problem.targets.log_z,
        problem.targets.log_tail,
        draws,
    )
    assert_fused_is_plain(problem, "fkl", targets=sampled, ce_weight=0.5)
    found = problem.fused_loss(*problem.leaves(), "fkl", targets=sampled).outside
    assert outside_means(found.tolist()) == {}


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize(
    "kind_and_tail", [("akl", "bucket"), ("rkl", "renormalize"), ("fkl", "uniform")]
)
def test_the_mass_outside_the_kept_ids_is_that_of_dense_softmaxes(
    kind_and_tail: tuple[str, str], temperature: float
) -> None:
    """The student's and the teacher's, at the loss's temperature, and what is below akl's mu."""
    kind, tail = kind_and_tail
    problem = Problem(temperature=temperature)
    options = {"mu": 0.7} if kind == "akl" else {}
    found = problem.fused_loss(*problem.leaves(), kind, tail=tail, num_targets=14, **options)
    q = torch.softmax(
        F.linear(problem.hidden, problem.weight, problem.bias).double() / temperature, 1
    )
    kept = problem.targets.token_ids
    inside = torch.where(kept >= 0, q.gather(1, kept.clamp(min=0)), 0.0).sum(1)
    teacher = problem.targets.log_tail.double().exp()
    below = float(((1 - teacher) < 0.7).sum()) if kind == "akl" else 0.0
    assert below > 0 or kind != "akl"
    with_mu = 7 if kind == "akl" else 0
    expected = [7, float((1 - inside).sum()), float(teacher.sum()), with_mu, below]
    assert found.outside.tolist() == pytest.approx([x / 14 for x in expected], rel=1e-5)
    assert not found.outside.requires_grad
    assert problem.targets.num_below(0.7, temperature) == (1 - teacher < 0.7).sum()
    means = outside_means(found.outside.tolist())
    assert means["student_tail"] == pytest.approx(float((1 - inside).mean()), rel=1e-5)
    assert ("below_mu" in means) == (kind == "akl")


def test_float16_gradients_survive_a_large_count() -> None:
    """Gradients smaller than float16 can hold reach the head when the loss is scaled up."""
    problem = Problem(dtype=torch.float16)
    ours, true = problem.leaves(), problem.leaves(torch.float64)
    arguments: dict[str, Any] = {"num_targets": 10**7}
    (65536.0 * problem.fused_loss(*ours, "fkl", **arguments).loss).backward()
    (65536.0 * problem.plain_loss(*true, "fkl", **arguments)[0]).backward()
    for mine, right in zip(ours, true, strict=True):
        assert mine.grad is not None and right.grad is not None
        assert (mine.grad.double() - right.grad).norm() < 0.01 * right.grad.norm()


def test_backward_twice_is_refused() -> None:
    """A second backward raises instead of returning gradients already changed in place."""
    problem = Problem()
    loss = problem.fused_loss(*problem.leaves(), "fkl").loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="ran twice"):
        loss.backward()


def test_no_tensor_of_all_logits_is_made() -> None:
    """No tensor larger than a chunk's logits is made, in forward or backward."""
    problem = Problem(num_targets=64, vocab_size=200, hidden_size=4, num_kept=[8] * 64)
    leaves = problem.leaves()
    sizes: list[int] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            result = func(*args, **(kwargs or {}))
            sizes.append(result.numel() if isinstance(result, Tensor) else 0)
            return result

    with Watch():
        problem.fused_loss(*leaves, "akl", ce_weight=0.5, chunk_size=8).loss.backward()
    assert max(sizes) == 8 * 200


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"labels": None, "ce_weight": 0.5}, "ce_weight=0.5 needs labels"),
        ({"labels": torch.zeros(3, dtype=torch.int64)}, r"labels must be \[7\], got \(3,\)"),
        ({"labels": torch.full((7,), 23)}, "label 23 is neither -100 nor within .* of 23"),
        ({"labels": torch.full((7,), -1)}, "label -1 is neither -100"),
        ({"num_targets": 0}, "num_targets must be > 0, got 0"),
        ({"chunk_size": 0}, "chunk_size must be > 0, got 0"),
        ({"softcap": -1.0}, "softcap must be > 0, got -1.0"),
        ({"mu": 0.5}, "fkl has no option mu"),
    ],
)
def test_wrong_arguments_are_refused(arguments: dict[str, Any], message: str) -> None:
    """Impossible arguments are refused with their values."""
    problem = Problem()
    with pytest.raises(ValueError, match=message):
        problem.fused_loss(*problem.leaves(), "fkl", **arguments)


def test_mismatched_tensors_are_refused() -> None:
    """Shapes and dtypes that do not fit are named."""
    problem = Problem()
    hidden, weight, bias = problem.leaves()
    with pytest.raises(ValueError, match=r"\(7, 5\) and \(23, 8\)"):
        problem.fused_loss(hidden[:, :5], weight, bias, "fkl")
    with pytest.raises(ValueError, match="6 hidden states but 7 targets"):
        problem.fused_loss(hidden[:6], weight, bias, "fkl")
    with pytest.raises(ValueError, match=r"bias must be \[23\], got \(8,\)"):
        problem.fused_loss(hidden, weight, bias[:8], "fkl")
    with pytest.raises(ValueError, match=r"hidden is torch\.float32 but weight torch\.bfloat16"):
        problem.fused_loss(hidden, weight.bfloat16(), bias, "fkl")


def test_without_labels_the_loss_is_the_divergence_alone() -> None:
    """Labels may be left out: ce is 0 and the loss is kd."""
    problem = Problem(temperature=2.0)
    fused = problem.fused_loss(*problem.leaves(), "fkl", labels=None)
    assert fused.ce == 0
    assert torch.equal(fused.loss.detach(), fused.kd)
