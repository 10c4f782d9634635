"""Does a cache say what the teacher says? Score a random sample again, live, and compare.

What the live teacher says of itself when the same sequences are batched otherwise is the tolerance;
nothing here is tuned to a model. A disagreement is tried against its usual causes, each of which
has a number that only it explains. Reads the cache, never writes.
Shapes: n targets, K slots of the cache, M live entries, T temperatures, V vocabulary.
"""

import dataclasses
import logging
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from decant.schemas import Manifest, ScoredSequence, Truncation, tokenizer_fingerprint
from decant.schemas.arrow import log_tail_column, log_z_column
from decant.storage import CacheReader
from decant.storage.cache.rows import logprob_bound
from decant.teacher_dump.engines import TeacherConfig, open_engine
from decant.teacher_dump.engines.seam import DTYPES, QUANTIZATIONS, SequenceError
from decant.teacher_dump.inputs.sequences import TokenSequence
from decant.teacher_dump.teacher import Teacher, describe_teacher, hash_weights

log = logging.getLogger(__name__)

FLOOR = 1e-4
"""Nats that are never held against a cache, however well a teacher repeats itself."""
CONTROL_FACTOR = 4.0
"""Tolerance over the 99 % quantile of the control's deviations."""
STRAYS = 0.01
"""Share of targets that may lie beyond the tolerance: routers of experts flip on rounding."""
LIVE_ENTRIES = 256
"""Live entries per target, at least; twice the cache's slots where that is more."""
NEGLIGIBLE_MASS = 1e-6
"""Tails are compared by log(mass + this): a smaller one is not resolved by every engine."""
DRAW_SIGMAS = 5.0
"""How far drawn counts may lie from their expectation, in standard deviations."""

UNKNOWN = "unknown"
"""Fingerprint of the teacher of an imported cache."""

Deviations = dict[str, NDArray[np.float64]]
"""By quantity: how far n targets are apart."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Quantity:
    """One thing that was compared, over all targets of the sample."""

    name: str
    unit: str
    """nats, mass, or sd (standard deviations of drawn counts)."""
    compared: int
    """Targets; ranks for draws."""
    median: float
    """Of the deviations, beyond what the stored precision explains."""
    p99: float
    max: float
    control_p99: float
    """The 99 % quantile of the live teacher against itself in other batches."""
    tolerance: float
    beyond: float
    """Share of what was compared that lies beyond the tolerance."""
    sequences_beyond: int
    """Sequences most of whose targets do."""
    agrees: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """What a disagreement looks like, or a remark."""

    kind: str
    """shift, temperature, normalisation, teacher, tokenizer, vocabulary, unscored, or the name of a
    quantity; of notes: precision, files, unknown, incomplete."""
    text: str


@dataclass(frozen=True, kw_only=True, slots=True)
class AuditReport:
    """The outcome; the cache agrees with the teacher if there are no findings."""

    url: str
    teacher: str
    dtype: str
    """In which the live teacher ran; auto = as its weights are saved."""
    sequences: int
    """Scored again."""
    targets: int
    quantities: tuple[Quantity, ...]
    findings: tuple[Finding, ...]
    notes: tuple[Finding, ...]

    @property
    def ok(self) -> bool:
        """Whether the cache agrees with the teacher."""
        return not self.findings


@dataclass(frozen=True, slots=True, eq=False)
class _Values:
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


def audit(
    url: str,
    config: TeacherConfig,
    *,
    sample: int = 32,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> AuditReport:
    """Compare `sample` random sequences of a cache, chosen by `seed`, with the teacher, live.

    `config.dtype` auto runs the dtype that the manifest names. `progress` gets sequences scored
    and to score. Raises ValueError (FormatError, EngineError) where nothing can be compared.
    """
    if sample < 1:
        raise ValueError(f"sample must be at least 1, found {sample}")
    if seed < 0:
        raise ValueError(f"seed must be at least 0, found {seed}")
    reader = CacheReader(url, allow_incomplete=True)
    manifest = reader.manifest
    if not len(reader):
        raise ValueError(f"{url}: no shard is committed yet; there is nothing to compare")
    dtype, _, quantization = manifest.teacher.dtype.partition("+")
    if config.dtype == "auto" and dtype in DTYPES and config.engine != "http":
        config = dataclasses.replace(config, dtype=dtype)
    if config.engine == "transformers" and quantization in QUANTIZATIONS:
        config = dataclasses.replace(config, quantization=quantization)
    teacher = hash_weights(describe_teacher(config), progress=log.info)
    findings, notes = _identity(manifest, teacher)
    if not manifest.is_final:
        notes.append(Finding(kind="incomplete", text="the cache is not complete yet"))
    generator = np.random.default_rng(seed)
    chosen = generator.choice(len(reader), min(sample, len(reader)), replace=False)
    cached = [s for s in (reader[int(i)] for i in np.sort(chosen)) if s.num_targets]
    if not cached:
        raise ValueError(f"{url}: none of {len(chosen)} sequences chosen at random has a target")
    quantities: list[Quantity] = []
    if teacher.info.vocab_size >= manifest.shared_vocab_size:
        cached, live, alone, failed = _score(config, teacher, manifest, cached, progress)
        findings += failed
        control = [_apart(c, a, b, manifest) for c, a, b in zip(cached, live, alone, strict=True)]
        tolerances = _tolerances(control)
        quantities = _quantities(manifest, cached, live, tolerances)
        stored, given = manifest.teacher.fingerprint, teacher.info.fingerprint
        differs = f"(fingerprint {stored} in the manifest, {given} given)"
        causes: list[Finding] = []
        if not all(q.agrees for q in quantities):
            causes = _causes(config, teacher, manifest, cached, live, quantities)
            if not causes and stored not in (given, UNKNOWN):
                causes = [Finding(kind="teacher", text=f"another teacher {differs}")]
            elif not causes:
                precision = _precision(config, teacher, manifest, cached, live, quantities)
                notes += precision
                causes = [] if precision else _plain(quantities)
        if stored != given and not any(cause.kind == "teacher" for cause in causes):
            notes.append(Finding(kind="files", text=f"the teacher's files are others {differs}"))
        findings = causes + findings
    return AuditReport(
        url=reader.url,
        teacher=teacher.info.name,
        dtype=config.dtype,
        sequences=len(cached),
        targets=sum(s.num_targets for s in cached),
        quantities=tuple(quantities),
        findings=tuple(findings),
        notes=tuple(notes),
    )


def _identity(manifest: Manifest, teacher: Teacher) -> tuple[list[Finding], list[Finding]]:
    """What manifest and teacher say of tokenizer and vocabulary."""
    findings, notes = [], []
    rows, vocab_size = teacher.info.vocab_size, manifest.shared_vocab_size
    if rows < vocab_size:
        text = f"another vocabulary: the cache has {vocab_size} ids, the teacher {rows} output rows"
        findings.append(Finding(kind="vocabulary", text=text))
    stored = manifest.tokenizer.fingerprint
    given = "" if teacher.tokenizer is None else tokenizer_fingerprint(teacher.tokenizer)
    if not stored or not given:
        text = "tokenizers were not compared: the {} has none".format(
            "given teacher" if stored else "cache"
        )
        notes.append(Finding(kind="unknown", text=text))
    elif stored != given:
        text = f"another tokenizer (fingerprint {stored} in the manifest, {given} given)"
        findings.append(Finding(kind="tokenizer", text=text))
    return findings, notes


def _score(
    config: TeacherConfig,
    teacher: Teacher,
    manifest: Manifest,
    cached: list[ScoredSequence],
    progress: Callable[[int, int], None] | None = None,
    temperatures: tuple[float, ...] = (),
) -> tuple[list[ScoredSequence], list[ScoredSequence], list[ScoredSequence], list[Finding]]:
    """What of the sample the teacher can score, its scores, and a finding for each of the others.

    The live scores are in common batches and, if there is `progress`, one by one too. Neighbours
    of the targets are scored as well, so that a shift can be recognised. Raises EngineError if
    the teacher can score none.
    """
    engine = open_engine(
        config,
        teacher.model_path,
        vocab_size=manifest.shared_vocab_size,
        truncation=Truncation(
            k=min(manifest.shared_vocab_size, max(LIVE_ENTRIES, 2 * manifest.truncation.slots))
        ),
        temperatures=temperatures or manifest.temperatures,
        max_length=max(len(s.input_ids) for s in cached),
    )
    inputs = []
    for s in cached:
        near = s.is_target.copy()
        near[:-1] |= s.is_target[1:]
        near[1:] |= s.is_target[:-1]
        near[0] = False
        inputs.append(TokenSequence(s.sample_id, s.input_ids, near))
    together: list[ScoredSequence] = []
    alone: list[ScoredSequence] = []
    failed: list[Finding] = []
    cached = list(cached)
    try:
        while (done := len(together)) < len(inputs):
            try:
                for live in engine.score(inputs[done:], done):
                    together.append(live)
                    if progress:
                        progress(len(together), 2 * len(inputs))
            except SequenceError as error:
                bad = done + error.index
                failed.append(Finding(kind="unscored", text=str(error)))
                if len(inputs) == 1:
                    raise
                del inputs[bad], cached[bad]
        for index, sequence in enumerate(inputs if progress else []):
            alone += engine.score([sequence], index)
            if progress:
                progress(len(inputs) + len(alone), 2 * len(inputs))
    finally:
        engine.close()
    return cached, together, alone, failed


def _rows(
    cached: ScoredSequence, live: ScoredSequence, shift: int = 0
) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Which targets of the cache are `shift` tokens before which live ones."""
    wanted = cached.positions + shift
    at = np.searchsorted(live.positions, wanted).clip(max=live.num_targets - 1)
    found = live.positions[at] == wanted
    return np.flatnonzero(found), at[found]


def _stored(cached: ScoredSequence, rows: NDArray[np.intp]) -> _Values:
    """What the cache says."""
    assert cached.logprobs is not None and cached.log_tail is not None
    return _Values(
        cached.logprobs[rows].astype(np.float64),
        np.zeros(len(rows)),
        cached.log_z[rows].astype(np.float64),
        cached.log_tail[rows].astype(np.float64),
        cached.label_logprob[rows].astype(np.float64),
    )


def _said(
    live: ScoredSequence,
    rows: NDArray[np.intp],
    token_ids_NK: NDArray[np.int32],
    temperatures: tuple[float, ...],
) -> _Values:
    """What the live teacher says of these ids."""
    assert live.logprobs is not None and live.log_tail is not None
    logprobs_NM = live.logprobs[rows].astype(np.float64)
    slot_NK = _find(token_ids_NK, live.token_ids[rows])
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
    return _Values(
        np.where(used, np.where(found, kept, np.nan), -np.inf),
        logprobs_NM[:, -1],
        log_z,
        np.where(unknown, np.nan, np.stack(tails, axis=1)),
        live.label_logprob[rows].astype(np.float64),
    )


def _find(ids_NK: NDArray[np.int32], entries_NM: NDArray[np.int32]) -> NDArray[np.intp]:
    """[n, K] in which slot of its row of entries each id stands; -1 = in none."""
    n, num_entries = entries_NM.shape
    offset = np.arange(n, dtype=np.int64)[:, None] << 32
    keys = (entries_NM + offset).ravel()
    order = np.argsort(keys)
    wanted = ids_NK + offset
    at = order[np.searchsorted(keys, wanted, sorter=order).clip(max=keys.size - 1)]
    return np.where((keys[at] == wanted) & (ids_NK >= 0), at % num_entries, -1)


def _log_sum_exp(x: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.logaddexp.reduce(x, axis=1, initial=-np.inf)


def _between(
    one: _Values, other: _Values, bound: NDArray | float, manifest: Manifest
) -> Deviations:
    """How far two sides are apart beyond `bound`, [n, K] nats that the precision explains."""
    known = np.isfinite(one.logprobs) & np.isfinite(other.logprobs)
    with np.errstate(invalid="ignore"):  # -inf of unused slots
        apart = np.where(known, np.abs(one.logprobs - other.logprobs), 0.0)
        for this, that in ((one, other), (other, one)):
            above = np.where(np.isnan(that.logprobs), this.logprobs - that.ceiling[:, None], 0.0)
            apart = np.fmax(apart, above)
        deviations = {"logprob": (apart - bound).clip(min=0).max(axis=1)}
    for i, temperature in enumerate(manifest.temperatures):
        if temperature != 1:
            deviations[log_z_column(temperature)] = np.abs(one.log_z[:, i] - other.log_z[:, i])
        a, b = (np.log(np.exp(v.log_tail[:, i]) + NEGLIGIBLE_MASS) for v in (one, other))
        deviations[log_tail_column(temperature)] = np.abs(a - b)
    label = one.label_logprob - other.label_logprob
    if manifest.source.get("unknown_label") == "bound":  # of an import: may be too high
        label = label.clip(max=0)
    return {**deviations, "label_logprob": np.abs(label)}


def _deviation(
    cached: ScoredSequence, live: ScoredSequence, manifest: Manifest, shift: int = 0
) -> Deviations:
    """How far the cache is from what the live teacher says `shift` tokens later."""
    ours, theirs = _rows(cached, live, shift)
    assert live.logprobs is not None
    if cached.logprobs is None:
        assert cached.entropy is not None
        low, high = _entropy_bounds(live, theirs, manifest.shared_vocab_size)
        label = cached.label_logprob[ours] - live.label_logprob[theirs]
        return {
            "entropy": np.maximum(low - cached.entropy[ours], cached.entropy[ours] - high).clip(0),
            "label_logprob": np.abs(label.astype(np.float64)),
        }
    said = _said(live, theirs, cached.token_ids[ours], manifest.temperatures)
    bound = logprob_bound(cached.logprobs[ours], manifest.precision, manifest.layout.code)
    deviations = _between(_stored(cached, ours), said, bound, manifest)
    if manifest.truncation.method != "sample":
        deviations |= _selection(cached, ours, live.logprobs[theirs], said, manifest.truncation)
    return deviations


def _apart(
    cached: ScoredSequence, one: ScoredSequence, other: ScoredSequence, manifest: Manifest
) -> Deviations:
    """How far two live scores are apart on the cache's ids."""
    ours, rows = _rows(cached, one)
    ids = cached.token_ids[ours]
    deviations = _between(
        _said(one, rows, ids, manifest.temperatures),
        _said(other, rows, ids, manifest.temperatures),
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


def _selection(
    cached: ScoredSequence,
    ours: NDArray[np.intp],
    logprobs_NM: NDArray[np.float32],
    said: _Values,
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
    if truncation.method == "topp":
        mass = np.exp(np.where(head, known, -np.inf)).sum(axis=1)
        short = np.where(kept < truncation.k, truncation.p - mass, 0)
        long = np.where(kept > truncation.min_k, mass - np.exp(last_kept) - truncation.p, 0)
        deviations["cut"] = np.maximum(short, long).clip(min=0)
    return deviations


def _draws(
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
        ours, theirs = _rows(old, new)
        slot = _find(old.token_ids[ours], new.token_ids[theirs])
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


def _tolerances(control: Sequence[Deviations]) -> dict[str, tuple[float, float]]:
    """By quantity: the control's 99 % quantile, and the tolerance that follows from it."""
    p99 = {name: _quantile(_pooled(control, name), 0.99) for name in control[0]}
    of = {name: (value, FLOOR + CONTROL_FACTOR * value) for name, value in p99.items()}
    # Two ids may change places when each of their log probs moves; masses move with log probs.
    return {**of, "ids": (of["logprob"][0], 2 * of["logprob"][1]), "cut": of["logprob"]}


def _quantities(
    manifest: Manifest,
    cached: list[ScoredSequence],
    live: list[ScoredSequence],
    tolerances: dict[str, tuple[float, float]],
) -> list[Quantity]:
    """Judge every quantity: few targets and no sequence as a whole may be beyond tolerance."""
    deviations = [_deviation(old, new, manifest) for old, new in zip(cached, live, strict=True)]
    units = {"cut": "mass"}
    quantities = [
        _judged(name, units.get(name, "nats"), [d[name] for d in deviations], *tolerances[name])
        for name in deviations[0]
    ]
    if manifest.truncation.sampled:
        z = _draws(cached, live, manifest.truncation, tolerances["logprob"][1])
        quantities.append(_judged("draws", "sd", [z], 0.0, DRAW_SIGMAS, strays=0))
    return quantities


def _judged(
    name: str,
    unit: str,
    by_sequence: Sequence[NDArray[np.float64]],
    control_p99: float,
    tolerance: float,
    strays: float = STRAYS,
) -> Quantity:
    values = np.concatenate(by_sequence)
    values = values[~np.isnan(values)]
    beyond = int((values > tolerance).sum())
    sequences = sum(bool(_quantile(v, 0.5) > tolerance) for v in by_sequence)
    return Quantity(
        name=name,
        unit=unit,
        compared=len(values),
        median=_quantile(values, 0.5),
        p99=_quantile(values, 0.99),
        max=_quantile(values, 1.0),
        control_p99=control_p99,
        tolerance=tolerance,
        beyond=beyond / max(1, len(values)),
        sequences_beyond=sequences,
        agrees=not sequences and beyond <= strays * len(values) + (strays > 0),
    )


def _pooled(deviations: Iterable[Deviations], name: str) -> NDArray[np.float64]:
    return np.concatenate([d[name] for d in deviations])


def _quantile(values: NDArray[np.float64], rank: float) -> float:
    values = values[~np.isnan(values)]
    return float(np.quantile(values, rank)) if len(values) else 0.0


def _causes(
    config: TeacherConfig,
    teacher: Teacher,
    manifest: Manifest,
    cached: list[ScoredSequence],
    live: list[ScoredSequence],
    quantities: list[Quantity],
) -> list[Finding]:
    """The usual causes that explain the numbers."""
    tolerance = {q.name: q.tolerance for q in quantities}
    pairs = list(zip(cached, live, strict=True))
    name = "logprob" if manifest.layout.has_logprobs else "entropy"
    bad = [
        (old, new)
        for old, new in pairs
        if _median(_deviation(old, new, manifest)[name]) > tolerance[name]
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
        findings += _scaled(bad, manifest, tolerance[name])
    off = [t for t in manifest.temperatures if t != 1]
    wrong = {q.name for q in quantities if not q.agrees}
    if not wrong & {"logprob", "ids"}:
        for t in off:
            if log_z_column(t) in wrong:
                findings += _mislabelled(config, teacher, manifest, cached, t)
    return findings


def _is_shifted(
    cached: ScoredSequence,
    live: ScoredSequence,
    manifest: Manifest,
    shift: int,
    name: str,
    tolerance: float,
) -> bool:
    deviation = _deviation(cached, live, manifest, shift)[name]
    return len(deviation) > 0 and _median(deviation) <= tolerance


def _median(values: NDArray[np.float64]) -> float:
    return _quantile(values, 0.5)


def _scaled(
    pairs: Sequence[tuple[ScoredSequence, ScoredSequence]], manifest: Manifest, tolerance: float
) -> list[Finding]:
    """Another temperature multiplies all gaps between log probs; another normaliser none."""
    stored: list[NDArray[np.float64]] = []
    said: list[NDArray[np.float64]] = []
    bounds: list[NDArray[np.float64]] = []
    offsets: list[NDArray[np.float64]] = []
    for cached, live in pairs:
        ours, theirs = _rows(cached, live)
        assert cached.logprobs is not None
        values = _said(live, theirs, cached.token_ids[ours], manifest.temperatures).logprobs
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
    left = _median(np.nanmax(np.abs(y - slope * x) - slack, axis=1))
    if abs(slope - 1) > 0.02 and left <= tolerance + 0.01 * _median(np.nanmax(np.abs(y), axis=1)):
        text = (
            f"wrong temperature: the log probs are the teacher's at T={1 / slope:.3g}, not at T=1"
        )
        return [Finding(kind="temperature", text=text)]
    left = _median(np.nanmax(np.abs(y - x) - slack, axis=1))
    offset = _median(np.concatenate(offsets))
    if left <= 2 * tolerance and abs(offset) > 4 * tolerance:
        text = (
            "another normalisation: the log probs of a target are all off by the same "
            f"{offset:+.3g} nats (median), as after a softmax over the "
            "kept ids alone"
        )
        return [Finding(kind="normalisation", text=text)]
    return []


def _mislabelled(
    config: TeacherConfig,
    teacher: Teacher,
    manifest: Manifest,
    cached: list[ScoredSequence],
    temperature: float,
) -> list[Finding]:
    """Which temperature a stored log Z, which grows with it, belongs to."""
    some = cached[:8]
    ladder = tuple(float(t) for t in np.geomspace(temperature / 4, temperature * 4, 25) if t > 0.01)
    some, live, _, _ = _score(config, teacher, manifest, some, temperatures=(1.0, *ladder))
    column = manifest.temperatures.index(temperature)
    found = []
    for old, new in zip(some, live, strict=True):
        for row, at in zip(*_rows(old, new), strict=True):
            log_t = np.interp(old.log_z[row, column], new.log_z[at, 1:], np.log(ladder))
            found.append(math.exp(log_t))
    name = log_z_column(temperature)
    low, middle, high = np.quantile(found, (0.25, 0.5, 0.75))
    if high / low > 1.05 or abs(middle / temperature - 1) < 0.01:
        return []
    text = f"wrong temperature: {name} and the tail beside it are of T={middle:.3g}"
    return [Finding(kind="temperature", text=text)]


def _precision(
    config: TeacherConfig,
    teacher: Teacher,
    manifest: Manifest,
    cached: list[ScoredSequence],
    live: list[ScoredSequence],
    quantities: list[Quantity],
) -> list[Finding]:
    """A note if log probs disagree by no more than what computing in 16 bits does."""
    if all(q.agrees for q in quantities if q.name == "logprob"):
        return []
    if config.engine == "http":  # a service has the dtype it has
        return []
    runs = {config.dtype: live}
    for dtype in ("float32", "bfloat16"):
        if dtype not in runs:
            other = dataclasses.replace(config, dtype=dtype)
            scored, runs[dtype], *_ = _score(other, teacher, manifest, cached)
            if len(scored) < len(cached):  # half precision overflows on some
                return []
    one, other_run = runs["float32"], runs["bfloat16"]
    control = [_apart(c, a, b, manifest) for c, a, b in zip(cached, one, other_run, strict=True)]
    tolerances = _tolerances(control)
    quantities = _quantities(manifest, cached, live, tolerances)
    if not all(q.agrees for q in quantities):
        return []
    medians = {
        dtype: _median(
            _pooled(
                (_deviation(old, new, manifest) for old, new in zip(cached, run, strict=True)),
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


def _plain(quantities: Iterable[Quantity]) -> list[Finding]:
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


def report_text(report: AuditReport) -> str:
    """The report for a terminal, findings last."""
    width = max([len(q.name) for q in report.quantities], default=0)
    lines = [
        f"{report.url}: {report.sequences} sequences, {report.targets} targets scored again by "
        f"{report.teacher} ({report.dtype})"
    ]
    if report.quantities:
        lines.append(
            f"  {'':{width}}  unit {'median':>9}{'99 %':>9}{'largest':>9}{'control':>9}"
            f"{'tolerance':>11}{'beyond':>8}"
        )
    for q in report.quantities:
        lines.append(
            f"  {q.name:{width}}  {q.unit:4} {q.median:9.2g}{q.p99:9.2g}{q.max:9.2g}"
            f"{q.control_p99:9.2g}{q.tolerance:11.2g}{q.beyond:8.1%}"
        )
    lines += [f"note: {note.text}" for note in report.notes]
    lines += [finding.text for finding in report.findings]
    if report.ok:
        lines.append("the cache agrees with the teacher")
    return "\n".join(lines)
