"""The share of one cache in a mixture, and the loss that is taken on its targets."""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from decant.student_train.config.loss import LossConfig, Weight
from decant.student_train.config.paths import expand_home
from decant.student_train.config.schedule import values_of

SIDES = ("teacher", "student")


@dataclass(frozen=True, kw_only=True)
class OwnLoss:
    """The loss of one cache of a mixture: what is given stands in for the same of `loss`."""

    kind: str | None = None
    """As in loss; its options are then its own."""
    options: dict[str, Any] | None = None
    """Options of the kind; of the common kind, those that are to differ."""
    kd_weight: Weight | None = None
    """As in loss."""
    ce_weight: Weight | None = None
    """As in loss."""
    temperature: Weight | None = None
    """As in loss; this cache alone must have it."""
    tail: str | None = None
    """As in loss."""
    scale_by_t2: bool | None = None
    """As in loss."""
    clip: float | None = None
    """As in loss, for kind opd."""
    gap: float | None = None
    """As in loss, for skewed kinds; also with a preset that takes them."""


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
    prefixes: str | None = None
    """Whose tokens its texts are, for loss.preset: teacher (sampled from the teacher, or the data
    in its stead) or student (sampled from the student)."""
    loss: OwnLoss | None = None
    """What is minimised on its targets where that is not the common loss, for example
    {kind: rkl, kd_weight: 0.5}."""

    def __post_init__(self) -> None:
        expand_home(self, "cache")
        if not self.cache:
            raise ValueError("mixture: every entry needs a cache")
        if not (math.isfinite(self.weight) and self.weight > 0):
            raise ValueError(f"mixture: weight of {self.cache} must be > 0, found {self.weight}")
        if self.prefixes is not None and self.prefixes not in SIDES:
            raise ValueError(
                f"mixture: prefixes of {self.cache} {self.prefixes!r} is not one of {SIDES}"
            )
        for name in ("kd_weight", "ce_weight"):
            value = getattr(self, name)
            if value is not None and self.loss and getattr(self.loss, name) is not None:
                raise ValueError(
                    f"mixture: {self.cache} has {name} and loss.{name}: give one of the two"
                )
            if value is not None and min(values_of(value)) < 0:
                raise ValueError(f"mixture: {name} of {self.cache} must be >= 0, found {value}")

    @property
    def own(self) -> dict[str, Any]:
        """What it sets for itself of the loss."""
        given = dataclasses.asdict(self.loss) if self.loss else {}
        given = {
            name: getattr(self.loss, name) for name, value in given.items() if value is not None
        }
        for name in ("kd_weight", "ce_weight"):
            if getattr(self, name) is not None:
                given[name] = getattr(self, name)
        return given


def own_loss(common: LossConfig, share: CacheShare) -> LossConfig:
    """The loss on the targets of one cache. Raises ValueError, naming the cache, if it is none."""
    own = share.own
    options = {} if "kind" in own else dict(common.of_kind)
    if "clip" in own:
        options.pop("clip", None)
    changed: dict[str, Any] = {
        **own,
        "preset": "",
        "options": {**options, **own.get("options", {})},
        "clip": own.get("clip"),
        "gap": own.get("gap", None if "kind" in own else common.gap),
    }
    try:
        return dataclasses.replace(common, **changed)
    except ValueError as error:
        raise ValueError(f"mixture: {share.cache}: {error}") from error


def own_losses(common: LossConfig, mixture: Sequence[CacheShare]) -> tuple[LossConfig, ...]:
    """The loss of each cache, in the order of the mixture; one for all of no mixture."""
    if not mixture:
        return (common,)
    return tuple(own_loss(common, share) for share in mixture)
