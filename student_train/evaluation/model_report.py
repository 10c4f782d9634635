"""What the measuring of models against a cache found; `docs/guides/evaluate.md` has every key."""

from dataclasses import dataclass

from decant.storage.inspect.examples import Entry, Target
from decant.storage.inspect.report import Spread

MEANS = {
    "cross_entropy": "ce",
    "bits_per_byte": "bits_per_byte",
    "kl_forward_per_byte": "kl_forward_per_byte",
    "kl_forward": "kl_forward",
    "kl_forward_upper": "kl_forward_upper",
    "kl_reverse": "kl_reverse",
    "top1_agreement": "agreement",
    "top1_accuracy": "correct",
    "acceptance": "acceptance",
    "acceptance_upper": "acceptance_upper",
    "teacher_tail": "teacher_tail",
    "model_tail": "model_tail",
}
"""Key of a mean -> the figure of a target that it is of."""
PER_BYTE = ("bits_per_byte", "kl_forward_per_byte")
"""Figures whose paired difference is reported of models of any two tokenizers."""
COMPARED = (
    *("ce", "kl_forward", "kl_reverse", "agreement", "correct", "acceptance"),
    *PER_BYTE,
)
"""Those of two models of the cache's tokenizer."""


@dataclass(kw_only=True, slots=True)
class Chunks:
    """What a model of another tokenizer was measured on, in the sequences that were chosen."""

    tokens: int = 0
    """Its own, in chunks: what its cross-entropy, accuracy and calibration are of."""
    chunks: int = 0
    """What its divergences are of."""
    one_to_one: int = 0
    """Chunks of one token of the teacher's and one of its own: what its agreement is of."""
    one_to_many: int = 0
    """One of the teacher's, several of its own."""
    many_to_one: int = 0
    many_to_many: int = 0
    left_out: int = 0
    """Sequences that have no chunk."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WorstTarget:
    """A target on which a model is far from the teacher."""

    target: Target
    """In context, with the teacher's entries."""
    kl_forward: float | None
    """Its lower bound; None in a cache that keeps no entries."""
    kl_reverse: float | None
    model_probability: float
    """Of the actual token."""
    model_entries: tuple[Entry, ...]
    """The model's most probable tokens."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelReport:
    """One model on the targets; means over targets, None where the cache cannot tell."""

    model: str
    architecture: str
    form: str
    """Dtype and quantisation."""
    device: str
    means: dict[str, float | None]
    intervals: dict[str, tuple[float, float] | None]
    """95% bootstrap intervals of the means, over sequences."""
    perplexity: float
    calibration_error: float | None
    spreads: dict[str, Spread | None]
    """Over targets: kl_forward, kl_reverse and ce."""
    reliability: list[tuple[float, float, float]]
    """Per bin of confidence: targets, mean confidence, share that is the actual token."""
    worst_targets: tuple[WorstTarget, ...]
    sequence_gap: float | None = None
    """Mean over sequences of the geometric mean of the teacher's probabilities of the actual
    tokens, less that of the model's: loss.gap. None for a model of another tokenizer."""
    aligned: Chunks | None = None
    """None for a model of the cache's tokenizer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """Mean of the second model's figure minus the first's, over the same targets."""

    mean: float
    interval: tuple[float, float] | None
    """95% bootstrap interval over sequences."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelsReport:
    """One or two models against the teacher's word in a cache."""

    cache: str
    cache_id: str
    teacher: str
    kept: str
    """What the cache keeps of a target."""
    of_entries: bool
    """Whether entries are kept."""
    exact: bool
    """Whether nothing of the teacher is unknown: every id is kept."""
    estimated: bool
    """Whether kl_forward is an estimate from draws, and has no bounds."""
    sequences: int
    of_sequences: int
    targets: int
    chosen: str
    """Which sequences: all, the first, or at random."""
    seed: int
    teacher_cross_entropy: float
    teacher_perplexity: float
    teacher_calibration_error: float | None
    models: tuple[ModelReport, ...]
    differences: dict[str, Difference]
    """B - A of two models, by figure; empty for one."""
