"""Reading a cache in the version that it has and in the present one, in alternating runs.

    python benchmarks/bench_versions.py CACHE ...

CACHE is of an older version; it is rewritten (`decant migrate --rewrite`) beside the original in
a temporary folder, so both hold the same values. Of each way to read, the medians over the rounds
of the processor time per target, all threads together, and of the ratio within a round:
  fetched   row groups fetched, hashed, decompressed (CacheReader.read_table)
  stored    and as a stream takes them (read_stored)
  decoded   and decoded (read)
  batches   and joined to batches of tensors (collate), as a training gets them
  targets   and decoded in the batch (Batch.targets), as a loss takes them
  stream    several passes of a CacheStream to such batches, its threads and reading ahead included
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import torch

from decant.storage import CacheReader
from decant.storage.edit.derived import make
from decant.storage.edit.rewrite import rewrite
from decant.student_train import CacheStream
from decant.student_train.data.collate import collate

WARM_UPS = 2
PASSES = 4


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("caches", nargs="+", type=Path, metavar="CACHE")
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--batch-size", type=int, default=16, help="sequences")
    args = parser.parse_args()
    pa.set_cpu_count(1)
    torch.set_num_threads(1)
    for cache in args.caches:
        with tempfile.TemporaryDirectory() as folder:
            new = f"{folder}/new"
            make(new, rewrite(CacheReader(cache)))
            compare(cache, new, args.rounds, args.batch_size)


def compare(old: Path, new: str, rounds: int, batch_size: int) -> None:
    """Print the table of one cache."""
    readers = [CacheReader(url) for url in (old, new)]
    targets = sum(len(readers[0].read(group).positions) for group in readers[0].row_groups())
    sizes = [sum(record.bytes for record in reader.index) / targets for reader in readers]
    print(f"{old}, {targets:,} targets, {sizes[0]:.1f} and {sizes[1]:.1f} bytes each")
    print(f"{'':<10}{'before, ns':>12}{'now, ns':>12}{'ratio':>8}")
    ways: dict[str, tuple[Callable[[], int], Callable[[], int]]] = {
        name: (passing(readers[0], method), passing(readers[1], method))
        for name, method in (
            ("fetched", "read_table"),
            ("stored", "read_stored"),
            ("decoded", "read"),
        )
    }
    ways["batches"] = (joining(readers[0], batch_size), joining(readers[1], batch_size))
    ways["targets"] = (
        joining(readers[0], batch_size, decoded=True),
        joining(readers[1], batch_size, decoded=True),
    )
    ways["stream"] = (streaming(str(old), batch_size), streaming(new, batch_size))
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for at in range(WARM_UPS + rounds):
        for name, pair in ways.items():
            order = (0, 1) if at % 2 else (1, 0)
            spent = [0.0, 0.0]
            for which in order:
                start = time.process_time()
                count = pair[which]()
                spent[which] = (time.process_time() - start) / count * 1e9
            if at >= WARM_UPS:
                found[name].append((spent[0], spent[1]))
    for name, pairs in found.items():
        before, now = (statistics.median(pair[i] for pair in pairs) for i in range(2))
        ratio = statistics.median(pair[1] / pair[0] for pair in pairs)
        print(f"{name:<10}{before:>12,.0f}{now:>12,.0f}{ratio:>8.2f}", flush=True)


def passing(reader: CacheReader, method: str) -> Callable[[], int]:
    """One pass over a cache by a method of its reader; gives the targets."""

    def run() -> int:
        for group in reader.row_groups():
            getattr(reader, method)(group)
        return int(reader.index.totals().targets)

    return run


def joining(reader: CacheReader, batch_size: int, *, decoded: bool = False) -> Callable[[], int]:
    """One pass over a cache to batches of sequences of a row group each; gives the targets."""
    layout = reader.manifest.layout

    def run() -> int:
        count = 0
        for group in reader.row_groups():
            rows = reader.read_stored(group)
            for start in range(0, len(rows), batch_size):
                members = range(start, min(start + batch_size, len(rows)))
                batch = collate([(rows, i) for i in members], layout, (0,))
                count += len(batch.targets.token_ids) if decoded else batch.num_targets
        return count

    return run


def streaming(url: str, batch_size: int) -> Callable[[], int]:
    """PASSES over a cache through a new stream; gives the targets."""

    def run() -> int:
        stream = CacheStream(url, batch_size=batch_size, threads=1, lanes=1)
        return sum(batch.num_targets for _ in range(PASSES) for batch in stream.one_epoch())

    return run


if __name__ == "__main__":
    main()
