"""The truncation methods: what each keeps of a distribution, and what it needs stored.

The one place where a method is named: everything else asks `Truncation.rule`.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from decant.schemas.distributions import in_order


@dataclass(frozen=True, kw_only=True, slots=True)
class Method:
    """What a truncation method keeps of a target; all that differs between methods follows."""

    kept: str
    """For people, with the fields of `Truncation` in braces."""
    options: tuple[str, ...]
    """The fields of `Truncation` that have an effect."""
    tolerated: tuple[str, ...] = ()
    """Those that have none, and may be set all the same."""
    given: tuple[str, ...]
    """What a teacher gives of a target beside what it always gives: fields of `Distributions`."""
    stored: tuple[str, ...]
    """What is stored of it."""
    stored_with_logprobs: tuple[str, ...] | None = None
    """What is stored in caches that keep log probs all the same, as those begun before version 3
    of the format do; None where there are none."""
    varies: bool = False
    """Whether the number of kept entries differs between targets."""

    @property
    def has_head(self) -> bool:
        """Whether the kept entries begin with the most probable ones, in descending order."""
        return "k" in self.options

    @property
    def has_entries(self) -> bool:
        """Whether any entry is kept."""
        return self.has_head or self.has_draws

    @property
    def has_draws(self) -> bool:
        """Whether entries are drawn at random."""
        return "draws" in self.options

    @property
    def is_top(self) -> bool:
        """Whether the kept entries are the most probable ones, and no others."""
        return self.has_head and not self.has_draws

    @property
    def has_logprobs(self) -> bool:
        """Whether the log probs of kept entries are stored."""
        return "logprobs" in self.stored


EXACT = ("logprobs", "log_tail")
METHODS = {
    "topk": Method(kept="top {k}", options=("k",), given=EXACT, stored=EXACT),
    "topp": Method(
        kept="top-p {p:g}, {min_k} to {k} entries",
        options=("k", "p", "min_k"),
        given=EXACT,
        stored=EXACT,
        varies=True,
    ),
    "sample": Method(
        kept="{draws} draws",
        options=("draws", "seed"),
        tolerated=("k",),
        given=(*EXACT, "draws", "entropy"),
        stored=("draws", "entropy"),
        stored_with_logprobs=(*EXACT, "draws"),
        varies=True,
    ),
    "topk+sample": Method(
        kept="top {k} + {draws} draws from the tail",
        options=("k", "draws", "seed"),
        given=(*EXACT, "draws"),
        stored=(*EXACT, "draws"),
        varies=True,
    ),
    "label": Method(kept="the log prob of the actual token alone", options=(), given=(), stored=()),
}


@dataclass(frozen=True, kw_only=True)  # no slots: jsonargparse reads defaults through vars()
class Truncation:
    """Which entries of each distribution are kept."""

    method: str = "topk"
    """topk | topp | sample | topk+sample | label: the log prob of the actual token alone."""
    k: int = 64
    """topk: entries kept; topp: at most this many; topk+sample: size of the exact head."""
    p: float = 1.0
    """topp: keep the smallest set of top entries whose mass reaches p."""
    min_k: int = 1
    """topp: keep at least this many."""
    draws: int = 0
    """sample, topk+sample: draws with replacement per target (from the tail for topk+sample)."""
    seed: int = 0
    """sample, topk+sample: seed; a sequence's draws depend on it and the sequence index alone."""

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"truncation.method {self.method!r} is not one of {tuple(METHODS)}")
        options, tolerated = self.rule.options, self.rule.tolerated
        defaults = {f.name: f.default for f in dataclasses.fields(self)}
        for names in (("k",), ("p", "min_k"), ("draws", "seed")):
            idle = [name for name in names if name not in (*options, *tolerated)]
            if any(getattr(self, name) != defaults[name] for name in idle):
                have = "have" if len(idle) > 1 else "has"
                raise ValueError(
                    f"truncation.{' and '.join(idle)} {have} no effect with method {self.method!r}"
                )
        if "k" in options and self.k < 1:
            raise ValueError(f"truncation.k must be at least 1, found {self.k}")
        if "p" in options and not 0 < self.p <= 1:
            raise ValueError(f"truncation.p must lie in (0, 1], found {self.p}")
        if "min_k" in options and not 1 <= self.min_k <= self.k:
            raise ValueError(f"truncation.min_k must lie in [1, k={self.k}], found {self.min_k}")
        if "draws" in options and not 1 <= self.draws <= 65_535:
            raise ValueError(f"truncation.draws must lie in [1, 65535], found {self.draws}")
        if "seed" in options and not 0 <= self.seed < 2**63:
            raise ValueError(f"truncation.seed must lie in [0, 2^63), found {self.seed}")

    @classmethod
    def nucleus(cls, *, k: int, p: float, min_k: int) -> "Truncation":
        """The smallest set of top entries whose mass reaches p, of `min_k` to `k` entries."""
        return cls(method="topp", k=k, p=p, min_k=min_k)

    @property
    def rule(self) -> Method:
        """What the method keeps, and what follows from it."""
        return METHODS[self.method]

    @property
    def sampled(self) -> bool:
        """Whether entries are drawn at random."""
        return self.rule.has_draws

    @property
    def slots(self) -> int:
        """K: entries a target can hold."""
        return (self.k if self.rule.has_head else 0) + (self.draws if self.sampled else 0)

    @property
    def given(self) -> tuple[str, ...]:
        """The fields of `Distributions` that a teacher gives, in the order of their list."""
        return in_order(self.rule.given)

    def stored(self, with_logprobs: bool) -> tuple[str, ...]:
        """The fields of `Distributions` that a cache holds, in the order of their list."""
        rule = self.rule
        older = with_logprobs and rule.stored_with_logprobs is not None
        return in_order(rule.stored_with_logprobs or () if older else rule.stored)

    def check_without_logprobs(self, temperatures: Sequence[float]) -> None:
        """Raise ValueError unless these can be had of a method that stores no log probs."""
        if tuple(temperatures) != (1,):
            raise ValueError(
                f"truncation.method {self.method!r} stores no log probs of kept entries, which "
                f"other temperatures need: temperatures must be [1], found {list(temperatures)}"
            )

    def text(self) -> str:
        """What is kept, for people."""
        return self.rule.kept.format(**dataclasses.asdict(self))


def check_temperatures(temperatures: tuple[float, ...]) -> None:
    """Raise ValueError unless they are finite, positive, of distinct names, and start with 1."""
    rest = temperatures[1:]
    if not temperatures or temperatures[0] != 1:
        raise ValueError(f"temperatures must start with 1, found {list(temperatures)}")
    names = {f"{t:g}" for t in temperatures}  # columns are named by six digits
    if any(not 0 < t < float("inf") for t in rest) or len(names) < len(temperatures):
        raise ValueError(
            "temperatures must be positive, finite and distinct in their first six digits, "
            f"found {list(temperatures)}"
        )
