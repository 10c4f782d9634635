"""Megatron-LM's cached teacher log probs: tars of compressed `torch.save` files.

Each is of one context-parallel and data-parallel rank and a run of iterations. They hold no tokens:
those come from a file of the samples in the order in which Megatron trains on
them. Values of microbatch m of data rank d are of the samples (m D + d) B to (m D + d + 1) B - 1 of
an iteration, for D ranks and B samples in a microbatch; list t is about token t + 1.
"""

import contextlib
import io
import itertools
import json
import os
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import zstandard
from numpy.typing import NDArray

from decant.storage.exchange.bounds import MAX_DESCRIPTION, MAX_UNPACKED, regular
from decant.storage.exchange.columns import Lists, read_rows, table_files
from decant.storage.exchange.config import ImportConfig
from decant.storage.exchange.foreign import (
    IGNORED_LABEL,
    ForeignError,
    ForeignRecord,
    make_record,
)
from decant.storage.exchange.torch_files import Tensor, read_tensors
from decant.storage.files.sealed import MAX_WINDOW

TAR = re.compile(r"cp(\d+)_dp(\d+)__(\d+)\.tar")
MEMBER = re.compile(r"(\d+)\.pt\.zst")
META = "_meta.json"
NO_ENTRY = -1e3
"""The value of places beyond a token's nucleus."""
ROUNDING = {"float16": 2.0**-11, "bfloat16": 2.0**-9, "float32": 0.0}

Sample = tuple[NDArray[np.int64], NDArray[np.bool_] | None]


def source_files(config: ImportConfig) -> list[Path]:
    """The tars of a directory in order, and the tokens. Raises ForeignError if there is none."""
    tars = [tar for of_rank in _ranks(config.path).values() for tar in of_rank]
    folder = Path(os.path.expanduser(config.path))
    tokens = Path(os.path.expanduser(config.tokens))
    if tokens.suffix == ".npy" and not tokens.is_file():
        raise ForeignError(f"{config.tokens}: no such file")
    tars = [regular(tar, folder) for tar in tars]
    return [*tars, *([tokens] if tokens.suffix == ".npy" else table_files(config.tokens))]


def read(config: ImportConfig, vocab_size: int) -> Iterator[ForeignRecord]:
    """A record for each sample in the order of training. Raises ForeignError."""
    ranks = _ranks(config.path)
    cp_size, dp_size = (max(rank[i] for rank in ranks) + 1 for i in (0, 1))
    wanted = set(itertools.product(range(cp_size), range(dp_size)))
    if lacking := sorted(wanted - set(ranks)):
        names = ", ".join(f"cp{cp}_dp{dp}__*.tar" for cp, dp in lacking[:3])
        raise ForeignError(f"{config.path}: no {names}, but tars of higher ranks: give all of them")
    samples, number = _samples(config.tokens), 0
    streams = {rank: _iterations(tars) for rank, tars in ranks.items()}
    for iteration in _in_step(config.path, streams):
        where, by_rank = iteration
        microbatches = {len(found[0]) for found in by_rank.values()}
        if len(microbatches) > 1:
            raise ForeignError(f"{where}: {sorted(microbatches)} microbatches on different ranks")
        for m, dp in itertools.product(range(microbatches.pop()), range(dp_size)):
            parts = [by_rank[cp, dp] for cp in range(cp_size)]
            values = _whole(where, [of_values[m] for of_values, _, _ in parts])
            ids = _whole(where, [of_ids[m] for _, of_ids, _ in parts])
            rounding = ROUNDING[parts[0][2]]
            for b in range(values.shape[1]):
                here = f"{where} microbatch {m} rank {dp} sample {b}"
                sample = next(samples, None)
                if sample is None:
                    raise ForeignError(
                        f"{here}: {config.tokens} has {number} samples and no more: expected one "
                        "for each that the teacher was fed"
                    )
                yield _record(
                    here, number, sample, (ids[:, b], values[:, b]), config, vocab_size, rounding
                )
                number += 1


def nucleus(config: ImportConfig) -> float:
    """The mass that lists of different lengths reach, as the first tar says; 1 if it does not."""
    first = next(iter(_ranks(config.path).values()))[0]
    with _opened(first) as tar:
        for member in tar:
            if member.name == META:
                try:
                    said = json.loads(_content(first, tar, member, MAX_DESCRIPTION))
                    return float(said["saver"]["p"] or 1.0)
                except (ValueError, KeyError, TypeError, RecursionError) as error:
                    if isinstance(error, ForeignError):
                        raise
                    return 1.0
    return 1.0


@contextlib.contextmanager
def _opened(file: Path) -> Iterator[tarfile.TarFile]:
    """A tar as it is written, without compression around it. Raises ForeignError."""
    try:
        with tarfile.open(regular(file), "r:") as tar:
            yield tar
    except tarfile.TarError as error:
        raise ForeignError(f"{file} cannot be read as a tar: {error}") from error


def _content(file: Path, tar: tarfile.TarFile, member: tarfile.TarInfo, most: int) -> bytes:
    """The bytes of a plain member. Raises ForeignError for a link, a hole, or too many."""
    size = min(file.stat().st_size, most)
    content = tar.extractfile(member) if member.isreg() and not member.issparse() else None
    if content is None or member.size > size:
        raise ForeignError(
            f"{file} member {member.name!r:.80} of {member.size} bytes is no plain file of at most "
            f"{size}"
        )
    return content.read()


def _ranks(path: str) -> dict[tuple[int, int], list[Path]]:
    """The tars of each (cp, dp) rank, in the order of their iterations."""
    folder = Path(os.path.expanduser(path))
    if not folder.is_dir():
        raise ForeignError(f"{path}: expected the directory of tars that --logits-save-dir names")
    found = [(match, file) for file in folder.iterdir() if (match := TAR.fullmatch(file.name))]
    if not found:
        raise ForeignError(f"{path}: no tar called cpC_dpD__ITERATION.tar inside")
    ranks: dict[tuple[int, int], list[tuple[int, Path]]] = {}
    for match, file in found:
        cp, dp, iteration = (int(group) for group in match.groups())
        ranks.setdefault((cp, dp), []).append((iteration, file))
    return {rank: [file for _, file in sorted(ranks[rank])] for rank in sorted(ranks)}


Payload = tuple[list[NDArray], list[NDArray], str]
"""Values and ids [S, B, K] of each microbatch, and the dtype of the values."""


def _iterations(tars: list[Path]) -> Iterator[tuple[int, str, Payload]]:
    """Every iteration of one rank: its number, where it is, what it holds."""
    for file in tars:
        with _opened(file) as tar:
            for member in tar:
                if match := MEMBER.fullmatch(member.name):
                    data = _content(file, tar, member, MAX_UNPACKED)
                    where = f"{file} member {member.name}"
                    yield int(match[1]), where, _payload(where, data)


def _payload(where: str, data: bytes) -> Payload:
    try:
        unpack = zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW)
        with unpack.stream_reader(io.BytesIO(data)) as stream:
            unpacked = stream.read(MAX_UNPACKED + 1)
        if len(unpacked) > MAX_UNPACKED:
            raise ValueError(f"it unpacks to more than {MAX_UNPACKED} bytes")
        saved = read_tensors(unpacked)
        lists = [saved[name] for name in ("values", "indices_low", "bit_17")]
        if not all(isinstance(t, Tensor) and np.ndim(t.values) == 3 for of in lists for t in of):
            raise ValueError("expected lists of tensors of three dimensions")
        values, low, high = lists
        for triple in zip(values, low, high, strict=True):
            if len({t.values.shape for t in triple}) > 1:
                raise ValueError(f"shapes {[t.values.shape for t in triple]} differ")
        dtypes = {t.dtype for t in values}
        if len(dtypes) != 1 or not dtypes <= set(ROUNDING):
            raise ValueError(f"values of {sorted(dtypes)}: expected one of {', '.join(ROUNDING)}")
    except (zstandard.ZstdError, ValueError, KeyError, TypeError) as error:
        raise ForeignError(
            f"{where} holds no log probs as Megatron-LM saves them (values, indices_low, bit_17): "
            f"{error}"
        ) from error
    ids = [
        a.values.astype(np.int64) | b.values.astype(np.int64) << 16
        for a, b in zip(low, high, strict=True)
    ]
    return [t.values.astype(np.float64) for t in values], ids, dtypes.pop()


def _in_step(
    path: str, streams: dict[tuple[int, int], Iterator[tuple[int, str, Payload]]]
) -> Iterator[tuple[str, dict[tuple[int, int], Payload]]]:
    """Each iteration with what every rank has of it; none may be missing in between."""
    before: int | None = None
    for found in itertools.zip_longest(*streams.values()):
        numbers = {item[0] if item else None for item in found}
        if len(numbers) > 1:
            raise ForeignError(
                f"{path}: ranks are at different iterations, {sorted(map(str, numbers))}: give the "
                "tars of all ranks up to the same iteration"
            )
        number = numbers.pop()
        assert number is not None
        if before is not None and number != before + 1:
            raise ForeignError(
                f"{found[0][1]}: iteration {number} follows {before}: expected {before + 1}, as "
                "samples are matched with tokens by their order"
            )
        before = number
        yield found[0][1], dict(zip(streams, (item[2] for item in found), strict=True))


def _whole(where: str, parts: list[NDArray]) -> NDArray:
    """[S, B, K] of the parts of all context ranks: rank r holds chunks r and 2C - 1 - r of 2C.

    K is the largest of them; places that a part lacks hold no entry.
    """
    if len(parts) == 1:
        return parts[0]
    if len({part.shape[:2] for part in parts}) > 1 or len(parts[0]) % 2:
        raise ForeignError(
            f"{where}: context ranks hold {[part.shape for part in parts]}: expected equal, even "
            "lengths"
        )
    width = max(part.shape[2] for part in parts)
    filler = NO_ENTRY if parts[0].dtype == np.float64 else 0
    filled = [
        np.pad(p, ((0, 0), (0, 0), (0, width - p.shape[2])), constant_values=filler) for p in parts
    ]
    half = len(parts[0]) // 2
    return np.concatenate([*(p[:half] for p in filled), *(p[half:] for p in reversed(filled))])


def _samples(tokens: str) -> Iterator[Sample]:
    """Tokens of every sample, and which of them may be targets where the file has labels."""
    file = Path(os.path.expanduser(tokens))
    if file.suffix != ".npy":
        for row in read_rows(tokens):
            row.require("megatron", "input_ids")
            ids = row.integers("input_ids")
            wanted = None
            if "labels" in row.names:
                wanted = row.integers("labels", len(ids)) != IGNORED_LABEL
            yield ids, wanted
        return
    try:
        matrix: Any = np.load(regular(file), mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, TypeError, SyntaxError, MemoryError) as error:
        raise ForeignError(f"{file} cannot be read as .npy: {error}") from error
    if not isinstance(matrix, np.ndarray):
        raise ForeignError(f"{file} is an archive of arrays: expected one array, as .npy")
    if matrix.ndim != 2 or not np.issubdtype(matrix.dtype, np.integer):
        raise ForeignError(
            f"{file} holds {matrix.dtype} {matrix.shape}: expected whole numbers [samples, tokens]"
        )
    for row_ids in matrix:
        yield np.asarray(row_ids, np.int64), None


def _record(
    where: str,
    number: int,
    sample: Sample,
    lists: Lists,
    config: ImportConfig,
    vocab_size: int,
    rounding: float,
) -> ForeignRecord:
    ids, values = lists
    tokens, wanted = sample
    if len(tokens) not in (len(values), len(values) + 1):
        raise ForeignError(
            f"{where}: {len(values)} lists, but sample {number} of {config.tokens} has "
            f"{len(tokens)} tokens: expected as many, or one more"
        )
    unused = values == NO_ENTRY
    return make_record(
        where,
        str(number),
        tokens,
        1 + config.shift,
        np.where(unused, -1, ids),
        np.where(unused, -np.inf, values),
        vocab_size,
        wanted=wanted,
        rounding=rounding,
    )
