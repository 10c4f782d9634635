"""Draws stored without log probs: what is stored comes back, and the loss is the forward KL."""

import dataclasses
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from decant.schemas import FormatError, ScoredSequence, Truncation
from decant.storage import CacheReader, verify
from decant.storage.cache import rows as rows_codec
from decant.storage.cache.checks import check_sequence
from decant.storage.exchange.export import export
from decant.storage.inspect.diff import diff
from decant.storage.inspect.diff_text import diff_text
from decant.storage.inspect.head import head, head_text
from decant.student_train import CacheStream
from decant.student_train.losses import (
    SparseTargets,
    fused_linear_divergence,
    sparse_divergence,
)
from tests.support import caches
from tests.support.caches import fixture

DRAWS = 12
SETTINGS = caches.Settings(truncation=Truncation(method="sample", draws=DRAWS))


@settings(max_examples=60, deadline=None)
@given(data=st.data(), num_draws=st.sampled_from([1, 2, 7, 300]), rows=st.integers(0, 5))
def test_any_draws_survive_their_steps(data: st.DataObject, num_draws: int, rows: int) -> None:
    """The same id throughout, id 0, the last id, every draw another: ids ascending with counts."""
    vocab = data.draw(st.sampled_from([num_draws, 70_000]))
    seed = data.draw(st.integers(0, 2**32 - 1))
    generator = np.random.default_rng(seed)
    spread = min(data.draw(st.sampled_from([1, 2, vocab])), vocab)
    drawn = generator.integers(0, spread, (rows, num_draws)) + vocab - spread
    ids = np.full((rows, num_draws), -1, np.int32)
    counts = np.zeros((rows, num_draws), np.int32)
    for row in range(rows):
        found, times = np.unique(drawn[row], return_counts=True)
        ids[row, : len(found)], counts[row, : len(found)] = found, times
    steps = rows_codec.draw_steps(ids, counts)
    np.testing.assert_array_equal(steps.cumsum(axis=1), np.sort(drawn, axis=1))
    back, times, num_kept = rows_codec.draws_of_steps(steps)
    used = ids >= 0
    np.testing.assert_array_equal(num_kept, used.sum(axis=1))
    np.testing.assert_array_equal(np.where(used, back, -1), ids)
    np.testing.assert_array_equal(times, counts)


def test_what_draws_must_be_is_checked() -> None:
    """Counts that do not add up, an entry without draws, an entropy that cannot be."""
    sequence, _ = caches.random_sequence(np.random.default_rng(0), SETTINGS)
    layout = SETTINGS.draft().layout
    check_sequence(sequence, layout)
    check_sequence(caches.by_id(sequence), layout)
    assert sequence.draws is not None and sequence.entropy is not None
    more, none = sequence.draws.copy(), sequence.draws.copy()
    more[3, 0] += 1
    none[3, 1] += none[3, 0]
    none[3, 0] = 0
    for changes, message in (
        ({"draws": more}, "draws do not sum to 12: 1 times, first at 3"),
        ({"draws": none}, "entry without draws"),
        ({"entropy": sequence.entropy + 4}, r"entropy outside 0 to log V = 3\.9120"),
        ({"entropy": sequence.entropy * np.float32(np.nan)}, "entropy outside"),
        ({"entropy": None}, r"entropy must be float32 \(11,\), found None"),
        ({"logprobs": sequence.logprobs + np.float32(1)}, "kept mass"),
    ):
        with pytest.raises(FormatError, match=f"sample sample: .*{message}"):
            check_sequence(dataclasses.replace(sequence, **changes), layout)


def test_other_temperatures_and_precisions_are_refused() -> None:
    """Draws are at T=1; a cache of draws has no precision of log probs to choose."""
    draft = SETTINGS.draft()
    assert draft.precision == "none" and draft.compact is None
    with pytest.raises(ValueError, match=r"temperatures must be \[1\], found \[1.0, 2.0\]"):
        dataclasses.replace(draft, temperatures=(1.0, 2.0))
    for truncation in (Truncation(k=4), Truncation(method="topk+sample", k=2, draws=4)):
        with pytest.raises(ValueError, match=r"precision 'none' is for truncation.method 'sample'"):
            dataclasses.replace(draft, truncation=truncation)


def targets_of(sequence: ScoredSequence, *, logprobs: bool) -> SparseTargets:
    assert sequence.draws is not None and sequence.log_tail is not None
    assert sequence.entropy is not None
    return SparseTargets(
        token_ids=torch.from_numpy(sequence.token_ids.astype(np.int64)),
        logprobs=torch.from_numpy(sequence.logprobs) if logprobs else None,
        log_z=torch.zeros(sequence.num_targets),
        log_tail=torch.from_numpy(sequence.log_tail[:, 0]),
        draws=torch.from_numpy(sequence.draws),
        entropy=None if logprobs else torch.from_numpy(sequence.entropy),
    )


def test_the_gradient_is_that_of_draws_with_log_probs() -> None:
    """Weights depend on the counts alone; fused and dense losses agree in value and gradient."""
    generator = np.random.default_rng(1)
    sequence, _ = caches.random_sequence(generator, SETTINGS, length=20)
    hidden = torch.randn(sequence.num_targets, 6, generator=torch.Generator().manual_seed(0))
    weight = torch.randn(50, 6, generator=torch.Generator().manual_seed(1), requires_grad=True)
    gradients, values = [], []
    for logprobs in (True, False):
        targets = targets_of(sequence, logprobs=logprobs)
        value = sparse_divergence(hidden @ weight.T, targets, kind="fkl").mean()
        fused = fused_linear_divergence(hidden, weight, targets, kind="fkl")
        for loss in (value, fused.loss):
            (gradient,) = torch.autograd.grad(loss, weight)
            gradients.append(gradient)
        torch.testing.assert_close(fused.loss, value, rtol=1e-5, atol=1e-5)
        values.append(value)
    for gradient in gradients[1:]:
        torch.testing.assert_close(gradient, gradients[0], rtol=1e-4, atol=1e-6)
    assert not torch.isclose(*values)  # they scatter differently around the same mean


def test_the_loss_is_an_unbiased_forward_kl() -> None:
    """Over many draws from one distribution, against the dense float64 divergence."""
    generator = np.random.default_rng(2)
    dense = np.repeat(caches.random_logprobs(generator, 1, 50, spread=1.5), 4000, axis=0)
    ids = np.zeros(4001, np.int32)
    sequence = caches.scored_sequence(
        dense, ids, np.arange(4001) > 0, SETTINGS, generator=generator
    )
    logits = generator.normal(size=50)
    log_q = logits - caches.log_sum_exp(logits[None])
    expected = float((np.exp(dense[0]) * (dense[0] - log_q)).sum())
    student = torch.from_numpy(logits).float().expand(4000, -1)
    values = sparse_divergence(student, targets_of(sequence, logprobs=False), kind="fkl")
    error = float(values.std()) / 4000**0.5
    assert abs(float(values.mean()) - expected) < 4 * error < 0.1 * expected


def test_targets_without_log_probs_are_validated() -> None:
    """What is missing or cannot be is named; only the forward KL at T=1 is offered."""
    sequence, _ = caches.random_sequence(np.random.default_rng(3), SETTINGS)
    good = targets_of(sequence, logprobs=False)
    logits = torch.zeros(len(good), 50)
    assert good.draws is not None
    for changes, message in (
        ({"entropy": None}, "need draws and the teacher's entropy"),
        ({"draws": None}, "need draws and the teacher's entropy"),
        ({"entropy": good.entropy[:3]}, "entropy must have shape"),
        ({"entropy": -good.entropy - 1}, "entropy must be finite and >= 0"),
        ({"draws": torch.zeros_like(good.draws)}, "every kept id needs draws"),
    ):
        with pytest.raises(ValueError, match=message):
            sparse_divergence(logits, dataclasses.replace(good, **changes), kind="fkl")
    for kind, temperature in (("rkl", 1.0), ("akl", 1.0), ("fkl", 2.0)):
        with pytest.raises(ValueError, match="sampled targets"):
            sparse_divergence(logits, good, kind=kind, temperature=temperature)


def test_a_stream_gives_what_was_drawn(tmp_path: Path) -> None:
    """Ids, counts, labels and entropy reach the loss; moving a batch keeps them."""
    shards = caches.random_shards(SETTINGS)
    caches.write_cache(tmp_path / "cache", SETTINGS, shards)
    by_id = {s.sample_id: caches.by_id(s) for shard in shards for s in shard}
    stream = CacheStream(tmp_path / "cache", batch_size=1)
    for batch, _ in zip(stream, range(8), strict=False):
        expected, targets = by_id[batch.sample_ids[0]], batch.to(torch.device("cpu")).targets
        assert targets.logprobs is None and targets.entropy is not None
        np.testing.assert_array_equal(targets.token_ids, expected.token_ids)
        np.testing.assert_array_equal(targets.draws, expected.draws)
        np.testing.assert_array_equal(targets.entropy, expected.entropy)
        dataclasses.replace(targets, checked_for=None).validate(SETTINGS.vocab_size)


def test_other_commands_show_draws(tmp_path: Path) -> None:
    """`head` by the number of draws, `export` as lists, `diff` without a KL."""
    shards = caches.random_shards(SETTINGS)
    manifest = caches.write_cache(tmp_path / "cache", SETTINGS, shards)
    first = shards[0][0]
    assert first.draws is not None
    (target, *_) = found = head(tmp_path / "cache", entries=50)
    assert target.rank is target.tail_mass is None
    shares = [entry.probability for entry in target.entries]
    assert shares == sorted(shares, reverse=True) and sum(shares) == pytest.approx(1)
    assert shares[0] == first.draws[0].max() / DRAWS
    assert "the most often drawn ids" in head_text(found)
    done = export(tmp_path / "cache", tmp_path / "out", rows="targets")
    assert manifest.totals is not None and done.targets == manifest.totals.targets
    table = pq.read_table(tmp_path / "out" / "part-000000.parquet")
    assert {"token_ids", "draws", "entropy", "label_logprob"} <= set(table.column_names)
    assert not {"logprobs", "log_tail_t1"} & set(table.column_names)
    assert {sum(counts) for counts in table["draws"].to_pylist()} == {DRAWS}
    same = diff(tmp_path / "cache", tmp_path / "cache")
    assert same.same_ids == 1 and same.top1_agreement is None and same.temperatures == ()
    assert same.label_difference is not None and same.label_difference.max == 0
    assert "no KL: one of them stores no log probs" in diff_text(same)


def test_log_probs_of_older_draws_are_kept(tmp_path: Path) -> None:
    """A cache of an earlier version has them, and its loss compares them with the student's."""
    reader = CacheReader(fixture(2, "drawn"))
    assert all(s.logprobs is not None and s.entropy is None for s in reader)
    batch = next(iter(CacheStream(fixture(2, "drawn"), batch_size=4)))
    logits = torch.zeros(batch.num_targets, 70_000)
    value = sparse_divergence(logits, batch.targets, kind="fkl")
    assert batch.targets.logprobs is not None and batch.targets.draws is not None
    weights = batch.targets.draws / 12
    log_p = batch.targets.logprobs.masked_fill(weights == 0, 0.0)
    expected = (weights * (log_p + np.log(70_000))).sum(1)
    torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-3)
    assert verify(fixture(2, "drawn")).ok
