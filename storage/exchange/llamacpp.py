"""llama.cpp's `--kl-divergence-base` files: whole distributions in 16 bits per token and id.

After the header come the tokens of every chunk, then, for each token of a chunk's second half but
the first, a line of V log probs, `min + scale * q`. What lies 16 nats below the most probable id is
at the floor, q = 0: what those ids hold together is known only to within their number times it.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from decant.schemas.manifest import MAX_VOCAB
from decant.storage.cache.tokenizer_files import TokenizerFiles
from decant.storage.exchange.config import DENSE_K, ImportConfig
from decant.storage.exchange.foreign import ForeignError, ForeignRecord, make_record

MAGIC = b"_logits_"
HEADER = 20
ROWS = 16
"""Lines held at a time: 5 MB at a vocabulary of 150,000."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Header:
    """What a file says of itself."""

    n_ctx: int
    n_vocab: int
    n_chunk: int

    @property
    def first(self) -> int:
        """Lines begin with the token behind this one."""
        return self.n_ctx // 2

    @property
    def lines(self) -> int:
        """Of a chunk."""
        return self.n_ctx - 1 - self.first

    @property
    def line_bytes(self) -> int:
        """Scale, minimum, and an even number of log probs."""
        return 2 * (4 + 2 * ((self.n_vocab + 1) // 2))

    @property
    def data(self) -> int:
        """Where the lines begin."""
        return HEADER + 4 * self.n_chunk * self.n_ctx

    @property
    def bytes(self) -> int:
        """Of the whole file."""
        return self.data + self.n_chunk * self.lines * self.line_bytes


def source_files(config: ImportConfig) -> list[Path]:
    """The file. Raises ForeignError if there is none."""
    file = Path(os.path.expanduser(config.path))
    if not file.is_file():
        raise ForeignError(
            f"{config.path}: expected the file of llama-perplexity --kl-divergence-base"
        )
    return [file]


def read_header(config: ImportConfig) -> Header:
    """Raises ForeignError if the file is none of these, or is not complete."""
    (file,) = source_files(config)
    with open(file, "rb") as source:
        start = source.read(HEADER)
    if len(start) < HEADER or start[:8] != MAGIC:
        raise ForeignError(f"{file} begins with {start[:8]!r}: expected {MAGIC!r}")
    n_ctx, n_vocab, n_chunk = (int(n) for n in np.frombuffer(start, "<i4", offset=8))
    if n_ctx < 4 or not 2 <= n_vocab <= MAX_VOCAB or n_chunk < 1:
        raise ForeignError(f"{file}: context {n_ctx}, vocabulary {n_vocab}, chunks {n_chunk}")
    header = Header(n_ctx=n_ctx, n_vocab=n_vocab, n_chunk=n_chunk)
    if (size := file.stat().st_size) != header.bytes:
        done = max(size - header.data, 0) // (header.lines * header.line_bytes)
        raise ForeignError(
            f"{file} has {size} bytes, expected {header.bytes} of {n_chunk} chunks of {n_ctx} "
            f"tokens and {n_vocab} ids; {done} chunks are whole: write it again"
        )
    return header


def read(config: ImportConfig, vocab_size: int) -> Iterator[ForeignRecord]:
    """A record for each chunk, with its k most probable ids. Raises ForeignError."""
    header = read_header(config)
    (file,) = source_files(config)
    k = min(config.k or DENSE_K, header.n_vocab)
    with open(file, "rb") as source:
        source.seek(HEADER)
        count = header.n_chunk * header.n_ctx
        chunks = np.fromfile(source, "<i4", count).reshape(header.n_chunk, header.n_ctx)
        bos = _bos(config, int(chunks[0, 0]))
        for chunk, tokens in enumerate(chunks.astype(np.int64)):
            if bos >= 0:
                tokens[0] = bos
            where = f"{file} chunk {chunk}"
            parts = []
            for start in range(0, header.lines, ROWS):
                lines = min(ROWS, header.lines - start)
                data = np.fromfile(source, np.uint8, lines * header.line_bytes)
                at = header.first + 1 + start + config.shift
                labels = tokens[np.clip(np.arange(at, at + lines), 0, header.n_ctx - 1)]
                here = f"{where}, list {start}"
                parts.append(_top(here, data.reshape(lines, -1), header.n_vocab, k, labels))
            ids, values, log_tail, actual, floored = (
                np.concatenate([part[i] for part in parts]) for i in range(5)
            )
            offset = header.first + 1 + config.shift
            yield make_record(
                where,
                str(chunk),
                tokens,
                offset,
                ids,
                values,
                vocab_size,
                actual=actual,
                floored=floored,
                log_tail=log_tail,
            )


def _bos(config: ImportConfig, first: int) -> int:
    """What the model saw first in each chunk: llama.cpp puts it there, and not into the file."""
    if config.bos >= 0 or not config.tokenizer:
        return config.bos
    tokenizer = TokenizerFiles.read(config.tokenizer)
    token = tokenizer.special_tokens_map.get("bos_token")
    return first if token is not None and tokenizer.get_vocab().get(token) == first else -1


def _top(
    where: str, lines: NDArray[np.uint8], n_vocab: int, k: int, labels: NDArray[np.int64]
) -> tuple[NDArray, ...]:
    """Ids and log probs [n, k], log tail [n], actual tokens' log probs [n], whether at the floor.

    The tail is what the kept ids leave of 1, within what the others can hold; all is scaled so that
    it adds up to 1, by less than the step of the codes.
    """
    scale, low = (np.ascontiguousarray(lines[:, :8]).view("<f4")[:, i : i + 1] for i in (0, 1))
    codes = np.ascontiguousarray(lines[:, 8:]).view("<u2")[:, :n_vocab]
    if not (np.isfinite(scale).all() and np.isfinite(low).all() and (scale >= 0).all()):
        bad = int(np.argmin(np.isfinite(scale) & np.isfinite(low) & (scale >= 0)))
        raise ForeignError(f"{where} + {bad}: scale {scale[bad, 0]} and minimum {low[bad, 0]}")
    everything = np.exp(low.astype(np.float64) + scale.astype(np.float64) * codes)
    ids = np.argpartition(codes, n_vocab - k, axis=1)[:, n_vocab - k :].astype(np.int64)
    ids = np.take_along_axis(
        ids,
        np.argsort(-np.take_along_axis(codes, ids, 1).astype(np.int64), axis=1, kind="stable"),
        1,
    )
    kept_codes = np.take_along_axis(codes, ids, 1)
    values = low.astype(np.float64) + scale.astype(np.float64) * kept_codes
    kept = np.exp(values).sum(axis=1)
    at_floor = np.where(codes == 0, everything, 0).sum(axis=1)
    at_floor -= np.where(kept_codes == 0, np.exp(values), 0).sum(axis=1)
    rest = np.maximum(everything.sum(axis=1) - kept, 0)
    tail = np.clip(1 - kept, np.maximum(rest - at_floor, 0), rest)
    log_total = np.log(kept + tail)
    if (far := np.abs(log_total) > 2 * scale[:, 0] + 1e-5).any():
        bad = int(far.argmax())
        raise ForeignError(
            f"{where} + {bad}: probabilities add up to {np.exp(log_total[bad]):.6f}, expected 1 "
            "within the step of the codes: the file is damaged"
        )
    own = np.take_along_axis(codes, labels[:, None], 1)[:, 0]
    actual = low[:, 0].astype(np.float64) + scale[:, 0].astype(np.float64) * own
    with np.errstate(divide="ignore"):
        log_tail = np.log(tail) - log_total
    return ids, values - log_total[:, None], log_tail, actual - log_total, own == 0
