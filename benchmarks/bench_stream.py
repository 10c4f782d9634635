"""Targets per second from files to collated batches: ours and other loaders on the same data.

    make bench-peers                                         the other loaders, into build/
    python benchmarks/bench_stream.py --cache build/demo/cache-train

The sequences of the cache are repeated up to --targets and written once in every form. All forms
hold the same columns (uint16 ids, one-byte codes, tokens, tail and label log probs), and every
loader ends in the same batch of tensors. Each run is a process of its own: one cold epoch, then
warm ones; `CPU` divides by the processor time of all its threads; growth is of resident memory from
the end of the first epoch to the end of the last. Ours verifies a hash of all it reads, MDS is told
to; the others have none. The limit is a memory map of the collated arrays, without any format.
"""

import argparse
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import peak_mb, save

from decant.schemas import Manifest, ScoredSequence
from decant.storage import CacheReader
from decant.storage.cache.logprobs import of_planes
from decant.storage.cache.plan import plan_of
from decant.storage.cache.writer import write_cache
from decant.student_train import CacheStream

ROOT = Path(__file__).resolve().parents[1]
PEERS = ROOT / "build/bench-peers"
EPOCHS = 4
SHUFFLE = 256
Sample = dict[str, bytes]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cache", required=True, help="a compact cache of top-k targets")
    parser.add_argument("--targets", type=int, default=1_000_000)
    parser.add_argument("--batch-size", type=int, default=16, help="sequences")
    parser.add_argument("--only", nargs="+", choices=LOADERS, default=[*LOADERS])
    parser.add_argument("--repeats", type=int, default=3, help="processes per loader")
    parser.add_argument("--folder", help="keep the data here, and use it again")
    parser.add_argument("--run", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        print(json.dumps(measure(args.run, Path(args.folder), args.batch_size)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(args.folder or temporary)
        targets = write_all(args.cache, folder, args.targets, args.only)
        sizes = {name: size_of(folder / FORMS[name]) for name in args.only}  # before any unpacking
        rows = [run_all(name, args, folder, sizes[name] / targets) for name in args.only]
    save("stream.csv", rows[0], [list(row.values()) for row in rows])


def run_all(name: str, args: argparse.Namespace, folder: Path, size: float) -> dict[str, Any]:
    """The medians of one loader over its processes, printed as a line."""
    found = []
    for _ in range(args.repeats):
        command = [sys.executable, __file__, "--cache", args.cache, "--run", name]
        command += ["--folder", str(folder), "--batch-size", str(args.batch_size)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
        if done.returncode:
            print(f"{name:<34} failed: {done.stderr.strip().splitlines()[-1]}")
            return {"loader": name}
        found.append(json.loads(done.stdout.strip().splitlines()[-1]))
    row: dict[str, Any] = {"loader": name}
    for key in found[0]:
        row[key] = round(statistics.median(run[key] for run in found), 3)
    row["bytes_per_target"] = round(size, 1)
    if name == args.only[0]:
        print(
            f"{'':<34}{'M targets/s':>26}{'M per CPU s':>12}{'bytes':>9}{'growth':>9}{'peak':>8}\n"
            f"{'loader':<34}{'cold wall':>13}{'warm wall':>13}{'warm':>12}{'/target':>9}"
            f"{'MB':>9}{'MB':>8}"
        )
    print(
        f"{name:<34}{row['cold_wall']:>13.2f}{row['warm_wall']:>13.2f}{row['warm_cpu']:>12.2f}"
        f"{row['bytes_per_target']:>9.1f}{row['growth_mb']:>9.0f}{row['peak_mb']:>8.0f}",
        flush=True,
    )
    return row


def measure(name: str, folder: Path, batch_size: int) -> dict[str, float]:
    """One cold epoch and some warm ones in this process."""
    torch.set_num_threads(1)
    epoch = LOADERS[name](folder / FORMS[name], batch_size)
    walls, cpus, resident = [], [], []
    for _ in range(EPOCHS):
        wall, cpu = time.perf_counter(), time.process_time()
        seen = epoch()
        walls.append(seen / (time.perf_counter() - wall) / 1e6)
        cpus.append(seen / (time.process_time() - cpu) / 1e6)
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        resident.append(pages * os.sysconf("SC_PAGESIZE") / 1e6)
    return {
        "cold_wall": walls[0],
        "warm_wall": statistics.median(walls[1:]),
        "warm_cpu": statistics.median(cpus[1:]),
        "growth_mb": resident[-1] - resident[0],
        "peak_mb": peak_mb(),
    }


def ours(threads: int, *, decode: bool = False) -> Callable[[Path, int], Callable[[], int]]:
    def open_(folder: Path, batch_size: int) -> Callable[[], int]:
        stream = CacheStream(folder, batch_size=batch_size, threads=threads)
        steps = stream.num_sequences // batch_size
        batches = iter(stream)

        def epoch() -> int:
            seen = 0
            for _ in range(steps):
                batch = next(batches)
                seen += len(batch.targets) if decode else batch.num_targets
            return seen

        return epoch

    return open_


def samples(folder: Path, batch_size: int) -> Callable[[], int]:
    """The limit: whole epochs of the collated arrays from the page cache."""
    columns = {
        name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("lo", "codes", "scalars")
    }
    step = batch_size * 255

    def epoch() -> int:
        for start in range(0, len(columns["lo"]), step):
            for column in columns.values():
                torch.from_numpy(np.array(column[start : start + step]))
        return len(columns["lo"])

    return epoch


def mds(folder: Path, batch_size: int) -> Callable[[], int]:
    dataset = streaming_base().StreamingDataset(
        local=str(folder), shuffle=True, batch_size=batch_size, validate_hash="xxh3_64"
    )
    return lambda: collate_all(iter(dataset), batch_size)


def litdata(folder: Path, batch_size: int) -> Callable[[], int]:
    from litdata import StreamingDataset

    dataset = StreamingDataset(str(folder), shuffle=True)
    return lambda: collate_all(iter(dataset), batch_size)


def webdataset(folder: Path, batch_size: int) -> Callable[[], int]:
    import webdataset

    files = sorted(str(path) for path in folder.glob("*.tar"))
    dataset = webdataset.WebDataset(files, shardshuffle=100, empty_check=False).shuffle(SHUFFLE)
    return lambda: collate_all(iter(dataset), batch_size)


def hf_datasets(folder: Path, batch_size: int) -> Callable[[], int]:
    import datasets

    datasets.disable_progress_bars()
    files = sorted(str(path) for path in folder.glob("*.parquet"))
    dataset = datasets.load_dataset("parquet", data_files=files, split="train", streaming=True)
    shuffled = dataset.shuffle(seed=0, buffer_size=SHUFFLE)
    return lambda: collate_all(iter(shuffled), batch_size)


LOADERS: dict[str, Callable[[Path, int], Callable[[], int]]] = {
    "numpy memmap, no format (limit)": samples,
    "CacheStream, 1 thread": ours(1),
    "CacheStream, 2 threads": ours(2),
    "CacheStream, 2 threads, decoded": ours(2, decode=True),
    "mosaicml-streaming, zstd 3": mds,
    "litdata, zstd 3": litdata,
    "webdataset, tar": webdataset,
    "datasets streaming, Parquet zstd": hf_datasets,
}
FORMS = {
    name: name.split(",")[0].replace(" ", "-") if not name.startswith("CacheStream") else "cache"
    for name in LOADERS
}
"""Loader -> folder of its data."""


def collate_all(found: Iterator[dict[str, Any]], batch_size: int) -> int:
    """Join every `batch_size` samples into the tensors of a batch; return the targets seen."""
    seen, pending = 0, []
    for sample in found:
        pending.append(sample)
        if len(pending) == batch_size:
            seen += collate(pending)
            pending = []
    return seen + (collate(pending) if pending else 0)


def collate(batch: list[dict[str, Any]]) -> int:
    """The same tensors as a batch of ours: padded tokens, and flat targets in stored widths."""
    tokens = [np.frombuffer(sample["tokens"], "<i4") for sample in batch]
    ids = np.zeros((len(batch), max(map(len, tokens))), np.int64)
    for row, sequence in enumerate(tokens):
        ids[row, : len(sequence)] = sequence
    mask = np.arange(ids.shape[1]) < np.array([[len(sequence)] for sequence in tokens])
    tensors = [torch.from_numpy(ids), torch.from_numpy(mask.astype(np.int64))]
    for name, dtype in (("lo", "u1"), ("codes", "u1"), ("scalars", "<f4")):
        parts = [np.frombuffer(sample[name], dtype) for sample in batch]
        tensors.append(torch.from_numpy(np.concatenate(parts)))
    return len(tensors[-1]) // 2


def write_all(cache: str, folder: Path, targets: int, loaders: list[str]) -> int:
    """Every form of the repeated sequences that is asked for and not there; return the targets."""
    folder.mkdir(parents=True, exist_ok=True)
    repeated = folder / FORMS["CacheStream, 1 thread"]
    if not (repeated / "manifest.json").exists():
        repeat(cache, repeated, targets)
    reader = CacheReader(repeated)
    for name in loaders:
        path = folder / FORMS[name]
        if not path.exists():
            print(f"writing {path.name}", file=sys.stderr)
            partial = path.with_name(path.name + ".tmp")
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            WRITERS[path.name](partial, reader)
            partial.rename(path)
    return reader.manifest.num_targets


def repeat(cache: str, path: Path, targets: int) -> None:
    """A cache of the sequences of another, over and over, up to a number of targets."""
    reader = CacheReader(cache)
    old = reader.manifest
    if old.precision != "compact" or old.truncation.method != "topk" or old.layout.wide:
        raise SystemExit(f"{cache}: needs a compact cache of top-k targets with V <= 65,536")
    once = [exact(sequence) for sequence in reader]
    times = -(-targets // old.num_targets)
    names = ("teacher", "tokenizer", "shared_vocab_size", "truncation", "temperatures")
    fields = {name: getattr(old, name) for name in (*names, "precision", "sequences")}
    draft = Manifest.draft(**fields, source={"path": str(cache), "repeated": times})
    shutil.copytree(Path(cache) / "tokenizer", path / "tokenizer", dirs_exist_ok=True)
    repeated = itertools.chain.from_iterable(itertools.repeat(once, times))
    write_cache(path, draft, repeated, plan_of([once] * times))


def exact(sequence: ScoredSequence) -> ScoredSequence:
    """Decoded values that agree with each other to the last digit, as a teacher gives them."""
    sequence.logprobs[:] = np.minimum.accumulate(sequence.logprobs, axis=1)
    row, slot = np.nonzero(sequence.token_ids == sequence.labels[:, None])
    sequence.label_logprob[row] = sequence.logprobs[row, slot]
    return sequence


def stored(reader: CacheReader) -> Iterator[Sample]:
    """The columns of every sequence as bytes, in the widths of the cache."""
    for group in reader.row_groups():
        rows = reader.read_stored(group)
        codes = of_planes(rows.topk_logprob, reader.manifest.layout.slots, compact=True)
        for i in range(len(rows)):
            targets = rows.target_rows[rows.target_starts[i] : rows.target_starts[i + 1]]
            tokens = rows.token_id[rows.row_starts[i] : rows.row_starts[i + 1]]
            tail, label = rows.by_temperature["log_tail"][0], rows.scalars["label_logprob"]
            scalars = np.stack([tail[targets], label[targets]])
            yield {
                "tokens": tokens.tobytes(),
                "lo": rows.topk_lo[targets].tobytes() + rows.topk_mid[targets].tobytes(),
                "codes": codes[targets].tobytes(),
                "scalars": scalars.tobytes(),
            }


def write_arrays(folder: Path, reader: CacheReader) -> None:
    width = reader.manifest.layout.slots
    columns: dict[str, list[np.ndarray]] = {"lo": [], "codes": [], "scalars": []}
    for sample in stored(reader):
        columns["lo"].append(np.frombuffer(sample["lo"], "u1").reshape(-1, 2 * width))
        columns["codes"].append(np.frombuffer(sample["codes"], "u1").reshape(-1, width))
        columns["scalars"].append(np.frombuffer(sample["scalars"], "<f4").reshape(2, -1).T)
    for name, parts in columns.items():
        np.save(folder / f"{name}.npy", np.concatenate(parts))


def write_mds(folder: Path, reader: CacheReader) -> None:
    columns = dict.fromkeys(("tokens", "lo", "codes", "scalars"), "bytes")
    with streaming_base().MDSWriter(
        out=str(folder), columns=columns, compression="zstd:3", hashes=["xxh3_64"]
    ) as out:
        for sample in stored(reader):
            out.write(sample)


def write_litdata(folder: Path, reader: CacheReader) -> None:
    from litdata.streaming.writer import BinaryWriter

    writer = BinaryWriter(str(folder), chunk_bytes=1 << 26, compression="zstd:3")
    for index, sample in enumerate(stored(reader)):  # samples of bytes would not be compressed
        arrays = {name: np.frombuffer(value, np.uint8) for name, value in sample.items()}
        writer.add_item(index, arrays)
    writer.done()
    writer.merge()


def write_webdataset(folder: Path, reader: CacheReader) -> None:
    import webdataset

    with webdataset.ShardWriter(f"{folder}/%06d.tar", maxsize=1 << 26, verbose=0) as out:
        for index, sample in enumerate(stored(reader)):
            out.write({"__key__": f"{index:09d}", **sample})


def write_hf(folder: Path, reader: CacheReader) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    for shard, start in enumerate(range(0, len(all_samples := list(stored(reader))), 4096)):
        table = pa.Table.from_pylist(all_samples[start : start + 4096])
        pq.write_table(
            table,
            folder / f"{shard:05d}.parquet",
            compression="zstd",
            compression_level=3,
            use_dictionary=False,
            row_group_size=64,
        )


WRITERS: dict[str, Callable[[Path, CacheReader], None]] = {
    FORMS["numpy memmap, no format (limit)"]: write_arrays,
    FORMS["mosaicml-streaming, zstd 3"]: write_mds,
    FORMS["litdata, zstd 3"]: write_litdata,
    FORMS["webdataset, tar"]: write_webdataset,
    FORMS["datasets streaming, Parquet zstd"]: write_hf,
}


def streaming_base() -> Any:
    """mosaicml-streaming without its vision part, which needs a torchvision of the same torch."""
    package = types.ModuleType("streaming")
    package.__path__ = [str(PEERS / "streaming")]
    sys.modules.setdefault("streaming", package)
    import streaming.base

    return streaming.base


def size_of(folder: Path) -> int:
    """Bytes of all files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


if __name__ == "__main__":
    sys.path.append(str(PEERS))
    main()
