"""How many entries to keep for a budget of bytes or nats, and what is known of the choice.

Of a curve of k there is no best point: what a target costs in bytes and what its tail is worth in
nats are for the reader to weigh. Without a budget nothing is recommended.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

UNITS = {"KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}
FAR = 20
"""Times the bytes of the largest k from which bytes per target are taken for a slip."""
SURE = 1.96
"""Standard errors that an estimate may be off: two-sided 95%."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """One k of the curve."""

    k: int
    nats: float
    """What it costs against the largest k of the curve, forward KL per target."""
    error: float | None
    """Standard error of `nats`; None with fewer than two sequences, which tell nothing of it."""
    bytes_per_target: float | None

    @property
    def least(self) -> float:
        """What `nats` is at least, as far as the sample tells."""
        return 0.0 if self.error is None else max(self.nats - SURE * self.error, 0)

    @property
    def most(self) -> float:
        """What it is at most."""
        return math.inf if self.error is None else self.nats + SURE * self.error


@dataclass(frozen=True, kw_only=True, slots=True)
class Budget:
    """What a target may take, and what it may lose."""

    max_bytes: str = ""
    """Bytes per target, or with a unit (KB, MB, GB, TB) bytes of the whole cache."""
    max_nats: float | None = None
    """Nats of forward KL per target against the whole vocabulary."""

    def __post_init__(self) -> None:
        if self.max_nats is not None and not 0 < self.max_nats < math.inf:
            raise ValueError(f"--max-nats must be a number above 0, found {self.max_nats}")
        self.bytes_per_target(1)

    def __bool__(self) -> bool:
        return bool(self.max_bytes) or self.max_nats is not None

    def bytes_per_target(self, targets: int) -> float | None:
        """What each of so many targets may take; None where bytes are no matter.

        Raises ValueError if `max_bytes` is none.
        """
        if not self.max_bytes:
            return None
        found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) ?([KMGT]B)?", self.max_bytes, re.IGNORECASE)
        if not found or not float(found[1]):
            raise ValueError(
                f"--max-bytes {self.max_bytes!r} is neither bytes per target, as 80, nor bytes of "
                "the whole cache with a unit, as 20GB"
            )
        value = float(found[1])
        return value * UNITS[found[2].upper()] / max(targets, 1) if found[2] else value


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """What a budget asks for."""

    k: int | None
    """None where no k below the largest is known to be it."""
    text: str
    """That, and why, in one line."""


def choose(steps: Sequence[Step], beyond: float, budget: Budget, targets: int) -> Choice:
    """The k that a budget asks for, of steps by ascending k.

    `beyond` is what the largest k itself may cost against the whole vocabulary, at most. For bytes
    it is the largest k that fits, for nats the smallest that is known to cost no more, for both
    that one if it fits. Never the largest k: the curve does not say what is beyond it.
    Raises ValueError for bytes per target that must be meant for the whole cache.
    """
    if not budget:
        raise ValueError("there is no budget to choose by")
    limit = budget.bytes_per_target(targets)
    largest = steps[-1].bytes_per_target
    is_of_target = not budget.max_bytes[-1:].isalpha()
    if limit is not None and largest is not None and is_of_target and limit > FAR * largest:
        raise ValueError(
            f"--max-bytes {budget.max_bytes} per target is far more than k={steps[-1].k} takes, "
            f"{largest:,.1f}: bytes of the whole cache have a unit, as 20GB"
        )
    if budget.max_nats is None:
        assert limit is not None
        return _by_bytes(steps, beyond, limit)
    choice = _by_nats(steps, beyond, budget.max_nats)
    if limit is None or choice.k is None:
        return choice
    chosen = next(step for step in steps if step.k == choice.k)
    if chosen.bytes_per_target is not None and chosen.bytes_per_target <= limit:
        return choice
    return Choice(k=None, text=f"no k fits both: {choice.text}, more than {_bytes(limit)}")


def _by_bytes(steps: Sequence[Step], beyond: float, limit: float) -> Choice:
    known = [(step, step.bytes_per_target) for step in steps if step.bytes_per_target is not None]
    if not known:
        return Choice(k=None, text="what each k takes was not measured")
    fitting = [step for step, size in known if size <= limit]
    if not fitting:
        least, size = known[0]
        return Choice(k=None, text=f"no k fits {_bytes(limit)}: k={least.k} takes {_bytes(size)}")
    if fitting[-1] is not steps[-1]:
        said = f"the largest k in {_bytes(limit)} is {_said(fitting[-1], beyond)}"
        return Choice(k=fitting[-1].k, text=said)
    said = f"all of k={steps[-1].k} fits {_bytes(limit)}"
    if beyond:
        said += f"; more, which is not measured here, would gain at most {beyond:.3g} nats"
    return Choice(k=None, text=said)


def _by_nats(steps: Sequence[Step], beyond: float, limit: float) -> Choice:
    for step in steps[:-1]:
        if step.most + beyond <= limit:
            said = f"the smallest k known to cost at most {limit:g} nats is {_said(step, beyond)}"
            return Choice(k=step.k, text=said)
    last = steps[-1]
    said = f"no k below {last.k} is known to cost at most {limit:g} nats"
    if beyond <= limit:
        return Choice(
            k=None, text=said + (f"; {last.k} costs up to {beyond:.3g}" if beyond else "")
        )
    said = f"no k up to {last.k} is known to cost at most {limit:g} nats: {last.k} may cost up to "
    said += f"{beyond:.3g}"
    perhaps = next(step for step in steps if step.least <= limit)
    if perhaps is not steps[0]:
        said += f", and what is below {perhaps.k} costs more"
    return Choice(k=None, text=said)


def _said(step: Step, beyond: float) -> str:
    size = "" if step.bytes_per_target is None else f", {_bytes(step.bytes_per_target)}"
    return f"k={step.k}: {nats(step, beyond)}{size}"


def nats(step: Step, beyond: float) -> str:
    """What a k costs against the whole vocabulary, as far as it is known."""
    error = "" if step.error is None else f", ± {SURE * step.error:.2g}"
    if not beyond:
        return f"{step.nats:.3g} nats{error}"
    return f"{step.nats:.3g} to {step.nats + beyond:.3g} nats{error}"


def _bytes(size: float | None) -> str:
    return f"{size:,.1f} bytes per target"
