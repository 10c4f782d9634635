"""A cache as plain lists: a row per sequence for trainers, or a row per target for SQL.

Values are what the reader gives, log probs decoded to float32. Unused slots are left out, so a list
of K entries is as long as what the target keeps.
"""

from collections.abc import Iterator

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from decant.schemas import Layout
from decant.schemas.arrow import SAMPLER_COLUMN, scalar_columns, temperature_columns
from decant.schemas.distributions import FIELDS, SLOTS
from decant.storage.cache.rows import Rows


def sequences(rows: Rows, layout: Layout) -> pa.Table:
    """A row per sequence; n targets each: lists of L tokens, of n targets, of n lists."""

    def per_token(values: NDArray) -> pa.Array:
        return _lists(rows.row_starts, pa.array(values))

    def per_target(values: pa.Array) -> pa.Array:
        return _lists(rows.target_starts, values)

    return pa.table(
        {
            "sequence": rows.sequence,
            "sample_id": pa.array(rows.sample_ids, pa.string()),
            "input_ids": per_token(rows.input_ids),
            "is_target": per_token(rows.is_target),
            "positions": per_target(pa.array(rows.positions)),
            **{name: per_target(values) for name, values in _distributions(rows, layout)},
            **_messages(rows),
        }
    )


def _messages(rows: Rows) -> dict[str, pa.Array]:
    """A column of conversations, null where there is none, in caches that keep them."""
    if rows.messages is None:
        return {}
    return {"messages": pa.array([text or None for text in rows.messages], pa.string())}


def targets(rows: Rows, layout: Layout) -> pa.Table:
    """A row per target: what SQL takes."""
    counts = np.diff(rows.target_starts)
    sample = np.repeat(np.arange(len(rows), dtype=np.int32), counts)
    return pa.table(
        {
            "sequence": np.repeat(rows.sequence, counts),
            "sample_id": pa.array(rows.sample_ids, pa.string()).take(pa.array(sample)),
            "position": rows.positions,
            "label": rows.labels,
            **dict(_distributions(rows, layout)),
        }
    )


def _distributions(rows: Rows, layout: Layout) -> Iterator[tuple[str, pa.Array]]:
    """Columns of n rows: lists of the entries in use, and the scalars of every temperature."""
    used = rows.token_ids >= 0
    starts = np.concatenate([[0], np.cumsum(used.sum(axis=1))])
    for name, values in rows.known().items():
        if FIELDS[name].axis == SLOTS and layout.slots:
            yield name, _lists(starts, pa.array(values[used]))
    for name, i, column in temperature_columns(layout):
        yield column, pa.array(getattr(rows, name)[:, i])
    for name in scalar_columns(layout):
        yield name, pa.array(getattr(rows, name))
    if rows.sampler_logprobs is not None:
        yield SAMPLER_COLUMN, pa.array(rows.sampler_logprobs)


def _lists(starts: NDArray, values: pa.Array) -> pa.Array:
    return pa.ListArray.from_arrays(pa.array(starts, pa.int32()), values)
