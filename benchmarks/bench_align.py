"""What a student of another tokenizer costs: its stream and its step beside those of one's own.

    make demo-real                            # its caches are build/real/cache-text-...
    python benchmarks/bench_align.py --cache CACHE --tokenizer examples/demo/teacher

Stream: targets of the cache per second of processor time, from files to targets that a loss takes,
over whole passes. Plain and aligned take turns at every row group, in one process and one thread.
In the first pass of an aligned stream no text and no word was met before. The longer it is, the
more words are known, until all are; in later passes all texts are, and their tokens are remembered.
Tables of the vocabularies, which are made once, are no part of any. What the tokenizer alone takes
for the texts, each encoded whole, is shown beside it. Step: forward and backward of the fused head
on hidden states drawn at random, plain and aligned, with equally many rows; memory is the peak of
resident memory above the inputs, gradients included. The vocabulary of both steps is `--vocab`, so
that only the targets differ.
"""

import argparse
import copy
import dataclasses
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import torch
from common import peak_mb, save, status_mb

from decant.storage import CacheReader
from decant.storage.cache.tokenizer_files import TokenizerFiles
from decant.student_train import Batch, CacheStream
from decant.student_train.alignment.aligner import Aligner
from decant.student_train.alignment.encoder import REMEMBERED, Encoder
from decant.student_train.data.stream import Found
from decant.student_train.losses import EventTargets, SparseTargets, fused_linear_divergence


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--cache", required=True, help="a cache of entries that holds its tokenizer"
    )
    parser.add_argument("--tokenizer", required=True, help="the student's: a directory")
    parser.add_argument("--repeats", type=int, default=2, help="pairs of each measurement")
    parser.add_argument("--rows", type=int, default=2048, help="targets of a step; 0: no step")
    parser.add_argument("--vocab", type=int, default=8_000, help="of the student, in a step")
    parser.add_argument("--hidden", type=int, default=256)
    args = parser.parse_args()
    torch.set_num_threads(1)
    reader = CacheReader(args.cache)
    tokenizer = TokenizerFiles.read(args.tokenizer)
    aligner = Aligner(reader, tokenizer, where=args.tokenizer)
    rows: list[list[Any]] = []
    options: dict[str, dict[str, Any]] = {
        "plain": {},
        "aligned": {"alignment": lambda _: aligner, "vocab_size": aligner.vocab_size},
    }
    passes(args, options)
    found: dict[str, list[dict[str, float]]] = {
        what: [] for what in ("the first pass", "its words known", "later passes")
    }
    whole = []
    for _ in range(args.repeats):
        aligner = forgetful(aligner, tokenizer, 0)
        found["the first pass"].append(passes(args, options))
        found["its words known"].append(passes(args, options))
        aligner = forgetful(aligner, tokenizer, REMEMBERED)
        passes(args, options)
        found["later passes"].append(passes(args, options))
        whole.append(encoding_speed(reader, aligner, tokenizer))
    for what, each in found.items():
        speeds = {name: [one[name] for one in each] for name in options}
        report(rows, f"stream, targets/s of a core, {what}", speeds)
    print(f"{'the tokenizer alone, texts whole':<44}{statistics.median(whole):>28,.2f}")
    if not args.rows:
        return

    batches = {name: rows_of(args, given) for name, given in options.items()}
    seconds: dict[str, list[float]] = {name: [] for name in options}
    for _ in range(args.repeats):
        for name, (targets, labels) in batches.items():
            seconds[name].append(step(args, targets, labels)[0])
    report(rows, f"step of {args.rows} rows, s of a core", seconds)
    memory = {name: [step(args, *batch, traced=True)[1]] for name, batch in batches.items()}
    report(rows, "step, MiB above the inputs", memory)
    for name, text in aligner.figures.lines():
        print(f"{name:<10} {text}")
    save("align.csv", ["what", "plain", "aligned", "ratio"], rows)


def report(rows: list[list[Any]], what: str, found: dict[str, list[float]]) -> None:
    """Print the medians of both and the median of the ratios of pairs."""
    ratio = statistics.median(b / a for a, b in zip(found["plain"], found["aligned"], strict=True))
    values = [statistics.median(found[name]) for name in ("plain", "aligned")]
    rows.append([what, *values, ratio])
    print(f"{what:<44}{values[0]:>14,.2f}{values[1]:>14,.2f}  aligned/plain {ratio:.2f}")


def forgetful(aligner: Aligner, tokenizer: TokenizerFiles, room: int) -> Aligner:
    """The same with its tables, without a memory of words and texts; room is for texts to come."""
    other = copy.copy(aligner)
    other._encode = Encoder(tokenizer, special_as_text=True, remembered=room)
    return other


def encoding_speed(reader: CacheReader, aligner: Aligner, tokenizer: TokenizerFiles) -> float:
    """Targets of the cache per second of processor time that encoding its texts takes."""
    teacher, backend = aligner.matching.teacher, tokenizer.backend_tokenizer
    texts = []
    for group in reader.row_groups():
        rows = reader.read_stored(group)
        ids = np.split(rows.token_id.astype(np.int64), rows.row_starts[1:-1])
        texts.append([teacher.text_of(one).decode(errors="ignore") for one in ids])
    started = time.process_time()
    for some in texts:
        backend.encode_batch_fast(some, add_special_tokens=False)
    return reader.manifest.num_targets / (time.process_time() - started)


def passes(args: argparse.Namespace, options: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Targets of the cache per second of processor time, of each kind of stream."""
    streams = {
        name: CacheStream(args.cache, batch_size=16, **given) for name, given in options.items()
    }
    seconds = dict.fromkeys(streams, 0.0)
    for group in streams["plain"].reader.row_groups():
        for name, stream in streams.items():
            started = time.process_time()
            rows = stream.read(group)
            every = [Found(rows, member, 0) for member in range(len(rows))]
            for first in range(0, len(every), stream.batch_size):
                _ = stream.collate(every[first : first + stream.batch_size]).targets
            seconds[name] += time.process_time() - started
    targets = streams["plain"].reader.manifest.num_targets
    return {name: targets / spent for name, spent in seconds.items()}


def rows_of(args: argparse.Namespace, options: dict[str, Any]) -> tuple[Any, torch.Tensor]:
    """Targets of about so many rows, with ids of a vocabulary as large as asked for."""
    stream = CacheStream(args.cache, batch_size=32, threads=1, **options)
    batches = iter(stream)
    batch: Batch = next(batches)
    batches.close()
    targets = batch.targets_at(1.0)
    labels = batch.labels % args.vocab
    if isinstance(targets, SparseTargets):
        rows = slice(0, args.rows)
        return with_ids(targets[rows], args.vocab), labels[rows]
    assert isinstance(targets, EventTargets)
    ends = targets.sizes.cumsum(0)
    stop = int(ends[int((ends <= args.rows).sum()) - 1])
    rows = slice(0, stop)
    part = dataclasses.replace(targets[rows], labels=labels[rows])
    return with_ids(part, args.vocab), labels[rows]


def with_ids(targets: Any, vocab: int) -> Any:
    """The same with distinct ids in place of those beyond the vocabulary."""
    ids = targets.token_ids
    spread = torch.arange(ids.shape[1]) + torch.arange(len(ids))[:, None]
    ids = torch.where(ids >= 0, spread % vocab, ids)
    return dataclasses.replace(targets, token_ids=ids, checked_for=(vocab, 1.0))


def step(
    args: argparse.Namespace, targets: Any, labels: torch.Tensor, traced: bool = False
) -> tuple[float, float]:
    """Seconds of processor time of a forward and backward, and the peak of memory in MiB."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(len(labels), args.hidden, generator=generator, requires_grad=True)
    head = torch.randn(args.vocab, args.hidden, generator=generator, requires_grad=True)
    if traced:
        return 0.0, traced_peak(lambda: one(hidden, head, targets, labels))
    started = time.process_time()
    one(hidden, head, targets, labels)
    return time.process_time() - started, 0.0


def one(hidden: Any, head: Any, targets: Any, labels: torch.Tensor) -> None:
    fused_linear_divergence(hidden, head, targets, labels, "fkl", ce_weight=0.5).loss.backward()


def traced_peak(function: Callable[[], None]) -> float:
    """How far resident memory rises in it, in MiB."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = status_mb("VmRSS")
    function()
    return peak_mb() - before


if __name__ == "__main__":
    main()
