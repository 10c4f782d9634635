"""Losses of a mixture by name: which divergence, with which weight, on whose prefixes.

The maths and their sources stand in docs/losses.md.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from decant.student_train.config.loss import LossConfig, Weight
from decant.student_train.config.mixture import SIDES, CacheShare, own_loss, own_losses
from decant.student_train.config.schedule import Schedule, parse_option, values_of

HALF: dict[str, Any] = {"lam": 0.5}
FIXED: dict[str, dict[str, tuple[str, dict[str, Any], float]]] = {
    "kl": {"teacher": ("fkl", {}, 1.0)},
    "rkl": {"student": ("rkl", {}, 1.0)},
    "js": {"teacher": ("skew_fkl", HALF, 0.5), "student": ("skew_rkl", HALF, 0.5)},
    "tvd": {"teacher": ("tvd", {}, 0.5), "student": ("tvd", {}, 0.5)},
}
"""f-DISTILL's: kind, options, and weight of a sequence on each side."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Side:
    """What a preset minimises on the prefixes of one side."""

    kind: str
    options: dict[str, Any]
    weight: Weight
    """Of a sequence, where both sides are passed alike often."""


def losses_of(common: LossConfig, mixture: Sequence[CacheShare]) -> tuple[LossConfig, ...]:
    """The loss of each cache, in the order of the mixture; one for all of no mixture.

    A preset weighs each side by its share of the sequences, so that its objective is the same in
    whatever shares the caches are passed. Raises ValueError, naming the cache, if one cannot be.
    """
    if not common.preset:
        for share in mixture:
            if share.prefixes:
                raise ValueError(
                    f"mixture: prefixes of {share.cache} has no effect without loss.preset"
                )
        return own_losses(common, mixture)
    sides = sides_of(common)
    _check_sides(common.preset, sides, mixture)
    total = sum(share.weight for share in mixture if share.prefixes)
    sums = {
        side: sum(share.weight for share in mixture if share.prefixes == side) for side in SIDES
    }
    found = []
    for share in mixture:
        if share.prefixes is None:
            found.append(own_loss(common, share))
            continue
        side = sides[share.prefixes]
        factor = scaled(side.weight, total / sums[share.prefixes])
        weight = _product(common.kd_weight, factor)
        try:
            chosen = dataclasses.replace(
                common, preset="", kind=side.kind, options=side.options, kd_weight=weight
            )
        except ValueError as error:
            raise ValueError(f"loss.preset {common.preset}: {error}") from error
        found.append(own_loss(chosen, share))
    return tuple(found)


def sides_of(common: LossConfig) -> dict[str, Side]:
    """What the preset of a loss minimises on each side. Raises ValueError for its options."""
    if common.preset in FIXED:
        if common.options:
            raise ValueError(
                f"loss.preset {common.preset} has no options, found {', '.join(common.options)}"
            )
        return {
            side: Side(kind=kind, options=options, weight=weight)
            for side, (kind, options, weight) in FIXED[common.preset].items()
        }
    unknown = sorted(set(common.options) - {"lam", "beta"})
    if unknown:
        raise ValueError(
            f"loss.preset contrastive has the options lam and beta, found {', '.join(unknown)}"
        )
    lam = common.options.get("lam", 0.1)
    beta = parse_option(common.options.get("beta", 1.0), "loss.options.beta")
    if not isinstance(beta, int | float | Schedule) or not all(0 < b < 2 for b in values_of(beta)):
        raise ValueError(
            f"loss.options.beta must lie between 0 and 2, both excluded, found {beta}: the "
            "teacher's side weighs 2 - beta"
        )
    of_teacher = (
        dataclasses.replace(beta, values=[2 - b for b in beta.values])
        if isinstance(beta, Schedule)
        else 2 - beta
    )
    return {
        "teacher": Side(kind="skew_fkl", options={"lam": lam}, weight=scaled(of_teacher, 0.5)),
        "student": Side(kind="skew_rkl", options={"lam": lam}, weight=scaled(beta, 0.5)),
    }


def scaled(weight: Weight, factor: float) -> Weight:
    """A weight times a number."""
    if isinstance(weight, Schedule):
        return dataclasses.replace(weight, values=[factor * value for value in weight.values])
    return factor * weight


def _product(common: Weight, of_side: Weight) -> Weight:
    if isinstance(of_side, Schedule):
        if isinstance(common, Schedule):
            raise ValueError("loss.kd_weight and loss.options.beta cannot both be schedules")
        return scaled(of_side, common)
    return scaled(common, of_side)


def _check_sides(preset: str, sides: dict[str, Side], mixture: Sequence[CacheShare]) -> None:
    """Raise ValueError unless every entry has its place, and every side its entries."""
    wanted = " and ".join(f"{side} prefixes" for side in sides)
    if not mixture:
        raise ValueError(
            f"loss.preset {preset} is of a mixture of caches with {wanted}: give a mixture whose "
            "entries have `prefixes`, or a loss.kind"
        )
    for share in mixture:
        if share.prefixes is None and not (share.loss and share.loss.kind):
            raise ValueError(
                f"mixture: loss.preset {preset} needs to know whose prefixes {share.cache} holds: "
                "give it `prefixes: teacher` or `prefixes: student`, or a loss.kind of its own"
            )
        if share.prefixes is not None and share.prefixes not in sides:
            raise ValueError(
                f"mixture: loss.preset {preset} is a loss of {wanted}, and {share.cache} holds "
                f"{share.prefixes} prefixes: leave it out, or take another preset"
            )
        ours = {"kind", "options", "kd_weight", "clip"} & set(share.own)
        if share.prefixes is not None and ours:
            raise ValueError(
                f"mixture: loss.preset {preset} sets {', '.join(sorted(ours))} of {share.cache}: "
                "leave it out there; `weight` says how often a cache is passed"
            )
    for side in sides:
        if not any(share.prefixes == side for share in mixture):
            raise ValueError(
                f"mixture: loss.preset {preset} needs caches of {wanted}, and none has "
                f"`prefixes: {side}`"
            )
