"""docs/format.md names all that is stored and printed, and its recipes read a shard."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from decant.schemas import (
    ByteRange,
    CommitRecord,
    Manifest,
    Rejected,
    RowGroup,
    Segment,
    ShardPlan,
    TeacherInfo,
    TokenizerInfo,
    Totals,
    Truncation,
    shard_schema,
)
from decant.schemas.truncation import METHODS
from decant.storage import CacheReader, VerifyReport
from decant.storage.inspect.diff import AtTemperatureDiff, Difference, DifferingTarget
from decant.storage.inspect.examples import Entry, Target
from decant.storage.inspect.report import (
    AtK,
    AtTemperature,
    DumpSpeed,
    Histogram,
    ReliabilityBin,
    Report,
    Sample,
    Spread,
    WorkerSpeed,
)
from tests.support import ROOT, caches

FORMAT = (ROOT / "docs/format.md").read_text()


def test_the_format_text_names_every_field_column_and_key() -> None:
    """Nothing is stored or printed that the document does not explain."""
    names = []
    for method, rule in METHODS.items():
        draws = 4 if rule.has_draws else 0
        settings = caches.Settings(
            truncation=Truncation(method=method, draws=draws), vocab_size=100_000
        )
        names += [method, *shard_schema(settings.draft().layout).names]
    names = [re.sub(r"_t[0-9.]+$", "_t{T}", name) for name in names]
    for cls in (
        *(Manifest, TeacherInfo, TokenizerInfo, Truncation, Segment, Totals, ShardPlan),
        *(CommitRecord, Rejected, RowGroup, ByteRange, Report, AtTemperature, Spread, VerifyReport),
        *(Histogram, ReliabilityBin, AtK, DumpSpeed, WorkerSpeed, Sample, Target, Entry),
        *(Difference, AtTemperatureDiff, DifferingTarget),
    ):
        names += [field.name for field in dataclasses.fields(cls)]
    missing = sorted({name for name in names if f"`{name}`" not in FORMAT})
    assert missing == []


@pytest.mark.parametrize(("vocab_size", "numbered"), [(60_000, False), (4_000, True)])
@pytest.mark.parametrize("precision", ["f32", "f16", "compact"])
@pytest.mark.parametrize("method", ["topk", "topp"])
def test_the_recipe_reads_a_shard(
    method: str, precision: str, vocab_size: int, numbered: bool, tmp_path: Path
) -> None:
    """The code in docs/format.md, run as it stands, gives what the reader gives."""
    truncation = Truncation(k=33) if method == "topk" else Truncation(method="topp", k=33, p=0.99)
    settings = caches.Settings(truncation=truncation, vocab_size=vocab_size, precision=precision)
    length = 80 if numbered else 5
    favoured = np.random.default_rng(0).permutation(vocab_size)[:200]
    (sequences,) = caches.random_shards(
        settings, num_shards=1, sequences=2, length=length, favoured=favoured
    )
    writer = caches.start_cache(tmp_path / "cache", settings, [sequences])
    caches.write_shard(writer, 0, sequences, row_group_rows=length)
    writer.finalize()
    reader = CacheReader(tmp_path / "cache")
    recipe, _ = re.findall(r"```python\n(.*?)```", FORMAT, re.DOTALL)
    names: dict[str, Any] = {"cache": tmp_path / "cache", "row_group": 1}
    exec(recipe, names)
    assert len(names["head"]()) == (256 if numbered else 0)
    expected = [reader[1]]
    np.testing.assert_array_equal(
        names["token_ids"], np.concatenate([s.token_ids for s in expected])
    )
    np.testing.assert_allclose(
        names["logprobs"], np.concatenate([s.logprobs for s in expected]), rtol=1e-6, atol=2e-6
    )


@pytest.mark.parametrize("vocab_size", [50, 70_000])
def test_the_recipe_reads_draws(vocab_size: int, tmp_path: Path) -> None:
    """Those of draws without log probs, each id as often as it was drawn."""
    truncation = Truncation(method="sample", draws=7)
    settings = caches.Settings(truncation=truncation, vocab_size=vocab_size)
    shards = caches.random_shards(settings, num_shards=1, sequences=2, length=5)
    caches.write_cache(tmp_path / "cache", settings, shards)
    recipe, rest = re.findall(r"```python\n(.*?)```", FORMAT, re.DOTALL)
    names: dict[str, Any] = {"cache": tmp_path / "cache", "row_group": 0}
    exec(recipe.split("\n\n\ndef head")[0] + "\n" + rest, names)
    drawn = [
        np.sort(np.repeat(ids[ids >= 0], counts[ids >= 0]))
        for sequence in shards[0]
        for ids, counts in zip(sequence.token_ids, sequence.draws, strict=True)
    ]
    np.testing.assert_array_equal(names["draws"], drawn)
