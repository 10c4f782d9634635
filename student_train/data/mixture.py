"""Several caches in exact proportions: several teachers of one tokenizer, or several domains.

The global order takes a sequence from one cache after another so that after any number n of
sequences each cache has given its share of n to within one. Each cache is passed in its own order,
epoch after epoch, however often its share asks for it. The state is the number consumed.
"""

import dataclasses
import logging
import math
import os
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from decant.schemas import NO_LOGPROBS, FormatError, Layout
from decant.storage import CacheReader, StoredRows
from decant.storage.cache.logprobs import decode_logprobs, of_planes
from decant.storage.cache.same_tokenizer import same_ids
from decant.student_train.alignment.aligner import AlignedRows
from decant.student_train.data.generations import GENERATIONS, generations_of
from decant.student_train.data.order import Entry
from decant.student_train.data.stream import SequenceStream, order_of
from decant.student_train.data.stream_config import StreamConfig, temperature_indices

log = logging.getLogger(__name__)

MAX_PERIOD = 100_000


def interleaving(weights: Sequence[float]) -> NDArray[np.int16]:
    """Which source comes at each place of one period, which repeats for ever.

    Tijdeman's rule: of the sources that may go without running ahead, the one goes that would be
    the first to fall behind. So after n places each source i has had w_i n of them, to within less
    than one. Raises ValueError if the weights have no common period of at most MAX_PERIOD.
    """
    exact = [Fraction(str(weight)) for weight in weights]
    shares = [weight / sum(exact) for weight in exact]
    period = math.lcm(*(share.denominator for share in shares))
    if period > MAX_PERIOD:
        raise ValueError(
            f"weights {list(weights)} repeat only after {period:,} sequences, at most "
            f"{MAX_PERIOD:,} are possible: round them"
        )
    counts = [int(share * period) for share in shares]
    if len(counts) == 1:
        return np.zeros(1, np.int16)
    # In units of 1 / (period * slack), so that everything is an integer.
    slack = 2 * len(counts) - 2
    given = [0] * len(counts)
    pattern = np.empty(period, np.int16)
    for place in range(period):
        best, earliest = -1, Fraction(0)
        for source, count in enumerate(counts):
            due = slack * (count * (place + 1) - given[source] * period)
            if due >= period:
                left = Fraction((slack - 1) * period - due, count)
                if best < 0 or left < earliest:
                    best, earliest = source, left
        pattern[place] = best
        given[best] += 1
    assert given == counts
    return pattern


class MixtureStream(SequenceStream):
    """Endless batches of one rank from several caches; a batch holds sequences of all of them.

    `Batch.source` says which cache each target is of. Caches may differ in k, method and precision:
    their targets are brought to one form, float32 log probs in as many slots as the widest has.
    """

    def __init__(
        self,
        urls: Sequence[str | os.PathLike[str]],
        weights: Sequence[float],
        *,
        temperatures: Sequence[Sequence[float]] | None = None,
        **options: Any,
    ) -> None:
        """Open the caches; `options` are the fields of `StreamConfig`, `lanes` are of each cache.

        `temperatures` are those that each cache's targets are wanted at, in place of `temperature`
        for all: at the others theirs are NaN.

        Raises ValueError if the caches differ in tokenizer or vocabulary (and there is no
        `alignment`), if one lacks a
        temperature, or if drawn targets were to be mixed with others.
        """
        if temperatures is not None:
            every = dict.fromkeys(t for those in temperatures for t in those)
            options["temperature"] = tuple(every)
        super().__init__(StreamConfig(**options))
        self.readers = [CacheReader(url) for url in urls]
        self._align()
        if self.config.alignment is None:
            for reader in self.readers[1:]:
                check_same_vocabulary(self.reader, reader)
        if self._to_events is None:
            self._check_forms()
        wanted = self.config.temperatures
        self._temperatures = [1.0] + [t for t in wanted if t != 1]
        self._indices = [
            _stored_at(reader, self._temperatures, [1.0, *own])
            for reader, own in zip(
                self.readers, temperatures or [wanted] * len(self.readers), strict=True
            )
        ]
        self._layout = _common_layout([r.manifest.layout for r in self.readers], self._temperatures)
        self._temperature_indices = tuple(self._temperatures.index(t) for t in wanted)
        self._pattern = interleaving(weights)
        self._num_sources = len(self.readers)
        self._num_lanes = self.config.lanes * self._num_sources
        self.orders = [order_of(reader, self.config) for reader in self.readers]
        shares = np.bincount(self._pattern, minlength=self._num_sources) / len(self._pattern)
        sizes = [order.num_sequences for order in self.orders]
        self.num_sequences = math.ceil(max(n / s for n, s in zip(sizes, shares, strict=True)))
        """Sequences until every cache has been passed at least once: the others then were more
        often."""

    def state_dict(self) -> dict[str, Any]:
        """Where the stream is: the same for every rank and any world size."""
        counts = np.bincount(self._pattern, minlength=self._num_sources)
        return {
            "cache_ids": [reader.manifest.cache_id for reader in self.readers],
            "shares": [f"{count}/{len(self._pattern)}" for count in counts],
            "seed": self.orders[0].seed,
            "num_sequences": [order.num_sequences for order in self.orders],
            "lanes": self.orders[0].lanes,
            GENERATIONS: generations_of(self.readers),
            "consumed": self.consumed,
        }

    def _given(self, consumed: int) -> list[int]:
        """How many of the first `consumed` sequences are of each cache."""
        periods, rest = divmod(consumed, len(self._pattern))
        whole = np.bincount(self._pattern, minlength=self._num_sources)
        begun = np.bincount(self._pattern[:rest], minlength=self._num_sources)
        return (periods * whole + begun).tolist()

    def _order(self, consumed: int) -> Iterator[Entry]:
        given = self._given(consumed)
        orders = [order.after(n) for order, n in zip(self.orders, given, strict=True)]
        period, place = len(self._pattern), consumed
        while True:
            source = int(self._pattern[place % period])
            lane, visit, member, _ = next(orders[source])
            yield Entry((source, lane), (source, *visit), member, source)
            place += 1

    def _load(self, visit: tuple[int, ...]) -> StoredRows | AlignedRows:
        source, _, group = visit
        reader = self.readers[source]
        rows = self.read(reader.row_groups()[group], source)
        if isinstance(rows, AlignedRows):
            return rows
        return _as_layout(rows, reader.manifest.layout, self._layout, self._indices[source])

    def _check_forms(self) -> None:
        forms: dict[tuple[bool, bool], CacheReader] = {}
        for reader in self.readers:
            layout = reader.manifest.layout
            forms.setdefault((layout.has_draws, layout.has_logprobs), reader)
        if len(forms) > 1:
            one, other = list(forms.values())[:2]
            raise ValueError(
                f"{one.url} ({one.manifest.truncation.method}, {one.manifest.precision}) and "
                f"{other.url} ({other.manifest.truncation.method}, {other.manifest.precision}) "
                "cannot be mixed: losses of drawn and of exact targets are estimated in different "
                "ways, and so are those of draws with and without log probs"
            )


def check_same_vocabulary(ours: CacheReader, theirs: CacheReader) -> None:
    """Raise ValueError unless two caches are of one tokenizer and one shared vocabulary."""
    a, b = ours.manifest, theirs.manifest
    try:
        differing = same_ids(ours, theirs).text()
    except FormatError as error:
        raise ValueError(str(error)) from error
    if differing:
        log.info(
            "%s: its tokenizer means the same by every id as that of %s and differs in: %s",
            theirs.url,
            ours.url,
            differing,
        )
    if a.shared_vocab_size != b.shared_vocab_size:
        raise ValueError(
            f"{theirs.url} has {b.shared_vocab_size} ids, {ours.url} {a.shared_vocab_size}"
        )


def _common_layout(layouts: Sequence[Layout], temperatures: Sequence[float]) -> Layout:
    """The layout that all targets fit in."""
    slots = max(layout.slots for layout in layouts)
    return dataclasses.replace(
        max(layouts, key=lambda layout: layout.wide),
        slots=slots,
        precision="f32" if layouts[0].has_logprobs else NO_LOGPROBS,
        temperatures=tuple(temperatures),
        has_num_kept=any(layout.has_num_kept or layout.slots < slots for layout in layouts),
    )


def _stored_at(
    reader: CacheReader, common: Sequence[float], own: Sequence[float]
) -> tuple[int | None, ...]:
    """Where a cache stores each of the common temperatures, None where it is not wanted of it.

    Raises ValueError naming what it has if one of its own is not stored.
    """
    found = dict(zip(own, temperature_indices(reader, own), strict=True))
    return tuple(found.get(value) for value in common)


def _as_layout(
    rows: StoredRows, layout: Layout, common: Layout, temperatures: tuple[int | None, ...]
) -> StoredRows:
    """The same sequences in the common layout; `temperatures` are those of it, as stored."""
    more = ((0, 0), (0, common.slots - layout.slots))

    def widened(values: NDArray) -> NDArray:
        return np.pad(values, more) if more[1][1] else values

    num_kept = rows.num_kept
    unused = None
    if num_kept is not None:
        unused = np.arange(layout.slots) >= num_kept[:, None]
    elif common.has_num_kept:
        num_kept = np.full(len(rows.token_id), layout.slots, np.uint16)
    logprobs = None
    if rows.topk_logprob is not None:
        tail = rows.by_temperature["log_tail"][0]
        assert tail is not None
        stored = of_planes(rows.topk_logprob, layout.slots, layout.precision == "compact")
        logprobs = decode_logprobs(stored, unused, tail, layout.precision, layout.code)
    unknown = np.full(len(rows.token_id), np.nan, np.float32)
    high = rows.topk_hi
    if high is None and common.wide:
        high = np.zeros_like(rows.topk_lo)
    return dataclasses.replace(
        rows,
        topk_lo=widened(rows.topk_lo),
        topk_mid=widened(rows.topk_mid),
        topk_hi=None if high is None else widened(high),
        topk_logprob=None if logprobs is None else (widened(logprobs),),
        num_kept=num_kept,
        draws=None if rows.draws is None else widened(rows.draws),
        by_temperature={
            name: [unknown if i is None else columns[i] for i in temperatures]
            for name, columns in rows.by_temperature.items()
        },
    )
