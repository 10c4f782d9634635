"""The divergences once more, in float64 probability space, one row and one class at a time.

Written from docs/losses.md, sharing no code with student_train.losses: the classes are built by
summing probabilities over the whole vocabulary, never from logsumexps.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from decant.student_train.losses import SparseTargets

SMALL: dict[str, dict[str, float | str]] = {"tail_kl": {"head": 1}}
"""Options of the kinds whose own defaults want more kept ids than a small example has."""


def allows(kind: str, tail: str, options: dict[str, float | str]) -> bool:
    """Whether a kind goes with a tail mode, by the table in docs/losses.md; `label` aside."""
    if tail == "label":
        return False
    if (kind, tail) == ("tail_kl", "uniform"):
        return False
    ranks = kind in ("hinge", "logistic")
    return tail == "bucket" or not (ranks or options.get("bound") == "upper")


def reference_divergence(
    student_logits: Tensor,
    teacher_logits: Tensor,
    kept: list[list[int]],
    kind: str,
    *,
    temperature: float = 1.0,
    tail: str = "bucket",
    scale_by_t2: bool = True,
    labels: list[int] | None = None,
    **options: float | str,
) -> Tensor:
    """Return the divergence of every row, [N] float64, differentiable in the student's logits."""
    losses = []
    every_label = labels or [0] * len(kept)
    for student_row, teacher_row, ids, label in zip(
        student_logits, teacher_logits, kept, every_label, strict=True
    ):
        q = torch.softmax(student_row.double() / temperature, 0)
        p = torch.softmax(teacher_row.double() / temperature, 0)
        classes_p, classes_q = build_classes(p, q, ids, tail, label)
        has_bucket = tail == "bucket" and len(classes_p) > len(ids)
        loss = divergence(kind, classes_p, classes_q, has_bucket, **options)
        losses.append(loss * temperature**2 if scale_by_t2 else loss)
    return torch.stack(losses)


def build_classes(
    p: Tensor, q: Tensor, ids: list[int], tail: str, label: int = 0
) -> tuple[Tensor, Tensor]:
    """Return the class probabilities of both sides that a tail mode compares."""
    others = [v for v in range(len(p)) if v not in set(ids)]
    if tail == "label":
        moved = torch.zeros_like(p)
        moved[ids] = p[ids]
        moved[label] += p[others].sum()
        return moved, q
    if tail == "bucket":
        if not others:
            return p[ids], q[ids]
        return (
            torch.cat([p[ids], p[others].sum().reshape(1)]),
            torch.cat([q[ids], q[others].sum().reshape(1)]),
        )
    if tail == "renormalize":
        return p[ids] / p[ids].sum(), q[ids] / q[ids].sum()
    if tail == "teacher_renormalize":
        return p[ids] / p[ids].sum(), q[ids]
    assert tail == "uniform"
    spread = p.clone()
    if others:
        spread[others] = p[others].sum() / len(others)
    return spread, q


def kl(a: Tensor, b: Tensor) -> Tensor:
    """Return Σ a log(a / b), a class with a = 0 adding nothing."""
    zero = a.new_zeros(())
    return sum((x * (x / y).log() for x, y in zip(a, b, strict=True) if x > 0), start=zero)


def divergence(kind: str, p: Tensor, q: Tensor, has_bucket: bool, **options: float | str) -> Tensor:
    number = {name: value for name, value in options.items() if not isinstance(value, str)}
    if kind == "fkl":
        return kl(p, q)
    if kind == "rkl":
        return kl(q, p)
    if kind == "jeffreys":
        lam = number.get("lam", 0.5)
        return (1 - lam) * kl(p, q) + lam * kl(q, p)
    if kind == "jsd":
        beta = number.get("beta", 0.5)
        if beta in (0, 1):
            return kl(p, q) if beta == 0 else kl(q, p)
        m = beta * p + (1 - beta) * q
        return beta * kl(p, m) + (1 - beta) * kl(q, m)
    if kind == "tvd":
        return torch.abs(p - q).sum() / 2
    if kind == "skew_fkl":
        lam = number.get("lam", 0.1)
        return kl(p, lam * p + (1 - lam) * q)
    if kind == "skew_rkl":
        lam = number.get("lam", 0.1)
        return kl(q, (1 - lam) * p + lam * q)
    if kind == "tail_kl":
        return tail_kl(p, q, has_bucket, int(number.get("head", 10)), number.get("beta", 2.0))
    if kind == "acceptance":
        whole = slice(0, -1 if has_bucket and options.get("bound") == "upper" else None)
        return -torch.minimum(p, q)[whole].sum().log()
    if kind == "acceptance_hybrid":
        share = math.exp(-number.get("eta", 3.0) * float(torch.minimum(p, q).sum().detach()))
        return share * kl(p, q) + (1 - share) * torch.abs(p - q).sum() / 2
    if kind in ("hinge", "logistic"):
        return over_pairs(kind, p, q, len(p) - has_bucket, number.get("margin"))
    if kind == "alpha_beta":
        return alpha_beta(p, q, number.get("alpha", 0.2), number.get("beta", 0.7))
    assert kind == "akl"
    head_weight, tail_weight = akl_weights(p, q, has_bucket, **options)
    return head_weight * kl(p, q) + tail_weight * kl(q, p)


def tail_kl(p: Tensor, q: Tensor, has_bucket: bool, head: int, beta: float) -> Tensor:
    """Return KL(head ids and their rest) + beta α KL(within the rest), α the teacher's rest."""
    ranked = sorted(range(len(p) - has_bucket), key=lambda c: -float(p[c]))
    top = ranked[:head]
    rest = [c for c in range(len(p)) if c not in set(top)]
    if not rest:
        return kl(p, q)
    p_rest, q_rest = p[rest].sum(), q[rest].sum()
    coarse = kl(torch.cat([p[top], p_rest[None]]), torch.cat([q[top], q_rest[None]]))
    return coarse + beta * p_rest * kl(p[rest] / p_rest, q[rest] / q_rest)


def over_pairs(kind: str, p: Tensor, q: Tensor, num_ids: int, margin: float | None) -> Tensor:
    """Return a ranking loss: its mean over the pairs of ids of which the teacher prefers one."""
    losses = []
    for i in range(num_ids):
        for j in range(num_ids):
            if p[i] > p[j]:
                wanted = p[i] - p[j] if margin is None else margin
                hinge = torch.clamp(wanted - (q[i] - q[j]), min=0)
                losses.append(hinge if kind == "hinge" else (1 + q[j] / q[i]).log())
    return torch.stack(losses).mean() if losses else q.sum() * 0


def akl_weights(
    p: Tensor, q: Tensor, has_bucket: bool, head_rule: str = "official", mu: float = 0.5
) -> tuple[float, float]:
    """Return akl's two weights, walking down the classes from the most probable."""
    p, q = p.detach(), q.detach()
    num_ranked = len(p) - has_bucket
    ranking = sorted(range(num_ranked), key=lambda c: -float(p[c]))
    head, before = set(), 0.0
    for rank, c in enumerate(ranking):
        through = before + float(p[c])
        belongs = through <= mu if head_rule == "official" else before < mu
        if rank == 0 or belongs:
            head.add(c)
        before = through
    gaps = [abs(float(a) - float(b)) for a, b in zip(p, q, strict=True)]
    total = math.fsum(gaps)
    if total == 0:
        return 0.5, 0.5
    head_weight = math.fsum(gaps[c] for c in head) / total
    return head_weight, 1 - head_weight


def alpha_beta(p: Tensor, q: Tensor, alpha: float, beta: float) -> Tensor:
    """Return the (alpha, beta) divergence, its limits by hand where the formula divides by 0."""
    if alpha == beta == 0:
        return ((p.log() - q.log()) ** 2).sum() / 2
    if alpha == 0:
        return (q**beta * (q**beta / p**beta).log() - q**beta + p**beta).sum() / beta**2
    if beta == 0:
        return (p**alpha * (p**alpha / q**alpha).log() - p**alpha + q**alpha).sum() / alpha**2
    if alpha + beta == 0:
        return ((q**alpha / p**alpha).log() + p**alpha / q**alpha - 1).sum() / alpha**2
    joint = p**alpha * q**beta
    own = alpha / (alpha + beta) * p ** (alpha + beta) + beta / (alpha + beta) * q ** (alpha + beta)
    return -(joint - own).sum() / (alpha * beta)


def top_kept(teacher_logits: Tensor, num_kept: list[int]) -> list[list[int]]:
    """Return each row's most probable ids, as many as asked."""
    return [
        row.argsort(descending=True)[:k].tolist()
        for row, k in zip(teacher_logits, num_kept, strict=True)
    ]


def targets_of(
    teacher_logits: Tensor,
    kept: list[list[int]],
    temperature: float = 1.0,
    *,
    num_slots: int | None = None,
    draws: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> SparseTargets:
    """Return what a cache would hold of these teacher logits."""
    num_slots = num_slots or max(map(len, kept))
    teacher_logits = teacher_logits.double()
    token_ids = torch.full((len(kept), num_slots), -1)
    logprobs = torch.full((len(kept), num_slots), -torch.inf, dtype=torch.float64)
    log_z, log_tail = [], []
    for row, ids in enumerate(kept):
        log_p = teacher_logits[row].log_softmax(0)
        token_ids[row, : len(ids)] = torch.tensor(ids)
        logprobs[row, : len(ids)] = log_p[ids]
        log_z.append((log_p / temperature).logsumexp(0))
        others = [v for v in range(len(log_p)) if v not in set(ids)]
        log_tail.append((log_p[others] / temperature - log_z[-1]).logsumexp(0))
    return SparseTargets(
        token_ids=token_ids,
        logprobs=logprobs.to(dtype),
        log_z=torch.stack(log_z).to(dtype),
        log_tail=torch.stack(log_tail).to(dtype),
        draws=draws,
    )


def random_logits(seed: int, num_rows: int, vocab_size: int, spread: float = 2.0) -> Tensor:
    """Return [num_rows, vocab_size] float64 logits."""
    generator = torch.Generator().manual_seed(seed)
    shape = (num_rows, vocab_size)
    return torch.randn(shape, generator=generator, dtype=torch.float64) * spread


def value_and_gradient(loss_N: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return the losses and the gradient of their sum, both float64."""
    (gradient,) = torch.autograd.grad(loss_N.sum(), logits)
    return loss_N.detach().double(), gradient.double()
