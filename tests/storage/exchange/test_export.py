"""An export holds what the reader gives, whole or not at all."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray

from decant.schemas import (
    FormatError,
    Truncation,
)
from decant.storage import CacheReader
from decant.storage.cache import paths
from decant.storage.exchange.export import export
from decant.storage.exchange.importing import import_cache
from tests.support import ROOT, caches
from tests.support.foreign import config, distillkit_rows, known_records, write

TRUNCATIONS = {
    "topk": Truncation(k=6),
    "topp": Truncation(method="topp", k=9, p=0.8),
    "topk+sample": Truncation(method="topk+sample", k=2, draws=5),
}


@pytest.fixture(scope="module", params=["topk", "topp", "topk+sample"])
def reader(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> CacheReader:
    """A cache of two shards; ids of three bytes, two temperatures, prompts. Never write to it."""
    precision = "compact" if request.param == "topp" else "f32"
    settings = caches.Settings(
        truncation=TRUNCATIONS[request.param], vocab_size=70_000, precision=precision
    )
    path = tmp_path_factory.mktemp("export") / "cache"
    caches.write_cache(path, settings, caches.random_shards(settings, sequences=2, length=5))
    return CacheReader(path)


def lists(values: NDArray, used: NDArray[np.bool_]) -> list[list[Any]]:
    """The entries in use of each target."""
    return [row[keep].tolist() for row, keep in zip(values, used, strict=True)]


def expected_row(reader: CacheReader, index: int) -> dict[str, Any]:
    """What a sequence export holds of one sequence."""
    s = reader[index]
    used = s.token_ids >= 0
    row = {
        "sequence": index,
        "sample_id": s.sample_id,
        "input_ids": s.input_ids.tolist(),
        "is_target": s.is_target.tolist(),
        "positions": s.positions.tolist(),
        "token_ids": lists(s.token_ids, used),
        "logprobs": lists(s.logprobs, used),
        "log_tail_t1": s.log_tail[:, 0].tolist(),
        "log_z_t2": s.log_z[:, 1].tolist(),
        "log_tail_t2": s.log_tail[:, 1].tolist(),
        "label_logprob": s.label_logprob.tolist(),
    }
    return row | ({"draws": lists(s.draws, used)} if s.draws is not None else {})


def test_a_parquet_export_is_what_the_reader_gives(reader: CacheReader, tmp_path: Path) -> None:
    """A row per sequence, a file per shard, lists as long as what is kept, values bit for bit."""
    report = export(reader.url, tmp_path / "out")
    files = sorted((tmp_path / "out").iterdir())
    assert [file.name for file in files] == ["part-000000.parquet", "part-000001.parquet"]
    rows = pq.read_table(tmp_path / "out").to_pylist()
    assert rows == [expected_row(reader, i) for i in range(len(reader))]
    assert (report.sequences, report.targets) == (len(reader), reader.manifest.num_targets)
    assert report.bytes == sum(file.stat().st_size for file in files)


def test_a_saved_dataset_is_what_the_reader_gives(reader: CacheReader, tmp_path: Path) -> None:
    """`datasets.load_from_disk` opens it; the description says whose values they are."""
    export(reader.url, tmp_path / "out", file_format="hf")
    dataset = datasets.load_from_disk(str(tmp_path / "out"))
    assert list(dataset) == [expected_row(reader, i) for i in range(len(reader))]
    assert json.loads(dataset.info.description)["cache_id"] == reader.manifest.cache_id
    names = [path.name for path in (tmp_path / "out").iterdir()]
    assert sorted(names) == ["data-00000-of-00001.arrow", "dataset_info.json", "state.json"]


@pytest.mark.parametrize("file_format", ["parquet", "hf"])
def test_a_target_export_has_a_row_per_target(
    file_format: str, reader: CacheReader, tmp_path: Path
) -> None:
    """The same values, with the actual token as the label."""
    export(reader.url, tmp_path / "out", file_format=file_format, rows="targets")
    if file_format == "hf":
        rows = list(datasets.load_from_disk(str(tmp_path / "out")))
    else:
        rows = pq.read_table(tmp_path / "out").to_pylist()
    expected = []
    for i in range(len(reader)):
        row, s = expected_row(reader, i), reader[i]
        per_target = {
            n: v for n, v in row.items() if n.startswith(("token_", "log", "label", "dr"))
        }
        for target in range(s.num_targets):
            expected.append(
                {"sequence": i, "sample_id": s.sample_id, "position": int(s.positions[target])}
                | {"label": int(s.labels[target])}
                | {name: values[target] for name, values in per_target.items()}
            )
    assert rows == expected


def test_an_export_is_whole_or_absent(tmp_path: Path) -> None:
    """Refused: what exists, a URL, a cache that is not final. Damage found late leaves nothing."""
    settings = caches.Settings()
    shards = caches.random_shards(settings)
    caches.write_cache(tmp_path / "cache", settings, shards)
    (tmp_path / "there").mkdir()
    with pytest.raises(FileExistsError, match="there exists already"):
        export(tmp_path / "cache", tmp_path / "there")
    with pytest.raises(ValueError, match="is a URL"):
        export(tmp_path / "cache", "memory://out")
    file = tmp_path / "cache" / paths.shard(1)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    before = sorted(tmp_path.iterdir())
    for file_format in ("parquet", "hf"):
        with pytest.raises(FormatError, match=r"part-000001\.parquet is damaged"):
            export(tmp_path / "cache", tmp_path / "out", file_format=file_format)
        assert sorted(tmp_path.iterdir()) == before
    caches.start_cache(tmp_path / "started", settings, shards)
    with pytest.raises(FormatError, match="is not complete"):
        export(tmp_path / "started", tmp_path / "out")


def test_an_interrupt_leaves_nothing(reader: CacheReader, tmp_path: Path) -> None:
    """Neither an export nor an import that is stopped in the middle."""

    def interrupt(done: int, total: int) -> None:
        if done == total > 1:
            raise KeyboardInterrupt

    for file_format in ("parquet", "hf"):
        with pytest.raises(KeyboardInterrupt):
            export(reader.url, tmp_path / "out", file_format=file_format, progress=interrupt)
    source = write(tmp_path / "dump.parquet", distillkit_rows(known_records()))
    with pytest.raises(KeyboardInterrupt):
        import_cache(config(source), tmp_path / "out", interrupt)
    assert [path.name for path in tmp_path.iterdir()] == ["dump.parquet"]


def test_exporting_needs_no_torch(tmp_path: Path) -> None:
    """Neither format imports torch or transformers."""
    settings = caches.Settings()
    caches.write_cache(tmp_path / "cache", settings, caches.random_shards(settings))
    code = (
        "import sys; from decant.storage.__main__ import main;"
        f"c = main(['export', {str(tmp_path / 'cache')!r}, {str(tmp_path / 'out')!r},"
        " '--format', 'hf']);"
        "print(c, [m for m in ('torch', 'transformers', 'vllm') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "0 []" and done.stderr == ""
