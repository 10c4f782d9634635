"""MixtureStream: exact proportions in every prefix, elastic, resumable, one form of targets."""

import dataclasses
import itertools
import json
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from decant.schemas import TokenizerInfo, Truncation
from decant.storage import CacheReader, CacheWriter
from decant.student_train import EvalConfig, train
from decant.student_train.config.mixture import CacheShare
from decant.student_train.data.batch import Batch
from decant.student_train.data.mixture import MixtureStream, interleaving
from tests.support import caches
from tests.support.trainings import config

VOCAB_SIZE = 30
FORMS = {
    "small": caches.Settings(truncation=Truncation(k=3), vocab_size=VOCAB_SIZE),
    "wide": caches.Settings(truncation=Truncation(k=7), vocab_size=VOCAB_SIZE, precision="compact"),
    "ragged": caches.Settings(
        truncation=Truncation(method="topp", k=9, p=0.8),
        vocab_size=VOCAB_SIZE,
        precision="f16",
        temperatures=(1.0, 4.0, 2.0),
    ),
}


@pytest.fixture(scope="module")
def urls(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three caches of one vocabulary that differ in everything else, of 6, 9 and 4 sequences."""
    folder = tmp_path_factory.mktemp("mixture")
    for (name, form), (shards, sequences) in zip(
        FORMS.items(), [(3, 2), (3, 3), (1, 4)], strict=True
    ):
        written = caches.random_shards(
            form, num_shards=shards, sequences=sequences, seed=len(name), length=4
        )
        named = [
            [dataclasses.replace(s, sample_id=f"{name}-{s.sample_id}") for s in shard]
            for shard in written
        ]
        caches.write_cache(folder / name, form, named)
    return [folder / name for name in FORMS]


def ids_of(stream: MixtureStream, batches: int) -> list[str]:
    iterator = iter(stream)
    taken = [i for batch in itertools.islice(iterator, batches) for i in batch.sample_ids]
    iterator.close()
    return taken


def order(urls: list[Path], weights: list[float], consumed: int, count: int, **setup: int) -> list:
    """The next `count` samples of all ranks together, in the global order."""
    taken = []
    for rank in range(setup["world_size"]):
        stream = MixtureStream(urls, weights, rank=rank, lanes=2, **setup)
        stream.consumed = consumed
        steps = -(-count // stream.sequences_per_step)
        ids = iter(ids_of(stream, steps))
        for step, slot in itertools.product(range(steps), range(setup["batch_size"])):
            taken.append((step, slot, rank, next(ids)))
    return [sample for *_, sample in sorted(taken)][:count]


@given(weights=st.lists(st.integers(1, 40), min_size=1, max_size=6))
def test_every_prefix_has_the_proportions_within_one_sequence(weights: list[int]) -> None:
    """At every place of the period, for any weights; and the period has them exactly."""
    pattern = interleaving(weights)
    shares = [Fraction(w, sum(weights)) for w in weights]
    given = [0] * len(weights)
    for place, source in enumerate(pattern.tolist(), start=1):
        given[source] += 1
        assert all(abs(n - share * place) < 1 for n, share in zip(given, shares, strict=True))
    assert all(n == share * len(pattern) for n, share in zip(given, shares, strict=True))


@pytest.mark.parametrize("weights", [[0.7, 0.3], [0.1, 0.2, 0.7], [3, 1, 1], [0.333, 0.667]])
def test_decimal_weights_are_taken_at_their_word(weights: list[float]) -> None:
    """0.7 is seven tenths, not the nearest double: the period is short."""
    pattern = interleaving(weights)
    assert len(pattern) <= 1000
    shares = np.bincount(pattern) / len(pattern)
    np.testing.assert_allclose(shares, np.array(weights) / sum(weights), rtol=1e-12)


def test_weights_without_a_common_period_are_refused() -> None:
    """The message says what to do."""
    with pytest.raises(ValueError, match="round them"):
        interleaving([0.123456789, 0.876543211])


SETUP = st.fixed_dictionaries({"world_size": st.integers(1, 4), "batch_size": st.integers(1, 3)})


@settings(max_examples=6, deadline=None)
@given(before=SETUP, after=SETUP, steps=st.integers(0, 8), seed=st.integers(0, 2))
def test_the_order_is_one_processs_across_a_change_of_the_world(
    urls: list[Path], before: dict[str, int], after: dict[str, int], steps: int, seed: int
) -> None:
    """Whoever consumes it; each cache passes its samples once per epoch; proportions hold."""
    weights, count = [0.5, 0.3, 0.2], 40
    consumed = steps * before["world_size"] * before["batch_size"]
    alone = order(urls, weights, 0, consumed + count, world_size=1, batch_size=1, seed=seed)
    seen = order(urls, weights, 0, consumed, **before, seed=seed)
    rest = order(urls, weights, consumed, count, **after, seed=seed)
    assert seen + rest == alone
    for name, url, weight in zip(FORMS, urls, weights, strict=True):
        mine = [sample for sample in alone if sample.startswith(name)]
        assert abs(len(mine) - weight * len(alone)) < 1
        expected = sorted(s.sample_id for s in CacheReader(url))
        for start in range(0, len(mine) - len(expected) + 1, len(expected)):
            assert sorted(mine[start : start + len(expected)]) == expected


def test_a_state_goes_on_where_it_was(urls: list[Path]) -> None:
    """Also mid-batch of a cache's epoch, at another world size; other weights are refused."""
    setup = {"batch_size": 2, "temperature": 2.0}
    whole = ids_of(MixtureStream(urls, [2, 1, 1], **setup), 20)
    stream = MixtureStream(urls, [2, 1, 1], **setup)
    iterator = iter(stream)
    first = [i for batch in itertools.islice(iterator, 7) for i in batch.sample_ids]
    iterator.close()
    other = MixtureStream(urls, [2, 1, 1], **setup)
    other.load_state_dict(stream.state_dict())
    assert first + ids_of(other, 13) == whole
    with pytest.raises(ValueError, match="shares was"):
        MixtureStream(urls, [1, 1, 1], **setup).load_state_dict(stream.state_dict())


def test_targets_of_every_cache_are_what_its_reader_gives(urls: list[Path]) -> None:
    """Padded to the widest K, at every temperature, with its source."""
    by_id = {s.sample_id: (i, s) for i, url in enumerate(urls) for s in CacheReader(url)}
    stored = [CacheReader(url).manifest.temperatures for url in urls]
    stream = MixtureStream(urls, [1, 1, 1], batch_size=19, temperature=(2.0, 1.0))
    batch = next(iter(stream))
    for temperature in (1.0, 2.0):
        targets = batch.targets_at(temperature).validate(VOCAB_SIZE, temperature)
        assert targets.token_ids.shape[1] == 9
        start = 0
        for sample_id in batch.sample_ids:
            source, sequence = by_id[sample_id]
            rows, k = slice(start, start + sequence.num_targets), sequence.token_ids.shape[1]
            start = rows.stop
            column = stored[source].index(temperature)
            assert (batch.source[rows] == source).all()
            assert torch.equal(targets.token_ids[rows, :k].int(), torch.tensor(sequence.token_ids))
            assert torch.equal(targets.logprobs[rows, :k], torch.tensor(sequence.logprobs))
            assert (targets.token_ids[rows, k:] == -1).all()
            assert targets.logprobs[rows, k:].isneginf().all()
            assert torch.equal(targets.log_z[rows], torch.tensor(sequence.log_z[:, column]))
            assert torch.equal(targets.log_tail[rows], torch.tensor(sequence.log_tail[:, column]))
        assert start == batch.num_targets
        # The checks that the stream vouches for do hold.
        unchecked = dataclasses.replace(targets, checked_for=None)
        unchecked.validate(VOCAB_SIZE, temperature)


def test_caches_that_do_not_fit_are_refused(urls: list[Path], tmp_path: Path) -> None:
    """Another vocabulary, another tokenizer, a temperature that one lacks, draws beside top-k."""
    small = FORMS["small"]

    def cache(name: str, form: caches.Settings, tokenizer: str = "") -> Path:
        shards = caches.random_shards(form, num_shards=1, sequences=2, length=4)
        draft = dataclasses.replace(
            form.draft(), tokenizer=TokenizerInfo(fingerprint=tokenizer, files={})
        )
        writer = CacheWriter.create(tmp_path / name, draft, caches.plan_of(shards))
        caches.write_shard(writer, 0, shards[0])
        writer.finalize()
        return tmp_path / name

    larger = cache("larger", dataclasses.replace(small, vocab_size=31))
    with pytest.raises(ValueError, match=r"larger has 31 ids, .*small 30"):
        MixtureStream([urls[0], larger], [1, 1], batch_size=1)
    other = cache("other", small, tokenizer="sha256:1")
    with pytest.raises(ValueError, match="other has another tokenizer"):
        MixtureStream([urls[0], other], [1, 1], batch_size=1)
    with pytest.raises(ValueError, match=r"temperature 4 is not stored in .*small, which has 1, 2"):
        MixtureStream(urls, [1, 1, 1], batch_size=1, temperature=4.0)
    sampled = Truncation(method="sample", draws=7, seed=1)
    drawn = cache("drawn", dataclasses.replace(small, truncation=sampled))
    with pytest.raises(
        ValueError, match=r"small \(topk, f32\) and .*drawn \(sample, .*cannot be mixed"
    ):
        MixtureStream([urls[0], drawn], [1, 1], batch_size=1)
    with pytest.raises(ValueError, match="must be > 0"):
        CacheShare(cache="x", weight=0)


def test_caches_of_draws_mix_with_each_other(tmp_path: Path) -> None:
    """Of different numbers of draws: ids and counts are what each reader gives."""
    for draws in (5, 9):
        truncation = Truncation(method="sample", draws=draws, seed=1)
        form = caches.Settings(truncation=truncation, vocab_size=VOCAB_SIZE, temperatures=(1.0,))
        written = caches.random_shards(form, num_shards=1, sequences=3, seed=draws, length=5)
        named = [dataclasses.replace(s, sample_id=f"{draws}-{s.sample_id}") for s in written[0]]
        caches.write_cache(tmp_path / str(draws), form, [named])
    folders = [tmp_path / "5", tmp_path / "9"]
    by_id = {s.sample_id: s for folder in folders for s in CacheReader(folder)}
    batch = next(iter(MixtureStream(folders, [1, 1], batch_size=6)))
    targets, start = batch.targets, 0
    dataclasses.replace(targets, checked_for=None).validate(VOCAB_SIZE)
    for sample_id in batch.sample_ids:
        sequence = by_id[sample_id]
        rows, k = slice(start, start + sequence.num_targets), sequence.token_ids.shape[1]
        start = rows.stop
        assert torch.equal(targets.token_ids[rows, :k].int(), torch.tensor(sequence.token_ids))
        used = torch.tensor(sequence.token_ids) >= 0
        counts = targets.draws[rows, :k]
        assert torch.equal(counts[used].int(), torch.tensor(sequence.draws)[used])
        assert (targets.token_ids[rows, k:] == -1).all() and (targets.draws[rows, k:] == 0).all()


@pytest.mark.parametrize("packing", ["none", "rows", "padding_free"])
def test_targets_keep_their_source_when_a_step_is_laid_out(urls: list[Path], packing: str) -> None:
    """Whatever goes to which row or microbatch, a target's distribution stays with its cache."""
    batches = list(itertools.islice(MixtureStream(urls, [1, 1, 1], batch_size=6), 3))
    laid_out = next(MixtureStream(urls, [1, 1, 1], batch_size=6).steps(3, packing))
    widest = {0: 3, 1: 7, 2: 9}

    def found(batch: Batch) -> list[tuple[int, int, float]]:
        targets = batch.targets
        columns = (batch.source, batch.labels, targets.logprobs[:, 0])
        used = (targets.token_ids >= 0).sum(1)
        for source, kept in zip(batch.source.tolist(), used.tolist(), strict=True):
            assert kept == widest[source] if source < 2 else kept <= 9
        return list(zip(*(column.tolist() for column in columns), strict=True))

    before = sorted(entry for batch in batches for entry in found(batch))
    after = sorted(entry for batch in laid_out for entry in found(batch))
    assert before == after and len({source for source, *_ in before}) == 3


def test_a_mixture_trains_with_the_weights_of_its_caches(cache: Path, tmp_path: Path) -> None:
    """A cache whose weights are next to nothing leaves a run of the other alone.

    Half of the targets then count for nothing but the mean.
    """
    shares = [
        CacheShare(cache=str(cache), weight=0.5),
        CacheShare(cache=str(cache), weight=0.5, kd_weight=0.0, ce_weight=1e-9),
    ]
    run = dataclasses.replace(config(cache, tmp_path / "mix"), cache="", mixture=shares)
    train(dataclasses.replace(run, eval=EvalConfig(heldout_fraction=0.2)))
    lines = [json.loads(line) for line in (tmp_path / "mix/metrics.jsonl").open()]
    for line in lines[1:-1]:
        whole = line["kd"] + 0.3 * line["ce"]
        assert 0.2 * whole < line["loss"] < 0.8 * whole
    assert {"heldout_ce", "heldout_ce/cache-0", "heldout_loss/cache-1"} <= lines[-1].keys()
    assert lines[-1]["heldout_loss/cache-1"] == pytest.approx(0, abs=1e-7)
    nothing = [shares[0], dataclasses.replace(shares[1], ce_weight=0.0)]
    with pytest.raises(ValueError, match="are both 0"):
        dataclasses.replace(run, mixture=nothing)
    with pytest.raises(ValueError, match="give steps"):
        dataclasses.replace(run, steps=0, epochs=1.0)
    with pytest.raises(ValueError, match="not both"):
        dataclasses.replace(run, cache=str(cache))
