"""The SQL and Polars recipes of docs/exchange.md give what `inspect --json` says."""

import json
import re
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import polars as pl
import pyarrow.parquet as pq
import pytest

from decant.schemas import Truncation
from decant.storage import CacheReader
from decant.storage.__main__ import main
from decant.storage.exchange.export import export
from tests.support import ROOT, caches

TEXT = (ROOT / "docs/exchange.md").read_text()
SQL = {block.split("\n")[0]: block for block in re.findall(r"```sql\n(.*?)```", TEXT, re.DOTALL)}
PYTHON = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
TRUNCATIONS = {
    "topk": Truncation(k=6),
    "topp": Truncation(method="topp", k=9, p=0.8),
    "topk+sample": Truncation(method="topk+sample", k=3, draws=9),
}


def sql(first_words: str, **places: Path) -> list[dict[str, Any]]:
    """The rows that a recipe gives, found by how its first line begins."""
    (query,) = (text for line, text in SQL.items() if line.startswith(f"-- {first_words}"))
    for name, path in places.items():
        query = query.replace(f"'{name}/", f"'{path}/")
    result = duckdb.execute(query)
    names = [column[0] for column in result.description]
    return [dict(zip(names, row, strict=True)) for row in result.fetchall()]


def run(recipe: str, **names: Any) -> dict[str, Any]:
    """The names that a Python recipe leaves."""
    exec(recipe, names)
    return names


@pytest.fixture(scope="module", params=["topk", "topp", "topk+sample"])
def method(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module", params=[50, 70_000])
def cache(
    request: pytest.FixtureRequest, method: str, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Three shards, prompts in every other sequence, ids of two and of three bytes."""
    precision = "compact" if method == "topp" else "f32"
    settings = caches.Settings(
        truncation=TRUNCATIONS[method], vocab_size=request.param, precision=precision
    )
    path = tmp_path_factory.mktemp("sql") / "cache"
    caches.write_cache(path, settings, caches.random_shards(settings, num_shards=3, length=2))
    return path


@pytest.fixture
def report(cache: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """What inspect says."""
    assert main(["inspect", str(cache), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_duckdb_reads_masses_and_labels(cache: Path, report: dict[str, Any]) -> None:
    """Retained mass at every temperature, the teacher's cross-entropy, the number of targets."""
    (found,) = sql("mass kept", CACHE=cache)
    at_1, at_2 = (at["retained_mass"] for at in report["temperatures"])
    assert found["targets"] == report["targets"]
    assert found["retained_mass_t1"] == pytest.approx(at_1["mean"], abs=1e-6)
    assert found["p05_t1"] == pytest.approx(at_1["p05"], abs=1e-6)
    assert found["retained_mass_t2"] == pytest.approx(at_2["mean"], abs=1e-6)
    assert found["teacher_ce"] == pytest.approx(report["teacher_ce"], rel=1e-6)


def test_duckdb_reads_lengths(cache: Path, report: dict[str, Any]) -> None:
    """Tokens per sequence, and the sums."""
    (found,) = sql("lengths in tokens", CACHE=cache)
    assert (found["sequences"], found["tokens"]) == (report["sequences"], report["tokens"])
    for name in ("min", "mean", "p50", "max"):
        assert found[name] == pytest.approx(report["sequence_length"][name]), name


def test_duckdb_groups_targets(cache: Path, report: dict[str, Any]) -> None:
    """By sequence and by position, every target is counted once."""
    hardest = sql("the sequences that surprise", CACHE=cache)
    expected = {s.sample_id: -float(s.label_logprob.mean()) for s in CacheReader(cache)}
    assert len(hardest) == 10
    assert [row["teacher_ce"] for row in hardest] == pytest.approx(
        sorted(expected.values(), reverse=True)[:10], rel=1e-5
    )
    assert all(row["teacher_ce"] == pytest.approx(expected[row["sample_id"]]) for row in hardest)
    by_position = sql("where in a sequence", CACHE=cache)
    assert sum(row["targets"] for row in by_position) == report["targets"]
    lost = sum(row["targets"] * row["tail_mass"] for row in by_position) / report["targets"]
    mean = report["temperatures"][0]["retained_mass"]["mean"]
    assert lost == pytest.approx(1 - mean, abs=1e-6)


def test_polars_reads_the_same(cache: Path, report: dict[str, Any]) -> None:
    """The lazy scan gives masses, cross-entropy and lengths."""
    names = run(PYTHON[0], cache=cache)
    (found,) = names["summary"].to_dicts()
    at_1, at_2 = (at["retained_mass"]["mean"] for at in report["temperatures"])
    assert found["targets"] == report["targets"]
    assert found["retained_mass_t1"] == pytest.approx(at_1, abs=1e-6)
    assert found["retained_mass_t2"] == pytest.approx(at_2, abs=1e-6)
    assert found["teacher_ce"] == pytest.approx(report["teacher_ce"], rel=1e-6)
    lengths = names["lengths"]["length"].to_list()
    assert lengths == [len(s.input_ids) for s in CacheReader(cache)]


def test_recipes_read_an_export(cache: Path, tmp_path: Path) -> None:
    """Lists unnest in SQL and in Polars; the metadata says whose values they are."""
    out = tmp_path / "out"
    export(cache, out, rows="targets")
    reader = CacheReader(cache)
    wrong: dict[int, list[float]] = {}
    for s in reader:
        for ids, logprobs, label in zip(s.token_ids, s.logprobs, s.labels, strict=True):
            for i, logprob in zip(ids, logprobs, strict=True):
                if i not in (-1, label):
                    wrong.setdefault(int(i), []).append(float(np.exp(logprob)))
    rows = sql("of a target export", OUT=out)
    best = sorted((sum(p) for p in wrong.values()), reverse=True)[:10]
    assert [row["times"] * row["p"] for row in rows] == pytest.approx(best, rel=1e-5)
    assert all(row["times"] == len(wrong[row["id"]]) for row in rows)
    names = run(PYTHON[1], out=out)
    assert names["origin"]["cache_id"] == reader.manifest.cache_id
    table = pl.scan_parquet(f"{out}/*.parquet").select(pl.col("token_ids").list.len()).collect()
    kept = np.concatenate([(s.token_ids >= 0).sum(axis=1) for s in reader])
    assert table["token_ids"].to_list() == kept.tolist()


def test_draws_without_log_probs_have_their_entropy(tmp_path: Path) -> None:
    """A plain column in the place of the tails, in the shards and in an export."""
    settings = caches.Settings(truncation=Truncation(method="sample", draws=9))
    caches.write_cache(tmp_path / "cache", settings, caches.random_shards(settings))
    export(tmp_path / "cache", tmp_path / "out", rows="targets")
    expected = np.mean(np.concatenate([s.entropy for s in CacheReader(tmp_path / "cache")]))
    for query in (
        f"select avg(entropy) from '{tmp_path}/cache/shards/*.parquet' where is_target",
        f"select avg(entropy) from '{tmp_path}/out/*.parquet'",
    ):
        ((found,),) = duckdb.execute(query).fetchall()
        assert found == pytest.approx(float(expected), rel=1e-6)


def test_every_recipe_is_run() -> None:
    """No block in the document is without a test above; scalars have the columns it names."""
    assert len(SQL) == 5 and len(PYTHON) == 2


def test_scalar_columns_are_plain(cache: Path) -> None:
    """Floats, integers, booleans and strings, in every shard."""
    for file in sorted(cache.glob("shards/*.parquet")):
        names = [n for n in pq.read_schema(file).names if not n.startswith(("topk_", "draws"))]
        assert pl.read_parquet(file, columns=names).null_count().to_numpy().sum() == 0
