"""Bytes per target, rates and decoding error of the format, beside other formats and the limits.

    python benchmarks/vocab_models.py      once: the models and the caches measured on
    python benchmarks/bench_format.py      the tables, and results/format.csv
    python benchmarks/bench_format.py --cache DIR ...   the same of caches of another teacher

A cache of float32 log probs is written in every precision. Of one of `compact` or `f16` the decoded
log probs are cut and written in its own precision, shards as they are, beside what else follows
from them: `topp`, `label` and the bytes of the other formats. Draws do not follow. The label's log
prob is that of its decoded entry, where it is kept, as a writer wants the two to agree.

Every row of ours is a real cache written by `CacheWriter`; bytes are whole shard files. Rates are
targets per second of CPU time, the best of some runs: `write` includes checks, hashes and fsync,
`table` (CacheReader.read_table) every checksum, `read` the decoding too. The error is the
generalised KL(scored || decoded) over the kept entries, in nats: the tail is one exact bucket.

The other formats are written from their published descriptions: what they store per target, not
how fast. None but ours stores the tail, the label's log prob or checksums.
  DistillKit       ids in ceil(log2 V) bits; 16 exact log probs (bfloat16), the rest a least-squares
                   polynomial of the rank, terms 0 to 4 and sqrt in float32; bit-packed, as is
  Megatron-LM      float16 log probs, uint16 low id bits, one bool for bit 16; whole arrays, zstd-3
  plain lists      Parquet lists of int32 and float32, zstd-3
  axolotl JSONL    a list of {"token": "token_id:N", "logprob": x} per position, zstd-3
  Random Sampling  3 bytes per distinct id: 17 bits of id, 7 bits of count
Of draws, which we store without log probs too, counts are exact: what they err by is the draw, not
the storing. The limits: order-0 entropy of the stored ids under one unigram model, plus that of the
compact codes slot by slot; for draws less the order of the ids, which says nothing.
"""

import argparse
import dataclasses
import io
import json
import math
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import zstandard
from common import save
from numpy.typing import NDArray

from decant.schemas import (
    NO_LOGPROBS,
    Manifest,
    ScoredSequence,
    ShardPlan,
    TeacherInfo,
    TokenizerInfo,
    Truncation,
)
from decant.storage import CacheReader
from decant.storage.cache import logprobs as logprobs_code
from decant.storage.cache.writer import write_cache

CACHES = Path(__file__).resolve().parents[1] / "build/vocab-models"
NAMES = ("4k", "32k", "100k")
SLOTS = (16, 64, 128)
PRECISIONS = ("f32", "f16", "compact")
ZSTD_LEVEL = 3
EXACT_SLOTS = 16
BLOCK_TARGETS = 8192
"""Targets that the other formats compress together."""
NUCLEUS = 0.95
"""Mass of top-p where it follows from a cache of the most probable entries."""
JSON_TARGETS = 4096
"""Enough of them for the size of JSON."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One line of the tables and of the CSV file; None: not measured."""

    vocab_size: int
    kept: str
    encoding: str
    bytes_per_target: float
    write: float | None = None
    """Targets per CPU second, as the next two."""
    table: float | None = None
    read: float | None = None
    kl_mean: float | None = None
    kl_max: float | None = None


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--caches", type=Path, default=CACHES, help="where vocab_models.py wrote")
    parser.add_argument(
        "--cache", type=Path, nargs="+", help="other caches, of 64 log probs or more"
    )
    parser.add_argument("--only", choices=NAMES, nargs="+", default=NAMES)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    pa.set_cpu_count(1)
    rows: list[Row] = []
    columns: list[tuple] = []
    names = [(f"cache-{name}", f"cache-{name}-sample") for name in args.only]
    groups = [[args.caches / name for name in pair] for pair in names]
    for caches in [[cache] for cache in args.cache] if args.cache else groups:
        found: list[Row] = []
        for cache in caches:
            found += measure(CacheReader(cache), args.repeats, columns)
        print(shown(found))
        rows += found
    if args.cache:
        for column in columns:
            print(*column, sep="\t")
    elif tuple(args.only) == NAMES:
        fields = [field.name for field in dataclasses.fields(Row)]
        save("format.csv", fields, [dataclasses.astuple(row) for row in rows])
        save("format_columns.csv", ("vocab_size", "kept", "encoding", "column", "bytes"), columns)


def measure(reader: CacheReader, repeats: int, columns: list[tuple]) -> Iterator[Row]:
    """All encodings of one cache of float32 log probs; bytes by column go into `columns`."""
    whole = list(reader)
    stored = reader.manifest.truncation
    if reader.manifest.precision not in ("f32", NO_LOGPROBS):
        yield from measure_cut(reader, whole, repeats, columns)
        return
    for k in (0,) if stored.sampled else [k for k in SLOTS if k <= stored.slots]:
        sequences = [prefix(sequence, k) for sequence in whole] if k else whole
        scored = Scored.of(sequences, reader.manifest.shared_vocab_size)
        kept = f"k={k}" if k else f"{scored.used.sum(1).mean():.1f} sampled"
        base = {"vocab_size": scored.vocab_size, "kept": kept}
        truncation = Truncation(k=k) if k else stored
        print(f"V={scored.vocab_size:,}, {kept}", file=sys.stderr, flush=True)
        with tempfile.TemporaryDirectory() as folder:
            for precision in PRECISIONS if k else ("draws",):
                cache = f"{folder}/{precision}"
                draft = draft_of(reader.manifest, truncation, precision if k else PRECISIONS[0])
                ours, sizes = measure_ours(cache, sequences, draft, scored, repeats)
                yield Row(**base, encoding=f"ours, {precision}", **ours)
                columns += [(scored.vocab_size, kept, precision, *size) for size in sizes.items()]
            bits = limits(CacheReader(cache), scored)
        for encoding, peer in PEERS.items():
            if (encoding == "Random Sampling") == (scored.draws is not None):
                blob, decoded = peer(scored)
                errors = {}
                if scored.draws is None:
                    error = logprobs_code.decoding_error(scored.logprobs[: len(decoded)], decoded)
                    errors = {"kl_mean": float(error.mean()), "kl_max": float(error.max())}
                size = len(blob) / len(decoded)
                yield Row(**base, encoding=encoding, bytes_per_target=size, **errors)
        for name, value in bits.items():
            yield Row(**base, encoding=f"limit: {name}", bytes_per_target=value)


def measure_cut(
    reader: CacheReader, whole: list[ScoredSequence], repeats: int, columns: list[tuple]
) -> Iterator[Row]:
    """Our encodings that follow from the decoded log probs of a cache, in its own precision."""
    precision, vocab_size = reader.manifest.precision, reader.manifest.shared_vocab_size
    slots = reader.manifest.truncation.slots
    agreeing = [with_label_of_entry(sequence) for sequence in whole]
    nucleus = Truncation(method="topp", k=slots, p=NUCLEUS)
    cuts = [
        (f"k={k}", Truncation(k=k), [prefix(s, k) for s in agreeing]) for k in SLOTS if k <= slots
    ]
    cuts += [
        (f"topp {NUCLEUS:g}", nucleus, [within(s, NUCLEUS) for s in agreeing]),
        ("label", Truncation(method="label"), [label_alone(s) for s in whole]),
    ]
    for kept, truncation, sequences in cuts:
        if truncation.method == "topp":
            kept += (
                f", {np.mean(np.concatenate([(s.token_ids >= 0).sum(1) for s in sequences])):.1f}"
            )
        scored = Scored.of(sequences, vocab_size)
        with tempfile.TemporaryDirectory() as folder:
            draft = draft_of(reader.manifest, truncation, precision)
            ours, sizes = measure_ours(
                f"{folder}/cache", sequences, draft, scored, repeats, reader.plan
            )
            said = precision if truncation.rule.has_logprobs else NO_LOGPROBS
            ours = {name: value for name, value in ours.items() if not name.startswith("kl_")}
            yield Row(vocab_size=vocab_size, kept=kept, encoding=f"ours, {said}", **ours)
            columns += [(vocab_size, kept, said, *size) for size in sizes.items()]
            if truncation.method == "topk" and precision == "compact":
                bits = limits(CacheReader(f"{folder}/cache"), scored)
                found = {f"limit: {name}": value for name, value in bits.items()}
                if truncation.k == slots:
                    found |= {name: size_with(peer, scored) for name, peer in OF_LOGPROBS.items()}
                for name, value in found.items():
                    base = {"vocab_size": vocab_size, "kept": kept}
                    yield Row(**base, encoding=name, bytes_per_target=value)


@dataclass(frozen=True, kw_only=True, slots=True)
class Scored:
    """The kept entries of all targets [n, K], descending; -1 and -inf in unused slots."""

    token_ids: NDArray[np.int32]
    logprobs: NDArray[np.float32]
    """Of no entries for draws, which have none."""
    draws: NDArray[np.int32] | None
    vocab_size: int

    @staticmethod
    def of(sequences: list[ScoredSequence], vocab_size: int) -> "Scored":
        """All targets of some sequences."""
        draws = [s.draws for s in sequences if s.draws is not None]
        logprobs = [s.logprobs for s in sequences if s.logprobs is not None]
        return Scored(
            token_ids=np.concatenate([s.token_ids for s in sequences]),
            logprobs=np.concatenate(logprobs) if logprobs else np.zeros((0, 0), np.float32),
            draws=np.concatenate(draws) if draws else None,
            vocab_size=vocab_size,
        )

    @property
    def used(self) -> NDArray[np.bool_]:
        """[n, K]."""
        return self.token_ids >= 0


def prefix(sequence: ScoredSequence, k: int) -> ScoredSequence:
    """The same sequence with its k most probable entries; the others join the tail, at T=1."""
    assert sequence.logprobs is not None and sequence.log_tail is not None
    dropped = sequence.logprobs[:, k:].astype(np.float64)
    tail = np.logaddexp.reduce(dropped, axis=1, initial=-np.inf)
    return dataclasses.replace(
        sequence,
        token_ids=np.ascontiguousarray(sequence.token_ids[:, :k]),
        logprobs=np.ascontiguousarray(sequence.logprobs[:, :k]),
        log_z=sequence.log_z[:, :1],
        log_tail=np.logaddexp(tail, sequence.log_tail[:, 0])[:, None].astype(np.float32),
    )


def with_label_of_entry(sequence: ScoredSequence) -> ScoredSequence:
    """The same sequence with the label's log prob of its kept entry, where there is one."""
    assert sequence.logprobs is not None
    is_label = sequence.token_ids == sequence.labels[:, None]
    each = np.arange(sequence.num_targets)
    kept = sequence.logprobs[each, is_label.argmax(axis=1)]
    labels = np.where(is_label.any(axis=1), kept, sequence.label_logprob)
    return dataclasses.replace(sequence, label_logprob=labels)


def within(sequence: ScoredSequence, p: float) -> ScoredSequence:
    """The same sequence with the entries that reach mass p; the others join the tail, at T=1."""
    assert sequence.logprobs is not None and sequence.log_tail is not None
    mass = np.cumsum(np.exp(sequence.logprobs, dtype=np.float64), axis=1)
    dropped = np.zeros(mass.shape, bool)
    dropped[:, 1:] = mass[:, :-1] >= p
    rest = np.where(dropped, sequence.logprobs, -np.inf).astype(np.float64)
    tail = np.logaddexp.reduce(rest, axis=1, initial=-np.inf)
    return dataclasses.replace(
        sequence,
        token_ids=np.where(dropped, np.int32(-1), sequence.token_ids),
        logprobs=np.where(dropped, np.float32(-np.inf), sequence.logprobs),
        log_z=sequence.log_z[:, :1],
        log_tail=np.logaddexp(tail, sequence.log_tail[:, 0])[:, None].astype(np.float32),
    )


def label_alone(sequence: ScoredSequence) -> ScoredSequence:
    """The same sequence with nothing but the log probs of its tokens."""
    return dataclasses.replace(
        sequence,
        token_ids=sequence.token_ids[:, :0],
        logprobs=None,
        log_tail=None,
        log_z=sequence.log_z[:, :1],
    )


def draft_of(like: Manifest, truncation: Truncation, precision: str) -> Manifest:
    """A manifest to start a cache with."""
    return Manifest.draft(
        teacher=TeacherInfo(
            name=like.teacher.name,
            fingerprint="",
            architecture="",
            engine="",
            dtype="float32",
            vocab_size=like.teacher.vocab_size,
        ),
        tokenizer=TokenizerInfo(fingerprint="", files={}),
        shared_vocab_size=like.shared_vocab_size,
        truncation=truncation,
        temperatures=(1.0,),
        precision=precision,
        source={},
        sequences={},
    )


def measure_ours(
    cache: str,
    sequences: list[ScoredSequence],
    draft: Manifest,
    scored: Scored,
    repeats: int,
    plan: list[ShardPlan] | None = None,
) -> tuple[dict[str, float], dict[str, int]]:
    """What `Row` wants of one of our layouts, and its bytes by column."""
    write = fastest(lambda i: write_cache(f"{cache}-{i}", draft, sequences, plan), repeats)
    reader = CacheReader(f"{cache}-0")
    Path(f"{cache}-0").rename(cache)
    reader = CacheReader(cache)
    groups = reader.row_groups()
    table = fastest(lambda _: [reader.read_table(group) for group in groups], repeats + 2)
    read = fastest(lambda _: [reader.read(group) for group in groups], repeats + 2)
    decoded = [rows.logprobs for rows in map(reader.read, groups) if rows.logprobs is not None]
    errors = {}
    if decoded:
        error = logprobs_code.decoding_error(scored.logprobs, np.concatenate(decoded))
        errors = {"kl_mean": float(error.mean()), "kl_max": float(error.max())}
    sizes: dict[str, int] = {}
    total = 0
    for path in Path(cache, "shards").glob("*.parquet"):
        total += path.stat().st_size
        metadata = pq.read_metadata(path)
        for group in range(metadata.num_row_groups):
            for i in range(metadata.num_columns):
                column = metadata.row_group(group).column(i)
                name = column.path_in_schema
                sizes[name] = sizes.get(name, 0) + column.total_compressed_size
    n = len(scored.token_ids)
    return {
        "bytes_per_target": total / n,
        "write": n / write,
        "table": n / table,
        "read": n / read,
        **errors,
    }, sizes


def fastest(step: Callable[[int], object], repeats: int) -> float:
    """CPU seconds of the fastest of some runs."""
    seconds = []
    for i in range(repeats):
        start = time.process_time()
        step(i)
        seconds.append(time.process_time() - start)
    return min(seconds)


# Each of the others: the bytes of all targets, and the log probs [n, K] that they decode to.
Encoded = tuple[bytes, NDArray[np.float32]]


def distillkit(scored: Scored) -> Encoded:
    ids = pack_bits(scored.token_ids, math.ceil(math.log2(scored.vocab_size)))
    exact = to_bfloat16(scored.logprobs[:, :EXACT_SLOTS])
    rest = scored.logprobs[:, EXACT_SLOTS:].astype(np.float64)
    if not rest.size:
        return ids.tobytes() + exact.tobytes(), from_bfloat16(exact)
    rank = np.arange(rest.shape[1], dtype=np.float64)
    terms = np.stack([*(rank**i for i in range(5)), np.sqrt(rank)], axis=1)
    coefficients = np.linalg.lstsq(terms, rest.T, rcond=None)[0].T.astype("<f4")
    fitted = coefficients.astype(np.float64) @ terms.T
    decoded = np.concatenate([from_bfloat16(exact), fitted], axis=1).astype(np.float32)
    return ids.tobytes() + exact.tobytes() + coefficients.tobytes(), decoded


def pack_bits(values: NDArray[np.int32], width: int) -> NDArray[np.uint8]:
    """[n, ceil(K width / 8)] bytes of the K values of each row, `width` bits each."""
    rows = []
    for block in np.array_split(values, max(1, len(values) // BLOCK_TARGETS)):
        bits = (block[:, :, None] >> np.arange(width)) & 1
        rows.append(np.packbits(bits.astype(np.uint8).reshape(len(block), -1), axis=1))
    return np.concatenate(rows)


def to_bfloat16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """The upper halves of float32 bits, rounded to nearest even."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")


def from_bfloat16(halves: NDArray[np.uint16]) -> NDArray[np.float32]:
    return (halves.astype(np.uint32) << 16).view(np.float32)


def megatron(scored: Scored) -> Encoded:
    halves = scored.logprobs.astype("<f2")
    blocks = (
        halves[i].tobytes()
        + (scored.token_ids[i] & 0xFFFF).astype("<u2").tobytes()
        + (scored.token_ids[i] >> 16).astype(bool).tobytes()
        for i in slices(len(halves))
    )
    return zstd(blocks), halves.astype(np.float32)


def plain_lists(scored: Scored) -> Encoded:
    n, slots = scored.token_ids.shape
    offsets = pa.array(np.arange(n + 1, dtype=np.int32) * slots)
    table = pa.table(
        {
            "token_ids": pa.ListArray.from_arrays(offsets, pa.array(scored.token_ids.ravel())),
            "logprobs": pa.ListArray.from_arrays(offsets, pa.array(scored.logprobs.ravel())),
        }
    )
    file = io.BytesIO()
    pq.write_table(table, file, compression="zstd", compression_level=ZSTD_LEVEL)
    return file.getvalue(), scored.logprobs


def axolotl_jsonl(scored: Scored) -> Encoded:
    ids, logprobs = scored.token_ids[:JSON_TARGETS], scored.logprobs[:JSON_TARGETS]
    lines = (
        json.dumps(
            [
                {"token": f"token_id:{token}", "logprob": logprob}
                for token, logprob in zip(row_ids, row, strict=True)
            ]
        )
        + "\n"
        for row_ids, row in zip(ids.tolist(), logprobs.tolist(), strict=True)
    )
    return zstd(["".join(lines).encode()]), logprobs


def random_sampling(scored: Scored) -> Encoded:
    assert scored.draws is not None and scored.vocab_size <= 1 << 17
    used = scored.used
    packed = (scored.token_ids[used] | np.minimum(scored.draws[used], 127) << 17).astype("<u4")
    counts = np.zeros(used.shape, np.float32)
    counts[used] = packed >> 17
    blob = np.ascontiguousarray(packed[:, None].view(np.uint8)[:, :3]).tobytes()
    with np.errstate(divide="ignore"):  # what the counts alone say of p
        return blob, np.log(counts / counts.sum(axis=1, keepdims=True))


PEERS: dict[str, Callable[[Scored], Encoded]] = {
    "DistillKit": distillkit,
    "Megatron-LM": megatron,
    "plain lists": plain_lists,
    "axolotl JSONL": axolotl_jsonl,
    "Random Sampling": random_sampling,
}


OF_LOGPROBS = {name: peer for name, peer in PEERS.items() if peer is not random_sampling}


def size_with(peer: Callable[[Scored], Encoded], scored: Scored) -> float:
    """Bytes per target in another format."""
    blob, decoded = peer(scored)
    return len(blob) / len(decoded)


def slices(n: int) -> Iterator[slice]:
    return (slice(start, start + BLOCK_TARGETS) for start in range(0, n, BLOCK_TARGETS))


def zstd(blocks: Iterable[bytes]) -> bytes:
    """Each block a frame of its own."""
    compressor = zstandard.ZstdCompressor(ZSTD_LEVEL)
    return b"".join(compressor.compress(block) for block in blocks)


def limits(compact: CacheReader, scored: Scored) -> dict[str, float]:
    """Bytes per target that an order-0 model of the ids, and of the compact codes, would need."""
    used = scored.used
    ids = entropy_bits(scored.token_ids[used]) / 8 * used.sum() / len(used)
    if scored.draws is not None:
        orders = np.cumsum(np.log2(np.arange(1, used.shape[1] + 1)))[used.sum(axis=1) - 1]
        return {"ids, unigram": ids - float(orders.mean()) / 8}
    parts = []
    for rows in map(compact.read_stored, compact.row_groups()):
        columns = [column[rows.target_rows] for column in rows.topk_logprob or ()]
        parts.append(logprobs_code.of_planes(columns, used.shape[1], compact=True))
    codes = np.concatenate(parts)
    bits = sum(
        entropy_bits(slot[mask]) * mask.sum() for slot, mask in zip(codes.T, used.T, strict=True)
    )
    return {"ids, unigram": ids, "ids and codes": ids + bits / 8 / len(used)}


def entropy_bits(values: NDArray) -> float:
    """Bits per value of the best code that looks at one value at a time."""
    count = np.bincount(values) if values.size else np.zeros(1)
    share = count[count > 0] / max(values.size, 1)
    return float(-(share * np.log2(share)).sum())


def shown(rows: list[Row]) -> str:
    """The rows of one vocabulary as a table."""
    lines = [
        f"\nV = {rows[0].vocab_size:,}",
        f"{'kept':<14}{'encoding':<22}{'B/target':>9}{'write':>8}{'table':>8}{'read':>8}"
        f"{'KL mean':>10}{'KL max':>10}   (k targets/s)",
    ]
    for row in rows:
        rates = "".join(
            f"{'' if rate is None else format(rate / 1e3, ',.0f'):>8}"
            for rate in (row.write, row.table, row.read)
        )
        errors = "".join(
            f"{'' if error is None else format(error, '.1e'):>10}"
            for error in (row.kl_mean, row.kl_max)
        )
        lines.append(f"{row.kept:<14}{row.encoding:<22}{row.bytes_per_target:>9.1f}{rates}{errors}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
