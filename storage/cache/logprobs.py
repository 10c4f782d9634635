"""Log probs to their stored bytes and back: the codes, their table, their error bounds."""

import functools
import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from decant.schemas import CompactCode, Layout

LAST_CODE = 255
"""Compact code: stands for every gap from nearly the limit on."""


LOW_HALF, HIGH_HALF, FOUR = np.uint8(15), np.uint8(240), np.uint8(4)
SIXTEEN = np.uint8(16)
"""Multiplied by in place of a shift by four to the left, which takes numpy eight times as long."""


ROUNDED_BITS = 12
ROUNDING = 2.0 ** -(ROUNDED_BITS + 1)
"""What `rounded` can move a number by, in nats."""


LOG_FLOOR = np.float32(-87)
"""Log probs below it count as this in a loss: near the smallest float32."""


BLOCK_ROWS = 2048
"""Targets decoded at a time: what is in between stays in the processor's cache."""


CODE = CompactCode()


STORED_LOGPROB = {"f32": "<f4", "f16": "<f2", "compact": "u1"}


@functools.cache
def gap_table(code: CompactCode) -> NDArray[np.float32]:
    """[256] the gap in nats that each compact code stands for: expm1(q step) / scale."""
    return (np.expm1(np.arange(256) * code.step) / code.scale).astype(np.float32)


@functools.cache
def _pair_tables(code: CompactCode) -> tuple[pa.Array, pa.Array]:
    """[65536] gaps and summed weights of two neighbouring codes, by the uint16 they form.

    The two float32 gaps are the bits of one int64, the weights float64.
    """
    gaps = gap_table(code)
    weights = np.exp(-gaps.astype(np.float64)).astype(np.float32).astype(np.float64)
    pairs = np.stack([np.tile(gaps, 256), np.repeat(gaps, 256)], axis=1).view(np.int64)
    return pa.array(pairs.ravel()), pa.array((weights[None, :] + weights[:, None]).ravel())


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


def in_planes(stored: NDArray, used: NDArray[np.bool_], layout: Layout) -> list[NDArray[np.uint8]]:
    """The columns [n, width] of a ranked layout, from `encode_logprobs`, zero in unused slots.

    The steps of compact codes in two planes of half bytes, those of the first half of the slots in
    the low bits. Otherwise the differences of successive values as integers, a plane for each byte.
    """
    n, slots = stored.shape
    if layout.precision == "compact":
        steps = np.zeros((n, slots + slots % 2), np.uint8)
        steps[:, :slots] = stored
        first, second = np.hsplit(steps, 2)
        return [first & LOW_HALF | second * SIXTEEN, first >> FOUR | second & HIGH_HALF]
    width = stored.dtype.itemsize
    bits = stored.view(f"<u{width}")
    steps = np.diff(bits, axis=1, prepend=bits.dtype.type(0))
    steps[~used] = 0
    planes = steps.view(np.uint8).reshape(n, slots, width)
    return [np.ascontiguousarray(planes[:, :, i]) for i in range(width)]


def of_planes(columns: Sequence[NDArray], slots: int, compact: bool) -> NDArray:
    """The inverse of `in_planes`, but for unused slots: log probs, or steps of compact codes.

    A single column is what it is already.
    """
    if len(columns) == 1:
        return columns[0]
    n = len(columns[0])
    if compact:
        half = columns[0].shape[1]
        steps = empty((n, 2 * half), np.uint8)
        for start in range(0, n, BLOCK_ROWS):
            block = slice(start, start + BLOCK_ROWS)
            low, high = columns[0][block], columns[1][block]
            steps[block, :half] = low & LOW_HALF | high * SIXTEEN
            steps[block, half:] = low >> FOUR | high & HIGH_HALF
        return steps[:, :slots]
    width = len(columns)
    parts = empty((n, slots, width), np.uint8)
    for i, plane in enumerate(columns):
        parts[:, :, i] = plane
    bits = parts.view(f"<u{width}")[:, :, 0]
    for start in range(0, n, BLOCK_ROWS):
        rows = bits[start : start + BLOCK_ROWS]
        for j in range(1, slots):  # cumsum along the rows, in half its time
            rows[:, j] += rows[:, j - 1]
    return bits.view(f"<f{width}")


def rounded(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Numbers per target as they are stored where a little may be lost: fewer digits, fewer bytes.

    To multiples of 2^-ROUNDED_BITS, of those times 2^e where 2^e <= |x| < 2^(e+1) <= 1: so within
    ROUNDING, and within a relative ROUNDING where |x| < 1.
    """
    _, exponent = np.frexp(values)  # |x| < 2^exponent
    places = ROUNDED_BITS - np.minimum(exponent - 1, 0)
    near = np.ldexp(np.rint(np.ldexp(values.astype(np.float64), places)), -places)
    keep = ~np.isfinite(values) | (values > 0)
    return np.where(keep, values, near).astype(np.float32)


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
    even = slots + slots % 2
    for start in range(0, n, BLOCK_ROWS):  # what is in between stays in the processor's cache
        block = slice(start, start + BLOCK_ROWS)
        rows = logprobs[block]
        codes = _summed(stored[block])
        codes[:, slots:] = LAST_CODE
        if unused is not None:
            codes[:, :slots][unused[block]] = LAST_CODE  # weighs 4e-11, the first entry 1
        # Arrow looks up by the indices as they are; numpy would widen them to eight bytes first.
        pairs = pa.array(codes[:, :even].view("<u2").ravel())
        gaps = pc.take(pair_gaps, pairs, boundscheck=False).to_numpy().view(np.float32)
        weights = pc.take(pair_weights, pairs, boundscheck=False).to_numpy()
        weights = weights.reshape(len(rows), -1).sum(axis=1)
        first = (kept[block] - np.log(weights)).astype(np.float32)
        np.subtract(first[:, None], gaps.reshape(len(rows), even)[:, :slots], out=rows)
    if unused is not None:
        logprobs[unused] = -np.inf
    return logprobs


def _summed(steps: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """[n, K or more] sums along the rows: the codes of descending log probs, which are below 256.

    A product with 1 + 2^8 + 2^16 + ... sums the eight bytes of a word.
    """
    n, slots = steps.shape
    codes = np.zeros((n, -(-slots // 8) * 8), np.uint8)
    codes[:, :slots] = steps
    ones = np.uint64(0x0101010101010101)
    words = codes.view("<u8")
    words *= ones
    for j in range(1, words.shape[1]):
        words[:, j] += (words[:, j - 1] >> np.uint64(56)) * ones
    return codes


def logprob_bound(
    logprobs: NDArray[np.float32], precision: str, code: CompactCode = CODE
) -> NDArray[np.float32]:
    """[n, K] how far a decoded log prob can be from the scored one, in nats; 0 in unused slots.

    f16: |log p| / 2^11. compact: half a code, (1/scale + g) expm1(step / 2), plus what all of them
    together, and the rounded tail, can move the first entry; infinite for the last code, which has
    no far end.
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
    bound = half + moved[:, None] + np.float32(ROUNDING + 1e-5)
    bound[gaps > gap_table(code)[LAST_CODE - 1] + 1e-3] = np.inf
    return np.where(used, bound, 0)


def decoding_error(
    logprobs: NDArray[np.float32], decoded: NDArray[np.float32]
) -> NDArray[np.float64]:
    """[n] the first of `decoding_errors`: the generalised KL."""
    return decoding_errors(logprobs, decoded)[0]


class Measured:
    """The sum and the largest of values that are measured in turn."""

    def __init__(self) -> None:
        """Of none."""
        self._sum = self.largest = 0.0

    def add(self, values: NDArray) -> None:
        """Take more."""
        self._sum += float(values.sum(dtype=np.float64))
        self.largest = max(self.largest, float(values.max(initial=0)))

    def mean(self, count: int) -> float:
        """Of so many of them, those that were not measured being 0."""
        return self._sum / max(count, 1)


def decoding_errors(
    logprobs: NDArray[np.float32], decoded: NDArray[np.float32]
) -> tuple[NDArray[np.float64], NDArray[np.float32]]:
    """[n] and [n]: what decoding changes of each target, over the kept entries; unused slots -inf.

    The generalised KL(scored || decoded) in nats, sum p (log p - log p') - p + p', which is zero
    only at p' = p whatever the mass of p'; it weighs by the teacher, to whom an entry of nearly
    nothing is nothing. And the largest |log p - log p'|, log probs below LOG_FLOOR counting as
    that: as the losses take them. The reverse KL of any student moves by at most this, for
    sum q log(q / p') - sum q log(q / p) = sum q (log p - log p').
    """
    n = len(logprobs)
    kl, largest = np.empty(n, np.float64), np.empty(n, np.float32)
    for start in range(0, n, BLOCK_ROWS):  # what is in between stays in the processor's cache
        block = slice(start, start + BLOCK_ROWS)
        log_p = np.maximum(logprobs[block], LOG_FLOOR)
        gap = np.maximum(decoded[block], LOG_FLOOR)
        gap -= log_p
        p = np.exp(log_p)
        largest[block] = np.maximum(gap.max(axis=1, initial=0), -gap.min(axis=1, initial=0))
        terms = np.expm1(gap)  # p (e^gap - 1 - gap) loses no digits where p' is nearly p
        terms -= gap
        terms *= p
        kl[block] = terms.sum(axis=1, dtype=np.float64)
    return np.maximum(kl, 0), largest


def empty(shape: tuple[int, ...], dtype: npt.DTypeLike) -> NDArray:
    """`np.empty` from Arrow's pool, which keeps its pages: faulting in new ones costs a third."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    return np.frombuffer(pa.allocate_buffer(size), dtype).reshape(shape)
