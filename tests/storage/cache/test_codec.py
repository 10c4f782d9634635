"""Encoding loses nothing but the stated precision of the log probs, and that within bounds."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from decant.schemas import ScoredSequence, Truncation
from decant.storage import Rows
from decant.storage.cache import logprobs as logprobs_code
from decant.storage.cache import rows as rows_codec
from decant.storage.cache.checks import check_rows, check_sequence
from tests.support import caches

TRUNCATIONS = {
    "topk": Truncation(k=8),
    "topp": Truncation(method="topp", k=9, p=0.8, min_k=2),
    "sample": Truncation(method="sample", draws=7),
    "topk+sample": Truncation(method="topk+sample", k=3, draws=6),
    "whole vocabulary": Truncation(k=40),
}


def round_trip(sequences: list[ScoredSequence], cache: caches.Settings) -> Rows:
    layout = cache.draft().layout
    for sequence in sequences:
        check_sequence(sequence, layout)
    rows = rows_codec.decode(rows_codec.encode(sequences, 5, layout), layout)
    assert check_rows(rows, layout) == []
    assert rows.sequence.tolist() == list(range(5, 5 + len(sequences)))
    return rows


def error_of(logprobs: NDArray[np.float32], log_tail: NDArray[np.float32]) -> NDArray[np.float64]:
    """[n] decoding error of the compact code."""
    steps = logprobs_code.encode_logprobs(logprobs, np.isfinite(logprobs), "compact")
    tail = logprobs_code.tail_to_store(logprobs, log_tail)
    decoded = logprobs_code.decode_logprobs(steps, ~np.isfinite(logprobs), tail, "compact")
    return logprobs_code.decoding_error(logprobs, decoded)


def top(dense: NDArray[np.float64], k: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """The k largest log probs [n, k] of each row and the log mass [n] of the rest."""
    ordered = -np.sort(-dense, axis=1)
    tail = caches.log_sum_exp(ordered[:, k:])
    return ordered[:, :k].astype(np.float32), tail.astype(np.float32)


@settings(max_examples=60, deadline=None)
@given(
    method=st.sampled_from(sorted(TRUNCATIONS)),
    precision=st.sampled_from(["f32", "f16", "compact"]),
    temperatures=st.sampled_from([(1.0,), (1.0, 2.0), (1.0, 4.0, 0.7)]),
    lengths=st.lists(st.tuples(st.integers(2, 20), st.integers(0, 22)), min_size=1, max_size=4),
    spread=st.sampled_from([0.0, 0.1, 1.0, 4.0, 20.0]),
    seed=st.integers(0, 2**32 - 1),
)
def test_a_round_trip_keeps_everything_but_the_precision_of_log_probs(
    method: str,
    precision: str,
    temperatures: tuple[float, ...],
    lengths: list[tuple[int, int]],
    spread: float,
    seed: int,
) -> None:
    """Any truncation, temperature, mask, sharpness; f32 is lossless, the others within bounds."""
    cache = caches.Settings(
        truncation=TRUNCATIONS[method],
        vocab_size=40,
        temperatures=temperatures,
        precision=precision,
    )
    generator = np.random.default_rng(seed)
    sequences = [
        caches.random_sequence(
            generator,
            cache,
            length=length,
            prompt=prompt,
            spread=spread,
            sample_id=f"Ж-{i}-\U0001f40d",
        )[0]
        for i, (length, prompt) in enumerate(lengths)
    ]
    rows = round_trip(sequences, cache)
    for i, sequence in enumerate(sequences):
        if method == "sample":
            caches.assert_equal(rows[i], sequence)
            continue
        caches.assert_equal(rows[i], sequence, logprobs=precision == "f32")
        bound = logprobs_code.logprob_bound(rows[i].logprobs, precision)
        used = sequence.token_ids >= 0
        error = np.abs(rows[i].logprobs[used] - sequence.logprobs[used])
        assert (error <= bound[used]).all()
        assert np.isneginf(rows[i].logprobs[~used]).all()


@pytest.mark.parametrize("vocab_size", [65_536, 65_537, 200_000])
def test_every_id_of_a_wide_vocabulary_survives(vocab_size: int) -> None:
    """Ids need a third byte beyond 65,536; the largest of either width come back."""
    cache = caches.Settings(truncation=Truncation(k=6), vocab_size=vocab_size)
    generator = np.random.default_rng(0)
    dense = caches.random_logprobs(generator, 3, vocab_size)
    for row, highest in zip(dense, (vocab_size - 1, 65_535, 255), strict=True):
        row[[highest, row.argmax()]] = row[[row.argmax(), highest]]
    ids = np.array([0, vocab_size - 1, 65_535, 255], np.int32)
    sequence = caches.scored_sequence(dense, ids, np.arange(4) > 0, cache)
    assert sequence.token_ids[:, 0].tolist() == [vocab_size - 1, 65_535, 255]
    caches.assert_equal(round_trip([sequence], cache)[0], sequence)


@pytest.mark.parametrize("precision", ["f32", "f16", "compact"])
def test_a_whole_vocabulary_has_no_tail(precision: str) -> None:
    """With k = V the log tail is -inf, and the decoded mass is 1."""
    cache = caches.Settings(truncation=Truncation(k=40), vocab_size=40, precision=precision)
    sequence, _ = caches.random_sequence(np.random.default_rng(0), cache, length=30)
    assert np.isneginf(sequence.log_tail).all()
    rows = round_trip([sequence], cache)
    assert np.isneginf(rows.log_tail).all()
    tolerance = {"f32": 1e-6, "f16": 2e-3, "compact": 1e-6}[precision]
    np.testing.assert_allclose(np.exp(rows.logprobs).sum(axis=1), 1, atol=tolerance)


@pytest.mark.parametrize("slots", [1, 2, 3, 16, 63, 64, 255])
def test_the_compact_code_equals_its_equation(slots: int) -> None:
    """Decoded by the sentence in docs/format.md, one entry at a time, in float64."""
    generator = np.random.default_rng(slots)
    logprobs, log_tail = top(caches.random_logprobs(generator, 5, 256), slots)
    num_kept = generator.integers(1, slots + 1, 5)
    unused = np.arange(slots) >= num_kept[:, None]
    logprobs[unused] = -np.inf
    log_tail = np.log1p(-np.exp(logprobs, dtype=np.float64).sum(axis=1)).astype(np.float32)
    steps = logprobs_code.encode_logprobs(logprobs, ~unused, "compact")
    decoded = logprobs_code.decode_logprobs(steps, unused, log_tail, "compact")
    for row in range(5):
        code, gaps = 0, []
        for step in steps[row, : num_kept[row]].tolist():
            code = (code + step) % 256
            gaps.append(25 ** (code / 255) - 1)
        first = np.log1p(-np.exp(float(log_tail[row]))) - np.log(np.sum(np.exp(-np.array(gaps))))
        np.testing.assert_allclose(decoded[row, : num_kept[row]], first - gaps, atol=1e-5)
    assert (steps[unused] == 0).all() and (steps[:, 0] == 0).all()


def test_compact_mass_is_one_at_temperature_one() -> None:
    """Kept mass + tail is 1 within float32 rounding, however flat or peaked the distribution."""
    generator = np.random.default_rng(0)
    for spread in (0.01, 1, 3, 8, 30):
        logprobs, log_tail = top(caches.random_logprobs(generator, 200, 1000, spread), 64)
        steps = logprobs_code.encode_logprobs(logprobs, np.ones(logprobs.shape, bool), "compact")
        tail = logprobs_code.tail_to_store(logprobs, log_tail)
        decoded = logprobs_code.decode_logprobs(steps, None, tail, "compact")
        mass = np.exp(decoded, dtype=np.float64).sum(axis=1) + np.exp(tail, dtype=np.float64)
        np.testing.assert_allclose(mass, 1, atol=1e-6)


# Mean and maximum of the decoding error at k=64, in nats: what docs/format.md states.
BOUNDS = {
    # standard deviation of the Gaussian logits, V: (mean, max)
    (8.0, 1000): (5e-5, 3e-4),
    (6.0, 32_000): (5e-5, 3e-4),
    (3.0, 1000): (5e-5, 3e-4),
    (1.0, 1000): (5e-5, 3e-4),
}


@pytest.mark.parametrize(("spread", "vocab_size"), BOUNDS)
def test_the_compact_code_stays_within_the_stated_error(spread: float, vocab_size: int) -> None:
    """KL(scored || decoded) of peaked and of flat distributions, every target of the sample."""
    generator = np.random.default_rng(0)
    n = 1000 if vocab_size == 1000 else 100
    error = error_of(*top(caches.random_logprobs(generator, n, vocab_size, spread), 64))
    mean, largest = BOUNDS[spread, vocab_size]
    assert error.min() > -1e-7
    assert error.mean() <= mean and error.max() <= largest


def test_the_compact_code_stays_within_the_stated_error_on_ranked_data() -> None:
    """Zipfian distributions, the shape of a language model's: a head and a long tail."""
    generator = np.random.default_rng(0)
    exponents = generator.uniform(0.8, 3, size=(500, 1))
    logits = -exponents * np.log(np.arange(1, 5001)) + generator.normal(scale=0.3, size=(500, 5000))
    error = error_of(*top(logits - caches.log_sum_exp(logits)[:, None], 64))
    assert error.mean() <= 5e-5 and error.max() <= 3e-4


def test_f16_stays_within_the_stated_error() -> None:
    """KL(scored || decoded) at most 1e-6 for every target, flat or peaked."""
    generator = np.random.default_rng(0)
    for spread in (0.1, 3, 8):
        logprobs, _ = top(caches.random_logprobs(generator, 500, 1000, spread), 64)
        stored = logprobs_code.encode_logprobs(logprobs, np.ones(logprobs.shape, bool), "f16")
        decoded = logprobs_code.decode_logprobs(stored, None, logprobs[:, 0], "f16")
        assert logprobs_code.decoding_error(logprobs, decoded).max() <= 1e-6


def test_a_kept_mass_of_almost_nothing_is_rebuilt() -> None:
    """Where float32 rounds the tail to 1 or above, the entries still come back within 5%."""
    kept = np.log(np.array([[3e-8, 2e-8], [1e-12, 1e-13], [2e-4, 1e-4]]))
    logprobs = kept.astype(np.float32)
    for rounding in (0.0, 1e-7, 3e-6):
        log_tail = (np.log1p(-np.exp(kept).sum(axis=1)) + rounding).astype(np.float32)
        steps = logprobs_code.encode_logprobs(logprobs, np.ones((3, 2), bool), "compact")
        tail = logprobs_code.tail_to_store(logprobs, log_tail)
        np.testing.assert_allclose(tail, log_tail, atol=4e-6)
        decoded = logprobs_code.decode_logprobs(steps, None, tail, "compact")
        np.testing.assert_allclose(np.exp(decoded), np.exp(logprobs), rtol=0.05)


@pytest.mark.parametrize("precision", ["f16", "compact"])
def test_impossible_tokens_keep_every_number_finite(precision: str) -> None:
    """A teacher that forbids tokens (log prob -10,000) leaves no NaN, nor a false alarm."""
    cache = caches.Settings(truncation=Truncation(k=6), vocab_size=20, precision=precision)
    logits = np.full((4, 20), -10_000.0)
    logits[:, :3] = np.random.default_rng(0).normal(size=(4, 3))
    dense = np.maximum(logits - caches.log_sum_exp(logits)[:, None], -10_000)
    ids = np.array([0, 1, 2, 4, 19], np.int32)
    sequence = caches.scored_sequence(dense, ids, np.arange(5) > 0, cache)
    rows = round_trip([sequence], cache)
    error = logprobs_code.decoding_error(sequence.logprobs, rows.logprobs)
    assert np.isfinite(error).all() and error.max() < 1e-4
    np.testing.assert_allclose(rows.logprobs[:, :3], sequence.logprobs[:, :3], atol=0.05)


def test_the_decoding_error_is_the_generalised_divergence() -> None:
    """It is sum p log(p/p') - p + p' over the kept entries, zero at p' = p only."""
    generator = np.random.default_rng(0)
    logprobs, _ = top(caches.random_logprobs(generator, 20, 100), 8)
    other = logprobs + generator.normal(scale=0.01, size=logprobs.shape).astype(np.float32)
    p, q = np.exp(logprobs.astype(np.float64)), np.exp(other.astype(np.float64))
    expected = (p * np.log(p / q) - p + q).sum(axis=1)
    np.testing.assert_allclose(logprobs_code.decoding_error(logprobs, other), expected, atol=1e-8)
    np.testing.assert_array_equal(logprobs_code.decoding_error(logprobs, logprobs), 0)
    assert (logprobs_code.decoding_error(logprobs, other) > 0).all()


@pytest.mark.parametrize("spread", [4, 30])
def test_the_error_of_the_worst_log_prob_bounds_the_reverse_kl(spread: float) -> None:
    """Of every student, also where a peaked teacher's error of the forward KL is nearly 0.

    There the compact code ends 24 nats below the first entry, so that a student's reverse KL and
    its gradient are off by tens of percent; f16 is not.
    """
    generator = np.random.default_rng(0)
    dense = caches.random_logprobs(generator, 60, 400, spread)
    logprobs, log_tail = top(dense, 32)
    p, tail = np.exp(logprobs.astype(np.float64)), log_tail.astype(np.float64)[:, None]
    q = np.exp(caches.random_logprobs(generator, 60, 33, 1.0))
    found = {}
    for precision in ("compact", "f16"):
        stored = logprobs_code.encode_logprobs(logprobs, np.ones(logprobs.shape, bool), precision)
        its_tail = logprobs_code.tail_to_store(logprobs, log_tail)
        decoded = logprobs_code.decode_logprobs(stored, None, its_tail, precision)
        kl, largest = logprobs_code.decoding_errors(logprobs, decoded)
        floored = [np.maximum(x, -87).astype(np.float64) for x in (logprobs, decoded)]
        expected = np.abs(floored[0] - floored[1]).max(axis=1)
        np.testing.assert_allclose(largest, expected, rtol=1e-5, atol=1e-7)
        true, ours = (
            (q * (np.log(q) - np.concatenate([x, np.maximum(tail, -87)], axis=1))) for x in floored
        )
        assert (np.abs(true.sum(axis=1) - ours.sum(axis=1)) <= largest + 1e-6).all()
        slopes = [x - q * x.sum(axis=1, keepdims=True) for x in (true, ours)]
        gradient_off = np.linalg.norm(slopes[1] - slopes[0]) / np.linalg.norm(slopes[0])
        found[precision] = float(kl.mean()), float(largest.max()), float(gradient_off)
    kl_mean, largest_max, gradient_off = found["compact"]
    assert found["f16"][1] < 0.05 and found["f16"][2] < 1e-3
    if spread == 30:
        assert kl_mean < 1e-5 and largest_max > 10 and gradient_off > 0.2
    else:
        assert largest_max < 0.2 and p.min() < 1e-3


@pytest.mark.parametrize("precision", ["f16", "compact"])
def test_flat_distributions_raise_no_false_alarm(precision: str) -> None:
    """Where rounding moves all entries alike, the sums are allowed what it can move."""
    truncation = Truncation(k=4096)
    cache = caches.Settings(
        truncation=truncation, vocab_size=4096, temperatures=(1.0, 0.5, 8.0), precision=precision
    )
    logits = np.zeros((2, 4096))
    logits[1, 0] = 9
    dense = logits - caches.log_sum_exp(logits)[:, None]
    sequence = caches.scored_sequence(dense, np.array([1, 2, 3], np.int32), np.arange(3) > 0, cache)
    round_trip([sequence], cache)
