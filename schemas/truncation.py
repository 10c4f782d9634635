"""The truncation methods: what each keeps of a distribution, and what it needs stored."""

from dataclasses import dataclass

METHODS = ("topk", "topp", "sample", "topk+sample")


@dataclass(frozen=True, kw_only=True)  # no slots: jsonargparse reads defaults through vars()
class Truncation:
    """Which entries of each distribution are kept."""

    method: str = "topk"
    """topk | topp | sample | topk+sample."""
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
            raise ValueError(f"truncation.method {self.method!r} is not one of {METHODS}")
        head = self.method != "sample"
        if head and self.k < 1:
            raise ValueError(f"truncation.k must be at least 1, found {self.k}")
        if self.method == "topp":
            if not 0 < self.p <= 1:
                raise ValueError(f"truncation.p must lie in (0, 1], found {self.p}")
            if not 1 <= self.min_k <= self.k:
                raise ValueError(
                    f"truncation.min_k must lie in [1, k={self.k}], found {self.min_k}"
                )
        elif self.p != 1.0 or self.min_k != 1:
            raise ValueError(f"truncation.p and min_k have no effect with method {self.method!r}")
        if self.sampled:
            if not 1 <= self.draws <= 65_535:
                raise ValueError(f"truncation.draws must lie in [1, 65535], found {self.draws}")
            if not 0 <= self.seed < 2**63:
                raise ValueError(f"truncation.seed must lie in [0, 2^63), found {self.seed}")
        elif self.draws or self.seed:
            raise ValueError(
                f"truncation.draws and seed have no effect with method {self.method!r}"
            )

    @property
    def sampled(self) -> bool:
        """Whether entries are drawn at random."""
        return self.method in ("sample", "topk+sample")

    @property
    def slots(self) -> int:
        """K: entries a target can hold."""
        head = 0 if self.method == "sample" else self.k
        return head + (self.draws if self.sampled else 0)


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
