"""From records to token sequences: which tokens the teacher reads and which of them are targets.

Owns the settings, the order of the steps, and what no sequence may be; what a single record becomes
is `encoding.py`, how the overlong is cut or the short is packed `windows.py`. Knows nothing about
files, models or scores. The tokenizer is passed in.
"""

import array
import dataclasses
import itertools
import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from decant.schemas.selection import num_selected
from decant.teacher_dump.inputs.border import BorderCheck
from decant.teacher_dump.inputs.config import SequenceConfig
from decant.teacher_dump.inputs.counts import SequenceCounts as SequenceCounts
from decant.teacher_dump.inputs.encoding import Encoder
from decant.teacher_dump.inputs.kinds import MESSAGES, Formed, is_empty
from decant.teacher_dump.inputs.messages import read_conversation
from decant.teacher_dump.inputs.records import (
    Ids,
    Mask,
    Record,
    SourceError,
    TokenSequence,
    Unrenderable,
)
from decant.teacher_dump.inputs.windows import Document, HeadOf, cut, packed

log = logging.getLogger(__name__)

BATCH_RECORDS = 256
ALWAYS_UNRENDERABLE = 3
"""So many records may be left out whatever the share."""
HOPELESS = 20
"""If the first so many records are all left out, there is no use in reading on."""


def chat_template_text(config: SequenceConfig) -> str:
    """The template in the file that `chat_template` names, or "". Raises ValueError."""
    if not config.chat_template:
        return ""
    path = Path(config.chat_template).expanduser()
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeError) as error:
        raise ValueError(f"sequences.chat_template {path} cannot be read: {error}") from error


def make_encoder(config: SequenceConfig, tokenizer: Any) -> Encoder:
    """What encodes the records as this configuration says."""
    return Encoder(
        tokenizer,
        targets=config.targets,
        only_texts=config.packing == "concat",
        add_bos=config.add_bos,
        add_eos=config.add_eos,
        chat_template_kwargs=config.chat_template_kwargs,
        chat_date=config.chat_date,
        chat_template=chat_template_text(config),
        accept_rendering=config.accept_rendering,
    )


def iter_sequences(
    records: Iterable[Record],
    tokenizer: Any,
    config: SequenceConfig,
    *,
    vocab_size: int,
    counts: SequenceCounts,
    border: BorderCheck | None = None,
) -> Iterator[TokenSequence]:
    """Yield the sequences of the records, in their order; every one has at least one target.

    `tokenizer` is a transformers tokenizer, or None if all records are input_ids. `counts` is
    updated along the way and final when the iterator ends. `border` looks at the records before
    they are cut. Raises SourceError.
    """
    encode = make_encoder(config, tokenizer)
    found: Iterator[Formed] = map(encode.form, records)
    if config.empty == "drop":
        found = _without_empty(found, counts)
    encoded = _encoded(found, encode, config.max_unrenderable, counts)
    if config.keep_messages:
        encoded = ((_with_messages(one), ids, mask) for one, ids, mask in encoded)
    documents = _checked(encoded, vocab_size, config.empty, counts, border)
    distinct = _without_duplicates if config.duplicates == "drop" else _counting_duplicates
    documents = distinct(documents, counts)
    head_of: HeadOf = encode.head if config.window_head == "repeat" else lambda _: []
    if config.packing == "concat":
        windows = packed(documents, counts, max_length=config.max_length, head_of=head_of)
    else:
        windows = cut(
            documents,
            counts,
            max_length=config.max_length,
            overlong=config.overlong,
            head_of=head_of,
        )
    for sample_id, ids, is_target, messages, sampler in windows:
        counts.sequences += 1
        counts.tokens += len(ids)
        candidates = int(is_target.sum())
        kept = num_selected(candidates, config.target_share)
        counts.targets += kept
        counts.unselected_targets += candidates - kept
        said = messages if config.keep_messages else ""
        yield TokenSequence(sample_id, ids.astype(np.int32), is_target, said, sampler)


def _with_messages(found: Formed) -> Formed:
    """The same with what it says, where it is a conversation."""
    if found.form != MESSAGES:
        return found
    said = read_conversation(found.record).kept()
    return dataclasses.replace(
        found, record=dataclasses.replace(found.record, messages=said.to_text())
    )


def _batches(found: Iterable[Formed], size: int) -> Iterator[list[Formed]]:
    iterator = iter(found)
    while batch := list(itertools.islice(iterator, size)):
        yield batch


def _without_empty(found: Iterable[Formed], counts: SequenceCounts) -> Iterator[Formed]:
    for one in found:
        if is_empty(one):
            counts.records += 1
            counts.empty_records += 1
        else:
            yield one


def _encoded(
    found: Iterable[Formed], encode: Encoder, most_unrenderable: float, counts: SequenceCounts
) -> Iterator[tuple[Formed, Ids, Mask]]:
    """Yield what can be encoded; leave out and count what the chat template cannot render.

    Raises SourceError if that is more than the share allows.
    """
    first = ""
    for batch in _batches(found, BATCH_RECORDS):
        for one, result in zip(batch, encode(batch), strict=True):
            if not isinstance(result, Unrenderable):
                yield one, *result
                continue
            if most_unrenderable == 0:
                raise result
            counts.records += 1
            counts.unrenderable_records += 1
            first = first or str(result)
            if counts.unrenderable_records <= ALWAYS_UNRENDERABLE:
                log.warning("left out: %s", result)
            if counts.unrenderable_records == counts.records == HOPELESS:
                raise SourceError(f"none of the first {HOPELESS} records can be used: {first}")
    left_out = counts.unrenderable_records
    if left_out > max(ALWAYS_UNRENDERABLE, most_unrenderable * counts.records):
        raise SourceError(
            f"{left_out} of {counts.records} records cannot be rendered, more than "
            f"max_unrenderable={most_unrenderable:g} of them; the first: {first}"
        )


def _checked(
    encoded: Iterable[tuple[Formed, Ids, Mask]],
    vocab_size: int,
    empty: str,
    counts: SequenceCounts,
    border: BorderCheck | None,
) -> Iterator[Document]:
    for found, ids, mask in encoded:
        record = found.record
        counts.records += 1
        if len(ids) < 2 and empty == "drop":
            counts.empty_records += 1
            counts.dropped_tokens += len(ids)
            continue
        if len(ids) < 2:
            raise SourceError(
                f"{record.where}: sample {record.sample_id!r} has {len(ids)} token(s): expected at"
                " least 2, nothing predicts the first; remove the record, or set empty: drop"
            )
        outside = np.flatnonzero((ids < 0) | (ids >= vocab_size))
        if len(outside):
            raise SourceError(
                f"{record.where}: sample {record.sample_id!r} has token id {ids[outside[0]]} at"
                f" position {outside[0]}: expected ids from 0 to {vocab_size - 1}, which are all"
                " that the teacher has; use the tokenizer that belongs to it, or leave the record"
                " out"
            )
        if border is not None:
            border.look(found, ids, mask)
        yield record, ids, mask


def _counting_duplicates(
    documents: Iterator[Document], counts: SequenceCounts
) -> Iterator[Document]:
    """Count at the end, which takes 8 bytes per record."""
    digests = array.array("Q")
    for record, ids, mask in documents:
        digests.append(_digest(ids, mask))
        yield record, ids, mask
    counts.duplicate_records = len(digests) - len(np.unique(np.frombuffer(digests, np.uint64)))


def _without_duplicates(
    documents: Iterator[Document], counts: SequenceCounts
) -> Iterator[Document]:
    """Leave them out, which takes about 100 bytes per record."""
    seen: set[int] = set()
    for record, ids, mask in documents:
        digest = _digest(ids, mask)
        if digest in seen:
            counts.duplicate_records += 1
            counts.dropped_tokens += len(ids)
            continue
        seen.add(digest)
        yield record, ids, mask


def _digest(ids: Ids, mask: Mask) -> int:
    """64 bits: of 100 million records, two are wrongly taken for equal in one run of 3,700."""
    return xxhash.xxh3_64_intdigest(ids.tobytes() + mask.tobytes())
