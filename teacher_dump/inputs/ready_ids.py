"""Records that are tokenised already: their ids, and which of them are targets.

Owns the masks that other trainers write beside `input_ids`, and what contradicts itself. A mask
that is not understood is refused: to ignore one would make targets of what is none.
"""

import re
from typing import Any

import numpy as np

from decant.teacher_dump.inputs.kinds import TARGET_MASKS
from decant.teacher_dump.inputs.records import Ids, Mask, Record, SourceError

IGNORED = -100
"""The label of what is not a target."""
MASK_LIKE = re.compile("mask|label|weight", re.IGNORECASE)
HARMLESS = frozenset({"special_tokens_mask"})
"""Called a mask, but says nothing of targets: the tokenizer's remark on its own tokens."""
INTERSECTING = frozenset({"completion_mask", "assistant_masks", "assistant_mask"})
"""Masks that each take away: what is a target in both the completion and the assistant's words."""


def ready_ids(record: Record, tokenizer: Any | None) -> tuple[Ids, Mask]:
    """Ids without padding, and which of them are targets.

    `attention_mask` says what is padding, which is left out; `labels` are the ids themselves, or
    -100 for what is not a target; masks have a 1 for each target. Raises SourceError if they
    contradict one another, or if the record has a mask of another name.
    """
    ids = integers(record, "input_ids")
    _refuse_unknown_masks(record, len(ids))
    masks = {name: _mask(record, name, len(ids)) for name in TARGET_MASKS if _has(record, name)}
    if _has(record, "labels"):
        masks["labels"] = _labelled(record, ids)
    attended = _attended(record, len(ids))
    _refuse_packed(record, attended)
    is_target = _agreed(record, {name: mask[attended] for name, mask in masks.items()})
    ids = ids[attended]
    if not _has(record, "attention_mask"):
        _refuse_padding(record, ids, is_target, tokenizer)
    return ids, np.ones(len(ids), dtype=bool) if is_target is None else is_target


def integers(record: Record, name: str) -> Ids:
    """A field that is a list of integers. Raises SourceError if it is not."""
    try:
        array = np.array(record.fields[name])
    except ValueError:  # rows of unequal length
        array = np.empty((0, 0))
    if array.ndim != 1 or (len(array) and array.dtype.kind not in "iub"):
        raise SourceError(
            f"{record.where}: {name} is {record.fields[name]!r:.60}: expected a list of integers"
        )
    return array.astype(np.int64)


def _has(record: Record, name: str) -> bool:
    return record.fields.get(name) is not None


def _mask(record: Record, name: str, length: int) -> Mask:
    try:
        values = np.array(record.fields[name])
        mask = values.astype(np.float64)
    except (ValueError, TypeError):
        mask = values = np.empty((0, 0))
    if mask.shape != (length,) or not np.isin(mask, (0, 1)).all():
        shown = sorted(set(mask.ravel().tolist()))[:5]
        raise SourceError(
            f"{record.where}: {name} has {mask.size} values, {shown}:"
            f" expected one 0 or 1 for each of the {length} input_ids"
        )
    return mask.astype(bool)


def _labelled(record: Record, ids: Ids) -> Mask:
    labels = integers(record, "labels")
    if len(labels) != len(ids):
        raise SourceError(
            f"{record.where}: labels has {len(labels)} values: expected one for each of the"
            f" {len(ids)} input_ids"
        )
    is_target = labels != IGNORED
    wrong = np.flatnonzero(is_target & (labels != ids))
    if not len(wrong):
        return is_target
    what = f"labels has {labels[wrong[0]]} at position {wrong[0]}, input_ids {ids[wrong[0]]}"
    for shift, words in ((1, "next"), (-1, "previous")):
        inside = slice(None, -1) if shift > 0 else slice(1, None)
        shifted = (labels == np.roll(ids, -shift))[inside][is_target[inside]]
        if len(shifted) and shifted.all():
            raise SourceError(
                f"{record.where}: labels are shifted by one: each is the id of the {words} position"
                f" ({what}); give each token its own label"
            )
    raise SourceError(
        f"{record.where}: {what}: expected each label to be the id itself, or {IGNORED} where it is"
        " no target"
    )


def _attended(record: Record, length: int) -> slice:
    """What is not padding, which comes before and after it."""
    if not _has(record, "attention_mask"):
        return slice(0, length)
    values = integers(record, "attention_mask")
    if len(values) != length or not np.isin(values, (0, 1)).all():
        raise SourceError(
            f"{record.where}: attention_mask has {len(values)} values, {np.unique(values)[:5]}:"
            f" expected one 0 or 1 for each of the {length} input_ids; give packed samples as"
            " records of their own"
        )
    (at,) = np.nonzero(values)
    if not len(at):
        return slice(0, 0)
    if at[-1] - at[0] + 1 != len(at):
        raise SourceError(
            f"{record.where}: attention_mask has zeros between ones: expected padding before and"
            " after the tokens alone; give packed samples as records of their own"
        )
    return slice(int(at[0]), int(at[-1]) + 1)


def _refuse_packed(record: Record, attended: slice) -> None:
    """Raise SourceError if positions begin again: the teacher would read across samples."""
    if not _has(record, "position_ids"):
        return
    positions = integers(record, "position_ids")[attended]
    if not np.array_equal(positions, np.arange(attended.stop - attended.start)):
        raise SourceError(
            f"{record.where}: position_ids do not count from 0 up by one: several samples in one"
            " record are read as one text; give each as a record of its own, or drop position_ids"
        )


def _agreed(record: Record, masks: dict[str, Mask]) -> Mask | None:
    """What all masks say; None without any. The first token is never a target, so it may differ."""
    if not masks:
        return None
    parts = {name: mask for name, mask in masks.items() if name in INTERSECTING}
    if len(parts) > 1:
        both = np.logical_and.reduce(list(parts.values()))
        if any(mask[1:].any() for mask in parts.values()) and not both[1:].any():
            raise SourceError(_contradiction(record, parts))
        masks = {name: both if name in parts else mask for name, mask in masks.items()}
    first, *others = masks.values()
    if any(not np.array_equal(mask[1:], first[1:]) for mask in others):
        raise SourceError(_contradiction(record, masks))
    return first


def _contradiction(record: Record, masks: dict[str, Mask]) -> str:
    targets = ", ".join(f"{name} {int(mask[1:].sum())}" for name, mask in masks.items())
    return (
        f"{record.where}: the masks contradict one another about which tokens are targets"
        f" (they have {targets}): drop those that do not count"
    )


def _refuse_unknown_masks(record: Record, length: int) -> None:
    known = {*TARGET_MASKS, *HARMLESS, "labels", "attention_mask"}
    for name, value in record.fields.items():
        if name in known or not MASK_LIKE.search(name):
            continue
        if isinstance(value, list | tuple | np.ndarray) and len(value) == length:
            raise SourceError(
                f"{record.where}: {name} looks like a mask of the {length} input_ids, but is none"
                f" that is read ({', '.join(TARGET_MASKS)}, labels, attention_mask): rename it by"
                f" source.fields, such as {{loss_mask: {name}}}, or leave it out"
                f" ({{{name}: ''}})"
            )


def _refuse_padding(
    record: Record, ids: Ids, is_target: Mask | None, tokenizer: Any | None
) -> None:
    """Raise SourceError for padding that nothing marks, where the tokenizer has a token for it."""
    pad = getattr(tokenizer, "pad_token_id", None)
    others = (getattr(tokenizer, f"{name}_token_id", None) for name in ("bos", "eos", "unk"))
    if pad is None or pad in others or len(ids) < 2:
        return
    read_first = ids[0] == pad
    learnt_last = ids[-1] == pad and (is_target is None or is_target[-1])
    if read_first or learnt_last:
        raise SourceError(
            f"{record.where}: input_ids {'begin' if read_first else 'end'} with the padding token"
            f" {pad}, which would be {'read' if read_first else 'learnt'} as text: give"
            " attention_mask, or cut the padding off"
        )
