"""From records to token sequences: which tokens the teacher reads and which of them are targets.

Owns how the overlong is cut or the short is packed, and what no sequence may be; what a single
record becomes is `encoding.py`. Knows nothing about files, models or scores. The tokenizer is
passed in.
"""

import array
import datetime
import itertools
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import xxhash

from decant.teacher_dump.inputs.encoding import Encoder
from decant.teacher_dump.inputs.records import Ids, Mask, Record, SourceError, TokenSequence

BATCH_RECORDS = 256

Document = tuple[Record, Ids, Mask]


@dataclass(frozen=True, kw_only=True)  # no slots: jsonargparse reads defaults through vars()
class SequenceConfig:
    """How records become token sequences."""

    max_length: int = 1024
    """Longest sequence in tokens, special tokens included."""

    overlong: str = "truncate"
    """Longer records: truncate, split (into windows "id#1", "id#2", ...), or error."""

    empty: str = "error"
    """Records without text, messages, or two tokens: error, or drop."""

    duplicates: str = "keep"
    """Records of the same tokens and targets as an earlier one: keep, or drop; both count them."""

    packing: str = "none"
    """none, or concat: plain texts joined and cut into windows of exactly max_length."""

    targets: str = "response"
    """Scored tokens of messages and prompt + response: response, or all."""

    add_bos: bool = False
    """Start text and prompts with the bos token even if the tokenizer by itself does not."""

    add_eos: bool = True
    """End text and responses with the eos token even if the tokenizer by itself does not."""

    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    """Variables for the chat template, e.g. {enable_thinking: false}."""

    chat_date: str = ""
    """The date (2026-01-31) for chat templates that ask for today's; they are refused without."""

    def __post_init__(self) -> None:
        """Refuse unknown values, and options without effect in this combination."""
        for name, allowed in (
            ("overlong", ("truncate", "split", "error")),
            ("empty", ("error", "drop")),
            ("duplicates", ("keep", "drop")),
            ("packing", ("none", "concat")),
            ("targets", ("response", "all")),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}: expected one of {allowed}")
        if self.max_length < 2:
            raise ValueError(
                f"max_length is {self.max_length}: expected at least 2, nothing predicts the first"
            )
        if self.packing == "concat" and not self.add_eos:
            raise ValueError("packing: concat ends each document with the eos: set add_eos: true")
        if self.packing == "concat" and self.overlong != "truncate":
            raise ValueError(
                f"overlong: {self.overlong} has no effect with packing: concat, which cuts"
                " everywhere; leave it out"
            )
        try:
            json.dumps(self.chat_template_kwargs, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"chat_template_kwargs must hold plain JSON values: {error}; quote dates"
            ) from error
        try:
            datetime.date.fromisoformat(self.chat_date or "2026-01-31")
        except ValueError as error:
            raise ValueError(
                f"chat_date is {self.chat_date!r}: expected a date such as 2026-01-31"
            ) from error


@dataclass(slots=True)
class SequenceCounts:
    """Tally of one pass: `tokens + dropped_tokens` is all that the records held."""

    records: int = 0
    sequences: int = 0
    tokens: int = 0
    targets: int = 0
    empty_records: int = 0
    """Left out, as `empty: drop` says."""
    duplicate_records: int = 0
    """Of the same tokens and targets as an earlier one: kept or left out, as `duplicates` says."""
    truncated_records: int = 0
    split_records: int = 0
    records_without_targets: int = 0
    """Left out whole: after truncation nothing in them is a target."""
    windows_without_targets: int = 0
    """Left out of a split record of which other windows were kept."""
    dropped_tokens: int = 0
    """Cut off, alone in a last window, or of records and windows that were left out."""


def iter_sequences(
    records: Iterable[Record],
    tokenizer: Any,
    config: SequenceConfig,
    *,
    vocab_size: int,
    counts: SequenceCounts,
) -> Iterator[TokenSequence]:
    """Yield the sequences of the records, in their order; every one has at least one target.

    `tokenizer` is a transformers tokenizer, or None if all records are input_ids. `counts` is
    updated along the way and final when the iterator ends.
    """
    encode = Encoder(
        tokenizer,
        targets=config.targets,
        only_texts=config.packing == "concat",
        add_bos=config.add_bos,
        add_eos=config.add_eos,
        chat_template_kwargs=config.chat_template_kwargs,
        chat_date=config.chat_date,
    )
    if config.empty == "drop":
        records = _without_empty(records, counts)
    documents: Iterator[Document] = (
        (record, ids, mask)
        for batch in _batches(records, BATCH_RECORDS)
        for record, (ids, mask) in zip(batch, encode(batch), strict=True)
    )
    documents = _checked(documents, vocab_size, config.empty, counts)
    distinct = _without_duplicates if config.duplicates == "drop" else _counting_duplicates
    documents = distinct(documents, counts)
    windows = _packed if config.packing == "concat" else _cut
    for sample_id, ids, is_target in windows(documents, config, counts):
        counts.sequences += 1
        counts.tokens += len(ids)
        counts.targets += int(is_target.sum())
        yield TokenSequence(sample_id, ids.astype(np.int32), is_target)


def _batches(records: Iterable[Record], size: int) -> Iterator[list[Record]]:
    iterator = iter(records)
    while batch := list(itertools.islice(iterator, size)):
        yield batch


def _without_empty(records: Iterable[Record], counts: SequenceCounts) -> Iterator[Record]:
    """Leave out what has no content at all, which could not even be encoded."""
    for record in records:
        contents = (record.fields.get(name) for name in ("text", "messages", "input_ids"))
        if any(isinstance(c, str | list | np.ndarray) and len(c) == 0 for c in contents):
            counts.records += 1
            counts.empty_records += 1
        else:
            yield record


def _checked(
    documents: Iterator[Document], vocab_size: int, empty: str, counts: SequenceCounts
) -> Iterator[Document]:
    for record, ids, mask in documents:
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
                f" position {outside[0]}: expected ids from 0 to {vocab_size - 1}; use the"
                " tokenizer that belongs to the teacher"
            )
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


def _cut(
    documents: Iterator[Document], config: SequenceConfig, counts: SequenceCounts
) -> Iterator[tuple[str, Ids, Mask]]:
    """Yield each record as one window, or cut to windows as `overlong` says."""
    size = config.max_length
    for record, ids, mask in documents:
        names = [record.sample_id]
        if len(ids) > size and config.overlong == "error":
            raise SourceError(
                f"{record.where}: sample {record.sample_id!r} has {len(ids)} tokens: expected at"
                f" most max_length={size}; raise it, or set overlong to truncate or split"
            )
        if len(ids) > size and config.overlong == "truncate":
            counts.truncated_records += 1
            counts.dropped_tokens += len(ids) - size
            ids, mask = ids[:size], mask[:size]
        elif len(ids) > size:
            counts.split_records += 1
            names = [f"{record.sample_id}#{n + 1}" for n in range(-(-len(ids) // size))]
        kept = 0
        for window, name in enumerate(names):
            piece = ids[window * size : (window + 1) * size]
            is_target = mask[window * size : (window + 1) * size].copy()
            is_target[0] = False
            if is_target.any():
                kept += 1
                yield name, piece, is_target
            else:
                counts.dropped_tokens += len(piece)
        if kept:
            counts.windows_without_targets += len(names) - kept
        else:
            counts.records_without_targets += 1


def _packed(
    documents: Iterator[Document], config: SequenceConfig, counts: SequenceCounts
) -> Iterator[tuple[str, Ids, Mask]]:
    """Yield windows of exactly max_length over the joined documents; the last may be shorter.

    A window is called "<id of the document it starts in>#<number of the window>".
    """
    size = config.max_length
    pieces: list[Ids] = []
    first, filled, number, last = "", 0, 0, -1
    for record, document, _ in documents:
        ids = document[1:] if document[0] == last else document  # eos is bos: one between texts
        last = document[-1]
        while len(ids):
            first = first if pieces else record.sample_id
            piece, ids = ids[: size - filled], ids[size - filled :]
            pieces.append(piece)
            filled += len(piece)
            if filled == size:
                number += 1
                yield f"{first}#{number}", np.concatenate(pieces), np.arange(size) > 0
                pieces, filled = [], 0
    if filled == 1:
        counts.dropped_tokens += 1
    elif filled:
        yield f"{first}#{number + 1}", np.concatenate(pieces), np.arange(filled) > 0
