"""f-DISTILL's risks of a student, and what its samples are like, from caches: no teacher is loaded.

arXiv 2307.15190: the likelihood risk is the teacher's negative log likelihood of what the student
samples, which is high where the student says what the teacher would not; the coverage risk is the
student's of what the teacher samples, high where the student misses what the teacher says.
"""

import dataclasses
import logging
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from decant.storage import CacheReader
from decant.storage.cache.lineage import sampler_text
from decant.student_train.config.evaluation import ROUGE
from decant.student_train.evaluation.gathered import intervals
from decant.student_train.evaluation.references import read_references, texts_of
from decant.student_train.evaluation.rouge import Rouge

log = logging.getLogger(__name__)

ORDERS = (1, 2, 3, 4)
"""N of distinct-n."""
Interval = tuple[float, float] | None


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Samples:
    """What a cache over samples says of them; means over targets in nats, None if unknown."""

    cache: str
    cache_id: str
    sampled_by: str
    """Path, step, temperature and top-p of the sampler; "" where the cache does not say."""
    teacher: str
    sequences: int
    targets: int
    likelihood_risk: float
    """Mean of -log p of the sampled tokens, p being the teacher's."""
    likelihood_risk_interval: Interval
    """95% bootstrap over sequences."""
    likelihood_risk_of_sequence: float
    """Mean over sequences of the sum over their tokens."""
    sampler_cross_entropy: float | None
    """Mean of -log q of the sampled tokens, q being the sampler's."""
    reverse_kl: float | None
    """Mean of log q - log p: an unbiased estimate of KL(sampler, teacher) per token where the
    samples were drawn at T=1 from all ids."""
    reverse_kl_interval: Interval
    sequence_gap: float | None
    """Mean over samples of the geometric mean of the sampler's probabilities of the tokens, less
    that of the teacher's (loss.gap); None without the sampler's."""
    is_unbiased: bool
    """Whether they were."""
    distinct: dict[str, float] | None
    """distinct-n: the share of different n-grams of words among all; None without text."""
    rouge: dict[str, float] | None
    """Mean F-measures against the references; None without any."""
    references: str
    """What the samples were compared with."""
    compared: int
    """Samples that have a reference."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Risks:
    """All of it for one student."""

    samples: Samples
    model: str = ""
    """Whose coverage risk it is; "" if none was asked for."""
    cache: str = ""
    """Of what the teacher samples."""
    coverage_risk: float | None = None
    """Mean of -log q of its actual tokens, q being the model's."""
    coverage_risk_interval: Interval = None
    coverage_gap: float | None = None
    """As `sequence_gap`, of the teacher's probabilities less the model's on that cache."""
    targets: int = 0
    """Of that cache, those that were looked at."""


def measure_samples(
    url: str,
    *,
    references: str = "",
    cache: str = "",
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Samples:
    """What the cache at `url` says of the samples in it.

    Their texts are compared with those of the file `references`, else with what the targets of
    `cache` say under the same sample id, if one is given. Raises ValueError where there is no
    target, or no sample has a reference though a file of them was given.
    """
    reader = CacheReader(url)
    manifest = reader.manifest
    sums, texts = _gathered(reader, progress)
    targets = int(sums["targets"].sum())
    if not targets:
        raise ValueError(f"{url}: none of the {len(reader)} sequences has a target")
    scored = sums["targets"] > 0
    figures = np.stack([sums["teacher"], sums["sampler"] - sums["teacher"]], axis=1)[scored]
    counts = np.repeat(sums["targets"][scored, None], 2, axis=1)
    low, high = intervals(figures, counts, seed)
    by = manifest.sampler_logprobs
    sampler = manifest.source.get("sampler") or {}
    means = {name: float(sums[name].sum() / targets) for name in ("teacher", "sampler")}
    known = read_references(references, cache, texts)
    return Samples(
        cache=reader.url,
        cache_id=manifest.cache_id,
        sampled_by=sampler_text(manifest.source),
        teacher=manifest.teacher.name,
        sequences=int(scored.sum()),
        targets=targets,
        likelihood_risk=means["teacher"],
        likelihood_risk_interval=low,
        likelihood_risk_of_sequence=float(sums["teacher"].sum() / scored.sum()),
        sampler_cross_entropy=means["sampler"] if by else None,
        reverse_kl=means["teacher"] - means["sampler"] if by else None,
        reverse_kl_interval=_negated(high) if by else None,
        sequence_gap=_gap(sums, scored) if by else None,
        is_unbiased=by and (sampler.get("temperature"), sampler.get("top_p")) == (1.0, 1.0),
        distinct=distinct(text for _, text in texts) if texts else None,
        rouge=_mean_rouge(texts, known.texts, is_asked=bool(references)),
        references=known.what,
        compared=sum(sample_id in known.texts for sample_id, _ in texts),
    )


def _gap(sums: dict[str, NDArray[np.float64]], scored: NDArray[np.bool_]) -> float:
    means = {name: sums[name][scored] / sums["targets"][scored] for name in ("sampler", "teacher")}
    return float((np.exp(-means["sampler"]) - np.exp(-means["teacher"])).mean())


def distinct(texts: Iterable[str]) -> dict[str, float]:
    """distinct-n for n = 1 to 4: the share of different ones among all n-grams of words.

    Words are what spaces part; n-grams lie within a text. Without n where no text is as long (Li et
    al., arXiv 1510.03055, over all texts together).
    """
    seen: dict[int, set[tuple[str, ...]]] = {n: set() for n in ORDERS}
    counts = dict.fromkeys(ORDERS, 0)
    for text in texts:
        words = text.split()
        for n in ORDERS:
            grams = list(zip(*(words[i:] for i in range(n)), strict=False))
            counts[n] += len(grams)
            seen[n].update(grams)
    return {f"distinct_{n}": len(seen[n]) / counts[n] for n in ORDERS if counts[n]}


def _gathered(
    reader: CacheReader, progress: Callable[[int, int], None] | None
) -> tuple[dict[str, NDArray[np.float64]], list[tuple[str, str]]]:
    """[S] targets, sums of -log p and of -log q; and the texts of the samples."""
    parts: dict[str, list[NDArray[np.float64]]] = {"targets": [], "teacher": [], "sampler": []}
    groups = reader.row_groups()
    for number, group in enumerate(groups):
        rows = reader.read_stored(group)
        counts = np.diff(rows.target_starts)
        owner = np.repeat(np.arange(len(counts)), counts)

        def total(values: NDArray, owner: NDArray = owner, size: int = len(counts)) -> Any:
            return np.bincount(owner, weights=-values.astype(np.float64), minlength=size)

        sampler = rows.sampler_logprobs
        parts["targets"].append(counts.astype(np.float64))
        parts["teacher"].append(total(rows.scalars["label_logprob"][rows.target_rows]))
        no_sampler = np.zeros(len(counts))
        parts["sampler"].append(no_sampler if sampler is None else total(sampler[rows.target_rows]))
        if progress:
            progress(number + 1, len(groups))
    empty = [np.zeros(0)]
    joined = {name: np.concatenate(values or empty) for name, values in parts.items()}
    return joined, list(texts_of(reader))


def _mean_rouge(
    texts: list[tuple[str, str]], references: dict[str, str], *, is_asked: bool
) -> dict[str, float] | None:
    """None without references, and without rouge-score unless it was asked for."""
    if not references:
        return None
    try:
        rouge = Rouge("evaluate --references")
    except ImportError:
        if is_asked:
            raise
        log.warning("rouge-score is not installed, so there is no ROUGE: pip install decant[rouge]")
        return None
    scores = [rouge(references[i], text) for i, text in texts if i in references]
    return {name: sum(score[name] for score in scores) / len(scores) for name in ROUGE}


def _negated(interval: Interval) -> Interval:
    return None if interval is None else (-interval[1], -interval[0])


def risks_text(found: Risks) -> str:
    """For a terminal."""
    its = found.samples
    rows = [
        ("samples", f"{its.cache}: {its.sequences:,} of {its.targets:,} tokens"),
        ("sampled by", its.sampled_by or "not said: the teacher itself, or they are given texts"),
        ("scored by", its.teacher),
        (
            "likelihood risk",
            f"{_with(its.likelihood_risk, its.likelihood_risk_interval)} per token",
        ),
        ("", f"{its.likelihood_risk_of_sequence:.3f} per sample: the teacher's NLL of the samples"),
    ]
    if found.coverage_risk is not None:
        rows += [
            (
                "coverage risk",
                f"{_with(found.coverage_risk, found.coverage_risk_interval)} per token",
            ),
            ("", f"the NLL that {found.model} has of {found.cache} ({found.targets:,} tokens)"),
        ]
    if its.reverse_kl is not None:
        biased = "" if its.is_unbiased else ", biased: not drawn at T=1 from all ids"
        rows += [
            ("its own NLL", f"{its.sampler_cross_entropy:.4f}"),
            (
                "reverse KL",
                f"{_with(its.reverse_kl, its.reverse_kl_interval)} per token, estimated from the "
                f"samples{biased}",
            ),
        ]
    gaps = [("samples", its.sequence_gap), ("teacher's", found.coverage_gap)]
    if told := [f"{value:.4f} of the {of}" for of, value in gaps if value is not None]:
        rows.append(("sequence gap", f"{', '.join(told)}: what loss.gap takes"))
    if its.distinct is not None:
        said = "  ".join(f"{n[9:]}: {value:.4f}" for n, value in its.distinct.items())
        rows.append(("distinct-n", said))
    if its.rouge is not None:
        said = "  ".join(f"{name}: {value:.4f}" for name, value in its.rouge.items())
        rows += [("ROUGE", said), ("", f"{its.compared:,} samples against {its.references}")]
    width = max(len(name) for name, _ in rows)
    lines = [f"{name:<{width}}  {text}" for name, text in rows]
    return "\n".join([*lines, "nats; [ , ]: 95% intervals over samples, resampled 1,000 times"])


def _with(value: float, interval: Interval) -> str:
    said = f"{value:.4f}"
    return said if interval is None else f"{said} [{interval[0]:.4f}, {interval[1]:.4f}]"
