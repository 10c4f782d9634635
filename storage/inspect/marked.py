"""A token sequence as text in which its targets stand between marks. Knows no cache."""

import itertools
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from decant.storage.cli.terminal import escaped_lines
from decant.storage.inspect.token_bytes import BROKEN

BEGIN, END = "⟦", "⟧"
"""Around each stretch of targets."""
CONTEXT = 8
"""Ids in front of a stretch after which it is decoded: decoders treat a beginning otherwise."""

Decode = Callable[[list[int]], str]
"""The text of ids, special tokens included."""


def stretches(
    ids: Sequence[int] | npt.NDArray[np.integer], is_target: npt.NDArray[np.bool_], decode: Decode
) -> list[tuple[str, bool]]:
    """The text of each stretch of tokens that are all targets, or all none; joined, all the text.

    A character whose bytes lie in two stretches stands in the second.
    """
    ids = [int(i) for i in ids]
    if not ids:
        return []
    changes = np.flatnonzero(np.diff(is_target.astype(np.int8))) + 1
    borders = [0, *changes.tolist(), len(ids)]
    found = []
    for start, stop in itertools.pairwise(borders):
        before = decode(ids[max(0, start - CONTEXT) : start]) if start else ""
        through = decode(ids[max(0, start - CONTEXT) : stop])
        before = before if through.startswith(before) else before.rstrip(BROKEN)
        text = through[len(before) :] if through.startswith(before) else decode(ids[start:stop])
        if stop < len(ids):
            text = text.rstrip(BROKEN)
        found.append((text, bool(is_target[start])))
    return found


def marked(
    ids: Sequence[int] | npt.NDArray[np.integer],
    is_target: npt.NDArray[np.bool_],
    decode: Decode,
    *,
    characters: int = 1200,
) -> str:
    """The text with each stretch of targets between `BEGIN` and `END`; long ones lose their middle.

    Of more than about `characters`, the end is left out. Line breaks stay; what else a terminal
    would obey is escaped.
    """
    parts: list[str] = []
    left = characters
    for text, targets in stretches(ids, is_target, decode):
        if left <= 0:
            parts.append(" …")
            break
        text = _shortened(text, characters // 3)
        left -= len(text)
        shown = escaped_lines(text)
        parts.append(f"{BEGIN}{shown}{END}" if targets else shown)
    return "".join(parts)


def _shortened(text: str, characters: int) -> str:
    if len(text) <= characters:
        return text
    half = characters // 2
    return f"{text[:half]} … {text[-half:]}"
