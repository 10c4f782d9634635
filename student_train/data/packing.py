"""How the sequences of a step lie in its microbatches: padded, several to a row, or in one row.

A packed batch has no attention mask: position ids that start again at 0 tell transformers where a
sequence begins, from which it builds block-diagonal masks, or flash attention's sequence bounds.
Whether a student keeps to that is found by asking it, not by its name. Knows nothing about order
across steps: the same sequences go into a step whatever `packing` is.

Shapes: B sequences, R rows, L length of a row, N targets.
"""

import dataclasses
import logging
from typing import Any

import torch
from torch import Tensor

from decant.student_train.data.batch import Batch, PackedTargets

log = logging.getLogger(__name__)

BY_POSITION = ("input_ids", "attention_mask")
"""Tensors of a padded batch whose second axis are positions."""


def arrange(microbatches: list[Batch], packing: str) -> list[Batch]:
    """The sequences of padded microbatches in as many of the same sizes, laid out anew.

    "none": alike lengths come together, the longest first, so that little is padded. "rows" and
    "padding_free": every microbatch gets its share of long and short ones, then is packed.
    """
    if len(microbatches) > 1 and _alike(microbatches):
        lengths = torch.cat([lengths_of(batch) for batch in microbatches])
        order = lengths.argsort(descending=True, stable=True).tolist()
        microbatches = [
            _select(microbatches, picks)
            for picks in _deal(order, [len(b.sample_ids) for b in microbatches], packing == "none")
        ]
    return microbatches if packing == "none" else [pack(b, packing) for b in microbatches]


def pack(batch: Batch, packing: str) -> Batch:
    """A padded batch with several sequences to a row.

    "rows" have the length of the longest sequence, so that attention costs no more than padded;
    "padding_free" is one row without padding, for flash attention.
    """
    lengths = lengths_of(batch).tolist()
    rows = [list(range(len(lengths)))]
    if packing == "rows":
        rows = first_fit(lengths, max(lengths))
    num_columns = max(sum(lengths[i] for i in row) for row in rows)
    input_ids = batch.input_ids.new_zeros(len(rows), num_columns)
    position_ids = input_ids.new_zeros(len(rows), num_columns)
    counts = torch.arange(num_columns)
    starts = [0] * len(lengths)
    for r, row in enumerate(rows):
        at = 0
        for i in row:
            end = at + lengths[i]
            input_ids[r, at:end] = batch.input_ids[i, : lengths[i]]
            position_ids[r, at:end] = counts[: lengths[i]]
            starts[i] = r * num_columns + at
            at = end
        position_ids[r, at:] = counts[: num_columns - at]  # padding is a sequence of its own
    padded_columns = batch.input_ids.shape[1]
    owner = batch.predictors // padded_columns
    predictors = torch.tensor(starts)[owner] + batch.predictors % padded_columns
    return dataclasses.replace(
        batch,
        input_ids=input_ids,
        attention_mask=None,
        position_ids=position_ids,
        predictors=predictors,
    )


def first_fit(lengths: list[int], capacity: int) -> list[list[int]]:
    """Indices in rows of at most `capacity`, the longest first, each into the first with room."""
    rows: list[list[int]] = []
    room: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        row = next((r for r, free in enumerate(room) if free >= lengths[i]), len(rows))
        if row == len(rows):
            rows.append([])
            room.append(capacity)
        rows[row].append(i)
        room[row] -= lengths[i]
    return rows


def lengths_of(batch: Batch) -> Tensor:
    """[B] tokens of each sequence of a padded batch."""
    assert batch.attention_mask is not None
    return batch.attention_mask.sum(1)


def _deal(order: list[int], sizes: list[int], in_runs: bool) -> list[list[int]]:
    """Deal an order out to groups of these sizes: in runs, or forth and back for equal sums."""
    if in_runs:
        ends = torch.tensor(sizes).cumsum(0).tolist()
        return [order[end - size : end] for size, end in zip(sizes, ends, strict=True)]
    groups: list[list[int]] = [[] for _ in sizes]
    turns = list(range(len(sizes)))
    while order:
        for group in turns:
            if order and len(groups[group]) < sizes[group]:
                groups[group].append(order[0])
                order = order[1:]
        turns.reverse()
    return groups


def _alike(batches: list[Batch]) -> bool:
    """Whether sequences may change places: all that is not a tensor or a list is the same."""

    def form(value: Any) -> list[Any]:
        said: list[Any] = []
        for field in dataclasses.fields(value):
            item = getattr(value, field.name)
            if isinstance(item, Tensor):
                said.append((item.dtype, None if field.name in BY_POSITION else item.shape[1:]))
            elif isinstance(item, PackedTargets):
                said.append(form(item))
            elif not isinstance(item, list):
                said.append(item)
        return said

    return all(form(batch) == form(batches[0]) for batch in batches)


def _select(batches: list[Batch], picks: list[int]) -> Batch:
    """A padded batch of these sequences, counted through all `batches`.

    Tensors other than those by position have a row per target; lists an entry per sequence.
    """
    places = [(b, i) for b, batch in enumerate(batches) for i in range(len(batch.sample_ids))]
    chosen = [places[pick] for pick in picks]
    bounds = [_target_bounds(batch) for batch in batches]
    length = max(int(lengths_of(batches[b])[i]) for b, i in chosen)

    def rows(name: str) -> Tensor:
        padded = torch.zeros(len(chosen), length, dtype=torch.int64)
        for row, (b, i) in enumerate(chosen):
            values = getattr(batches[b], name)[i, :length]
            padded[row, : len(values)] = values
        return padded

    def gathered(values: list[Any]) -> Any:
        changed: dict[str, Any] = {}
        for field in dataclasses.fields(values[0]):
            items = [getattr(value, field.name) for value in values]
            if isinstance(items[0], Tensor):
                if field.name in BY_POSITION:
                    changed[field.name] = rows(field.name)
                    continue
                parts = [items[b][bounds[b][i] : bounds[b][i + 1]] for b, i in chosen]
                if field.name == "predictors":
                    parts = [
                        part % batches[b].input_ids.shape[1] + row * length
                        for row, (part, (b, _)) in enumerate(zip(parts, chosen, strict=True))
                    ]
                changed[field.name] = torch.cat(parts)
            elif isinstance(items[0], PackedTargets):
                changed[field.name] = gathered(items)
            elif isinstance(items[0], list):
                changed[field.name] = [items[b][i] for b, i in chosen]
        return dataclasses.replace(values[0], **changed)

    return gathered(batches)


def _target_bounds(batch: Batch) -> list[int]:
    """[B + 1] where the targets of each sequence begin."""
    owner = batch.predictors // batch.input_ids.shape[1]
    counts = torch.bincount(owner, minlength=len(batch.sample_ids))
    return [0, *counts.cumsum(0).tolist()]
