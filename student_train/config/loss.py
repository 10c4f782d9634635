"""What is minimised: the configuration of the loss, and its numbers at one step."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from decant.student_train.config.schedule import Schedule, parse_option, value_at, values_of
from decant.student_train.losses.kinds import KINDS, check

Weight = float | Schedule


PRESETS = ("kl", "rkl", "js", "tvd", "contrastive")
"""Losses of a mixture whose kinds go by whose prefixes a cache holds: `config/presets.py`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LossTerms:
    """The loss of one step: numbers where `LossConfig` may have schedules."""

    kind: str
    kd_weight: float
    ce_weight: float
    temperature: float
    tail: str
    scale_by_t2: bool
    options: dict[str, Any]
    gap: float | None = None

    def text(self) -> str:
        """For people."""
        options = "".join(f", {name} {value}" for name, value in self.options.items())
        if self.gap is not None:
            options += f", lam by sequence from gap {self.gap:g}"
        return (
            f"{self.kd_weight:g} {self.kind} (T={self.temperature:g}, {self.tail}{options})"
            f" + {self.ce_weight:g} cross-entropy"
        )

    def divergence(self) -> dict[str, Any]:
        """What `sparse_divergence` is asked for."""
        return {
            "kind": self.kind,
            "temperature": self.temperature,
            "tail": self.tail,
            "scale_by_t2": self.scale_by_t2,
            **self.options,
        }


Terms = LossTerms | tuple[LossTerms, ...]
"""Those of all targets, or of each cache of a mixture."""


def of_source(terms: Terms, source: int) -> LossTerms:
    """The terms of one cache."""
    if isinstance(terms, LossTerms):
        return terms
    return terms[source] if len(terms) > 1 else terms[0]


def shown(terms: Terms, names: Sequence[str], caches: Sequence[str] = ()) -> dict[str, float]:
    """Some of the numbers, for a line of metrics; `name/cache` where caches differ in one."""
    each = (terms,) if isinstance(terms, LossTerms) else terms
    values: list[dict[str, Any]] = [
        {
            "kd_weight": one.kd_weight,
            "ce_weight": one.ce_weight,
            "temperature": one.temperature,
            **one.options,
        }
        for one in each
    ]
    found: dict[str, float] = {}
    for name in names:
        those: list[Any] = [value.get(name) for value in values]
        if all(value == those[0] for value in those):
            found[name] = those[0]
        else:
            told = zip(caches, those, strict=True)
            found |= {f"{name}/{cache}": value for cache, value in told if value is not None}
    return found


@dataclass(frozen=True, kw_only=True)  # no slots: jsonargparse reads defaults through vars()
class LossConfig:
    """What is minimised: kd_weight * divergence(teacher, student) + ce_weight * cross-entropy."""

    kind: str = "fkl"
    """Divergence: fkl, rkl, akl, jeffreys, jsd, tvd, skew_fkl, skew_rkl, alpha_beta or tail_kl; for
    draft models acceptance or acceptance_hybrid; for the order of ids alone hinge or logistic; on
    the student's own samples opd, which needs the log prob of the sampled token alone."""
    preset: str = ""
    """In place of a kind, for a mixture whose entries say whose `prefixes` they hold: f-DISTILL's
    kl, rkl, js or tvd, or DistiLLM-2's contrastive pair."""
    clip: float | None = None
    """opd: how far the ratio of student to sampler may go from 1, as in PPO; 0 = no ratio."""
    gap: float | None = None
    """skew_fkl, skew_rkl: give each sequence a lam of its own, at most the kind's, as DistiLLM-2
    does; this is how much more probable, on average where the training begins, the sampling side
    finds its samples than the other does: sequence_gap of decant evaluate."""
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
        if self.kind not in KINDS:
            raise ValueError(f"loss.kind {self.kind!r} is not one of {tuple(KINDS)}")
        if self.preset:
            self._check_preset()
        if self.clip is not None:
            if "clip" not in KINDS[self.kind]:
                raise ValueError(f"loss.clip is of kind opd, and has no effect with {self.kind}")
            if "clip" in self.options:
                raise ValueError("give loss.clip or loss.options.clip, not both")
        if self.gap is not None:
            self._check_gap(self.gap)
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
        options = self.of_kind
        parsed = {name: parse_option(v, f"loss.options.{name}") for name, v in options.items()}
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

    def _check_gap(self, gap: float) -> None:
        if not self.kind.startswith("skew"):
            which = f"loss.preset {self.preset}" if self.preset else f"kind {self.kind}"
            way = "give each entry of the mixture its own, or a kind" if self.preset else "leave it"
            raise ValueError(f"loss.gap is of skew_fkl and skew_rkl, and not of {which}: {way}")
        if not (math.isfinite(gap) and 0 <= gap < 1):
            raise ValueError(f"loss.gap is {gap}: expected a difference of probabilities in [0, 1)")
        if 0 in values_of(parse_option(self.options.get("lam", 0.1), "loss.options.lam")):
            raise ValueError("loss.gap moves lam below loss.options.lam, which is 0: leave it")

    def _check_preset(self) -> None:
        if self.preset not in PRESETS:
            raise ValueError(f"loss.preset {self.preset!r} is not one of {PRESETS}")
        if self.kind != "fkl":
            raise ValueError(
                f"loss.preset {self.preset} sets the kind of each cache, and loss.kind {self.kind} "
                "another: give one of the two"
            )

    @property
    def of_kind(self) -> dict[str, Any]:
        """The options of the kind; those of a preset are for its caches."""
        if self.preset:
            return {}
        return self.options if self.clip is None else {**self.options, "clip": self.clip}

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
            *(name for name, value in self.of_kind.items() if isinstance(value, dict)),
        )

    def at(self, step: int, steps: int) -> LossTerms:
        """The numbers of a step (0-based) of a run of `steps`."""
        options = {name: parse_option(value, name) for name, value in self.of_kind.items()}
        return LossTerms(
            kind=self.kind,
            kd_weight=value_at(self.kd_weight, step, steps),
            ce_weight=value_at(self.ce_weight, step, steps),
            temperature=value_at(self.temperature, step, steps),
            tail=self.tail,
            scale_by_t2=self.scale_by_t2,
            gap=self.gap,
            options={
                name: value.value(step, steps) if isinstance(value, Schedule) else value
                for name, value in options.items()
            },
        )


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
