"""DistillKit's rows: plain lists, its compressed ones, and packed documents; in and out.

List j is about token j + 1. Rows of its packer number their documents in `attention_mask`; the last
list of a document is about a token that was cut off, so it has no actual token and is left out.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from decant.schemas import ScoredSequence
from decant.storage.exchange.columns import Lists, Row, plain, read_rows
from decant.storage.exchange.config import ImportConfig
from decant.storage.exchange.distillkit_codec import (
    ROUNDING,
    Codec,
    LegacyCodec,
    read_codec,
    unpack_bits,
)
from decant.storage.exchange.foreign import IGNORED_LABEL, ForeignError, ForeignRecord
from decant.storage.exchange.peers import NO_VALUE, Peer, ragged

PLAIN = ("token_ids", "top_values")
COMPRESSED = ("compressed_logprobs", "bytepacked_indices")
LEGACY = ("packed_indices", "exact_values", "coeffs")


def read(config: ImportConfig, vocab_size: int) -> Iterator[ForeignRecord]:
    """All records of a source in order, one batch of rows in memory. Raises ForeignError."""
    codec = read_codec(config.codec, config.path)
    for number, row in enumerate(read_rows(config.path)):
        rounding = 0.0
        if {COMPRESSED[0], COMPRESSED[1]} & row.names:
            row.require("distillkit", *COMPRESSED, "input_ids")
            lists, rounding = _compressed(row, codec), _rounding(codec)
            column = COMPRESSED[0]
        elif "packed_indices" in row.names:
            row.require("distillkit", *LEGACY, "input_ids")
            lists, rounding = _legacy(row, codec), ROUNDING["float16"]
            column = LEGACY[0]
        else:
            row.require("distillkit", *PLAIN, "input_ids")
            lists, column = plain(row, *PLAIN), PLAIN[1]
        yield from row.records(
            number, lists, vocab_size, config.shift, column=column, rounding=rounding
        )


def _compressed(row: Row, codec: Codec | LegacyCodec | None) -> Lists:
    if not isinstance(codec, Codec):
        _refuse_without(row, codec, "logprob_compressor")
    assert isinstance(codec, Codec)
    values, ids = _block(row, COMPRESSED[0]), _block(row, COMPRESSED[1])
    if (values.shape[1], ids.shape[1]) != (codec.value_bytes, codec.id_bytes) and len(values):
        raise ForeignError(
            f"{row.where}: {values.shape[1]} bytes of values and {ids.shape[1]} of ids per token, "
            f"but these codec settings give {codec.value_bytes} and {codec.id_bytes} (k={codec.k}, "
            f"{codec.id_bits} bits per id): give the settings that the rows were made with"
        )
    if len(values) != len(ids):
        raise ForeignError(
            f"{row.where}: {COMPRESSED[1]} has {len(ids)} lists, {COMPRESSED[0]} has {len(values)}"
        )
    return unpack_bits(ids, codec.id_bits, codec.k), codec.values(values)


def _legacy(row: Row, codec: Codec | LegacyCodec | None) -> Lists:
    if not isinstance(codec, LegacyCodec):
        _refuse_without(row, codec, "legacy_logit_compression")
    assert isinstance(codec, LegacyCodec)
    words, exact = _block(row, LEGACY[0], pa.uint64()), _block(row, LEGACY[1], pa.float32())
    coefficients = _block(row, LEGACY[2], pa.float32())
    found = [block.shape for block in (words, exact, coefficients)]
    n = len(words)
    expected = [(n, codec.id_words), (n, codec.exact_k), (n, codec.num_terms)]
    if found != expected and n:
        shown = [", ".join(str(shape) for shape in shapes) for shapes in (found, expected)]
        raise ForeignError(
            f"{row.where}: {', '.join(LEGACY)} are of the shapes {shown[0]}, but these codec "
            f"settings give {shown[1]}: give the settings that the rows were made with"
        )
    return codec.ids(words), codec.values(exact, coefficients)


def _refuse_without(row: Row, codec: object, key: str) -> None:
    other = "; those given are of its other codec" if codec else ""
    raise ForeignError(
        f"{row.where}: these rows are compressed, and nothing in them says how{other}: give "
        "--codec FILE, DistillKit's compression_config.yaml or a training configuration with "
        f"teacher.{key}"
    )


def _rounding(codec: Codec | LegacyCodec | None) -> float:
    return ROUNDING[codec.exact_dtype] if isinstance(codec, Codec) else 0.0


def _block(row: Row, name: str, kind: pa.DataType | None = None) -> NDArray:
    """A column of lists of equal length, as a matrix; of bytes unless told otherwise."""
    starts, flat = row.lists(name)
    lengths = np.diff(starts)
    if len(lengths) and (lengths != lengths[0]).any():
        place = int(np.flatnonzero(lengths != lengths[0])[0])
        raise ForeignError(
            f"{row.where}, list {place}: {name} has {lengths[place]} entries, list 0 has "
            f"{lengths[0]}: expected as many in each"
        )
    try:
        if flat.null_count:
            raise pa.ArrowInvalid("null")
        of_word = kind == pa.uint64() and pa.types.is_signed_integer(flat.type)
        numbers = flat.cast(pa.int64() if of_word else kind or pa.uint8())
    except pa.ArrowException as error:
        raise ForeignError(
            f"{row.where}: {name} holds {flat.type}: expected {kind or pa.uint8()} ({error})"
        ) from error
    values = numbers.to_numpy(zero_copy_only=False)
    values = values.view(np.uint64) if of_word else values
    return values.reshape(len(lengths), -1) if len(lengths) else values.reshape(0, 0)


def table(peer: Peer, sequences: Sequence[ScoredSequence]) -> pa.Table:
    """Rows that it trains from as `prepacked`: all of one length, K entries at every token.

    Its losses mask list j, which is about token j + 1, by labels[j]: that is the token where there
    is such a list, and -100 elsewhere. `is_target` says which tokens the lists are about.
    """
    n, length, slots = len(sequences), peer.longest, peer.slots
    ids = np.tile(np.arange(slots, dtype=np.int32), (n, length, 1))
    values = np.full((n, length, slots), NO_VALUE, np.float32)
    tokens, mask = np.zeros((n, length), np.int32), np.zeros((n, length), np.int8)
    labels, is_target = np.full((n, length), IGNORED_LABEL, np.int32), np.zeros((n, length), bool)
    for i, s in enumerate(sequences):
        tokens[i, : len(s.input_ids)], mask[i, : len(s.input_ids)] = s.input_ids, 1
        at = s.positions - 1
        labels[i, at], is_target[i, s.positions] = s.input_ids[at], True
        used = s.token_ids >= 0
        ids[i, at] = _filled(s.token_ids)
        values[i, at] = np.where(used, peer.values(s), NO_VALUE)

    def lists(array: NDArray) -> pa.Array:
        whole = pa.array(array.reshape(-1))
        for size in reversed(array.shape[1:]):
            whole = ragged(np.full(len(whole) // size, size), whole)
        return whole

    return pa.table(
        {
            "input_ids": lists(tokens),
            "attention_mask": lists(mask),
            "labels": lists(labels),
            "is_target": lists(is_target),
            PLAIN[0]: lists(ids),
            PLAIN[1]: lists(values),
        }
    )


def _filled(token_ids: NDArray[np.int32]) -> NDArray[np.int32]:
    """Ids [n, K] with unused slots taken by the first ids that the target does not keep."""
    filled = token_ids.copy()
    for i in np.flatnonzero((token_ids < 0).any(axis=1)):
        row = filled[i]
        free = np.setdiff1d(np.arange(2 * len(row), dtype=np.int32), row)
        row[row < 0] = free[: (row < 0).sum()]
    return filled
