"""Stored against scored, entry by entry."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from decant.schemas import Manifest, ScoredSequence, Truncation
from decant.schemas.arrow import temperature_column
from decant.storage.cache.logprobs import ROUNDING, logprob_bound

NEGLIGIBLE_MASS = 1e-6
"""Tails are compared by log(mass + this): a smaller one is not resolved by every engine."""


Deviations = dict[str, NDArray[np.float64]]
"""By quantity: how far n targets are apart."""


@dataclass(frozen=True, slots=True, eq=False)
class Values:
    """What one side says of n targets, about the ids that the cache keeps."""

    logprobs: NDArray[np.float64]
    """[n, K] nan where only `ceiling` is known."""
    ceiling: NDArray[np.float64]
    """[n] no id of unknown log prob is more probable."""
    log_z: NDArray[np.float64]
    """[n, T]."""
    log_tail: NDArray[np.float64]
    """[n, T] nan where not known."""
    label_logprob: NDArray[np.float64]
    """[n]."""


def matching_rows(
    cached: ScoredSequence, live: ScoredSequence, shift: int = 0
) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Which targets of the cache are `shift` tokens before which live ones."""
    wanted = cached.positions + shift
    at = np.searchsorted(live.positions, wanted).clip(max=live.num_targets - 1)
    found = live.positions[at] == wanted
    return np.flatnonzero(found), at[found]


def _stored_values(cached: ScoredSequence, rows: NDArray[np.intp]) -> Values:
    """What the cache says."""
    assert cached.logprobs is not None and cached.log_tail is not None
    return Values(
        cached.logprobs[rows].astype(np.float64),
        np.zeros(len(rows)),
        cached.log_z[rows].astype(np.float64),
        cached.log_tail[rows].astype(np.float64),
        cached.label_logprob[rows].astype(np.float64),
    )


def live_values(
    live: ScoredSequence,
    rows: NDArray[np.intp],
    token_ids_NK: NDArray[np.int32],
    temperatures: tuple[float, ...],
) -> Values:
    """What the live teacher says of these ids."""
    assert live.logprobs is not None and live.log_tail is not None
    logprobs_NM = live.logprobs[rows].astype(np.float64)
    slot_NK = find_slots(token_ids_NK, live.token_ids[rows])
    used, found = token_ids_NK >= 0, slot_NK >= 0
    kept = np.take_along_axis(logprobs_NM, slot_NK.clip(min=0), axis=1)
    rest_NM = logprobs_NM.copy()
    each, _ = np.nonzero(found)
    rest_NM[each, slot_NK[found]] = -np.inf
    log_z, log_tail = (value[rows].astype(np.float64) for value in (live.log_z, live.log_tail))
    tails = [
        np.logaddexp(log_tail[:, i], _log_sum_exp(rest_NM / t - log_z[:, i, None]))
        for i, t in enumerate(temperatures)
    ]
    unknown = (used & ~found).any(axis=1, keepdims=True)
    return Values(
        np.where(used, np.where(found, kept, np.nan), -np.inf),
        logprobs_NM[:, -1],
        log_z,
        np.where(unknown, np.nan, np.stack(tails, axis=1)),
        live.label_logprob[rows].astype(np.float64),
    )


def find_slots(ids_NK: NDArray[np.int32], entries_NM: NDArray[np.int32]) -> NDArray[np.intp]:
    """[n, K] in which slot of its row of entries each id is; -1 = in none."""
    n, num_entries = entries_NM.shape
    offset = np.arange(n, dtype=np.int64)[:, None] << 32
    keys = (entries_NM + offset).ravel()
    order = np.argsort(keys)
    wanted = ids_NK + offset
    at = order[np.searchsorted(keys, wanted, sorter=order).clip(max=keys.size - 1)]
    return np.where((keys[at] == wanted) & (ids_NK >= 0), at % num_entries, -1)


def _log_sum_exp(x: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.logaddexp.reduce(x, axis=1, initial=-np.inf)


def _deviations_between(
    one: Values, other: Values, bound: NDArray | float, manifest: Manifest
) -> Deviations:
    """How far two sides are apart beyond `bound`, [n, K] nats that the precision explains."""
    known = np.isfinite(one.logprobs) & np.isfinite(other.logprobs)
    with np.errstate(invalid="ignore"):  # -inf of unused slots
        apart = np.where(known, np.abs(one.logprobs - other.logprobs), 0.0)
        for this, that in ((one, other), (other, one)):
            above = np.where(np.isnan(that.logprobs), this.logprobs - that.ceiling[:, None], 0.0)
            apart = np.fmax(apart, above)
        deviations = {"logprob": (apart - bound).clip(min=0).max(axis=1, initial=0)}
    for i, temperature in enumerate(manifest.temperatures):
        if temperature != 1:
            deviations[temperature_column("log_z", temperature)] = np.abs(
                one.log_z[:, i] - other.log_z[:, i]
            )
        a, b = (np.log(np.exp(v.log_tail[:, i]) + NEGLIGIBLE_MASS) for v in (one, other))
        deviations[temperature_column("log_tail", temperature)] = np.abs(a - b)
    label = one.label_logprob - other.label_logprob
    if manifest.source.get("unknown_label") == "bound":  # of an import: may be too high
        label = label.clip(max=0)
    return {**deviations, "label_logprob": np.abs(label)}


def deviations_from(
    cached: ScoredSequence, live: ScoredSequence, manifest: Manifest, shift: int = 0
) -> Deviations:
    """How far the cache is from what the live teacher says `shift` tokens later."""
    ours, theirs = matching_rows(cached, live, shift)
    assert live.logprobs is not None
    rounding = ROUNDING if manifest.layout.rounded else 0.0
    if cached.logprobs is None:
        label = cached.label_logprob[ours] - live.label_logprob[theirs]
        deviations = {"label_logprob": (np.abs(label.astype(np.float64)) - rounding).clip(0)}
        if (entropy := cached.entropy) is None:
            return deviations
        low, high = _entropy_bounds(live, theirs, manifest.shared_vocab_size)
        beyond = np.maximum(low - entropy[ours], entropy[ours] - high)
        return {"entropy": (beyond - rounding).clip(0)} | deviations
    said = live_values(live, theirs, cached.token_ids[ours], manifest.temperatures)
    bound = logprob_bound(cached.logprobs[ours], manifest.precision, manifest.layout.code)
    found = _deviations_between(_stored_values(cached, ours), said, bound, manifest)
    deviations = {
        name: values if name == "logprob" else (values - rounding).clip(0)
        for name, values in found.items()
    }
    if manifest.truncation.rule.has_head:
        deviations |= _selection_deviations(
            cached, ours, live.logprobs[theirs], said, manifest.truncation
        )
    return deviations


def control_deviations(
    cached: ScoredSequence, one: ScoredSequence, other: ScoredSequence, manifest: Manifest
) -> Deviations:
    """How far two live scores are apart on the cache's ids."""
    ours, rows = matching_rows(cached, one)
    ids = cached.token_ids[ours]
    deviations = _deviations_between(
        live_values(one, rows, ids, manifest.temperatures),
        live_values(other, rows, ids, manifest.temperatures),
        0.0,
        manifest,
    )
    low, _ = _entropy_bounds(one, rows, manifest.shared_vocab_size)
    other_low, _ = _entropy_bounds(other, rows, manifest.shared_vocab_size)
    return {**deviations, "entropy": np.abs(low - other_low)}


def _entropy_bounds(
    live: ScoredSequence, rows: NDArray[np.intp], vocab_size: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """[n] between which the entropy lies at T=1, for M entries of mass 1 - r and the last p_M.

    No id of the tail has more than p_M, and the tail's own entropy is at most log(V - M).
    """
    assert live.logprobs is not None and live.log_tail is not None
    logprobs_NM = live.logprobs[rows].astype(np.float64)
    log_tail = live.log_tail[rows, 0].astype(np.float64)
    kept = -(np.exp(logprobs_NM) * logprobs_NM).sum(axis=1)
    tail, others = np.exp(log_tail), vocab_size - logprobs_NM.shape[1]
    log_tail = np.where(tail > 0, log_tail, 0.0)
    low = kept - tail * logprobs_NM[:, -1]
    return low, np.maximum(kept + tail * (np.log(max(others, 1)) - log_tail), low)


def _selection_deviations(
    cached: ScoredSequence,
    ours: NDArray[np.intp],
    logprobs_NM: NDArray[np.float32],
    said: Values,
    truncation: Truncation,
) -> Deviations:
    """By how many nats the kept ids miss the most probable ones; by which mass, top-p's p."""
    head = cached.token_ids[ours] >= 0
    if cached.draws is not None:
        head &= cached.draws[ours] == 0
    kept = head.sum(axis=1)
    last_live = np.take_along_axis(logprobs_NM, kept[:, None] - 1, axis=1)[:, 0]
    known = np.where(np.isnan(said.logprobs), said.ceiling[:, None], said.logprobs)
    last_kept = np.where(head, known, np.inf).min(axis=1)
    deviations = {"ids": (last_live - last_kept).clip(min=0)}
    if "p" in truncation.rule.options:
        mass = np.exp(np.where(head, known, -np.inf)).sum(axis=1)
        short = np.where(kept < truncation.k, truncation.p - mass, 0)
        long = np.where(kept > truncation.min_k, mass - np.exp(last_kept) - truncation.p, 0)
        deviations["cut"] = np.maximum(short, long).clip(min=0)
    return deviations
