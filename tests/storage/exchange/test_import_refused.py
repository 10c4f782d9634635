"""What an import refuses: by file, row and a way out."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest

from decant.storage.exchange.foreign import ForeignError, ForeignRecord, make_record
from decant.storage.exchange.importing import import_cache
from tests.support.foreign import (
    K,
    V,
    axolotl_object_rows,
    config,
    distillkit_rows,
    imported,
    known_records,
    write,
)


def without(row: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key != name}


def changed(name: str, place: int, entry: int, value: Any) -> Callable[[dict[str, Any]], dict]:
    """One entry of one list replaced."""

    def change(row: dict[str, Any]) -> dict[str, Any]:
        values = [list(items) for items in row[name]]
        values[place][entry] = value
        return {**row, name: values}

    return change


def cut(name: str, place: int, length: int = 3) -> Callable[[dict[str, Any]], dict]:
    """One list cut short."""

    def change(row: dict[str, Any]) -> dict[str, Any]:
        values = [list(items) for items in row[name]]
        values[place] = values[place][:length]
        return {**row, name: values}

    return change


def cut_both(row: dict[str, Any]) -> dict[str, Any]:
    return cut("top_values", 4)(cut("token_ids", 4)(row))


BAD: dict[str, tuple[Callable[[dict[str, Any]], dict[str, Any]], str]] = {
    "missing column": (
        lambda row: without(row, "top_values"),
        r"dump.parquet: no column top_values for --format distillkit; found input_ids, token_ids",
    ),
    "missing tokens": (lambda row: without(row, "input_ids"), "add the tokens that the teacher"),
    "compressed": (
        lambda row: {"input_ids": row["input_ids"], "compressed_logprobs": [[1]]},
        "no column bytepacked_indices for --format distillkit",
    ),
    "ragged": (cut("top_values", 4), r"row 2, list 4: token_ids has 8 entries, top_values has 3"),
    "short list": (cut_both, r"row \d, list \d: 8 entries, but .*row 2, list 4: 3; .* --k 3"),
    "id too large": (
        changed("token_ids", 3, 1, V),
        f"row 2, list 3: {V} is not a token id, expected 0 to {V - 1}: "
        "give the dump's own tokenizer",
    ),
    "negative id": (changed("token_ids", 3, 1, -5), "row 2, list 3: token id -5 is negative"),
    "token too large": (
        lambda row: {**row, "input_ids": [V + 7, *row["input_ids"][1:]]},
        f"row 2: input_ids has {V + 7}, expected 0 to {V - 1}",
    ),
    "NaN": (changed("top_values", 5, 2, float("nan")), "row 2, list 5: nan is not a number"),
    "infinite": (changed("top_values", 5, 0, float("inf")), "row 2, list 5: inf is not a log prob"),
    "logit": (changed("top_values", 5, 0, 3.5), "row 2, list 5: 3.5 is a logit"),
    "too much mass": (
        lambda row: changed("top_values", 5, 0, 0.0)(changed("top_values", 5, 1, 0.0)(row)),
        r"row 2, list 5: probabilities add up to 2\.\d+, expected at most 1",
    ),
    "lost mass": (
        lambda row: {**row, "top_values": [[-8.0 - i for i in range(K)]] * len(row["top_values"])},
        r"row 2, list 0: 0\.9\d+ of the mass is neither in the entries nor",
    ),
    "too many lists": (
        lambda row: {**row, **{n: row[n] * 2 for n in ("token_ids", "top_values")}},
        r"row 2: top_values has 30 lists for 16 tokens: expected one each, or all but the last",
    ),
    "labels too short": (lambda row: {**row, "labels": [1]}, "labels has 1 entries for 16 tokens"),
    "packed": (
        lambda row: {**row, "attention_mask": [1, 1, 0, *[1] * 13]},
        "attention_mask is not one run of 1 between zeros, nor runs of 1, 2, 3",
    ),
}


@pytest.mark.parametrize("name", list(BAD))
def test_bad_records_are_named(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Code 2 and one line with file, row, what was found and a way out; nothing is left."""
    change, message = BAD[name]
    rows = distillkit_rows(known_records())
    every = name in ("missing column", "missing tokens", "compressed", "labels too short", "packed")
    if name in ("labels too short", "packed"):
        rows = [rows[2]]
    rows = [change(row) if every or i == 2 else row for i, row in enumerate(rows)]
    source = write(tmp_path / "dump.parquet", rows)
    with pytest.raises(ForeignError, match=message) as caught:
        import_cache(config(source), tmp_path / "cache")
    assert str(source) in str(caught.value) and "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["dump.parquet"]


def test_a_doubled_id_is_named(tmp_path: Path) -> None:
    """Two entries of one id in one list have no meaning."""
    rows = distillkit_rows(known_records())
    rows[1]["token_ids"][2][1] = twice = rows[1]["token_ids"][2][0]
    with pytest.raises(ForeignError, match=f"row 1, list 2: {twice} stands twice"):
        imported(tmp_path, rows)


def test_sources_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    """No file, another kind of file, an empty one, broken JSON, several splits, mixed files."""

    def refuse(name: str, message: str, **options: Any) -> None:
        with pytest.raises(ForeignError, match=message):
            import_cache(config(tmp_path / name, **options), tmp_path / "out" / "cache")

    refuse("nowhere", "nowhere: no such file")
    (tmp_path / "dump.csv").write_text("a,b\n")
    refuse("dump.csv", r"expected a file ending in one of \.parquet")
    (tmp_path / "text.parquet").write_text("not Parquet")
    refuse("text.parquet", r"text\.parquet cannot be read as a Parquet file")
    (tmp_path / "bytes.jsonl").write_bytes(b"\x00\xff\n")
    refuse("bytes.jsonl", r"bytes\.jsonl line 1 is no JSON record")
    (tmp_path / "list.jsonl").write_text('{"input_ids": [1]}\n[1]\n')
    refuse("list.jsonl", r"list\.jsonl: no column token_ids, top_values")
    (tmp_path / "empty.jsonl").write_text("\n")
    refuse("empty.jsonl", "0 records give no target")
    rows = distillkit_rows(known_records(1))
    write(tmp_path / "text.jsonl", [{**rows[0], "input_ids": "abc"}])
    refuse("text.jsonl", "line 1: input_ids is string: expected a list of integers")
    write(tmp_path / "flat.jsonl", [{**rows[0], "top_values": [0.5]}])
    refuse("flat.jsonl", "top_values is list<.*: expected one list of entries per token")
    (tmp_path / "folder").mkdir()
    refuse("folder", "no .parquet or .jsonl file and no saved dataset inside")
    write(tmp_path / "folder/a.parquet", rows)
    write(tmp_path / "folder/b.jsonl", rows)
    refuse("folder", "both .parquet and .jsonl")
    splits = datasets.DatasetDict({"train": datasets.Dataset.from_list(rows)})
    splits.save_to_disk(str(tmp_path / "splits"))
    refuse("splits", "give one of .*splits/train")
    write(tmp_path / "axolotl.parquet", [{"messages": "hi", "logprobs": [[-0.1]]}])
    refuse("axolotl.parquet", "no column input_ids .*chat template", file_format="axolotl")
    objects = axolotl_object_rows(known_records(1))
    objects[0]["logprobs"][3][0]["token"] = "the"
    write(tmp_path / "objects.parquet", objects)
    refuse("objects.parquet", '"token": "token_id:N"', file_format="axolotl")
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


def test_options_without_effect_are_errors(tmp_path: Path) -> None:
    """What cannot be meant is refused before anything is read."""
    with pytest.raises(ValueError, match="give --tokenizer, or --vocab-size"):
        config(tmp_path, vocab_size=0)
    with pytest.raises(ValueError, match="--logprobs-field has no effect"):
        config(tmp_path, logprobs_field="x")
    with pytest.raises(ValueError, match="lies inside the source"):
        import_cache(config(tmp_path), tmp_path / "cache")
    rows = distillkit_rows(known_records())
    with pytest.raises(ForeignError, match=r"8 entries, fewer than --k 9: give --k 8 or less"):
        imported(tmp_path, rows, k=9)


def test_a_negative_id_with_a_value_is_no_entry_that_is_not_there() -> None:
    """From whatever file: it is named, and what has no value may have any filler."""

    def record(ids: list[int], values: list[float]) -> ForeignRecord:
        tokens = np.array([1, 2])
        return make_record("f row 7", "a", tokens, 1, np.array([ids]), np.array([values]), V)

    assert record([3, -1], [-0.5, -np.inf]).token_ids.tolist() == [[3, -1]]
    with pytest.raises(ForeignError, match="f row 7, list 0: -5 is not a token id"):
        record([3, -5], [-0.5, -1.0])
