"""A teacher's sparse distributions of n targets: the one list of what is known of them.

A field is named here with its axis and its type. Sequences, row groups, messages and comparisons
build, cut, join and pack whatever is on the list. Arrays are numpy's or torch's: nothing here needs
to know which.

Shapes: n targets, K slots per target, T stored temperatures.
"""

import dataclasses
import functools
import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import numpy as np

A = TypeVar("A")
"""NDArray or Tensor."""
SLOTS, TEMPERATURES, ONE = "K", "T", ""
"""The second axis of a field: an entry per slot, a number per temperature, or none."""


IDS = COUNTS = {"axis": SLOTS, "dtype": np.dtype(np.int32)}
NATS = {"axis": SLOTS, "dtype": np.dtype(np.float32)}
NATS_BY_TEMPERATURE = {"axis": TEMPERATURES, "dtype": np.dtype(np.float32)}
NATS_OF_TARGET = {"axis": ONE, "dtype": np.dtype(np.float32)}


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Distributions(Generic[A]):
    """What is known of the distributions of n targets; a field that is not known is None."""

    token_ids: A = field(metadata=IDS)
    """[n, K] int32 kept vocabulary ids in descending probability, or ascending without log probs;
    -1 = unused slot."""
    logprobs: A | None = field(metadata=NATS, default=None)
    """[n, K] float32 log probs at T=1 in nats over the whole shared vocabulary; -inf = unused slot.
    None in a cache that holds draws without log probs."""
    draws: A | None = field(metadata=COUNTS, default=None)
    """[n, K] int32 how often each id was drawn (0 = exact head entry), or None without sampling."""
    log_z: A = field(metadata=NATS_BY_TEMPERATURE)
    """[n, T] float32 log sum_v p(v)^(1/T) over the whole vocabulary; 0 at T=1."""
    log_tail: A | None = field(metadata=NATS_BY_TEMPERATURE, default=None)
    """[n, T] float32 log mass under p_T of everything not kept; -inf when nothing is left. None
    without log probs."""
    label_logprob: A = field(metadata=NATS_OF_TARGET)
    """[n] float32 the teacher's log prob (T=1) of the actual token."""
    entropy: A | None = field(metadata=NATS_OF_TARGET, default=None)
    """[n] float32 nats, of the teacher's whole distribution at T=1: with method `sample`, from
    version 3 of the format on."""

    def known(self) -> dict[str, A]:
        """The fields that are known, by name, in the order of the list."""
        every = zip(FIELDS, _every_field(self), strict=True)
        return {name: value for name, value in every if value is not None}


@dataclass(frozen=True, slots=True)
class Field:
    """One field of `Distributions`."""

    name: str
    axis: str
    """SLOTS, TEMPERATURES or ONE."""
    dtype: np.dtype

    def width(self, slots: int, temperatures: int) -> int:
        """Numbers per target."""
        return {SLOTS: slots, TEMPERATURES: temperatures, ONE: 1}[self.axis]

    def shape(self, targets: int, slots: int, temperatures: int) -> tuple[int, ...]:
        """Of the array of n targets."""
        rest = () if self.axis == ONE else (self.width(slots, temperatures),)
        return (targets, *rest)


FIELDS = {f.name: Field(f.name, **f.metadata) for f in dataclasses.fields(Distributions)}
"""The list, in the order in which the fields travel."""
_every_field = operator.attrgetter(*FIELDS)
ALWAYS = tuple(
    f.name for f in dataclasses.fields(Distributions) if f.default is dataclasses.MISSING
)
"""The fields that are never None: of no entries where none are kept, 0 at T=1."""


@functools.cache
def in_order(names: tuple[str, ...]) -> tuple[str, ...]:
    """These fields and those that are always there, in the order of the list."""
    wanted = {*names, *ALWAYS}
    return tuple(name for name in FIELDS if name in wanted)


def joined(
    parts: Sequence[Distributions[A]],
    concatenate: Callable[[list[A]], A],
    names: Iterable[str] | None = None,
) -> dict[str, A]:
    """The fields of all targets of the parts, or those of `names`, which all parts must know."""
    wanted = parts[0].known() if names is None else names
    return {name: concatenate([getattr(part, name) for part in parts]) for name in wanted}
