"""Claims about JSON files: lines and arrays, under every name, give the same records."""

import gzip
import json
from pathlib import Path

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from decant.teacher_dump.inputs import json_lines
from decant.teacher_dump.inputs.config import SourceConfig
from decant.teacher_dump.inputs.records import SourceError
from decant.teacher_dump.inputs.sources import iter_records

ROWS = [{"text": f"text {n} é\u2028", "list": [{"a": n}, "]", "}"]} for n in range(5)]
LINES = b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in ROWS)
PACKED = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress}


def read(path: Path, **options) -> list:
    """All records of a source."""
    return list(iter_records(SourceConfig(path=str(path), **options)))


def save(path: Path, data: bytes) -> Path:
    """Write a file with its folders."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("packed", PACKED)
@pytest.mark.parametrize("suffix", [".jsonl", ".ndjson", ".json"])
def test_json_lines_may_have_every_name(tmp_path, suffix, packed):
    """Alone or in a folder, packed or not."""
    path = save(tmp_path / "d" / f"a{suffix}{packed}", PACKED[packed](LINES))
    for place in (path, path.parent):
        records = read(place)
        assert [r.fields for r in records] == ROWS
        assert records[1].where == f"a{suffix}{packed} line 2"


@pytest.mark.parametrize("packed", PACKED)
@pytest.mark.parametrize("indent", [None, 2])
def test_an_array_is_read_item_by_item(tmp_path, indent, packed):
    """A .json file may be one array, on one line or on many."""
    data = b"\xef\xbb\xbf \n" + json.dumps(ROWS, indent=indent, ensure_ascii=False).encode()
    records = read(save(tmp_path / f"a.json{packed}", PACKED[packed](data)))
    assert [r.fields for r in records] == ROWS
    assert [(r.sample_id, r.where) for r in records][3] == (
        f"a.json{packed}:3",
        f"a.json{packed} item 3",
    )


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.dictionaries(st.text(max_size=3), st.text(max_size=30) | st.floats(allow_nan=False)),
        min_size=1,
        max_size=9,
    ),
    st.integers(1, 40),
)
def test_an_array_may_be_cut_anywhere(tmp_path_factory, rows, frame_bytes):
    """Chunks of any size, as decompression gives them, join to the same items."""
    data = json.dumps(rows, ensure_ascii=False, indent=1).encode()
    starts = range(0, len(data), frame_bytes)
    frames = b"".join(zstandard.compress(data[n : n + frame_bytes]) for n in starts)
    path = save(tmp_path_factory.mktemp("array") / "a.json.zst", frames)
    assert [fields for _, _, fields in json_lines.json_rows("a", path)] == rows


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"[]", r"a\.json is empty"),
        (b'[{"a": 1} {"a": 2}]', r"a\.json item 1: not readable as JSON: expected a comma"),
        (b'[{"a": 1}, {"a": ', r"a\.json item 1: not readable as JSON"),
        (b'[{"a": 1}', r"a\.json item 1: not readable as JSON: expected a comma"),
        (b'[{"a": 1}]]', r"a\.json item 0: not readable as JSON: expected nothing behind"),
        (b"[1, 2]", r"a\.json item 0: expected a JSON object, found int '1'"),
        (b'[{"a": "\xff"}]', r"a\.json item 0: not valid UTF-8"),
        (rb'[{"a": "\ud800"}]', r"a\.json item 0: not valid UTF-8: .*surrogate"),
        (b"[" * 100_000, r"a\.json item 0: not readable as JSON"),
        (b'{"a":\n 1}', r"a\.json line 1: not readable as JSON: .*each line must be one whole"),
    ],
)
def test_bad_arrays_are_named(tmp_path, data, message):
    """What is no array of objects in UTF-8 is an error with file and item."""
    with pytest.raises(SourceError, match=message):
        read(save(tmp_path / "a.json", data))


def test_json_beside_data_is_about_the_data(tmp_path):
    """In a folder a .json file is read only where it is not beside files of data."""
    save(tmp_path / "d/a.jsonl", LINES)
    save(tmp_path / "d/meta.json", b"{}")
    assert len(read(tmp_path / "d")) == 5
    save(tmp_path / "e/one.json", LINES)
    save(tmp_path / "e/two.json.gz", gzip.compress(LINES))
    save(tmp_path / "e/dataset_info.json", b"{}")
    assert [r.sample_id for r in read(tmp_path / "e")][::5] == ["one.json:0", "two.json.gz:0"]
