"""axolotl's columns: as collected for its KD plug-in, and as prepared for training; in and out.

A prepared list j is about token j + 1, and renormalised over its entries. Of collected lists the
last is about the last token.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from decant.schemas import ScoredSequence
from decant.storage.exchange.columns import Lists, Row, entries, plain, read_rows
from decant.storage.exchange.config import ImportConfig
from decant.storage.exchange.foreign import IGNORED_LABEL, ForeignError, ForeignRecord
from decant.storage.exchange.peers import Peer, ragged

IDS, LOGPROBS, MASK = "target_token_ids", "target_logprobs", "target_mask"
FORMAT = "axolotl"


def read(config: ImportConfig, vocab_size: int) -> Iterator[ForeignRecord]:
    """All records of a source in order, one batch of rows in memory. Raises ForeignError."""
    for number, row in enumerate(read_rows(config.path)):
        prepared = LOGPROBS in row.names
        column = LOGPROBS if prepared else config.logprobs_field
        if prepared:
            row.require(FORMAT, IDS, "input_ids")
            lists = plain(row, IDS, LOGPROBS, MASK if MASK in row.names else None)
        else:
            row.require(FORMAT, column, "input_ids")
            lists = plain(row, IDS, column) if IDS in row.names else _objects(row, column)
        yield from row.records(
            number, lists, vocab_size, config.shift, column=column, from_end=not prepared
        )


def _objects(row: Row, name: str) -> Lists:
    """Ids and values of entries {"logprob": -0.1, "token": "token_id:42"}."""
    starts, flat = row.lists(name)
    if not len(flat):
        ids, values = pa.array([], pa.int64()), pa.array([], pa.float64())
        return entries(row, name, ids, name, values, starts)
    try:
        tokens = pc.struct_field(flat, "token")
        ids = pc.replace_substring_regex(tokens, "^token_id:", "").cast(pa.int64())
        values = pc.struct_field(flat, "logprob")
    except (pa.ArrowException, KeyError) as error:
        raise ForeignError(
            f"{row.where}: {name} holds {flat.type}: expected numbers beside a column "
            f'target_token_ids, or objects of "logprob" and "token": "token_id:N" ({error})'
        ) from error
    return entries(row, name, ids, name, values, starts)


def table(peer: Peer, sequences: Sequence[ScoredSequence]) -> pa.Table:
    """Rows that its KD plug-in trains from: list j is about token j + 1, as its loss compares them.

    Tokens without a distribution have an empty list before them, and the label -100; its collator
    fills lists up and masks what it fills.
    """
    lengths = np.array([len(s.input_ids) for s in sequences], np.int64)
    entries, ids, values, labels = [], [], [], []
    for s in sequences:
        used = s.token_ids >= 0
        here = np.zeros(len(s.input_ids), np.int64)
        here[s.positions - 1] = used.sum(axis=1)
        entries.append(here)
        ids.append(s.token_ids[used])
        values.append(peer.values(s)[used])
        labels.append(np.where(s.is_target, s.input_ids, IGNORED_LABEL))
    tokens, flat = np.concatenate([s.input_ids for s in sequences]), np.concatenate(values)

    def per_token(items: pa.Array) -> pa.ListArray:
        return ragged(lengths, items)

    def per_entry(items: pa.Array) -> pa.ListArray:
        return per_token(ragged(np.concatenate(entries), items))

    return pa.table(
        {
            "input_ids": per_token(pa.array(tokens)),
            "attention_mask": per_token(pa.array(np.ones(len(tokens), np.int8))),
            "labels": per_token(pa.array(np.concatenate(labels).astype(np.int32))),
            IDS: per_entry(pa.array(np.concatenate(ids))),
            LOGPROBS: per_entry(pa.array(flat)),
            MASK: per_entry(pa.array(np.ones(len(flat), np.int8))),
        }
    )
