"""The same losses in TRL, Liger and torch: where they compute ours, the numbers must be the same.

With k = V nothing is left to a tail, so a sparse divergence is the dense one. Where a peer differs,
a test shows the difference that docs/losses.md tells. Liger's Triton kernels run in a process of
their own under Triton's interpreter, which needs no GPU; its chunked losses are plain torch.
"""

from __future__ import annotations

import multiprocessing
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from decant.student_train.losses import (
    SparseTargets,
    fused_linear_divergence,
    sparse_divergence,
)
from tests.support import dense_reference as reference

pytestmark = pytest.mark.filterwarnings("ignore:You are importing from 'trl.experimental'")

NUM_TARGETS, VOCAB_SIZE, HIDDEN_SIZE = 6, 17, 5
BETAS = (0.0, 0.3, 1.0)
TEMPERATURES = (1.0, 2.0)
IGNORED = -100


def normal(seed: int, *shape: int) -> Tensor:
    """Float32 noise wide enough for uneven distributions."""
    return 1.5 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def everything(teacher_logits: Tensor, temperature: float = 1.0) -> SparseTargets:
    """Targets that keep the whole vocabulary."""
    kept = reference.top_kept(teacher_logits, [teacher_logits.shape[1]] * len(teacher_logits))
    return reference.targets_of(teacher_logits, kept, temperature)


def logits() -> tuple[Tensor, Tensor]:
    """The student's, as a leaf, and the teacher's."""
    return normal(4, NUM_TARGETS, VOCAB_SIZE).requires_grad_(), normal(5, NUM_TARGETS, VOCAB_SIZE)


class Heads:
    """A student's and a teacher's hidden states and heads, and labels of which two are masked."""

    def __init__(
        self,
        dtype: torch.dtype = torch.float32,
        num_targets: int = NUM_TARGETS,
        vocab_size: int = VOCAB_SIZE,
    ) -> None:
        self.hidden = normal(0, num_targets, HIDDEN_SIZE).to(dtype).requires_grad_()
        self.weight = normal(1, vocab_size, HIDDEN_SIZE).to(dtype).requires_grad_()
        self.teacher_hidden = normal(2, num_targets, HIDDEN_SIZE).to(dtype)
        self.teacher_weight = normal(3, vocab_size, HIDDEN_SIZE).to(dtype)
        generator = torch.Generator().manual_seed(9)
        self.labels = torch.randint(0, vocab_size, (num_targets,), generator=generator)
        self.labels[[1, 4]] = IGNORED
        self.rows = (self.labels != IGNORED).nonzero().squeeze(1)

    def gradients(self, loss: Tensor) -> list[Tensor]:
        """The loss and its gradients in the student's hidden states and head."""
        return [loss.detach(), *torch.autograd.grad(loss, (self.hidden, self.weight))]


def our_logit_loss(kind: str, temperature: float = 1.0, **options: Any) -> list[Tensor]:
    """Our mean over targets with k = V, without T², and its gradient in the student's logits."""
    student, teacher = logits()
    targets = everything(teacher, temperature)
    loss = sparse_divergence(student, targets, kind, temperature, scale_by_t2=False, **options)
    return [loss.mean().detach(), *torch.autograd.grad(loss.mean(), student)]


def our_fused_loss(
    heads: Heads, temperature: float = 1.0, *, masked: bool = False, **arguments: Any
) -> list[Tensor]:
    """Our fused loss with k = V, without T², and its gradients; `masked` drops masked rows."""
    rows = heads.rows if masked else torch.arange(len(heads.labels))
    scale, cap = arguments.get("logit_scale", 1.0), arguments.get("softcap")
    teacher_logits = scale * (heads.teacher_hidden.float() @ heads.teacher_weight.float().T)
    if cap is not None:
        teacher_logits = cap * torch.tanh(teacher_logits / cap)
    out = fused_linear_divergence(
        heads.hidden[rows],
        heads.weight,
        everything(teacher_logits[rows], temperature),
        heads.labels[rows],
        temperature=temperature,
        scale_by_t2=False,
        chunk_size=2,
        **arguments,
    )
    return heads.gradients(out.loss)


def assert_same(ours: list[Tensor], theirs: list[Tensor], rtol: float = 2e-5) -> None:
    """Compare loss and gradients at float32 rounding."""
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other.to(mine.dtype), rtol=rtol, atol=2e-6)


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("beta", BETAS)
def test_jsd_is_trls(beta: float, temperature: float) -> None:
    """GKDTrainer's generalized JSD is `jsd` without T²; its ends are FKL and RKL."""
    from trl.experimental.gkd import GKDTrainer

    student, teacher = logits()
    loss = GKDTrainer.generalized_jsd_loss(student, teacher, beta=beta, temperature=temperature)
    theirs = [loss.detach(), *torch.autograd.grad(loss, student)]
    assert_same(our_logit_loss("jsd", temperature, beta=beta), theirs)
    if beta != 0.3:
        assert_same(our_logit_loss("rkl" if beta else "fkl", temperature), theirs)


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("softcap", [None, 4.0])
@pytest.mark.parametrize("beta", BETAS)
def test_the_fused_jsd_is_trls(beta: float, softcap: float | None, temperature: float) -> None:
    """DistillationTrainer's chunked divergence, logit scale and softcap included, is ours."""
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    heads, scale = Heads(), 0.5
    student = (heads.hidden, heads.weight, None)
    teacher = (heads.teacher_hidden, heads.teacher_weight, None)
    divergence, _ = ChunkedDivergenceFunction.apply(
        *student, *teacher, beta, temperature, scale, softcap, scale, softcap
    )
    theirs = heads.gradients(divergence.mean())
    options: dict[str, Any] = {"logit_scale": scale, "softcap": softcap}
    assert_same(our_fused_loss(heads, temperature, kind="jsd", beta=beta, **options), theirs)


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize(("add_tail", "tail"), [(True, "bucket"), (False, "renormalize")])
def test_top_k_tails_are_trls(add_tail: bool, tail: str, temperature: float) -> None:
    """IWOPDTrainer's top-k forward KL is `fkl`: with its tail `bucket`, else `renormalize`."""
    from trl.experimental.iw_opd import IWOPDTrainer

    student, teacher = logits()
    loss = IWOPDTrainer.generalized_jsd_loss(
        student, teacher, beta=0.0, temperature=temperature, top_k=5, add_tail=add_tail
    )
    theirs = [loss.detach(), *torch.autograd.grad(loss, student)]
    targets = reference.targets_of(
        teacher, reference.top_kept(teacher, [5] * NUM_TARGETS), temperature
    )
    ours = sparse_divergence(student, targets, "fkl", temperature, tail, scale_by_t2=False).mean()
    assert_same([ours.detach(), *torch.autograd.grad(ours, student)], theirs)


def test_a_confident_students_tail_differs_from_trls() -> None:
    """TRL's tail, 1 - Σq held above 1e-7, is nats off there and without gradient; ours is exact."""
    from trl.experimental.iw_opd import IWOPDTrainer

    teacher = normal(5, 1, VOCAB_SIZE)
    kept = reference.top_kept(teacher, [5])
    student = torch.zeros(1, VOCAB_SIZE).scatter(1, torch.tensor(kept), 30.0).requires_grad_()
    truth = reference.reference_divergence(student, teacher, kept, "fkl").mean()
    ours = sparse_divergence(student, reference.targets_of(teacher, kept), "fkl").mean()
    theirs = IWOPDTrainer.generalized_jsd_loss(student, teacher, beta=0.0, top_k=5)
    right, mine, other = (torch.autograd.grad(loss, student)[0] for loss in (truth, ours, theirs))
    assert ours.item() == pytest.approx(truth.item(), rel=1e-5)
    torch.testing.assert_close(mine, right, rtol=1e-4, atol=1e-7)
    assert abs(theirs.item() - truth.item()) > 0.5
    tail = [v for v in range(VOCAB_SIZE) if v not in kept[0]]
    assert right[:, tail].sum() < -0.1
    assert other[:, tail].abs().sum() < 1e-6


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("beta", BETAS)
def test_the_fused_jsd_and_ce_are_ligers(beta: float, temperature: float) -> None:
    """LigerFusedLinearJSDLoss is ours, cross entropy included, over the rows it does not mask."""
    pytest.importorskip("liger_kernel", reason="liger-kernel is for Linux")
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    heads = Heads()
    theirs = LigerFusedLinearJSDLoss(
        weight_hard_loss=0.4,
        weight_soft_loss=0.6,
        beta=beta,
        temperature=temperature,
        compiled=False,
        chunk_size=2,
    )(heads.hidden, heads.weight, heads.teacher_hidden, heads.teacher_weight, heads.labels)
    ours = our_fused_loss(
        heads, temperature, masked=True, kind="jsd", beta=beta, kd_weight=0.6, ce_weight=0.4
    )
    assert_same(ours, heads.gradients(theirs))


def test_liger_masks_the_divergence_by_label_too() -> None:
    """Label -100 drops a row from Liger's divergence; here from the cross entropy alone."""
    pytest.importorskip("liger_kernel", reason="liger-kernel is for Linux")
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    heads = Heads()
    liger = LigerFusedLinearJSDLoss(0.0, 1.0, beta=0.0, compiled=False)
    theirs = liger(
        heads.hidden, heads.weight, heads.teacher_hidden, heads.teacher_weight, heads.labels
    )
    every_row, some_rows = (our_fused_loss(heads, masked=masked)[0] for masked in (False, True))
    assert theirs.item() == pytest.approx(some_rows.item(), rel=1e-5)
    assert abs(theirs.item() - every_row.item()) > 0.01


def test_liger_gives_probability_to_ids_the_student_lacks() -> None:
    """Liger gives a smaller student logits of 0 for missing ids; here they get no probability."""
    pytest.importorskip("liger_kernel", reason="liger-kernel is for Linux")
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    heads, missing = Heads(), 3
    liger = LigerFusedLinearJSDLoss(0.0, 1.0, beta=0.0, compiled=False)
    labels = heads.labels.clamp(min=0)
    small = heads.weight[:-missing]
    theirs = liger(heads.hidden, small, heads.teacher_hidden, heads.teacher_weight, labels)
    student, teacher = heads.hidden @ small.T, heads.teacher_hidden @ heads.teacher_weight.T
    padded = F.pad(student, (0, missing))
    as_they_do = sparse_divergence(padded, everything(teacher), "fkl").mean()
    torch.testing.assert_close(theirs, as_they_do, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="is beyond the student's vocabulary of 14"):
        sparse_divergence(student, everything(teacher), "fkl")


def test_bf16_gradients_are_closer_to_the_truth_than_ligers() -> None:
    """Liger's bf16 softmax and per-chunk sums in bf16 cost it accuracy; ours are float32."""
    pytest.importorskip("liger_kernel", reason="liger-kernel is for Linux")
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    narrow, wide = (Heads(torch.bfloat16, num_targets=64, vocab_size=200) for _ in range(2))
    for name in ("hidden", "weight", "teacher_hidden", "teacher_weight"):
        tensor = getattr(wide, name).detach().double()
        setattr(wide, name, tensor.requires_grad_(not name.startswith("teacher")))
    loss_of = LigerFusedLinearJSDLoss(0.0, 1.0, beta=0.0, compiled=False, chunk_size=2)
    losses = {}
    for name, heads in (("liger", narrow), ("truth", wide)):
        teacher = (heads.teacher_hidden, heads.teacher_weight, heads.labels)
        losses[name] = heads.gradients(loss_of(heads.hidden, heads.weight, *teacher))
    losses["ours"] = our_fused_loss(narrow, masked=True)
    for part in range(3):
        truth = losses["truth"][part]
        error = {name: (losses[name][part] - truth).norm() for name in ("ours", "liger")}
        assert error["ours"] < error["liger"]
    assert losses["ours"][0].dtype == torch.float32


def test_the_fused_cross_entropy_is_torchs() -> None:
    """Torch's chunked linear cross entropy is our ce, bias and masked labels included."""
    heads, bias = Heads(), normal(6, VOCAB_SIZE)
    theirs = F.linear_cross_entropy(
        heads.hidden,
        heads.weight,
        heads.labels,
        linear_bias=bias,
        options=torch.nn.LinearCrossEntropyOptions(),
    )
    ours = our_fused_loss(
        heads, kd_weight=0.0, ce_weight=1.0, num_targets=len(heads.rows), bias=bias
    )
    assert_same(ours, heads.gradients(theirs))


def kdflow_akl(student: Tensor, teacher: Tensor, temperature: float, alpha: float) -> Tensor:
    """KDFlow's `akl` in plain steps, a target at a time: its package cannot be had from PyPI.

    Its classes ascend in the teacher's probability; the tail is what the first of them have, taken
    together, as long as that is at most alpha. Weights are constants to the gradient.
    """
    losses = []
    for x, y in zip(student / temperature, teacher / temperature, strict=True):
        p, q = y.softmax(0), x.softmax(0)
        tail, mass = [], 0.0
        for c in sorted(range(len(p)), key=lambda c: float(p[c])):
            mass += float(p[c])
            if mass > alpha:
                break
            tail.append(c)
        gap = (p - q).abs().detach()
        share = gap[tail].sum() / gap.sum()
        forward, reverse = (p * (p / q).log()).sum(), (q * (q / p).log()).sum()
        losses.append((1 - share) * forward + share * reverse)
    return torch.stack(losses).mean()


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("alpha", [0.3, 0.5, 0.8])
def test_akl_of_kdflow_is_the_nucleus(alpha: float, temperature: float) -> None:
    """Its adaptive_alpha is the mass of the tail: `akl` with head_rule nucleus and mu = 1 - alpha.

    The authors' rule is another one: some targets have other weights.
    """
    student, teacher = logits()
    loss = kdflow_akl(student, teacher, temperature, alpha)
    theirs = [loss.detach(), *torch.autograd.grad(loss, student)]
    ours = our_logit_loss("akl", temperature, head_rule="nucleus", mu=1 - alpha)
    assert_same(ours, theirs)
    official = our_logit_loss("akl", temperature, head_rule="official", mu=1 - alpha)
    assert (official[1] - theirs[1]).norm() > 1e-3 * theirs[1].norm()


def run_liger_kernels(path: Path) -> None:
    """Save what Liger's Triton kernels give; the interpreter must be on before Triton loads.

    LigerKLDIVLoss, LigerTVDLoss and the softcap of the fused cross entropy do not run in it: they
    cast a Python float, which only the compiler makes a tensor.
    """
    from liger_kernel.ops.fused_ce_tvd import LigerFusedCETVDFunction
    from liger_kernel.transformers import (
        LigerFusedLinearCrossEntropyLoss,
        LigerFusedLinearJSD,
        LigerJSD,
    )
    from liger_kernel.transformers.fused_linear_kl_div import LigerFusedLinearKLDivLoss

    found = {}
    student, teacher = logits()
    for beta in BETAS:
        loss = LigerJSD(beta)(student.log_softmax(1), teacher.log_softmax(1))
        found[f"jsd {beta}"] = [loss.detach(), *torch.autograd.grad(loss, student)]
    every_label = torch.zeros(NUM_TARGETS, dtype=torch.int64)
    loss = LigerFusedCETVDFunction.apply(student, teacher, every_label)[1].mean()
    found["tvd"] = [loss.detach(), *torch.autograd.grad(loss, student)]
    heads = Heads()
    for beta in BETAS:
        loss = LigerFusedLinearJSD(beta, temperature=2.0)(
            heads.hidden, heads.weight, heads.teacher_hidden, heads.teacher_weight, heads.labels
        )
        found[f"fused jsd {beta}"] = heads.gradients(loss)
    teacher_probs = (heads.teacher_hidden @ heads.teacher_weight.T / 2.0).softmax(1)
    loss = LigerFusedLinearKLDivLoss(temperature=2.0)(
        heads.hidden, heads.weight, teacher_probs, heads.labels
    )
    found["fused kl"] = heads.gradients(loss)
    loss = LigerFusedLinearCrossEntropyLoss()(heads.weight, heads.hidden, heads.labels)
    found["fused ce"] = heads.gradients(loss)
    torch.save(found, path)


@pytest.fixture(scope="module")
def liger_kernels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Tensor]]:
    """Losses and gradients of Liger's Triton kernels."""
    path = tmp_path_factory.mktemp("liger") / "found.pt"
    process = multiprocessing.get_context("spawn").Process(target=run_liger_kernels, args=(path,))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        process.start()
    process.join()
    assert process.exitcode == 0
    return torch.load(path)


@pytest.mark.parametrize(
    ("name", "kind", "options"),
    [*((f"jsd {beta}", "jsd", {"beta": beta}) for beta in BETAS), ("tvd", "tvd", {})],
)
def test_divergences_are_ligers_kernels(
    name: str, kind: str, options: dict[str, float], liger_kernels: dict[str, list[Tensor]]
) -> None:
    """LigerJSD and the distance of LigerFusedCETVDLoss are jsd and tvd."""
    assert_same(our_logit_loss(kind, **options), liger_kernels[name])


@pytest.mark.parametrize(
    ("name", "kind", "options"),
    [
        *((f"fused jsd {beta}", "jsd", {"beta": beta}) for beta in BETAS),
        ("fused kl", "fkl", {}),
    ],
)
def test_fused_divergences_are_ligers_kernels(
    name: str, kind: str, options: dict[str, float], liger_kernels: dict[str, list[Tensor]]
) -> None:
    """LigerFusedLinearJSD and -KLDivLoss are ours over the rows they do not mask, without T²."""
    ours = our_fused_loss(Heads(), 2.0, masked=True, kind=kind, **options)
    assert_same(ours, liger_kernels[name])


def test_the_fused_cross_entropy_is_ligers_kernel(liger_kernels: dict[str, list[Tensor]]) -> None:
    """LigerFusedLinearCrossEntropyLoss, masked labels included, is our ce."""
    ours = our_fused_loss(Heads(), masked=True, kd_weight=0.0, ce_weight=1.0)
    assert_same(ours, liger_kernels["fused ce"])
