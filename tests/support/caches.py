"""Small caches whose contents are known: dense float64 distributions, cut down in plain numpy.

Shares no code with teacher_dump. Shapes: L tokens, n targets, V vocabulary, K slots.
"""

import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from decant.schemas import (
    Manifest,
    ScoredSequence,
    Segment,
    TeacherInfo,
    TokenizerInfo,
    Truncation,
)
from decant.schemas.distributions import FIELDS
from decant.storage import CacheWriter
from decant.storage.cache import writer
from decant.storage.cache.plan import plan_of
from tests.support import FIXTURES

ROUNDED = ("log_z", "log_tail", "label_logprob", "entropy")
UNSEALED = Segment(name="", entries=0, bytes=0, xxh3_128="")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a cache of random sequences is made of."""

    truncation: Truncation = field(default_factory=lambda: Truncation(k=8))
    vocab_size: int = 50
    temperatures: tuple[float, ...] = (1.0, 2.0)
    precision: str = "f32"
    version_3: bool = False
    """Whether the cache is of that version of the format."""
    before_version_3: bool = False
    """Whether draws are scored for a cache that keeps their log probs."""

    def __post_init__(self) -> None:
        if not (self.truncation.rule.has_logprobs or self.before_version_3):  # at 1 alone
            object.__setattr__(self, "temperatures", (1.0,))

    def draft(self) -> Manifest:
        """A manifest to start a cache with."""
        draft = Manifest.draft(
            teacher=TeacherInfo(
                name="random",
                fingerprint="sha256:0",
                architecture="Dice",
                engine="numpy 2",
                dtype="float64",
                vocab_size=self.vocab_size + 3,
            ),
            tokenizer=TokenizerInfo(fingerprint="", files={}),
            shared_vocab_size=self.vocab_size,
            truncation=self.truncation,
            temperatures=self.temperatures,
            precision=self.precision,
            source={"path": "nowhere", "fingerprint": "0"},
            sequences={"max_length": 64},
        )
        if not self.version_3:
            return draft
        return dataclasses.replace(draft, format_version=3, ids="planes")


def random_logprobs(
    generator: np.random.Generator, n: int, vocab_size: int, spread: float = 4.0
) -> NDArray[np.float64]:
    """[n, V] log probs of Gaussian logits with this standard deviation."""
    logits = generator.normal(scale=spread, size=(n, vocab_size))
    return logits - log_sum_exp(logits)[:, None]


def log_sum_exp(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """[n] log sum exp over the rows; -inf for a row of -inf."""
    top = x.max(axis=1, initial=-np.inf, keepdims=True)
    top = np.where(np.isfinite(top), top, 0)
    with np.errstate(divide="ignore"):
        return np.log(np.exp(x - top).sum(axis=1)) + top[:, 0]


def random_sequence(
    generator: np.random.Generator,
    settings: Settings,
    *,
    length: int = 12,
    prompt: int = 1,
    spread: float = 4.0,
    sample_id: str = "sample",
    favoured: Sequence[int] = (),
) -> tuple[ScoredSequence, NDArray[np.float64]]:
    """A valid scored sequence and the dense log probs [n, V] that it was cut from.

    The first `prompt` tokens are no targets; labels are drawn from the distributions. The logits of
    `favoured` ids are higher, so that nearly all that is kept is of these.
    """
    is_target = np.arange(length) >= max(prompt, 1)
    dense = random_logprobs(generator, int(is_target.sum()), settings.vocab_size, spread)
    if len(favoured):
        dense[:, favoured] += 5 * spread
        dense -= log_sum_exp(dense)[:, None]
    input_ids = generator.integers(0, settings.vocab_size, length, dtype=np.int32)
    gumbel = generator.gumbel(size=dense.shape)
    input_ids[is_target] = (dense + gumbel).argmax(axis=1)
    return scored_sequence(dense, input_ids, is_target, settings, sample_id, generator), dense


def scored_sequence(
    dense: NDArray[np.float64],
    input_ids: NDArray[np.int32],
    is_target: NDArray[np.bool_],
    settings: Settings,
    sample_id: str = "sample",
    generator: np.random.Generator | None = None,
) -> ScoredSequence:
    """What a teacher gives of these dense log probs [n, V]; sampling needs a generator.

    Drawn entries come with their log probs, which a cache of the present format leaves out.
    """
    truncation, temperatures = settings.truncation, settings.temperatures
    n = len(dense)
    token_ids = np.full((n, truncation.slots), -1, np.int32)
    draws = np.zeros((n, truncation.slots), np.int32)
    rest = dense.copy()
    for row, order in enumerate(np.argsort(-dense, axis=1, kind="stable")):
        ids, counts = _kept(dense[row], order, truncation, generator)
        token_ids[row, : len(ids)], draws[row, : len(ids)] = ids, counts
        rest[row, ids] = -np.inf
    log_z = np.zeros((n, len(temperatures)))
    log_tail = np.zeros((n, len(temperatures)))
    for i, temperature in enumerate(temperatures):
        if temperature != 1:
            log_z[:, i] = log_sum_exp(dense / temperature)
        log_tail[:, i] = log_sum_exp(rest / temperature) - log_z[:, i]
    kept = np.take_along_axis(dense, np.maximum(token_ids, 0), axis=1)
    labels = input_ids[is_target]
    known = {
        "token_ids": token_ids,
        "logprobs": np.where(token_ids >= 0, kept, -np.inf),
        "draws": draws,
        "log_z": log_z,
        "log_tail": log_tail,
        "label_logprob": dense[np.arange(n), labels],
        "entropy": -(np.exp(dense) * dense).sum(axis=1),
    }
    return ScoredSequence(
        sample_id=sample_id,
        input_ids=input_ids.astype(np.int32),
        is_target=is_target,
        positions=np.flatnonzero(is_target).astype(np.int32),
        **{name: known[name].astype(FIELDS[name].dtype) for name in truncation.given},
    )


def _kept(
    log_p: NDArray[np.float64],
    order: NDArray[np.intp],
    truncation: Truncation,
    generator: np.random.Generator | None,
) -> tuple[NDArray[np.intp], NDArray[np.intp] | int]:
    """Ids of one target in descending probability and how often each was drawn."""
    if not truncation.rule.has_entries:
        return order[:0], 0
    if truncation.method == "topk":
        return order[: truncation.k], 0
    p = np.exp(log_p)
    if truncation.method == "topp":
        reached = int(np.searchsorted(np.cumsum(p[order]), truncation.p)) + 1
        num_kept = min(max(reached, truncation.min_k), truncation.k)
        return order[:num_kept], 0
    assert generator is not None
    num_head = truncation.k if truncation.method == "topk+sample" else 0
    tail = order[num_head:]
    counts = generator.multinomial(truncation.draws, p[tail] / p[tail].sum())
    drawn = counts > 0
    ids = np.concatenate([order[:num_head], tail[drawn]])
    return ids, np.concatenate([np.zeros(num_head, np.intp), counts[drawn]])


def start_cache(
    url: str | os.PathLike[str], settings: Settings, shards: Sequence[Sequence[ScoredSequence]]
) -> CacheWriter:
    """Start a cache whose plan these sequences fill; no shard is written."""
    return CacheWriter.create(url, settings.draft(), plan_of(shards))


def write_shard(
    started: CacheWriter, index: int, sequences: Sequence[ScoredSequence], **options: Any
) -> None:
    """Write and commit one shard; options are those of `CacheWriter.shard`."""
    with started.shard(index, **options) as shard:
        for sequence in sequences:
            shard.write(sequence)


def write_cache(
    url: str | os.PathLike[str], settings: Settings, shards: Sequence[Sequence[ScoredSequence]]
) -> Manifest:
    """Write a whole cache."""
    sequences = [sequence for shard in shards for sequence in shard]
    return writer.write_cache(url, settings.draft(), sequences, plan_of(shards))


def random_shards(
    settings: Settings,
    *,
    num_shards: int = 2,
    sequences: int = 4,
    seed: int = 0,
    length: int = 12,
    favoured: Sequence[int] = (),
) -> list[list[ScoredSequence]]:
    """Shards of random sequences of uneven length, the first `length` long, some with a prompt."""
    generator = np.random.default_rng(seed)
    return [
        [
            random_sequence(
                generator,
                settings,
                length=length + 3 * i,
                prompt=1 + 2 * (i % 2),
                sample_id=f"sample-{shard}-{i}",
                favoured=favoured,
            )[0]
            for i in range(sequences)
        ]
        for shard in range(num_shards)
    ]


def assert_equal(found: ScoredSequence, expected: ScoredSequence, *, logprobs: bool = True) -> None:
    """Assert that two sequences are equal bit for bit; without log probs, to what is rounded.

    That is numbers per target within 2^-13 nats, where they are not stored as float32 alone. Where
    only draws were stored, expect them by ascending id, and no log probs.
    """
    assert (found.sample_id, found.messages) == (expected.sample_id, expected.messages)
    if expected.entropy is not None and found.logprobs is None:
        expected = by_id(expected)
    elif expected.entropy is not None:
        expected = dataclasses.replace(expected, entropy=None)  # stored without log probs alone
    known, wanted = found.known(), expected.known()
    assert known.keys() == wanted.keys()
    for name in ("input_ids", "is_target", "positions"):
        known[name], wanted[name] = getattr(found, name), getattr(expected, name)
    for name, value in wanted.items():
        if name != "logprobs" or logprobs:
            assert known[name].dtype == value.dtype, name
            if name in ROUNDED and not (logprobs and found.logprobs is not None):
                np.testing.assert_allclose(
                    known[name], value, rtol=0, atol=2**-13 + 1e-5, err_msg=name
                )
            else:
                np.testing.assert_array_equal(known[name], value, err_msg=name)


def by_id(sequence: ScoredSequence) -> ScoredSequence:
    """The same draws with ids ascending, without log probs, at T=1 alone."""
    assert sequence.draws is not None
    unused = sequence.token_ids < 0
    order = np.argsort(np.where(unused, np.iinfo(np.int32).max, sequence.token_ids), axis=1)
    return dataclasses.replace(
        sequence,
        token_ids=np.take_along_axis(sequence.token_ids, order, axis=1),
        draws=np.take_along_axis(sequence.draws, order, axis=1),
        logprobs=None,
        log_tail=None,
        log_z=sequence.log_z[:, :1],
    )


def fixture(version: int, name: str) -> Path:
    return FIXTURES / f"version-{version}" / name
