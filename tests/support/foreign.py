"""Dumps of other tools with known distributions, as rows of their own formats."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from decant.schemas import (
    Manifest,
    ScoredSequence,
)
from decant.storage import CacheReader, verify
from decant.storage.exchange.config import ImportConfig
from decant.storage.exchange.importing import import_cache
from tests.support import caches

V, K = 60, 8
"""Ids of the vocabulary; entries of a target."""


@dataclasses.dataclass(frozen=True)
class Known:
    """One record: tokens and the dense log probs of every token but the first."""

    input_ids: list[int]
    dense: NDArray[np.float64]
    """[L-1, V]; row j is of token j + 1."""

    def top(self, k: int = K) -> tuple[list[list[int]], list[list[float]]]:
        """Kept ids and float32 log probs, in descending order."""
        ids = np.argsort(-self.dense, axis=1)[:, :k]
        values = np.take_along_axis(self.dense, ids, axis=1).astype(np.float32)
        return ids.tolist(), values.tolist()


def known_records(num: int = 5, *, labels_kept: bool = True, spread: float = 2.0) -> list[Known]:
    """Records of uneven length; actual tokens among the K most probable, or drawn from all."""
    generator = np.random.default_rng(3)
    records = []
    for i in range(num):
        dense = caches.random_logprobs(generator, 9 + 3 * i, V, spread)
        rank = np.argsort(-dense, axis=1)
        drawn = (dense + generator.gumbel(size=dense.shape)).argmax(axis=1)
        kept = rank[np.arange(len(dense)), generator.integers(0, K, len(dense))]
        tokens = kept if labels_kept else drawn
        records.append(Known([int(generator.integers(V)), *tokens.tolist()], dense))
    return records


def distillkit_rows(records: list[Known]) -> list[dict[str, Any]]:
    """One list per token but the last, about the token behind."""
    rows = []
    for record in records:
        ids, values = record.top()
        rows.append({"input_ids": record.input_ids, "token_ids": ids, "top_values": values})
    return rows


def axolotl_rows(records: list[Known]) -> list[dict[str, Any]]:
    """As collected: the last list is about the last token; the first token has none."""
    rows = []
    for record in records:
        ids, values = record.top()
        rows.append({"input_ids": record.input_ids, "logprobs": values, "target_token_ids": ids})
    return rows


def axolotl_object_rows(records: list[Known]) -> list[dict[str, Any]]:
    """The older form: objects, and null for the first token."""
    rows = []
    for record in records:
        objects = [
            [
                {"logprob": value, "token": f"token_id:{i}"}
                for i, value in zip(ids, values, strict=True)
            ]
            for ids, values in zip(*record.top(), strict=True)
        ]
        rows.append({"input_ids": record.input_ids, "logprobs": [None, *objects]})
    return rows


def prepared_rows(records: list[Known], prompt: int = 3) -> list[dict[str, Any]]:
    """As prepared for training: renormalised, masked prompt, one padded list at the end."""
    rows = []
    for record in records:
        ids, values = record.top()
        renormalised = [list(np.array(v) - np.logaddexp.reduce(v)) for v in values]
        masked = [position < prompt for position in range(1, len(record.input_ids))]
        rows.append(
            {
                "input_ids": record.input_ids,
                "attention_mask": [1] * len(record.input_ids),
                "labels": [-100] * prompt + record.input_ids[prompt:],
                "target_token_ids": [*ids, [0] * K],
                "target_logprobs": [*renormalised, [-1e9] * K],
                "target_mask": [[0 if m else 1] * K for m in masked] + [[0] * K],
            }
        )
    return rows


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Write a dump in the format of its suffix; none is a saved Hugging Face dataset."""
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=2)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        datasets.disable_progress_bars()
        datasets.Dataset.from_list(rows).save_to_disk(str(path), num_shards=2)
    return path


def config(path: Path, file_format: str = "distillkit", **options: Any) -> ImportConfig:
    options = {"teacher": "some/teacher", "vocab_size": V} | options
    return ImportConfig(path=str(path), file_format=file_format, **options)


def imported(
    tmp_path: Path, rows: list[dict[str, Any]], file_format: str = "distillkit", **options: Any
) -> tuple[Manifest, list[ScoredSequence]]:
    """The manifest and sequences of a dump, after `verify`."""
    source = write(tmp_path / "dump.parquet", rows)
    manifest = import_cache(config(source, file_format, **options), tmp_path / "cache")
    report = verify(tmp_path / "cache")
    assert report.ok, report.problems
    return manifest, list(CacheReader(tmp_path / "cache"))


def assert_is_known(found: ScoredSequence, record: Known) -> None:
    """Every target of the record, as its dense distributions have it."""
    n = len(record.dense)
    ids, values = record.top()
    np.testing.assert_array_equal(found.input_ids, record.input_ids)
    np.testing.assert_array_equal(found.positions, np.arange(1, n + 1))
    np.testing.assert_array_equal(found.token_ids, ids)
    np.testing.assert_array_equal(found.logprobs, np.array(values, np.float32))
    tail = 1 - np.exp(np.take_along_axis(record.dense, np.array(ids), 1)).sum(axis=1)
    np.testing.assert_allclose(np.exp(found.log_tail[:, 0]), tail, atol=2e-7 * K)
    own = record.dense[np.arange(n), record.input_ids[1:]]
    np.testing.assert_allclose(found.label_logprob, own, rtol=1e-6)
