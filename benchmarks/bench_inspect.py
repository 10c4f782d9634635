"""How fast `inspect` and `diff` look at a cache of many targets, and in how much memory.

    python benchmarks/bench_inspect.py                       1,000,000 generated targets, k=64
    python benchmarks/bench_inspect.py --targets 10000000    ten times as many: the same memory
    python benchmarks/bench_inspect.py --cache DIR           on a cache of yours

Every line is a process of its own: seconds of wall and of processor time, targets of the cache per
second of each, and the peak of its memory above what the imports take. Two temperatures, compact.
"""

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
import time

import pyarrow as pa
from bench_codec import SLOTS, VOCAB_SIZE, generate
from common import draft, peak_mb, save

from decant.schemas import Truncation
from decant.storage import CacheReader
from decant.storage.cache.plan import plan_of
from decant.storage.cache.writer import write_cache
from decant.storage.inspect.collect import inspect
from decant.storage.inspect.diff import diff

SEQUENCES = 200
"""Of 256 tokens, in each of the shards, which are copies of each other."""
HEADER = (
    "look",
    "targets",
    "wall_s",
    "cpu_s",
    "targets_per_wall_s",
    "targets_per_cpu_s",
    "peak_mb",
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cache", help="measure on this cache instead of a generated one")
    parser.add_argument("--targets", type=int, default=1_000_000, help="to generate")
    parser.add_argument("--diff", action="store_true", help="the cache against itself as well")
    parser.add_argument("--look", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.look:
        print(json.dumps(measure(args.cache, args.look)))
        return
    with tempfile.TemporaryDirectory() as folder:
        cache = args.cache
        if cache is None:
            cache = f"{folder}/cache"
            write(cache, args.targets)
        targets = CacheReader(cache).index.totals().targets
        rows = []
        print(f"{'look':<12}{'targets':>12}{'wall s':>9}{'cpu s':>9}{'/wall s':>10}{'/cpu s':>10}")
        for look in ("1 thread", "2 threads", "sample 0.1", *["diff"] * args.diff):
            command = [sys.executable, __file__, "--cache", cache, "--look", look]
            found = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
            wall, cpu, peak = found["wall_s"], found["cpu_s"], found["peak_mb"]
            rows.append((look, targets, wall, cpu, targets / wall, targets / cpu, peak))
            print(
                f"{look:<12}{targets:>12,}{wall:>9.2f}{cpu:>9.2f}{targets / wall:>10,.0f}"
                f"{targets / cpu:>10,.0f}   peak {peak:,.0f} MB",
                flush=True,
            )
    save("inspect.csv", HEADER, rows)


def measure(cache: str, look: str) -> dict[str, float]:
    """One look at a cache in this process."""
    before = peak_mb()
    wall, cpu = time.perf_counter(), time.process_time()
    if look == "diff":
        diff(cache, cache)
    elif look.startswith("sample"):
        inspect(cache, sample=float(look.split()[1]))
    else:
        pa.set_cpu_count(1)
        inspect(cache, workers=int(look.split()[0]))
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return {"wall_s": wall, "cpu_s": cpu, "peak_mb": peak_mb() - before}


def write(url: str, targets: int) -> None:
    """A cache of at least so many targets in shards of the same sequences."""
    sequences = generate(SEQUENCES)
    shards = -(-targets // sum(s.num_targets for s in sequences))
    repeated = itertools.chain.from_iterable(itertools.repeat(sequences, shards))
    write_cache(
        url, draft(VOCAB_SIZE, Truncation(k=SLOTS)), repeated, plan_of([sequences] * shards)
    )


if __name__ == "__main__":
    main()
