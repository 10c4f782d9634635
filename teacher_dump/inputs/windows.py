"""Documents to windows of at most so many tokens: cut, split, or packed.

A later window of a document begins with the document's head again (the bos that the tokenizer puts
first), as no target: teachers are trained with it, and without it many (Gemma, Llama) say something
else altogether.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from decant.teacher_dump.inputs.counts import SequenceCounts
from decant.teacher_dump.inputs.records import Ids, Mask, Record, SourceError

Document = tuple[Record, Ids, Mask]
Logprobs = npt.NDArray[np.float32]
Window = tuple[str, Ids, Mask, str, Logprobs | None]
"""Sample id, tokens, targets, the whole conversation that they are of, or "", and the sampler's log
prob of each token, if known."""
HeadOf = Callable[[Ids], list[int]]
"""What a document begins with and every later window of it shall, too; may be nothing."""


def cut(
    documents: Iterator[Document],
    counts: SequenceCounts,
    *,
    max_length: int,
    overlong: str,
    head_of: HeadOf,
) -> Iterator[Window]:
    """Yield each document as one window, or cut to windows as `overlong` says."""
    for record, ids, mask in documents:
        if len(ids) > max_length and overlong == "error":
            raise SourceError(
                f"{record.where}: sample {record.sample_id!r} has {len(ids)} tokens: expected at"
                f" most max_length={max_length}; raise it, or set overlong to truncate or split"
            )
        pieces = [Piece(ids, mask, record.sampler_logprobs, 0)]
        names = [record.sample_id]
        if len(ids) > max_length and overlong == "truncate":
            counts.truncated_records += 1
            counts.dropped_tokens += len(ids) - max_length
            pieces = [_part(record, ids, mask, slice(0, max_length))]
        elif len(ids) > max_length:
            counts.split_records += 1
            pieces = list(_pieces(record, ids, mask, max_length, head_of(ids)))
            names = [f"{record.sample_id}#{n + 1}" for n in range(len(pieces))]
        kept = 0
        for name, (piece, targets, sampler, repeated) in zip(names, pieces, strict=True):
            is_target = targets.copy()
            is_target[0] = False
            if is_target.any():
                kept += 1
                counts.repeated_tokens += repeated
                yield name, piece, is_target, record.messages, sampler
            else:
                counts.dropped_tokens += len(piece) - repeated
        if kept:
            counts.windows_without_targets += len(pieces) - kept
        else:
            counts.records_without_targets += 1


def packed(
    documents: Iterator[Document], counts: SequenceCounts, *, max_length: int, head_of: HeadOf
) -> Iterator[Window]:
    """Yield windows of exactly max_length over the joined documents; the last may be shorter.

    A window is called "<id of the document it starts in>#<number of the window>".
    """
    pieces: list[Ids] = []
    first, filled, repeated, number, last = "", 0, 0, 0, -1
    for record, document, _ in documents:
        head = head_of(document)
        place = int(document[0] == last)  # eos is bos: one between texts
        last = document[-1]
        while place < len(document):
            if not pieces:
                first = record.sample_id
                again = _again(record, head, place, max_length)
                repeated = filled = len(again)
                pieces = [again]
            piece = document[place : place + max_length - filled]
            pieces.append(piece)
            place += len(piece)
            filled += len(piece)
            if filled == max_length:
                number += 1
                counts.repeated_tokens += repeated
                yield (
                    f"{first}#{number}",
                    np.concatenate(pieces),
                    _after(repeated, filled),
                    "",
                    None,
                )
                pieces, filled, repeated = [], 0, 0
    if filled == 1:
        counts.dropped_tokens += 1
    elif filled:
        counts.repeated_tokens += repeated
        yield f"{first}#{number + 1}", np.concatenate(pieces), _after(repeated, filled), "", None


class Piece(NamedTuple):
    """A window of one document."""

    ids: Ids
    mask: Mask
    sampler: Logprobs | None
    repeated: int
    """How many of its first tokens are the document's head again."""


def _part(record: Record, ids: Ids, mask: Mask, span: slice, again: Ids | None = None) -> Piece:
    """A run of a document's tokens, behind what is repeated of its head."""
    if again is None:
        again = np.zeros(0, np.int64)
    sampler = record.sampler_logprobs
    if sampler is not None:
        sampler = np.concatenate([np.zeros(len(again), np.float32), sampler[span]])
    return Piece(
        np.concatenate([again, ids[span]]),
        np.concatenate([np.zeros(len(again), dtype=bool), mask[span]]),
        sampler,
        len(again),
    )


def _pieces(
    record: Record, ids: Ids, mask: Mask, max_length: int, head: list[int]
) -> Iterator[Piece]:
    """The windows of one document."""
    place = 0
    while place < len(ids):
        again = _again(record, head, place, max_length)
        stop = place + max_length - len(again)
        yield _part(record, ids, mask, slice(place, stop), again)
        place = stop


def _again(record: Record, head: list[int], place: int, max_length: int) -> Ids:
    """What a window that starts at this place of its document repeats of the head before it."""
    again = np.array(head[:place], dtype=np.int64)
    if len(again) >= max_length:
        raise SourceError(
            f"{record.where}: windows of max_length={max_length} have no room behind the"
            f" {len(again)} tokens that each begins with: raise it, or set window_head: none"
        )
    return again


def _after(repeated: int, length: int) -> Mask:
    """Targets: all but the first token, and but the head that is repeated."""
    return np.arange(length) >= max(1, repeated)
