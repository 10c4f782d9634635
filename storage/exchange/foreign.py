"""What a file of another tool says: records of tokens, and the entries of those that have some.

Knows no file format and nothing of caches; refuses what no cache could hold.

Shapes: L tokens of a record, m of them with entries, W entries at most.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from decant.schemas.manifest import MAX_SLOTS
from decant.schemas.strict import LARGEST

PADDING = -1e8
"""Values at or below it fill a list up: axolotl pads with -1e9, others with -inf."""
IGNORED_LABEL = -100
MAX_CELLS = 1 << 28
"""Entries of one record, every list of it as long as its longest."""


class ForeignError(ValueError):
    """A file is not what its format says: names the file, the row, what was found and a way out."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))  # one line, whatever Arrow has to say


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ForeignRecord:
    """The tokens of one record and the entries of those that have some."""

    where: str
    """File and row, for messages."""
    sample_id: str
    input_ids: NDArray[np.int32]
    """[L]."""
    positions: NDArray[np.int64]
    """[m] the token that each list of entries is about, 1 to L-1, ascending."""
    lists: NDArray[np.int64]
    """[m] where each list is in its row, for messages."""
    token_ids: NDArray[np.int64]
    """[m, W] in descending value; -1 = no entry."""
    values: NDArray[np.float64]
    """[m, W] log probs, or logits; -inf = no entry."""
    actual: NDArray[np.float64] | None = None
    """[m] log prob of the actual token where the file has it beside the entries; NaN where not."""
    floored: NDArray[np.bool_] | None = None
    """[m] whether `actual` is only an upper bound, the least that the file can say."""
    log_tail: NDArray[np.float64] | None = None
    """[m] log of the mass that the entries leave, where the file has all of it; else None."""
    rounding: float = 0.0
    """Relative error of a value as the file stores it: 2^-11 for float16."""

    @property
    def labels(self) -> NDArray[np.int32]:
        """[m] the actual tokens."""
        return self.input_ids[self.positions]

    @property
    def label_values(self) -> NDArray[np.float64]:
        """[m] log prob of the actual tokens: of its entry, or beside them; NaN where unknown."""
        beside = np.full(len(self.positions), np.nan) if self.actual is None else self.actual
        return self.values_of(self.labels, beside)

    def values_of(
        self, ids: NDArray[np.int32], otherwise: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        """[m] the value of one id per target, if it is an entry."""
        found = self.token_ids == ids[:, None]
        of = self.values[np.arange(len(ids)), found.argmax(axis=1)] if found.size else otherwise
        return np.where(found.any(axis=1), of, otherwise)

    def place(self, target: int) -> str:
        """Where a target is, for messages."""
        return f"{self.where}, list {self.lists[target]}"


def make_record(
    where: str,
    sample_id: str,
    tokens: NDArray[np.int64],
    offset: int,
    ids: NDArray[np.int64],
    values: NDArray[np.float64],
    vocab_size: int,
    *,
    span: tuple[int, int] | None = None,
    wanted: NDArray[np.bool_] | None = None,
    actual: NDArray[np.float64] | None = None,
    floored: NDArray[np.bool_] | None = None,
    log_tail: NDArray[np.float64] | None = None,
    rounding: float = 0.0,
) -> ForeignRecord:
    """A record of n lists [n, W], in any order inside a list; list j is about token j + `offset`.

    `span` [first, last) are the tokens of the record among `tokens`, if not all; `wanted` [L] are
    those that may be targets. Raises ForeignError for ids outside the vocabulary or twice in a
    list, and for values that are no numbers.
    """
    first, last = span or (0, len(tokens))
    _refuse_bad_tokens(where, tokens, vocab_size)
    positions = np.arange(len(ids)) + offset
    inside = (positions > first) & (positions < last)
    if wanted is not None:
        inside[inside] = wanted[positions[inside]]
    ids, values = in_order(ids, values)
    lists = np.flatnonzero(inside & (ids >= 0).any(axis=1))
    record = ForeignRecord(
        where=where,
        sample_id=sample_id,
        input_ids=tokens[first:last].astype(np.int32),
        positions=positions[lists] - first,
        lists=lists,
        token_ids=ids[lists],
        values=values[lists],
        actual=None if actual is None else actual[lists],
        floored=None if floored is None else floored[lists],
        log_tail=None if log_tail is None else log_tail[lists],
        rounding=rounding,
    )
    _refuse_bad_entries(record, vocab_size)
    return record


def in_order(
    ids: NDArray[np.int64], values: NDArray[np.float64]
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """[n, W] in descending value, padding last."""
    if (values[:, 1:] <= values[:, :-1]).all():
        return ids, values
    order = np.argsort(-values, axis=1, kind="stable")
    return np.take_along_axis(ids, order, 1), np.take_along_axis(values, order, 1)


def matrix(
    where: str, starts: NDArray[np.int64], ids: NDArray[np.int64], values: NDArray[np.float64]
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """[n, W] ids and values of lists that lie one after the other; -1 and -inf fill them up.

    Raises ForeignError for more places than a record may have: one long list makes all as long.
    """
    lengths = np.diff(starts)
    shape = (len(lengths), int(lengths.max(initial=1)))
    if shape[1] > MAX_SLOTS or shape[0] * shape[1] > MAX_CELLS:
        raise ForeignError(
            f"{where}: {shape[0]} lists of up to {shape[1]} entries: expected at most {MAX_SLOTS} "
            f"in one, and {MAX_CELLS} places in all"
        )
    rows = np.repeat(np.arange(len(lengths)), lengths)
    slots = np.arange(len(ids)) - np.repeat(starts[:-1], lengths)
    matrix_ids, matrix_values = np.full(shape, -1, np.int64), np.full(shape, -np.inf)
    matrix_ids[rows, slots], matrix_values[rows, slots] = ids, values
    return matrix_ids, matrix_values


def rows_of(
    where: str, lists: Sequence[Sequence[tuple[Any, Any]] | None]
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """[n, W] ids and values of lists of (id, value); None is a token without a list.

    Raises ForeignError, naming the list, for what is no pair of an id and a number.
    """
    ids: list[int] = []
    values: list[float] = []
    starts = [0]
    for place, entries in enumerate(lists):
        for token, value in entries or ():
            try:
                id_ = int(token)
                if not 0 <= id_ < LARGEST or isinstance(token, bool | float):
                    raise ValueError(f"{token!r} is no token id")
                if isinstance(value, bool) or not isinstance(value, int | float):
                    raise ValueError(f"{value!r} is not a number: score this record again")
            except (TypeError, ValueError) as error:
                raise ForeignError(f"{where}, list {place}: {error}") from error
            ids.append(id_)
            values.append(float(value))
        starts.append(len(ids))
    known = np.array(values, np.float64)
    used = np.where(known <= PADDING, -1, np.array(ids, np.int64))
    return matrix(where, np.array(starts), used, np.where(known <= PADDING, -np.inf, known))


def expected_id(vocab_size: int) -> str:
    """What a token id must be, for messages."""
    return f"expected 0 to {vocab_size - 1}: give the dump's own tokenizer or --vocab-size"


def _refuse_bad_tokens(where: str, tokens: NDArray[np.int64], vocab_size: int) -> None:
    if len(tokens) and not (tokens.min() >= 0 and tokens.max() < vocab_size):
        worst = tokens.max() if tokens.max() >= vocab_size else tokens.min()
        raise ForeignError(f"{where}: input_ids has {worst}, {expected_id(vocab_size)}")


def _refuse_bad_entries(record: ForeignRecord, vocab_size: int) -> None:
    def refuse(bad: NDArray[np.bool_], values: NDArray, what: str) -> None:
        if bad.any():
            target, slot = np.argwhere(bad)[0]
            raise ForeignError(f"{record.place(target)}: {values[target, slot]} {what}")

    ids, used = record.token_ids, record.token_ids >= 0
    refuse(np.isnan(record.values), record.values, "is not a number: score this record again")
    refuse(np.isposinf(record.values), record.values, "is not a log prob: score this record again")
    bad = (ids >= vocab_size) | (~used & np.isfinite(record.values))
    refuse(bad, ids, f"is not a token id, {expected_id(vocab_size)}")
    ordered = np.sort(ids, axis=1)
    twice = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)
    refuse(twice, ordered[:, 1:], "stands twice among the token ids: expected distinct ids")
