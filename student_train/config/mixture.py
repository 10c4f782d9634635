"""The share of one cache in a mixture."""

import math
from dataclasses import dataclass

from decant.student_train.config.loss import Weight
from decant.student_train.config.paths import expand_home
from decant.student_train.config.schedule import values_of


@dataclass(frozen=True, kw_only=True)  # no slots: jsonargparse reads defaults through vars()
class CacheShare:
    """One cache of a mixture."""

    cache: str
    """Directory or fsspec URL."""
    weight: float
    """Its share of the sequences, relative to the other weights."""
    kd_weight: Weight | None = None
    """Weight of the divergence on its targets, in place of loss.kd_weight."""
    ce_weight: Weight | None = None
    """Weight of the cross-entropy on its targets, in place of loss.ce_weight."""

    def __post_init__(self) -> None:
        expand_home(self, "cache")
        if not self.cache:
            raise ValueError("mixture: every entry needs a cache")
        if not (math.isfinite(self.weight) and self.weight > 0):
            raise ValueError(f"mixture: weight of {self.cache} must be > 0, found {self.weight}")
        for name in ("kd_weight", "ce_weight"):
            value = getattr(self, name)
            if value is not None and min(values_of(value)) < 0:
                raise ValueError(f"mixture: {name} of {self.cache} must be >= 0, found {value}")
