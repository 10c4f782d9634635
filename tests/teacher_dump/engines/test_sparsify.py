"""Claims about cutting dense logits down, against dense float64 numpy.

Shapes: n targets, V vocabulary, K slots, T temperatures, m draws.

One file, as every claim is made of every truncation.
"""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from decant.schemas import Truncation
from decant.teacher_dump.engines.sparsify import (
    LOGPROB_FLOOR,
    NotFinite,
    Sparse,
    _top_blocks,
    sparsify,
    sparsify_hidden,
    uniforms_for,
)

TEMPERATURES = (1.0, 0.5, 2.0, 5.0)
METHODS = [
    Truncation(method="topk", k=16),
    Truncation(method="topp", k=64, p=0.7, min_k=3),
    Truncation(method="sample", draws=40, seed=3),
    Truncation(method="topk+sample", k=5, draws=20, seed=3),
]
LABEL = Truncation(method="label")
each_method = pytest.mark.parametrize("truncation", METHODS, ids=lambda t: t.method)


def random_logits(n: int, vocab: int, *, spread: float = 3.0, seed: int = 0) -> NDArray[np.float32]:
    """[n, V] normal logits, no two of a row equal."""
    rng = np.random.default_rng(seed)
    return rng.normal(scale=spread, size=(n, vocab)).astype(np.float32)


def reduce(
    logits: NDArray[np.float32],
    truncation: Truncation,
    temperatures: tuple[float, ...] = TEMPERATURES,
    labels: NDArray[np.int64] | None = None,
    uniforms: NDArray[np.float64] | None = None,
) -> Sparse:
    """`sparsify` on a copy; labels are 0, 1, 2, ... and the random numbers those of sequence 0."""
    n, vocab = logits.shape
    labels = np.arange(n) % vocab if labels is None else labels
    if truncation.sampled and uniforms is None:
        uniforms = uniforms_for(truncation, 0, n)
    return sparsify(
        torch.from_numpy(logits.copy()),
        torch.from_numpy(labels),
        truncation,
        temperatures,
        None if uniforms is None else torch.from_numpy(uniforms),
    )


def log_sum_exp(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """[n] over the rows of [n, V]; -inf for a row of -inf."""
    top = x.max(axis=1, initial=-np.inf, keepdims=True)
    top = np.where(np.isfinite(top), top, 0)
    with np.errstate(divide="ignore"):
        return np.log(np.exp(x - top).sum(axis=1)) + top[:, 0]


def assert_exact(
    sparse: Sparse,
    logits: NDArray[np.floating[Any]],
    temperatures: tuple[float, ...] = TEMPERATURES,
    atol: float = 1e-5,
) -> None:
    """Every number that belongs to the kept ids is that of the dense distribution."""
    x = logits.astype(np.float64)
    logp = x - log_sum_exp(x)[:, None]
    ids = sparse.token_ids.numpy().astype(np.int64)
    used = ids >= 0
    rows, slots = np.nonzero(used)
    np.testing.assert_allclose(
        sparse.logprobs.numpy()[used], logp[rows, ids[rows, slots]], rtol=1e-6, atol=atol
    )
    assert np.isneginf(sparse.logprobs.numpy()[~used]).all()
    labels = np.arange(len(x)) % x.shape[1]
    expected_label = logp[np.arange(len(x)), labels]
    np.testing.assert_allclose(sparse.label_logprob.numpy(), expected_label, rtol=1e-6, atol=atol)
    rest = logp.copy()
    rest[rows, ids[rows, slots]] = -np.inf
    for i, temperature in enumerate(temperatures):
        log_z = log_sum_exp(logp / temperature)
        log_tail = log_sum_exp(rest / temperature) - log_z
        np.testing.assert_allclose(sparse.log_z[:, i].numpy(), log_z, rtol=1e-6, atol=atol)
        np.testing.assert_allclose(sparse.log_tail[:, i].numpy(), log_tail, rtol=1e-6, atol=atol)


@each_method
def test_log_probs_masses_and_labels_are_those_of_the_dense_distribution(truncation):
    """Whatever is kept: log p, log Z, log tail and the label's log prob agree with float64."""
    logits = random_logits(40, 1003)
    assert_exact(reduce(logits, truncation), logits)


def test_the_label_alone_is_that_of_the_dense_distribution():
    """Its log prob and log Z, of no entries; ids that are ruled out do no harm, NaN is found."""
    logits = random_logits(40, 1003)
    logits[:, 50:60] = -np.inf
    sparse = reduce(logits, LABEL)
    assert sparse.known().keys() == {"token_ids", "log_z", "label_logprob"}
    assert sparse.token_ids.shape == (40, 0)
    dense = reduce(logits, Truncation(k=16))
    np.testing.assert_allclose(sparse.label_logprob, dense.label_logprob, rtol=1e-6, atol=1e-5)
    np.testing.assert_allclose(sparse.log_z, dense.log_z, rtol=1e-6, atol=1e-5)
    for bad in (np.nan, np.inf):
        logits[7, 3] = bad
        with pytest.raises(NotFinite) as caught:
            reduce(logits, LABEL)
        assert caught.value.row == 7


@pytest.mark.parametrize("spread", [0.0, 0.1, 3.0, 30.0])
def test_the_entropy_of_draws_is_that_of_the_dense_distribution(spread: float):
    """Flat to peaked, with ids that are ruled out; no other method has it."""
    logits = random_logits(20, 5003, spread=spread)
    logits[:, 7:9] = -np.inf
    x = logits.astype(np.float64)
    logp = x - log_sum_exp(x)[:, None]
    expected = -np.where(np.isinf(logp), 0, np.exp(logp) * np.maximum(logp, -1e9)).sum(axis=1)
    sparse = reduce(logits, Truncation(method="sample", draws=5), (1.0,))
    assert sparse.entropy is not None
    np.testing.assert_allclose(sparse.entropy.numpy(), expected, rtol=2e-5, atol=1e-6)
    assert reduce(logits, Truncation(k=5)).entropy is None


def test_topk_keeps_the_k_most_probable_ids_in_order():
    """Ids are those of a full sort."""
    logits = random_logits(40, 1003)
    sparse = reduce(logits, Truncation(k=16))
    assert np.array_equal(sparse.token_ids.numpy(), np.argsort(-logits, axis=1)[:, :16])
    assert sparse.draws is None


def test_topp_keeps_the_smallest_set_that_reaches_p():
    """At least min_k, at most k, otherwise the shortest prefix whose mass is p or more."""
    logits = random_logits(60, 500) * np.linspace(0.1, 3, 60, dtype=np.float32)[:, None]
    truncation = Truncation(method="topp", k=32, p=0.6, min_k=3)
    sparse = reduce(logits, truncation)
    order = np.argsort(-logits, axis=1)
    mass = np.exp(logits - log_sum_exp(logits.astype(np.float64))[:, None])
    mass = np.take_along_axis(mass, order, axis=1).cumsum(axis=1)
    sizes = np.clip((mass < 0.6).sum(axis=1) + 1, 3, 32)
    assert {3, 32} < set(sizes)  # both limits are met, and sizes between
    for row, size in enumerate(sizes):
        assert np.array_equal(sparse.token_ids[row, :size], order[row, :size])
        assert (sparse.token_ids[row, size:] == -1).all()


def test_topp_of_1_keeps_all_k_however_peaked():
    """p=1 leaves nothing out, although the mass rounds to 1 before the last entry."""
    logits = np.linspace(60, 0, 50, dtype=np.float32)[None]
    assert (reduce(logits, Truncation(method="topp", k=50, p=1.0)).token_ids >= 0).all()


@pytest.mark.parametrize("gap", [20.0, 60.0, 80.0])
def test_a_tiny_tail_is_not_lost(gap):
    """A tail of e^-60, which 1 - sum p gives as 0 or below, is exact in log space."""
    logits = random_logits(30, 400, spread=1.0)
    logits[:, 7:11] += gap + 8
    sparse = reduce(logits, Truncation(k=4), temperatures=(1.0, 2.0))
    assert set(sparse.token_ids.flatten().tolist()) == {7, 8, 9, 10}
    assert sparse.log_tail[:, 0].max() < 10 - gap
    assert_exact(sparse, logits, temperatures=(1.0, 2.0))


def test_a_tail_of_almost_everything_is_exact():
    """One kept entry of a flat distribution: the tail is log(1 - 1/V) and not rounded to 0."""
    logits = np.zeros((3, 1 << 14), np.float32)
    sparse = reduce(logits, Truncation(k=1))
    np.testing.assert_allclose(sparse.log_tail[:, 0], math.log1p(-(2**-14)), rtol=1e-2)
    assert_exact(sparse, logits, atol=1e-6)


@pytest.mark.parametrize("slots", [49, 50])
def test_k_of_the_whole_vocabulary_leaves_no_tail(slots):
    """A k of V gives log tail -inf at every temperature; V - 1 the log prob of the last id."""
    logits = random_logits(20, 50)
    sparse = reduce(logits, Truncation(k=slots))
    if slots == 50:
        assert torch.isneginf(sparse.log_tail).all()
        np.testing.assert_allclose(sparse.logprobs.exp().sum(dim=1), 1, atol=1e-6)
    assert_exact(sparse, logits)


@pytest.mark.parametrize("offset", [-4096.0, 0.0, 4096.0])
@each_method
def test_an_offset_of_all_logits_changes_nothing(truncation, offset):
    """A softmax knows no offset: numbers far from 0 cost no digits."""
    logits = np.round(random_logits(20, 300) * 1024) / 1024  # exact in float32 with the offset
    assert_exact(reduce((logits + offset).astype(np.float32), truncation), logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_reduced_in_float32(dtype):
    """What the dtype holds is taken as it is and summed in float32."""
    logits = torch.from_numpy(random_logits(10, 700)).to(dtype)
    sparse = sparsify(logits.clone(), torch.arange(10), Truncation(k=8), TEMPERATURES)
    assert_exact(sparse, logits.float().numpy())


@each_method
def test_ties_are_kept_once_each(truncation):
    """Equal logits: distinct ids, all of log prob -log V, and the tail of the others."""
    sparse = reduce(np.full((6, 500), 2.5, np.float32), truncation)
    for ids, logprobs, log_tail in zip(
        sparse.token_ids, sparse.logprobs, sparse.log_tail[:, 0], strict=True
    ):
        kept = ids[ids >= 0].tolist()
        assert len(set(kept)) == len(kept)
        np.testing.assert_allclose(logprobs[: len(kept)], -math.log(500), rtol=1e-6)
        np.testing.assert_allclose(log_tail, math.log1p(-len(kept) / 500), rtol=1e-5)


@each_method
def test_ruled_out_ids_stay_finite(truncation):
    """-inf logits get the floor where they must be kept, and are never drawn or in the tail."""
    logits = np.full((4, 100), -np.inf, np.float32)
    logits[:, 30:33] = random_logits(4, 3)
    sparse = reduce(logits, truncation)
    used = sparse.token_ids >= 0
    allowed = (sparse.token_ids >= 30) & (sparse.token_ids < 33)
    assert torch.isfinite(sparse.logprobs[used]).all()
    assert (sparse.logprobs[used & ~allowed] == LOGPROB_FLOOR).all()
    assert (sparse.label_logprob == LOGPROB_FLOOR).all()  # labels 0 to 3
    mass = sparse.logprobs.exp().sum(dim=1) + sparse.log_tail[:, 0].exp()
    np.testing.assert_allclose(mass, 1, atol=1e-6)
    assert truncation.method == "sample" or torch.isneginf(sparse.log_tail).all()
    assert torch.isfinite(sparse.log_z).all()
    if truncation.sampled:
        drawn = sparse.draws > 0
        assert (drawn <= allowed).all()


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("column", [0, 123, 499])
@each_method
def test_a_logit_that_is_not_finite_names_its_row(truncation, column, value):
    """NaN and +inf raise NotFinite with the first such row, wherever in the row they stand."""
    logits = random_logits(9, 500)
    logits[5, column] = logits[7, 2] = value
    with pytest.raises(NotFinite) as caught:
        reduce(logits, truncation)
    assert caught.value.row == 5


def test_a_row_of_ruled_out_ids_is_not_a_distribution():
    """All -inf is refused like NaN."""
    with pytest.raises(NotFinite):
        reduce(np.full((2, 40), -np.inf, np.float32), Truncation(k=4))


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 7),
    k=st.integers(1, 20),
    times=st.floats(16, 60),
    levels=st.integers(2, 5000),
    seed=st.integers(0, 1 << 30),
)
def test_top_blocks_equals_topk(n, k, times, levels, seed):
    """The two-step top k has torch.topk's values at any width, with ties and a ragged last part."""
    vocab = max(16, int(k * times))
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(levels, (n, vocab), generator=generator).float()
    ids = _top_blocks(x, k)
    assert torch.equal(x.gather(1, ids), x.topk(k).values)
    assert all(len(set(row.tolist())) == k for row in ids)


def test_a_head_is_applied_in_steps():
    """From hidden states: rows, labels and the number of a bad row are those of one big product."""
    torch.manual_seed(0)
    n, vocab = 300, 50_000  # several products, and several chunks in each
    hidden, head = torch.randn(n, 8), torch.randn(vocab + 100, 8)
    truncation, labels = Truncation(method="topk+sample", k=4, draws=3), torch.arange(n)
    uniforms = torch.from_numpy(uniforms_for(truncation, 0, n))

    def parts() -> list[Sparse]:
        return list(
            sparsify_hidden(
                hidden,
                lambda rows: rows @ head.T,
                labels,
                vocab_size=vocab,
                truncation=truncation,
                temperatures=TEMPERATURES,
                uniforms=uniforms,
            )
        )

    assert len(parts()) > 5
    whole = sparsify(
        (hidden @ head.T)[:, :vocab], labels, truncation, TEMPERATURES, uniforms=uniforms
    )
    joined = torch.cat([part.token_ids for part in parts()])
    assert (joined == whole.token_ids).float().mean() > 0.99
    for name in ("log_z", "log_tail", "label_logprob"):
        joined = torch.cat([getattr(part, name) for part in parts()])
        np.testing.assert_allclose(joined, getattr(whole, name), atol=1e-4)
    hidden[217] = math.nan
    with pytest.raises(NotFinite) as caught:
        parts()
    assert caught.value.row == 217


# Sampling. The weight of an id is p in the exact head and R * draws / m beyond it, R being the
# mass that the draws stand for.


def importance_weights(sparse: Sparse, vocab: int, num_draws: int) -> NDArray[np.float64]:
    """[n, V] the estimate of p that sampled entries stand for."""
    assert sparse.draws is not None
    ids, draws = sparse.token_ids.long(), sparse.draws.double()
    p = torch.where(ids >= 0, sparse.logprobs.double().exp(), 0)
    exact = (draws == 0) & (ids >= 0)
    beyond = 1 - torch.where(exact, p, 0).sum(dim=1, keepdim=True)
    weight = torch.where(exact, p, beyond * draws / num_draws).masked_fill(ids < 0, 0)
    dense = torch.zeros(len(ids), vocab, dtype=torch.float64)
    return dense.scatter_add_(1, ids.clamp(min=0), weight).numpy()


@pytest.mark.parametrize("truncation", METHODS[2:], ids=lambda t: t.method)
def test_samples_are_unbiased(truncation):
    """The mean of 4000 importance estimates of p, and of a sum over it, is p: within 5 s.e."""
    n, vocab = 4000, 60
    row = random_logits(1, vocab, spread=2.0).astype(np.float64)
    p = np.exp(row - log_sum_exp(row)[:, None])[0]
    sparse = reduce(np.repeat(row.astype(np.float32), n, axis=0), truncation, temperatures=(1.0,))
    estimates = importance_weights(sparse, vocab, truncation.draws)
    errors = estimates.std(axis=0) / math.sqrt(n)
    assert (np.abs(estimates.mean(axis=0) - p) <= 5 * errors + 1e-6).all()
    values = np.random.default_rng(1).normal(size=vocab)
    sums = estimates @ values
    assert abs(sums.mean() - p @ values) < 5 * sums.std() / math.sqrt(n)


@pytest.mark.parametrize("truncation", METHODS[2:], ids=lambda t: t.method)
def test_draws_are_counted_and_ordered(truncation):
    """Draw counts sum to m, ids are distinct, the most probable first, unused slots at the end."""
    logits = random_logits(50, 200)
    sparse = reduce(logits, truncation)
    assert sparse.token_ids.shape == (50, truncation.slots)
    assert (sparse.draws.sum(dim=1) == truncation.draws).all()
    for ids, logprobs, draws in zip(sparse.token_ids, sparse.logprobs, sparse.draws, strict=True):
        kept = ids[ids >= 0]
        assert len(kept.unique()) == len(kept)
        assert (ids[len(kept) :] == -1).all() and (draws[len(kept) :] == 0).all()
        assert (logprobs[1:] <= logprobs[:-1]).all()


def test_the_tail_is_drawn_outside_the_head():
    """topk+sample: the head is the exact top k with 0 draws, and no draw is one of its ids."""
    logits = random_logits(200, 40, spread=4.0)  # a head this heavy would draw itself at once
    truncation = Truncation(method="topk+sample", k=5, draws=30)
    sparse = reduce(logits, truncation)
    head = np.argsort(-logits, axis=1)[:, :5]
    assert np.array_equal(sparse.token_ids[:, :5], head)
    assert (sparse.draws[:, :5] == 0).all()
    for row, ids in enumerate(sparse.token_ids[:, 5:]):
        assert not set(ids.tolist()) & set(head[row].tolist())


def test_nothing_is_drawn_from_an_empty_tail():
    """topk+sample whose head holds all that is possible draws nothing."""
    logits = np.full((2, 30), -np.inf, np.float32)
    logits[:, :4] = 1.0
    sparse = reduce(logits, Truncation(method="topk+sample", k=4, draws=6))
    assert (sparse.token_ids[:, 4:] == -1).all()
    assert (sparse.draws == 0).all()


def test_a_random_number_of_0_draws_something_possible():
    """The edge of the interval: the first id with any mass, not id 0 without."""
    logits = np.array([[-np.inf, -np.inf, 1.0, 2.0]], np.float32)
    edges = np.array([[0.0, np.nextafter(1, 0)]])
    sparse = reduce(logits, Truncation(method="sample", draws=2), uniforms=edges)
    assert sparse.token_ids.tolist() == [[3, 2]]


@pytest.mark.parametrize("truncation", METHODS[2:], ids=lambda t: t.method)
def test_draws_do_not_depend_on_the_batch(truncation):
    """A row alone, and the same row among others, draws the same ids; so does a second time."""
    logits = random_logits(12, 300)
    uniforms = uniforms_for(truncation, 7, 12)
    whole = reduce(logits, truncation, uniforms=uniforms)
    again = reduce(logits, truncation, uniforms=uniforms_for(truncation, 7, 12))
    assert torch.equal(whole.token_ids, again.token_ids)
    for row in range(12):
        labels = np.array([row])
        one = slice(row, row + 1)
        alone = reduce(logits[one], truncation, labels=labels, uniforms=uniforms[one])
        assert torch.equal(alone.token_ids[0], whole.token_ids[row])
        assert torch.equal(alone.draws[0], whole.draws[row])


def test_random_numbers_belong_to_seed_and_sequence():
    """They repeat for the same pair, differ for any other, and lie in [0, 1)."""
    one = uniforms_for(METHODS[2], 5, 10)
    assert np.array_equal(one, uniforms_for(METHODS[2], 5, 10))
    assert ((one >= 0) & (one < 1)).all()
    other_seed = Truncation(method="sample", draws=40, seed=4)
    for other in (uniforms_for(METHODS[2], 6, 10), uniforms_for(other_seed, 5, 10)):
        assert not np.isin(one, other).any()
