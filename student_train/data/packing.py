"""How the sequences of a step are laid out: padded, several to a row, or all in one row.

Decided from lengths alone, before anything is copied. Where several sequences share a row, position
ids that start again at 0 tell transformers where one begins, from which it builds block-diagonal
masks, or flash attention's sequence bounds. Whether a student keeps to that is found by asking it
(`model/probes.py`), not by its name. Knows nothing about order across steps: the same sequences go
into a step whatever `packing` is.
"""

from collections.abc import Sequence


def deal(lengths: Sequence[int], num_microbatches: int, packing: str) -> list[list[int]]:
    """Which sequences of a step go into each of its microbatches, all of one size.

    With several microbatches, "none" puts alike lengths together, the longest first, so that little
    is padded; "rows" and "padding_free" give every microbatch its share of long and short ones.
    """
    if num_microbatches == 1:
        return [list(range(len(lengths)))]
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    size = len(order) // num_microbatches
    if packing == "none":
        return [order[start : start + size] for start in range(0, len(order), size)]
    rounds = [
        order[start : start + num_microbatches] for start in range(0, len(order), num_microbatches)
    ]
    forth_and_back = [one if i % 2 == 0 else one[::-1] for i, one in enumerate(rounds)]
    return [list(group) for group in zip(*forth_and_back, strict=True)]


def rows_of(lengths: Sequence[int], packing: str) -> list[list[int]]:
    """Which sequences of a microbatch lie in each of its rows, one after the other.

    "rows" are as long as the longest sequence, so that attention costs no more than padded;
    "padding_free" is one row without padding, for flash attention.
    """
    if packing == "none":
        return [[i] for i in range(len(lengths))]
    if packing == "rows":
        return first_fit(lengths, max(lengths))
    return [list(range(len(lengths)))]


def first_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
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
