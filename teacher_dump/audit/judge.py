"""What counts as the same."""

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from decant.schemas import Manifest, ScoredSequence, Truncation
from decant.teacher_dump.audit.compare import Deviations, deviations_from, find_slots, matching_rows
from decant.teacher_dump.audit.report import Compared, Finding

FLOOR = 1e-4
"""Nats that are never held against a cache, however well a teacher repeats itself."""


CONTROL_FACTOR = 4.0
"""Tolerance over the 99 % quantile of the control's deviations."""


ROUNDING_NATS = {"float32": 0.01, "float16": 0.1, "bfloat16": 0.5, "auto": 0.5}
"""Nats that 99 % of a healthy teacher's numbers stay within when they are batched otherwise."""


STRAYS = 0.01
"""Share of targets that may lie beyond the tolerance: routers of experts flip on rounding."""


DRAW_SIGMAS = 5.0
"""How far drawn counts may lie from their expectation, in standard deviations."""


def _draw_deviations(
    cached: list[ScoredSequence], live: list[ScoredSequence], truncation: Truncation, slack: float
) -> NDArray[np.float64]:
    """[ranks] by how many standard deviations drawn counts are off, over all targets.

    Of m draws a set of ids with conditional mass q gets m q, with variance m q (1 - q); sets are
    the live ranks 1, 2-3, 4-7, ..., and all the rest. `slack` is the relative error of the masses.
    """
    counts: NDArray = np.zeros(0)
    expected: NDArray = np.zeros(0)
    variance: NDArray = np.zeros(0)
    for old, new in zip(cached, live, strict=True):
        assert old.draws is not None
        ours, theirs = matching_rows(old, new)
        slot = find_slots(old.token_ids[ours], new.token_ids[theirs])
        assert new.logprobs is not None and new.log_tail is not None
        p_NM = np.exp(new.logprobs[theirs].astype(np.float64))
        drawn_NM = np.zeros_like(p_NM)
        each, _ = np.nonzero(slot >= 0)
        draws = old.draws[ours]
        drawn_NM[each, slot[slot >= 0]] = draws[slot >= 0]
        each, _ = np.nonzero(head := (draws == 0) & (slot >= 0))
        p_NM[each, slot[head]] = 0
        rest = np.exp(new.log_tail[theirs, 0].astype(np.float64))
        total = p_NM.sum(axis=1) + rest
        some = draws.sum(axis=1) > 0  # a teacher without a tail leaves nothing to draw
        starts = (1 << np.arange(p_NM.shape[1].bit_length())) - 1
        q = np.add.reduceat(p_NM, starts, axis=1) / total[:, None]
        q = np.concatenate([q, (rest / total)[:, None]], axis=1)[some]
        got = np.add.reduceat(drawn_NM, starts, axis=1)
        got = np.concatenate([got, (draws.sum(axis=1) - got.sum(axis=1))[:, None]], axis=1)[some]
        parts = got, truncation.draws * q, truncation.draws * q * (1 - q)
        sums = [part.sum(axis=0) for part in parts]
        counts, expected, variance = (
            (a + b if len(a) else b)
            for a, b in zip((counts, expected, variance), sums, strict=True)
        )
    # Few expected draws are not normal: Bernstein's inequality adds a constant.
    scale = np.sqrt(variance) + (DRAW_SIGMAS**2 / 3 + slack * expected) / DRAW_SIGMAS
    return np.abs(counts - expected) / scale


def rounding_nats(dtype: str) -> float:
    """What batching otherwise may move numbers by: `dtype` is a manifest's, "float32+bnb-4bit"."""
    name, _, quantised = dtype.partition("+")
    return ROUNDING_NATS["bfloat16" if quantised else name]


def tolerances_from(
    control: Sequence[Deviations], rounding: float
) -> dict[str, tuple[float, float]]:
    """By quantity: the control's 99 % quantile, and the tolerance that follows from it.

    However far a teacher is from itself, no more than the `rounding` of its dtype is excused.
    """
    p99 = {name: quantile(pooled(control, name), 0.99) for name in control[0]}
    of = {
        name: (value, FLOOR + CONTROL_FACTOR * min(value, rounding)) for name, value in p99.items()
    }
    # Two ids may change places when each of their log probs moves; masses move with log probs.
    return {**of, "ids": (of["logprob"][0], 2 * of["logprob"][1]), "cut": of["logprob"]}


def find_unsteady(
    tolerances: dict[str, tuple[float, float]], rounding: float, dtype: str
) -> list[Finding]:
    """A finding if the teacher is farther from itself than its dtype rounds."""
    name, p99 = max(((n, p99) for n, (p99, _) in tolerances.items()), key=lambda pair: pair[1])
    if p99 <= rounding:
        return []
    text = (
        f"the teacher disagrees with itself: {name} of the same sequences alone and in common "
        f"batches is {p99:.2g} nats apart (99 %), which {dtype} does not explain (at most "
        f"{rounding:g}); what it says depends on what else is in the batch"
    )
    return [Finding(kind="control", text=text)]


def compare_quantities(
    manifest: Manifest,
    cached: list[ScoredSequence],
    live: list[ScoredSequence],
    tolerances: dict[str, tuple[float, float]],
) -> list[Compared]:
    """Judge every quantity: few targets and no sequence as a whole may be beyond tolerance."""
    deviations = [
        deviations_from(old, new, manifest) for old, new in zip(cached, live, strict=True)
    ]
    units = {"cut": "mass"}
    quantities = [
        _judge(name, units.get(name, "nats"), [d[name] for d in deviations], *tolerances[name])
        for name in deviations[0]
    ]
    if manifest.truncation.sampled:
        z = _draw_deviations(cached, live, manifest.truncation, tolerances["logprob"][1])
        quantities.append(_judge("draws", "sd", [z], 0.0, DRAW_SIGMAS, strays=0))
    return quantities


def _judge(
    name: str,
    unit: str,
    by_sequence: Sequence[NDArray[np.float64]],
    control_p99: float,
    tolerance: float,
    strays: float = STRAYS,
) -> Compared:
    values = np.concatenate(by_sequence)
    values = values[~np.isnan(values)]
    beyond = int((values > tolerance).sum())
    sequences = sum(bool(quantile(v, 0.5) > tolerance) for v in by_sequence)
    return Compared(
        name=name,
        unit=unit,
        compared=len(values),
        median=quantile(values, 0.5),
        p99=quantile(values, 0.99),
        max=quantile(values, 1.0),
        control_p99=control_p99,
        tolerance=tolerance,
        beyond=beyond / max(1, len(values)),
        sequences_beyond=sequences,
        agrees=not sequences and beyond <= strays * len(values) + (strays > 0),
    )


def pooled(deviations: Iterable[Deviations], name: str) -> NDArray[np.float64]:
    """A quantity's deviations of all sequences."""
    return np.concatenate([d[name] for d in deviations])


def quantile(values: NDArray[np.float64], rank: float) -> float:
    """Of what is known; 0 of nothing."""
    values = values[~np.isnan(values)]
    return float(np.quantile(values, rank)) if len(values) else 0.0


def median(values: NDArray[np.float64]) -> float:
    """Of what is known; 0 of nothing."""
    return quantile(values, 0.5)
