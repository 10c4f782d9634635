"""Log probs to one byte each and back: the code, its table, its error bound."""

import functools
import math

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from numpy.typing import NDArray

from decant.schemas import CompactCode

LAST_CODE = 255
"""Compact code: stands for every gap from nearly the limit on."""


BLOCK_ROWS = 2048
"""Targets decoded at a time."""


CODE = CompactCode()


STORED_LOGPROB = {"f32": "<f4", "f16": "<f2", "compact": "u1"}


@functools.cache
def gap_table(code: CompactCode) -> NDArray[np.float32]:
    """[256] the gap in nats that each compact code stands for: expm1(q step) / scale."""
    return (np.expm1(np.arange(256) * code.step) / code.scale).astype(np.float32)


@functools.cache
def _pair_tables(code: CompactCode) -> tuple[NDArray, NDArray[np.float64]]:
    """[65536] gaps and summed weights of two neighbouring codes, by the uint16 they form."""
    gaps = gap_table(code)
    weights = np.exp(-gaps.astype(np.float64)).astype(np.float32).astype(np.float64)
    pairs = np.stack([np.tile(gaps, 256), np.repeat(gaps, 256)], axis=1).view(np.int64)
    return pairs, (weights[None, :] + weights[:, None]).ravel()


def encode_logprobs(
    logprobs: NDArray[np.float32],
    used: NDArray[np.bool_],
    precision: str,
    code: CompactCode = CODE,
) -> NDArray:
    """Stored form of kept log probs [n, K], descending, zero in unused slots.

    `compact`: the gap to the first entry as a code q (`CompactCode`), then differences of
    successive q. The first log prob is not stored: it follows from the tail.
    """
    if precision == "f32":
        return np.where(used, logprobs, 0).astype("<f4")
    if precision == "f16":
        return np.where(used, logprobs, 0).astype("<f2")
    curve = logprobs[:, :1] - logprobs  # becomes ln(1 + scale gap) / step; inf in unused slots
    np.minimum(curve, np.float32(code.limit), out=curve)
    curve *= np.float32(code.scale)
    curve += 1
    np.log(curve, out=curve)
    curve *= np.float32(1 / code.step)
    codes = np.rint(curve, out=curve).astype(np.uint8)
    steps = codes.copy()
    steps[:, 1:] -= codes[:, :-1]
    steps[~used] = 0
    return steps


def tail_to_store(
    logprobs: NDArray[np.float32], log_tail: NDArray[np.float32]
) -> NDArray[np.float32]:
    """The log tail mass [n] at T=1 of the compact code, from which the first entry is rebuilt.

    It is the given one, or log(1 - sum p) where the kept mass is below a half: there 1 - r cancels
    (to NaN once rounding lifts log r above 0), while 1 - sum p does not.
    """
    out = log_tail.copy()
    small = log_tail > np.float32(-np.log(2))
    if small.any():
        kept = np.exp(logprobs[small], dtype=np.float64).sum(axis=1)
        out[small] = np.minimum(np.log1p(-kept), -float(np.finfo(np.float32).tiny))
    return out


def decode_logprobs(
    stored: NDArray,
    unused: NDArray[np.bool_] | None,
    log_tail: NDArray[np.float32],
    precision: str,
    code: CompactCode = CODE,
) -> NDArray[np.float32]:
    """Log probs [n, K] from their stored form; `log_tail` [n] is the tail mass at T=1."""
    n, slots = stored.shape
    logprobs = empty((n, slots), np.float32)
    if precision != "compact":
        logprobs[:] = stored
        if unused is not None:
            logprobs[unused] = -np.inf
        return logprobs
    pair_gaps, pair_weights = _pair_tables(code)
    # The kept mass is 1 - r exactly, so the most probable entry follows from the gaps.
    with np.errstate(divide="ignore"):
        kept = np.log(-np.expm1(log_tail.astype(np.float64)))
    for start in range(0, n, BLOCK_ROWS):  # what is in between stays in the processor's cache
        block = slice(start, start + BLOCK_ROWS)
        rows = logprobs[block]
        codes = np.full((len(rows), slots + slots % 2), LAST_CODE, np.uint8)
        codes[:, :slots] = stored[block]
        for j in range(1, slots):  # cumsum along the rows, in half its time
            codes[:, j] += codes[:, j - 1]
        if unused is not None:
            codes[:, :slots][unused[block]] = LAST_CODE  # weighs 4e-11, the first entry 1
        pairs = codes.view("<u2").astype(np.intp)
        gaps = pair_gaps.take(pairs, mode="clip").view(np.float32)[:, :slots]
        weights = pair_weights.take(pairs, mode="clip").sum(axis=1)
        first = (kept[block] - np.log(weights)).astype(np.float32)
        np.subtract(first[:, None], gaps, out=rows)
    if unused is not None:
        logprobs[unused] = -np.inf
    return logprobs


def logprob_bound(
    logprobs: NDArray[np.float32], precision: str, code: CompactCode = CODE
) -> NDArray[np.float32]:
    """[n, K] how far a decoded log prob can be from the scored one, in nats; 0 in unused slots.

    f16: |log p| / 2^11. compact: half a code, (1/scale + g) expm1(step / 2), plus what all of them
    together can move the first entry; infinite for the last code, which has no far end.
    """
    used = np.isfinite(logprobs)
    if precision == "f32":
        return np.zeros_like(logprobs)
    if precision == "f16":
        return np.where(used, np.abs(logprobs) * np.float32(2**-11) + np.float32(2**-25), 0)
    gaps = np.where(used, logprobs[:, :1] - logprobs, 0)
    half = (1 / np.float32(code.scale) + gaps) * np.float32(np.expm1(code.step / 2))
    weights = np.where(used, np.exp(-gaps), 0)
    moved = np.log1p((weights * np.expm1(half)).sum(axis=1) / weights.sum(axis=1))
    bound = half + moved[:, None] + np.float32(1e-5)
    bound[gaps > gap_table(code)[LAST_CODE - 1] + 1e-3] = np.inf
    return np.where(used, bound, 0)


def decoding_error(
    logprobs: NDArray[np.float32], decoded: NDArray[np.float32]
) -> NDArray[np.float64]:
    """[n] generalised KL(scored || decoded) in nats over the kept entries; unused slots -inf.

    sum p (log p - log p') - p + p', which is zero only at p' = p whatever the mass of p'.
    """
    p = np.exp(logprobs, dtype=np.float64)
    kept, decoded_kept = p.sum(axis=1), np.exp(decoded, dtype=np.float64).sum(axis=1)
    p *= np.subtract(logprobs, decoded, where=np.isfinite(logprobs), out=np.zeros_like(logprobs))
    return p.sum(axis=1) - kept + decoded_kept


def empty(shape: tuple[int, ...], dtype: npt.DTypeLike) -> NDArray:
    """`np.empty` from Arrow's pool, which keeps its pages: faulting in new ones costs a third."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    return np.frombuffer(pa.allocate_buffer(size), dtype).reshape(shape)
