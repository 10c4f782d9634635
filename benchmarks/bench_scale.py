"""How long a cache of very many shards takes to open, and what it then holds in memory.

    python benchmarks/bench_scale.py --shards 1000 10000 100000

Writes manifest, plan and sealed records of caches whose shards are simulated: nothing that is timed
looks at a shard, as none is there. `stream` makes a `CacheStream` with a held-out part and takes
the first 100 sequences of the order at rank 3 of 8; `seek` takes them in the middle of epoch 2.
"""

import argparse
import hashlib
import itertools
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from common import draft, peak_mb

from decant.schemas import (
    ByteRange,
    CommitRecord,
    Manifest,
    RowGroup,
    ShardPlan,
    Truncation,
)
from decant.storage import CacheReader, CacheWriter, Store
from decant.storage.cache import paths
from decant.storage.cache.records import seal
from decant.storage.files.sealed import publish_json
from decant.student_train import CacheStream

SEQUENCES, LENGTH = 64, 256
"""Of a row group; tokens of a sequence."""
GROUP_BYTES = 2_000_000


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shards", type=int, nargs="+", default=[1000, 10_000, 100_000])
    parser.add_argument("--row-groups", type=int, default=16, help="of a shard")
    parser.add_argument("--open", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.open:
        print(json.dumps(measure(args.open)))
        return
    print(
        f"{args.row_groups} row groups a shard\n{'shards':>8}{'targets':>10}{'records':>10}"
        f"{'seal s':>8}{'open s':>8}{'stream s':>10}{'seek s':>8}{'peak MB':>9}{'growth MB':>11}"
    )
    base = 0.0
    for shards in [1, *args.shards]:
        with tempfile.TemporaryDirectory() as folder:
            seal_s = simulate(Path(folder), shards, args.row_groups)
            size = (Path(folder) / paths.RECORD_INDEX).stat().st_size
            command = [sys.executable, __file__, "--open", folder]
            found = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
        base = base or found["peak_mb"]
        targets = shards * args.row_groups * SEQUENCES * (LENGTH - 1)
        print(
            f"{shards:>8,}{targets:>10.1e}{size / 1e6:>7.1f} MB{seal_s:>8.1f}{found['open']:>8.2f}"
            f"{found['stream']:>10.2f}{found['seek']:>8.2f}{found['peak_mb']:>9.0f}"
            f"{found['peak_mb'] - base:>11.0f}",
            flush=True,
        )


def measure(folder: str) -> dict[str, float]:
    """Seconds and peak memory of opening, in this process."""
    found: dict[str, float] = {}

    def timed(name: str, action: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        result = action()
        found[name] = time.perf_counter() - start
        return result

    timed("open", lambda: CacheReader(folder))
    stream = timed("make", lambda: ranked(folder))
    first = timed("order", lambda: list(itertools.islice(stream._mine(0, 1, 0), 100)))
    found["stream"] = found["make"] + found["order"]
    middle = stream.num_sequences * 5 // 2
    later = timed("seek", lambda: list(itertools.islice(stream._mine(middle, 1, 0), 100)))
    assert len(first) == len(later)
    found["peak_mb"] = peak_mb()
    return found


def ranked(folder: str) -> CacheStream:
    return CacheStream(
        folder, batch_size=8, rank=3, world_size=8, part="train", heldout_fraction=0.01
    )


def simulate(folder: Path, shards: int, row_groups: int) -> float:
    """A final cache without its shards; returns the seconds that sealing its records took."""
    start_of = draft(152_000, Truncation(k=64), (1.0,))
    sequences = SEQUENCES * row_groups
    counts = {"num_sequences": sequences, "num_tokens": sequences * LENGTH}
    plan = (
        ShardPlan(
            shard=i,
            first_sequence=i * sequences,
            num_targets=sequences * (LENGTH - 1),
            input_xxh3_128=digest(i, 0),
            **counts,
        )
        for i in range(shards)
    )
    manifest = CacheWriter.create(folder, start_of, plan).manifest
    start = time.perf_counter()
    store = Store(folder)
    records = simulated_records(manifest, row_groups)
    final = seal(store, manifest, records)
    publish_json(store, paths.MANIFEST, final.to_json())
    return time.perf_counter() - start


def simulated_records(manifest: Manifest, row_groups: int) -> Iterator[CommitRecord]:
    rows, targets = SEQUENCES * LENGTH, SEQUENCES * (LENGTH - 1)
    for shard in range(manifest.num_shards):
        groups = tuple(
            RowGroup(
                rows=rows,
                sequences=SEQUENCES,
                targets=targets,
                data=ByteRange(
                    offset=4 + i * GROUP_BYTES, length=GROUP_BYTES, xxh3_128=digest(shard, i)
                ),
            )
            for i in range(row_groups)
        )
        end = 4 + row_groups * GROUP_BYTES
        yield CommitRecord(
            shard=shard,
            cache_id=manifest.cache_id,
            first_sequence=shard * SEQUENCES * row_groups,
            num_sequences=SEQUENCES * row_groups,
            rows=rows * row_groups,
            targets=targets * row_groups,
            rejected=(),
            bytes=end + 9000,
            xxh3_128=digest(shard, -1),
            row_groups=groups,
            footer=ByteRange(offset=end, length=9000, xxh3_128=digest(shard, -2)),
            kl_error_mean=3.3e-5,
            kl_error_max=9e-5,
            logprob_error_mean=0.1,
            logprob_error_max=0.2,
            seconds=60.0,
            worker=f"node{shard % 64}:1",
        )


def digest(*parts: int) -> str:
    """Hashes do not compress, so they are simulated too."""
    return hashlib.md5(repr(parts).encode()).hexdigest()


if __name__ == "__main__":
    main()
