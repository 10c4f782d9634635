"""What is known of each sequence of a cache: counts, figures of the teacher's word, hashes.

Shapes: S sequences, n targets, K slots.
"""

import itertools

import numpy as np
import xxhash
from numpy.typing import NDArray

from decant.schemas import Layout
from decant.storage.cache.rows import Rows

COUNTS = {
    "sequence": "index in the cache, from 0",
    "length": "tokens",
    "targets": "targets",
}
"""Figures that every sequence has."""
OF_LABELS = {
    "cross_entropy": "mean of -log p of the actual tokens, nats",
    "perplexity": "exp(cross_entropy)",
    "min_logprob": "log p of the least expected actual token, nats",
}
OF_ENTROPY = {
    "mean_entropy": "mean entropy of the teacher, nats: kept entries and one bucket for the rest",
    "max_entropy": "its largest",
}
OF_ENTRIES = {
    "retained_mass": "mean kept mass at T=1",
    "min_retained_mass": "the least kept mass of a target",
    "num_kept": "mean number of kept entries",
    "top1_probability": "mean probability of the first entry",
    "top1_agreement": "share of targets whose first entry is the actual token",
}
FIGURES = COUNTS | OF_LABELS | OF_ENTROPY | OF_ENTRIES
"""Name of a figure of a sequence -> what it is."""


def known_figures(layout: Layout) -> tuple[str, ...]:
    """The figures that a cache of this layout can give."""
    has_entropy = layout.has_logprobs or "entropy" in layout.fields
    known = COUNTS | OF_LABELS
    known |= OF_ENTROPY if has_entropy else {}
    known |= OF_ENTRIES if layout.has_logprobs else {}
    return tuple(known)


def figures_of(rows: Rows, layout: Layout) -> dict[str, NDArray[np.float64]]:
    """[S] each figure of the sequences of a row group; NaN where there is no target."""
    lengths = np.diff(rows.row_starts)
    targets = np.diff(rows.target_starts)
    owner = np.repeat(np.arange(len(rows)), targets)

    def mean(values: NDArray) -> NDArray[np.float64]:
        sums = np.bincount(owner, weights=values, minlength=len(rows))
        with np.errstate(invalid="ignore"):
            return sums / targets

    def extreme(function: np.ufunc, values: NDArray) -> NDArray[np.float64]:
        out = np.full(len(rows), np.nan)
        some = targets > 0
        if some.any():
            out[some] = function.reduceat(values, rows.target_starts[:-1][some])
        return out

    label = rows.label_logprob.astype(np.float64)
    cross_entropy = mean(-label)
    with np.errstate(over="ignore"):
        found = {
            "sequence": rows.sequence.astype(np.float64),
            "length": lengths.astype(np.float64),
            "targets": targets.astype(np.float64),
            "cross_entropy": cross_entropy,
            "perplexity": np.exp(cross_entropy),
            "min_logprob": extreme(np.minimum, label),
        }
    entropy = None if rows.entropy is None else rows.entropy.astype(np.float64)
    if rows.logprobs is not None and rows.log_tail is not None:
        p = np.exp(rows.logprobs, dtype=np.float64)
        log_rest = rows.log_tail[:, 0].astype(np.float64)
        rest = np.exp(log_rest)
        if entropy is None:
            entropy = -_times(p, rows.logprobs).sum(axis=1) - _times(rest, log_rest)
        used = rows.token_ids >= 0
        first = p.argmax(axis=1) if layout.slots else np.zeros(len(p), np.intp)
        each = np.arange(len(p))
        found |= {
            "retained_mass": mean(-np.expm1(log_rest)),
            "min_retained_mass": extreme(np.minimum, -np.expm1(log_rest)),
            "num_kept": mean(used.sum(axis=1)),
            "top1_probability": mean(p[each, first]),
            "top1_agreement": mean(rows.token_ids[each, first] == rows.labels),
        }
    if entropy is not None:
        found |= {"mean_entropy": mean(entropy), "max_entropy": extreme(np.maximum, entropy)}
    return {name: found[name] for name in known_figures(layout)}


def token_hashes(rows: Rows) -> NDArray[np.bytes_]:
    """[S] xxh3_128 of the token ids of each sequence."""
    ids = np.ascontiguousarray(rows.input_ids, "<i4")
    starts = rows.row_starts
    digests = [
        xxhash.xxh3_128_digest(ids[start:stop].data) for start, stop in itertools.pairwise(starts)
    ]
    return hashes_of(digests)


def id_hashes(sample_ids: list[str]) -> NDArray[np.bytes_]:
    """[S] xxh3_128 of each sample id."""
    return hashes_of([xxhash.xxh3_128_digest(sample_id.encode()) for sample_id in sample_ids])


def hashes_of(digests: list[bytes]) -> NDArray[np.bytes_]:
    """Digests of 16 bytes as an array that sorts and compares."""
    return np.frombuffer(b"".join(digests), "S16")


def _times(p: NDArray[np.float64], log_p: NDArray) -> NDArray[np.float64]:
    """P log p, which is 0 at p = 0."""
    return np.multiply(p, log_p, where=p > 0, out=np.zeros_like(p))
