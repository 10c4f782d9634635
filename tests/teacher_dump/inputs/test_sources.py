"""Claims about reading records: every format gives the same ones, and bad data is named."""

import gzip
import json
import os
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from decant.teacher_dump.inputs.config import SourceConfig
from decant.teacher_dump.inputs.records import SourceError
from decant.teacher_dump.inputs.sources import describe_source, iter_records

ROWS = [{"id": f"s{n}", "text": f"text {n} é\u2028"} for n in range(5)]


def encode_lines(rows: list[dict]) -> bytes:
    """Return the rows as JSON lines."""
    return b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)


def zstd_frames(data: bytes, frame_bytes: int) -> bytes:
    """Compress every `frame_bytes` bytes to a frame of their own."""
    starts = range(0, len(data), frame_bytes)
    return b"".join(zstandard.compress(data[n : n + frame_bytes]) for n in starts)


def write(path: Path, rows: list[dict]) -> Path:
    """Write the rows in the format that the suffix of the path names."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=2)
        return path
    data = encode_lines(rows)
    if path.suffix == ".gz":
        data = gzip.compress(data[:40]) + gzip.compress(data[40:])
    elif path.suffix == ".zst":
        data = zstd_frames(data, 40)
    path.write_bytes(data)
    return path


def read(path: Path | str, **options) -> list:
    """Return all records of a source."""
    return list(iter_records(SourceConfig(path=str(path), **options)))


def fingerprint(path: Path | str, **options) -> str:
    """Return the fingerprint of a source."""
    return describe_source(SourceConfig(path=str(path), **options))["fingerprint"]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.parquet"])
def test_every_format_gives_the_same_records(tmp_path, name):
    """A file gives its rows in order, with their ids and places, whatever the format."""
    records = read(write(tmp_path / name, ROWS))
    assert [r.fields for r in records] == ROWS
    assert [r.sample_id for r in records] == [f"s{n}" for n in range(5)]
    assert records[3].where == f"{name} {'row 3' if name == 'a.parquet' else 'line 4'}"


@settings(max_examples=50, deadline=None)
@given(
    texts=st.lists(st.text(st.characters(codec="utf-8"), max_size=80), min_size=1, max_size=12),
    frame_bytes=st.integers(1, 100),
)
def test_zstd_frames_may_be_cut_anywhere(tmp_path_factory, texts, frame_bytes):
    """A zst file of many frames, cut at any byte, is read to its end."""
    path = tmp_path_factory.mktemp("zst") / "a.jsonl.zst"
    path.write_bytes(zstd_frames(encode_lines([{"text": t} for t in texts]), frame_bytes))
    assert [r.fields["text"] for r in read(path)] == texts


def test_lines_longer_than_a_chunk_are_joined(tmp_path):
    """A line that spans many chunks of a decompressed file is one record."""
    rows = [{"text": "x" * 500_000}, {"text": "y"}]
    assert [r.fields for r in read(write(tmp_path / "a.jsonl.zst", rows))] == rows


def test_blank_lines_and_a_byte_order_mark_are_skipped(tmp_path):
    """Blank lines are no records, and count as lines but not in the ids."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\n\n  \r\n{"text": "b"}')
    assert [(r.sample_id, r.where) for r in read(path)] == [
        ("a.jsonl:0", "a.jsonl line 1"),
        ("a.jsonl:1", "a.jsonl line 4"),
    ]


def test_directories_and_globs_are_read_in_sorted_order(tmp_path):
    """A directory means its files and those below, by name, without hidden and foreign ones."""
    for name in ("b.jsonl", "a.jsonl.gz", "sub/c.jsonl", ".hidden.jsonl", "_temporary/d.jsonl"):
        write(tmp_path / "data" / name, [{"text": name}])
    (tmp_path / "data/README.md").write_text("about")
    ids = ["a.jsonl.gz:0", "b.jsonl:0", "sub/c.jsonl:0"]
    assert [r.sample_id for r in read(tmp_path / "data")] == ids
    assert [r.sample_id for r in read(tmp_path / "data/*.jsonl")] == ids[1:2]
    assert [r.sample_id for r in read(tmp_path / "data/s*/*.jsonl")] == ids[2:]


def test_an_explicit_format_reads_other_suffixes(tmp_path):
    """With format: jsonl a file is read as JSON lines whatever its name."""
    path = write(tmp_path / "a.data", ROWS)
    assert len(read(path, format="jsonl")) == 5
    with pytest.raises(SourceError, match=r"a\.data has no known suffix.*\.jsonl"):
        read(path)


def test_limit_stops_reading(tmp_path):
    """With a limit, what follows is not even looked at."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(encode_lines(ROWS[:2]) + b"garbage")
    assert len(read(path, limit=2)) == 2


def test_ids_come_from_the_id_field(tmp_path):
    """Integers become strings; a field asked for by name must be there."""
    path = write(tmp_path / "a.jsonl", [{"uid": 7, "text": "a"}, {"text": "b"}])
    assert read(path, id_field="uid", limit=1)[0].sample_id == "7"
    with pytest.raises(SourceError, match=r"a\.jsonl line 2: no field 'uid'.*\['text'\]"):
        read(path, id_field="uid")


@pytest.mark.parametrize("value", [1.5, True, ["a"], ""])
def test_ids_that_are_no_names_are_refused(tmp_path, value):
    """An id is a non-empty string or an integer."""
    with pytest.raises(SourceError, match=r"a\.jsonl line 1: 'id' is"):
        read(write(tmp_path / "a.jsonl", [{"id": value}]))


def test_a_repeated_id_is_an_error_naming_both_places(tmp_path):
    """The ids of a source are unique over all its files."""
    write(tmp_path / "d/a.jsonl", ROWS)
    write(tmp_path / "d/b.jsonl", [{"id": "new"}, {"id": "s2"}])
    with pytest.raises(SourceError, match=r"'s2'.*a\.jsonl line 3 and b\.jsonl line 2"):
        read(tmp_path / "d")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", r"a\.jsonl is empty"),
        (b"\n \n", r"a\.jsonl is empty"),
        (b'{"id": 1}\n{"id": \n', r"a\.jsonl line 2: not readable as JSON"),
        (b"[" * 100_000, r"a\.jsonl line 1: not readable as JSON"),
        (b"[1, 2]\n", r"a\.jsonl line 1: expected a JSON object, found list '\[1, 2\]'"),
        (b'{"id": 1}\n{"text": "\xff"}\n', r"a\.jsonl line 2: not valid UTF-8: .*0xff"),
        (rb'{"text": "\ud800"}', r"a\.jsonl line 1: not valid UTF-8: .*surrogate"),
    ],
)
def test_bad_lines_are_named(tmp_path, data, message):
    """What is no JSON object in UTF-8 is an error with file and line."""
    (tmp_path / "a.jsonl").write_bytes(data)
    with pytest.raises(SourceError, match=message):
        read(tmp_path / "a.jsonl")


def test_escaped_surrogate_pairs_are_read(tmp_path):
    """Whole pairs of escapes are ordinary JSON."""
    (tmp_path / "a.jsonl").write_bytes(rb'{"text": "\uD83D\ude00"}')
    assert read(tmp_path / "a.jsonl")[0].fields["text"] == "\U0001f600"


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.parquet"])
@pytest.mark.parametrize("lost_bytes", [1, 5, 20])
def test_truncated_files_are_errors(tmp_path, name, lost_bytes):
    """A file that lost its last bytes is never read as a shorter one."""
    path = write(tmp_path / name, ROWS)
    path.write_bytes(path.read_bytes()[:-lost_bytes])
    with pytest.raises(SourceError, match=f"{name} is (damaged or cut short|not readable as Par)"):
        read(path)


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.parquet"])
def test_files_that_are_not_what_their_name_says_are_errors(tmp_path, name):
    """Plain text under the name of a compressed or Parquet file is refused."""
    (tmp_path / name).write_bytes(encode_lines(ROWS))
    with pytest.raises(SourceError, match=name):
        read(tmp_path / name)


def test_an_empty_parquet_file_is_an_error(tmp_path):
    """A file without rows is a mistake of whoever wrote it."""
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "a.parquet")
    with pytest.raises(SourceError, match=r"a\.parquet is empty"):
        read(tmp_path / "a.parquet")


def test_paths_that_mean_nothing_are_errors(tmp_path):
    """A path must exist, hold files of one kind, and be local; it is checked before reading."""
    write(tmp_path / "a.jsonl", ROWS)
    write(tmp_path / "b.parquet", ROWS)
    for path, message in (
        (tmp_path / "none.jsonl", "does not exist"),
        ("none.jsonl", "does not exist"),
        (tmp_path / "*.csv", "holds no files"),
        (tmp_path, "holds jsonl and parquet files"),
        ("s3://bucket/a.jsonl", "is a URL"),
    ):
        with pytest.raises(SourceError, match=message):
            iter_records(SourceConfig(path=str(path)))
    assert len(read(tmp_path, format="parquet")) == 5


@pytest.mark.parametrize("options", [{"split": "test"}, {"subset": "x"}])
@pytest.mark.parametrize("format_", ["auto", "jsonl"])
def test_hf_options_are_refused_for_files(tmp_path, options, format_):
    """Split and subset have no effect on files, so they are errors there."""
    path = write(tmp_path / "a.jsonl", ROWS)
    with pytest.raises(SourceError, match="have no effect on the files"):
        read(path, format=format_, **options)


@pytest.mark.parametrize(
    "options", [{"path": ""}, {"format": "csv"}, {"limit": -1}, {"id_field": ""}]
)
def test_impossible_configs_are_refused(options):
    """A config is checked when it is made."""
    with pytest.raises(ValueError, match=next(iter(options))):
        SourceConfig(**{"path": "a.jsonl"} | options)


def test_the_fingerprint_is_that_of_the_content(tmp_path):
    """It ignores where and when the files lie, and sees content, names and options."""
    here, there = tmp_path / "here", tmp_path / "far" / "there"
    for name in ("a.jsonl", "b.jsonl"):
        write(here / name, [{"text": name}])
    shutil.copytree(here, there)
    for path in there.iterdir():
        os.utime(path, (1, 1))
    same = fingerprint(here)
    assert same == fingerprint(there) == fingerprint(f"{there}/*.jsonl")
    changed = [fingerprint(here, limit=1), fingerprint(here, id_field="text")]
    (there / "b.jsonl").rename(there / "c.jsonl")
    changed.append(fingerprint(there))
    write(here / "b.jsonl", [{"text": "other"}])
    changed.append(fingerprint(here))
    assert len({same, *changed}) == 5


def test_the_description_lists_the_files(tmp_path):
    """Every file is described by name, size and hash."""
    path = write(tmp_path / "a.jsonl", ROWS)
    description = describe_source(SourceConfig(path=str(path)))
    assert description["path"] == str(path)
    assert [(f["name"], f["bytes"]) for f in description["files"]] == [
        ("a.jsonl", path.stat().st_size)
    ]
    assert len(description["fingerprint"]) == 32 == len(description["files"][0]["xxh3_128"])


def test_saved_datasets_are_read(tmp_path):
    """A directory of `save_to_disk` is recognised, with or without splits, wherever it is moved."""
    datasets = pytest.importorskip("datasets")
    plain = datasets.Dataset.from_list(ROWS)
    plain.save_to_disk(tmp_path / "plain")
    datasets.DatasetDict(train=plain, test=plain.select([1])).save_to_disk(tmp_path / "dict")

    assert [r.fields for r in read(tmp_path / "plain")] == ROWS
    assert [r.sample_id for r in read(tmp_path / "dict", split="test")] == ["s1"]
    no_ids = read(tmp_path / "plain", limit=1, id_field="text")
    assert no_ids[0].where.endswith("plain split train row 0")
    for name, options in (("plain", {"split": "test"}), ("dict", {"subset": "x"})):
        with pytest.raises(SourceError, match="was saved with splits"):
            read(tmp_path / name, **options)

    shutil.copytree(tmp_path / "plain", tmp_path / "moved")
    assert fingerprint(tmp_path / "plain") == fingerprint(tmp_path / "moved")
    assert fingerprint(tmp_path / "dict") != fingerprint(tmp_path / "dict", split="test")
    assert describe_source(SourceConfig(path=str(tmp_path / "plain")))["rows"] == 5


def test_local_dataset_repositories_are_read(tmp_path, monkeypatch):
    """A cloned dataset repository is read with format: hf and identified by its files."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    write(tmp_path / "repo/data/train.jsonl", ROWS)
    write(tmp_path / "repo/data/test.jsonl", ROWS[:1])
    records = read(tmp_path / "repo", format="hf", split="test")
    assert [r.fields for r in records] == ROWS[:1]
    shutil.copytree(tmp_path / "repo", tmp_path / "moved")
    options = {"format": "hf", "split": "test"}
    assert fingerprint(tmp_path / "repo", **options) == fingerprint(tmp_path / "moved", **options)


def test_unloadable_datasets_are_errors(tmp_path):
    """What is neither a file nor a dataset is named."""
    pytest.importorskip("datasets")
    (tmp_path / "nothing").mkdir()
    with pytest.raises(SourceError, match="neither a local file nor a Hugging Face dataset"):
        read(tmp_path / "nothing", format="hf")
