"""Numberings: frequent ids get the first numbers, in a shard that stands alone."""

import base64
import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from decant.schemas import FormatError, Layout, Truncation
from decant.storage import CacheReader, verify
from decant.storage.cache.numbering import (
    FOOTER_KEY,
    Fitter,
    Numbering,
    from_footer,
    high_bits,
    ids_of_planes,
    numbers_of_ids,
)
from tests.support import caches

WIDTHS = [1_000, 57_344, 57_345, 70_000]


def layout(vocab_size: int) -> Layout:
    return caches.Settings(vocab_size=vocab_size).draft().layout


def ids_of(vocab_size: int, favoured: slice, rows: int = 200) -> Any:
    """[rows, 64] of 256 ids of an order of all."""
    generator = np.random.default_rng(0)
    order = generator.permutation(vocab_size).astype(np.int32)[favoured]
    return generator.choice(order, (rows, 64))


@pytest.mark.parametrize("vocab_size", WIDTHS)
def test_every_id_has_one_number(vocab_size: int) -> None:
    """Numbers are distinct, those of the head come first, and all fit in the columns' bytes."""
    here = layout(vocab_size)
    fitter = Fitter(here)
    numbering = fitter.choose(ids_of(vocab_size, slice(0, 300)), 200)
    assert numbering is not None and len(numbering.head) % 256 == 0
    every = np.arange(vocab_size, dtype=np.int32)[None]
    numbers = numbers_of_ids(every, numbering, vocab_size)
    assert len(np.unique(numbers)) == vocab_size
    assert set(numbers[0, numbering.head]) == set(range(len(numbering.head)))
    width = 2 if vocab_size <= 57_344 else 3
    assert len(here.id_columns) == width and numbers.max() < 1 << 8 * width
    planes = [(numbers >> 8 * i).astype(np.uint8) for i in range(width)]
    np.testing.assert_array_equal(ids_of_planes(planes, numbering, vocab_size), every)


@pytest.mark.parametrize("vocab_size", [1_000, 70_000])
def test_a_number_of_no_id_is_an_id_beyond_the_vocabulary(vocab_size: int) -> None:
    """So that whoever checks ids finds it."""
    numbering = Numbering(np.arange(10, 266, dtype=np.int32))
    width = 2 if vocab_size < 57_344 else 3
    for number in (vocab_size + 256, 65_535 if width == 2 else (1 << 24) - 1):
        planes = [np.full((1, 1), number >> 8 * i & 255, np.uint8) for i in range(width)]
        assert ids_of_planes(planes, numbering, vocab_size)[0, 0] >= vocab_size


def test_a_numbering_is_replaced_where_another_earns_its_bytes() -> None:
    """One for as long as ids are alike; none where they are few; another where they change."""
    fitter = Fitter(layout(50_000))
    english, python = ids_of(50_000, slice(0, 700)), ids_of(50_000, slice(700, 1_400))
    assert fitter.choose(english[:2], 2) is None
    first = fitter.choose(english, 800)
    assert first is not None and fitter.choose(english, 600) is first
    second = fitter.choose(python, 400)
    assert second is not None and second is not first
    assert fitter.choose(np.zeros((0, 64), np.int32), 0) is second
    assert fitter.chosen == [None, 0, 0, 1, 1]
    counts = np.bincount(python.ravel(), minlength=50_000)
    assert high_bits(counts, second.head) < high_bits(counts, first.head) / 2


def test_a_shard_stands_alone(tmp_path: Path) -> None:
    """Its footer holds the numberings of its row groups; ids come back, and it is smaller."""
    sizes = {}
    order = np.random.default_rng(0).permutation(3_000)
    for version_3 in (False, True):
        settings = caches.Settings(
            truncation=Truncation(k=64), vocab_size=3_000, version_3=version_3
        )
        parts = [
            caches.random_shards(
                settings, num_shards=1, sequences=3, length=50, seed=seed, favoured=favoured
            )[0]
            for seed, favoured in enumerate((order[:300], order[300:600]))
        ]
        sequences = [sequence for part in parts for sequence in part]
        url = tmp_path / str(version_3)
        writer = caches.start_cache(url, settings, [sequences])
        caches.write_shard(writer, 0, sequences, row_group_rows=160)
        writer.finalize()
        assert verify(url).problems == ()
        reader = CacheReader(url)
        for found, expected in zip(reader, sequences, strict=True):
            caches.assert_equal(found, expected)
        rows = [reader.read_stored(group) for group in reader.row_groups()]
        heads = [None if r.numbering is None else tuple(r.numbering.head) for r in rows]
        assert len(heads) == 2 and len(set(heads)) == (1 if version_3 else 2)
        sizes[version_3] = sum(
            reader.column_bytes(group)["topk_mid"] for group in reader.row_groups()
        )
    assert sizes[False] < sizes[True] / 2


def test_a_small_shard_has_no_numbering(tmp_path: Path) -> None:
    """It would take more bytes than it saves."""
    settings = caches.Settings()
    caches.write_cache(tmp_path, settings, caches.random_shards(settings, num_shards=1))
    assert FOOTER_KEY not in pq.read_metadata(tmp_path / "shards/part-000000.parquet").metadata


def packed(head: list[int]) -> str:
    steps = np.diff(head, prepend=0).astype("<u4").view(np.uint8).reshape(-1, 4)
    return base64.b64encode(zlib.compress(steps.T.tobytes())).decode()


@pytest.mark.parametrize(
    ("footer", "message"),
    [
        ("{", "cannot be read"),
        ("[]", "cannot be read"),
        ({"heads": [], "row_groups": [0]}, "cannot be read"),
        ({"heads": [packed([1, 2])], "row_groups": [-1]}, "cannot be read"),
        ({"heads": ["AAAA"], "row_groups": [0]}, "cannot be read"),
        ({"heads": [""], "row_groups": [0]}, "cannot be read"),
        ({"heads": [packed([1, 2])], "row_groups": [0, 0]}, "2 row groups, but there are 1"),
        ({"heads": [packed([1, 1])], "row_groups": [0]}, "not distinct ids below 1000"),
        ({"heads": [packed([1, 1000])], "row_groups": [0]}, "not distinct ids below 1000"),
    ],
)
def test_another_footer_is_refused(footer: Any, message: str) -> None:
    """By the shard's name."""
    text = footer if isinstance(footer, str) else json.dumps(footer)
    with pytest.raises(FormatError, match=f"part-000003.parquet: .*{message}"):
        from_footer({FOOTER_KEY: text.encode()}, layout(1_000), 1, "part-000003.parquet")


def test_a_head_that_does_not_fit_is_refused() -> None:
    """Two bytes hold the vocabulary and so many numbers more."""
    text = json.dumps({"heads": [packed(list(range(9_000)))], "row_groups": [0]})
    with pytest.raises(FormatError, match="a head of more than 8192 ids"):
        from_footer({FOOTER_KEY: text.encode()}, layout(57_344), 1, "part-000003.parquet")
