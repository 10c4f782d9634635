"""What would explain a difference."""

import dataclasses
import math
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from decant.schemas import Manifest, ScoredSequence
from decant.schemas.arrow import temperature_column
from decant.storage.cache.logprobs import logprob_bound
from decant.teacher_dump.audit.compare import (
    control_deviations,
    deviations_from,
    live_values,
    matching_rows,
)
from decant.teacher_dump.audit.judge import (
    ROUNDING_NATS,
    compare_quantities,
    median,
    pooled,
    tolerances_from,
)
from decant.teacher_dump.audit.report import Compared, Finding
from decant.teacher_dump.audit.scoring import score_live
from decant.teacher_dump.engines import TeacherConfig
from decant.teacher_dump.engines.config import REMOTE
from decant.teacher_dump.teacher import Teacher


def find_causes(
    config: TeacherConfig,
    teacher: Teacher,
    manifest: Manifest,
    cached: list[ScoredSequence],
    live: list[ScoredSequence],
    quantities: list[Compared],
) -> list[Finding]:
    """The usual causes that explain the numbers."""
    tolerance = {q.name: q.tolerance for q in quantities}
    pairs = list(zip(cached, live, strict=True))
    name = next(n for n in ("logprob", "entropy", "label_logprob") if n in tolerance)
    bad = [
        (old, new)
        for old, new in pairs
        if median(deviations_from(old, new, manifest)[name]) > tolerance[name]
    ]
    findings = []
    for shift in (1, -1):
        shifted = [
            (old, new)
            for old, new in bad
            if _is_shifted(old, new, manifest, shift, name, tolerance[name])
        ]
        if shifted:
            text = (
                "shifted by one token: row t holds the distribution of token "
                f"t{shift:+d} ({len(shifted)} of {len(pairs)} sequences)"
            )
            findings.append(Finding(kind="shift", text=text))
            bad = [pair for pair in bad if pair not in shifted]
    if bad and name == "logprob":
        findings += _find_scale(bad, manifest, tolerance[name])
    off = [t for t in manifest.temperatures if t != 1]
    wrong = {q.name for q in quantities if not q.agrees}
    if not wrong & {"logprob", "ids"}:
        for t in off:
            if temperature_column("log_z", t) in wrong:
                findings += _find_label(config, teacher, manifest, cached, t)
    return findings


def _is_shifted(
    cached: ScoredSequence,
    live: ScoredSequence,
    manifest: Manifest,
    shift: int,
    name: str,
    tolerance: float,
) -> bool:
    deviation = deviations_from(cached, live, manifest, shift)[name]
    return len(deviation) > 0 and median(deviation) <= tolerance


def _find_scale(
    pairs: Sequence[tuple[ScoredSequence, ScoredSequence]], manifest: Manifest, tolerance: float
) -> list[Finding]:
    """Another temperature multiplies all gaps between log probs; another normaliser none."""
    stored: list[NDArray[np.float64]] = []
    said: list[NDArray[np.float64]] = []
    bounds: list[NDArray[np.float64]] = []
    offsets: list[NDArray[np.float64]] = []
    for cached, live in pairs:
        ours, theirs = matching_rows(cached, live)
        assert cached.logprobs is not None
        values = live_values(live, theirs, cached.token_ids[ours], manifest.temperatures).logprobs
        bound = logprob_bound(cached.logprobs[ours], manifest.precision, manifest.layout.code)
        known = np.isfinite(values) & np.isfinite(bound)
        known[:, 0] &= known[:, 1:].any(axis=1)
        rows = known[:, 0]
        ids = np.where(known, cached.logprobs[ours], np.nan)[rows].astype(np.float64)
        values = np.where(known, values, np.nan)[rows]
        stored.append(ids - ids[:, :1])
        said.append(values - values[:, :1])
        bounds.append(bound[rows].astype(np.float64))
        offsets.append(ids[:, 0] - values[:, 0])
    y, x, slack = np.concatenate(stored), np.concatenate(said), 2 * np.concatenate(bounds)
    if not (square := np.nansum(x * x)) > 0:
        return []
    slope = float(np.nansum(x * y) / square)
    left = median(np.nanmax(np.abs(y - slope * x) - slack, axis=1))
    if abs(slope - 1) > 0.02 and left <= tolerance + 0.01 * median(np.nanmax(np.abs(y), axis=1)):
        text = (
            f"wrong temperature: the log probs are the teacher's at T={1 / slope:.3g}, not at T=1"
        )
        return [Finding(kind="temperature", text=text)]
    left = median(np.nanmax(np.abs(y - x) - slack, axis=1))
    offset = median(np.concatenate(offsets))
    if left <= 2 * tolerance and abs(offset) > 4 * tolerance:
        text = (
            "another normalisation: the log probs of a target are all off by the same "
            f"{offset:+.3g} nats (median), as after a softmax over the "
            "kept ids alone"
        )
        return [Finding(kind="normalisation", text=text)]
    return []


def _find_label(
    config: TeacherConfig,
    teacher: Teacher,
    manifest: Manifest,
    cached: list[ScoredSequence],
    temperature: float,
) -> list[Finding]:
    """Which temperature a stored log Z, which grows with it, belongs to."""
    some = cached[:8]
    ladder = tuple(float(t) for t in np.geomspace(temperature / 4, temperature * 4, 25) if t > 0.01)
    scored = score_live(config, teacher, manifest, some, temperatures=(1.0, *ladder))
    column = manifest.temperatures.index(temperature)
    found = []
    for old, new in zip(scored.cached, scored.together, strict=True):
        for row, at in zip(*matching_rows(old, new), strict=True):
            log_t = np.interp(old.log_z[row, column], new.log_z[at, 1:], np.log(ladder))
            found.append(math.exp(log_t))
    name = temperature_column("log_z", temperature)
    low, middle, high = np.quantile(found, (0.25, 0.5, 0.75))
    if high / low > 1.05 or abs(middle / temperature - 1) < 0.01:
        return []
    text = f"wrong temperature: {name} and the tail beside it are of T={middle:.3g}"
    return [Finding(kind="temperature", text=text)]


def find_precision(
    config: TeacherConfig,
    teacher: Teacher,
    manifest: Manifest,
    cached: list[ScoredSequence],
    live: list[ScoredSequence],
    quantities: list[Compared],
) -> list[Finding]:
    """A note if log probs disagree by no more than what computing in 16 bits does."""
    if all(q.agrees for q in quantities if q.name == "logprob"):
        return []
    if config.engine in REMOTE:  # a server has the dtype it has
        return []
    runs = {config.dtype: live}
    for dtype in ("float32", "bfloat16"):
        if dtype not in runs:
            other = dataclasses.replace(config, dtype=dtype)
            scored = score_live(other, teacher, manifest, cached)
            if scored.failed:  # half precision overflows on some
                return []
            runs[dtype] = scored.together
    one, other_run = runs["float32"], runs["bfloat16"]
    control = [
        control_deviations(c, a, b, manifest)
        for c, a, b in zip(cached, one, other_run, strict=True)
    ]
    tolerances = tolerances_from(control, ROUNDING_NATS["bfloat16"])
    quantities = compare_quantities(manifest, cached, live, tolerances)
    if not all(q.agrees for q in quantities):
        return []
    medians = {
        dtype: median(
            pooled(
                (deviations_from(old, new, manifest) for old, new in zip(cached, run, strict=True)),
                "logprob",
            )
        )
        for dtype, run in runs.items()
    }
    nearest = min(medians, key=lambda dtype: medians[dtype])
    (found,) = [q for q in quantities if q.name == "logprob"]
    text = (
        f"another precision: nearest to the teacher in {nearest}, which ran in {config.dtype}; "
        f"log probs differ by {found.median:.2g} nats (median), {found.p99:.2g} (99 %), and "
        f"bfloat16 from float32 by {found.control_p99:.2g} (99 %)"
    )
    return [Finding(kind="precision", text=text)]


def disagreements(quantities: Iterable[Compared]) -> list[Finding]:
    """What disagrees, where no cause explains it."""
    return [
        Finding(
            kind=q.name,
            text=f"{q.name} disagrees: {q.beyond:.1%} of {q.compared} beyond {q.tolerance:.2g} "
            f"{q.unit}, median {q.median:.2g}, largest {q.max:.2g}",
        )
        for q in quantities
        if not q.agrees
    ]
