"""Targets per second from a cache to collated batches, with hashes and page checksums verified.

    python benchmarks/bench_stream.py --cache build/demo/cache-train

Each row is the median over repeats of one pass; `CPU` divides by the processor time of all threads.
The last row reads the same number of bytes of decoded columns from a numpy memmap: the limit that
no format reaches.
"""

import argparse
import resource
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

from storage import CacheReader
from student_train import CacheStream


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cache", required=True)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    reader = CacheReader(args.cache)
    targets = reader.manifest.num_targets
    slots = reader.manifest.layout.slots
    size = sum(record.bytes for record in reader.records)
    print(f"{targets:,} targets, k={slots}, {size / targets:.1f} bytes per target")

    def read_all() -> int:
        return sum(len(reader.read(group).label_logprob) for group in reader.row_groups())

    def stream(threads: int) -> int:
        batches = CacheStream(args.cache, batch_size=args.batch_size, threads=threads)
        seen = 0
        for batch in batches:
            seen += batch.num_targets
            if batches.epoch >= 1:
                return seen
        raise AssertionError

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "flat")
        width = 8 * slots  # int32 id and float32 log prob per entry
        np.lib.format.open_memmap(path, "w+", np.uint8, (targets, width))[:] = 1

        def memmap() -> int:
            flat = np.load(path, mmap_mode="r")
            for start in range(0, targets, 4096):
                flat[start : start + 4096].copy()
            return targets

        print(f"{'path':<28}{'M targets/s wall':>18}{'M targets/s CPU':>18}")
        for name, run in {
            "decode row groups": read_all,
            "CacheStream, 1 thread": lambda: stream(1),
            "CacheStream, 2 threads": lambda: stream(2),
            "numpy memmap (limit)": memmap,
        }.items():
            walls, cpus = [], []
            for _ in range(args.repeats):
                wall, cpu = time.perf_counter(), time.process_time()
                seen = run()
                walls.append(seen / (time.perf_counter() - wall) / 1e6)
                cpus.append(seen / (time.process_time() - cpu) / 1e6)
            print(f"{name:<28}{statistics.median(walls):18.2f}{statistics.median(cpus):18.2f}")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"peak resident memory {peak:.0f} MB")


if __name__ == "__main__":
    main()
