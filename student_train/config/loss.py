"""What is minimised: the configuration of the loss, and its numbers at one step."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from decant.student_train.config.schedule import Schedule, parse_option, value_at, values_of
from decant.student_train.losses.kinds import DIVERGENCES, check

Weight = float | Schedule


@dataclass(frozen=True, kw_only=True, slots=True)
class LossTerms:
    """The loss of one step: numbers where `LossConfig` may have schedules."""

    kind: str
    kd_weight: tuple[float, ...]
    """One weight for all targets, or one per cache of a mixture."""
    ce_weight: tuple[float, ...]
    temperature: float
    tail: str
    scale_by_t2: bool
    options: dict[str, Any]

    def shown(self, names: Sequence[str]) -> dict[str, float]:
        """Some of the numbers, for a line of metrics; one weight for caches that differ is not."""
        values = {
            "kd_weight": self.kd_weight[0] if len(self.kd_weight) == 1 else None,
            "ce_weight": self.ce_weight[0] if len(self.ce_weight) == 1 else None,
            "temperature": self.temperature,
            **self.options,
        }
        return {name: values[name] for name in names if values[name] is not None}


@dataclass(frozen=True, kw_only=True)  # no slots: jsonargparse reads defaults through vars()
class LossConfig:
    """What is minimised: kd_weight * divergence(teacher, student) + ce_weight * cross-entropy."""

    kind: str = "fkl"
    """Divergence: fkl, rkl, akl, jeffreys, jsd, tvd, skew_fkl, skew_rkl, alpha_beta or tail_kl; for
    draft models acceptance or acceptance_hybrid; for the order of ids alone hinge or logistic."""
    kd_weight: Weight = 1.0
    """Weight of the divergence to the teacher; a number or a schedule, for example
    {values: [1.0, 0.5], at: [0, 1]}."""
    ce_weight: Weight = 0.0
    """Weight of the cross-entropy on the actual tokens; a number or a schedule."""
    temperature: Weight = 1.0
    """Softmax temperature of the divergence, which must be stored in the cache; a number or a
    schedule of shape step."""
    tail: str = "bucket"
    """What stands for the ids that were not kept. bucket: they are one class with their exact mass;
    renormalize: both sides count the kept ids alone; teacher_renormalize: the teacher's side alone
    does (biased, for comparison); uniform: their mass is spread evenly; label: their mass is the
    actual token's."""
    scale_by_t2: bool = True
    """Multiply the divergence, value and gradient, by temperature squared."""
    router_weight: float | None = None
    """Weight of the load-balancing loss of a mixture of experts; null = its config's own,
    router_aux_loss_coef; 0 = without."""
    options: dict[str, Any] = field(default_factory=dict)
    """Options of the kind, for example {head_rule: nucleus, mu: 0.5} for akl; a mapping in place
    of a number is a schedule."""

    def __post_init__(self) -> None:
        if self.kind not in DIVERGENCES:
            raise ValueError(f"loss.kind {self.kind!r} is not one of {tuple(DIVERGENCES)}")
        kd, ce = values_of(self.kd_weight), values_of(self.ce_weight)
        if min(kd) < 0 or min(ce) < 0 or max(kd) + max(ce) == 0:
            raise ValueError(
                f"loss weights must be >= 0 and not both 0, found kd_weight {self.kd_weight}, "
                f"ce_weight {self.ce_weight}"
            )
        if self.router_weight is not None and self.router_weight < 0:
            raise ValueError(f"loss.router_weight must be >= 0, found {self.router_weight}")
        if isinstance(self.temperature, Schedule) and self.temperature.shape != "step":
            raise ValueError(
                "a temperature between two stored ones cannot be computed: give the schedule of "
                f"loss.temperature shape step, found {self.temperature.shape}"
            )
        parsed = {name: parse_option(v, f"loss.options.{name}") for name, v in self.options.items()}
        if self.kind == "alpha_beta":
            for name, value in parsed.items():
                if isinstance(value, Schedule) and value.shape != "step":
                    raise ValueError(
                        f"loss.options.{name}: alpha_beta has branches of its own at 0, which a "
                        f"{value.shape} schedule may pass by; give it shape step"
                    )
        head = parsed.get("head")
        if isinstance(head, Schedule) and head.shape != "step":
            raise ValueError("loss.options.head is a count: give its schedule shape step")
        # Where a schedule goes linearly between valid values, all in between are valid.
        for temperature in self.temperatures:
            for at_knot in _knots(parsed):
                check(self.kind, temperature, self.tail, at_knot)

    @property
    def temperatures(self) -> tuple[float, ...]:
        """All temperatures of the run, in order of use."""
        return tuple(dict.fromkeys(values_of(self.temperature)))

    @property
    def scheduled(self) -> tuple[str, ...]:
        """Which of weights, temperature and options change over the run."""
        fields = ("kd_weight", "ce_weight", "temperature")
        return (
            *(name for name in fields if isinstance(getattr(self, name), Schedule)),
            *(name for name, value in self.options.items() if isinstance(value, dict)),
        )

    def at(
        self,
        step: int,
        steps: int,
        overrides: Sequence[tuple[Weight | None, Weight | None]] = ((None, None),),
    ) -> LossTerms:
        """The numbers of a step (0-based) of a run of `steps`.

        `overrides` has the kd and CE weight that each cache of a mixture sets for itself, or None.
        """
        kd = [self.kd_weight if kd is None else kd for kd, _ in overrides]
        ce = [self.ce_weight if ce is None else ce for _, ce in overrides]
        options = {name: parse_option(value, name) for name, value in self.options.items()}
        return LossTerms(
            kind=self.kind,
            kd_weight=_shared(tuple(value_at(weight, step, steps) for weight in kd)),
            ce_weight=_shared(tuple(value_at(weight, step, steps) for weight in ce)),
            temperature=value_at(self.temperature, step, steps),
            tail=self.tail,
            scale_by_t2=self.scale_by_t2,
            options={
                name: value.value(step, steps) if isinstance(value, Schedule) else value
                for name, value in options.items()
            },
        )


def _shared(weights: tuple[float, ...]) -> tuple[float, ...]:
    """One weight if all are equal."""
    return weights[:1] if len(set(weights)) == 1 else weights


def _knots(options: dict[str, Any]) -> list[dict[str, Any]]:
    """The options with each schedule at each of its values in turn."""
    fixed = {
        name: value.values[0] if isinstance(value, Schedule) else value
        for name, value in options.items()
    }
    return [fixed] + [
        {**fixed, name: knot}
        for name, value in options.items()
        if isinstance(value, Schedule)
        for knot in value.values[1:]
    ]
