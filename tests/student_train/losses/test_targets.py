"""The teacher's side: what targets are refused, and what sampled ones estimate."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from decant.schemas import Truncation
from decant.storage import CacheReader
from decant.student_train import CacheStream
from decant.student_train.losses import (
    SparseTargets,
    fused_linear_divergence,
    sparse_divergence,
)
from tests.support import caches
from tests.support import dense_reference as reference
from tests.support.dense_reference import random_logits, value_and_gradient


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
        ({"token_ids": torch.zeros(2, 3)}, r"int64 or int32, got torch.float32"),
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


@pytest.mark.parametrize("method", ["topk", "topp", "topk+sample", "sample"])
def test_a_scored_sequence_becomes_targets_in_one_call(method: str, tmp_path: Path) -> None:
    """`SparseTargets.of` what a reader gives is the batch's own, at each stored temperature."""
    truncation = {
        "topk": Truncation(k=4),
        "topp": Truncation(method="topp", k=6, p=0.8, min_k=1),
        "topk+sample": Truncation(method="topk+sample", k=3, draws=5),
        "sample": Truncation(method="sample", draws=9),
    }[method]
    settings = caches.Settings(truncation=truncation)
    caches.write_cache(
        tmp_path / "cache", settings, caches.random_shards(settings, num_shards=1, sequences=1)
    )
    reader = CacheReader(tmp_path / "cache")
    stored = reader.manifest.temperatures
    batch = next(iter(CacheStream(tmp_path / "cache", batch_size=1, temperature=stored)))
    for temperature in stored:
        ours = SparseTargets.of(reader[0], stored, temperature).validate(50, temperature)
        theirs = batch.targets_at(temperature)
        for name in ("token_ids", "logprobs", "log_z", "log_tail", "draws", "entropy"):
            expected = getattr(theirs, name)
            if expected is None:
                assert getattr(ours, name) is None
            else:
                assert torch.equal(getattr(ours, name), expected), name
    with pytest.raises(ValueError, match="one for each temperature of the cache, but stored is"):
        SparseTargets.of(reader[0], [*stored, 3.0])
    with pytest.raises(ValueError, match="temperature 3 is not stored: 1"):
        SparseTargets.of(reader[0], stored, 3.0)


def test_losses_take_the_integers_and_arrays_of_a_reader() -> None:
    """int32 ids and labels, and numpy's arrays, give the loss and gradient of int64 tensors."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 5, generator=generator, requires_grad=True)
    weight = torch.randn(6, 5, generator=generator, requires_grad=True)
    labels, good = torch.tensor([1, 3]), broken()
    narrow = dataclasses.replace(good, token_ids=good.token_ids.int())
    arrays = SparseTargets(
        *(getattr(good, name).numpy() for name in ("token_ids", "logprobs", "log_z", "log_tail"))
    )
    found = []
    for targets, ids in ((good, labels), (narrow, labels.int()), (arrays, labels.int().numpy())):
        out = fused_linear_divergence(hidden, weight, targets, ids, ce_weight=0.5)
        found.append(torch.autograd.grad(out.loss, (hidden, weight)))
        assert torch.equal(
            sparse_divergence(hidden @ weight.T, targets, "fkl"),
            sparse_divergence(hidden @ weight.T, good, "fkl"),
        )
    for gradients in found[1:]:
        assert all(map(torch.equal, gradients, found[0]))
