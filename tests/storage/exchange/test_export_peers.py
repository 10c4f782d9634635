"""What other trainers read: columns, shapes, and which list is about which token."""

from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray

from decant.schemas import ScoredSequence, Truncation
from decant.storage import CacheReader, verify
from decant.storage.exchange.export import export
from decant.storage.exchange.importing import import_cache
from tests.support import caches
from tests.support.foreign import config

K, V = 6, 300
VARYING = Truncation(method="topp", k=K, p=0.5)


def cache(path: Path, **options: Any) -> CacheReader:
    """A cache of uneven sequences with prompts and two temperatures."""
    settings = caches.Settings(**{"truncation": Truncation(k=K), "vocab_size": V} | options)
    shards = caches.random_shards(settings, sequences=3, length=8)
    caches.write_cache(path, settings, shards)
    return CacheReader(path)


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return list(datasets.load_from_disk(str(folder)))


def axolotl_batch(rows: list[dict[str, Any]]) -> dict[str, NDArray]:
    """As its collator documents: filled up to the longest with -1e9, mask 0 and labels -100."""
    length = max(len(row["labels"]) for row in rows)
    width = max(len(entries) for row in rows for entries in row["target_logprobs"])
    batch = {
        "labels": np.full((len(rows), length), -100),
        "target_token_ids": np.zeros((len(rows), length, width), int),
        "target_logprobs": np.full((len(rows), length, width), -1e9),
        "target_mask": np.zeros((len(rows), length, width), int),
    }
    for i, row in enumerate(rows):
        batch["labels"][i, : len(row["labels"])] = row["labels"]
        for name in ("target_token_ids", "target_logprobs", "target_mask"):
            assert len(row[name]) == len(row["input_ids"])
            for j, entries in enumerate(row[name]):
                batch[name][i, j, : len(entries)] = entries
    return batch


def expected(sequence: ScoredSequence, temperature: float, renormalise: bool) -> list[NDArray]:
    column = 0 if temperature == 1 else 1
    values = []
    for i, row in enumerate(sequence.logprobs):
        kept = row[sequence.token_ids[i] >= 0].astype(float) / temperature
        kept -= sequence.log_z[i, column]
        values.append(kept - np.logaddexp.reduce(kept) if renormalise else kept)
    return values


@pytest.mark.parametrize(
    ("truncation", "temperature", "renormalise"),
    [(Truncation(k=K), 1.0, False), (VARYING, 1.0, True), (Truncation(k=K), 2.0, False)],
)
def test_axolotl_finds_its_columns(
    truncation: Truncation, temperature: float, renormalise: bool, tmp_path: Path
) -> None:
    """Row j of a batch, which its loss compares with the logits at j, is about token j + 1."""
    reader = cache(tmp_path / "cache", truncation=truncation)
    out = tmp_path / "out"
    report = export(reader.url, out, to="axolotl", temperature=temperature, renormalise=renormalise)
    rows = rows_of(out)
    assert (report.sequences, report.targets) == (len(reader), reader.manifest.num_targets)
    names = ["input_ids", "attention_mask", "labels"]
    assert list(rows[0]) == [*names, "target_token_ids", "target_logprobs", "target_mask"]
    batch = axolotl_batch(rows)
    for i, sequence in enumerate(reader):
        np.testing.assert_array_equal(rows[i]["input_ids"], sequence.input_ids)
        labels = np.where(sequence.is_target, sequence.input_ids, -100)
        np.testing.assert_array_equal(rows[i]["labels"], labels)
        masked = batch["target_mask"][i].any(axis=1)
        np.testing.assert_array_equal(np.flatnonzero(masked), sequence.positions - 1)
        values = expected(sequence, temperature, renormalise)
        for position, ids, own in zip(sequence.positions, sequence.token_ids, values, strict=True):
            used = batch["target_mask"][i, position - 1] == 1
            found = batch["target_token_ids"][i, position - 1, used]
            np.testing.assert_array_equal(found, ids[ids >= 0])
            found = batch["target_logprobs"][i, position - 1, used]
            np.testing.assert_allclose(found, own, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("truncation", [Truncation(k=K), VARYING])
def test_distillkit_finds_its_columns(truncation: Truncation, tmp_path: Path) -> None:
    """All rows stack to tensors; labels are set exactly where list j is about a target."""
    reader = cache(tmp_path / "cache", truncation=truncation)
    export(reader.url, tmp_path / "out", to="distillkit")
    rows = rows_of(tmp_path / "out")
    batch = {name: np.array([row[name] for row in rows]) for name in rows[0]}  # as it collates
    longest = max(len(s.input_ids) for s in reader)
    assert batch["top_values"].shape == batch["token_ids"].shape == (len(reader), longest, K)
    assert batch["token_ids"].min() >= 0 and np.isfinite(batch["top_values"]).all()
    ordered = np.sort(batch["token_ids"], axis=-1)
    assert (ordered[..., 1:] != ordered[..., :-1]).all()
    for i, sequence in enumerate(reader):
        length = len(sequence.input_ids)
        np.testing.assert_array_equal(batch["input_ids"][i, :length], sequence.input_ids)
        assert batch["attention_mask"][i].sum() == length
        at = np.flatnonzero(batch["labels"][i] >= 0)
        np.testing.assert_array_equal(at, sequence.positions - 1)
        np.testing.assert_array_equal(batch["labels"][i, at], sequence.input_ids[at])
        used = sequence.token_ids >= 0
        np.testing.assert_array_equal(batch["token_ids"][i, at][used], sequence.token_ids[used])
        np.testing.assert_array_equal(batch["top_values"][i, at][used], sequence.logprobs[used])
        assert (batch["top_values"][i, at][~used] == -1e9).all()


@pytest.mark.parametrize("file_format", ["parquet", "hf"])
@pytest.mark.parametrize("to", ["axolotl", "distillkit"])
@pytest.mark.parametrize("truncation", [Truncation(k=K), VARYING])
def test_what_was_exported_is_imported_again(
    to: str, file_format: str, truncation: Truncation, tmp_path: Path
) -> None:
    """Tokens, targets, ids and log probs are equal; tails and labels as lists tell them."""
    reader = cache(tmp_path / "cache", truncation=truncation)
    out = tmp_path / "out"
    export(reader.url, out, to=to, file_format=file_format)
    options = {"unknown_label": "bound", "vocab_size": V, "varying": truncation is VARYING}
    import_cache(config(out, to, **options), tmp_path / "again")
    report = verify(tmp_path / "again")
    assert report.ok, report.problems
    again = CacheReader(tmp_path / "again")
    with_targets = [s for s in reader if s.num_targets]
    assert len(again) == len(with_targets)
    for a, b in zip(with_targets, again, strict=True):
        np.testing.assert_array_equal(a.input_ids, b.input_ids)
        np.testing.assert_array_equal(a.positions, b.positions)
        width = b.token_ids.shape[1]
        np.testing.assert_array_equal(a.token_ids[:, :width], b.token_ids)
        np.testing.assert_array_equal(a.logprobs[:, :width], b.logprobs)
        tails = np.exp(a.log_tail[:, 0]), np.exp(b.log_tail[:, 0])
        np.testing.assert_allclose(*tails, atol=2e-6)
        kept = (a.token_ids == a.labels[:, None]).any(axis=1)
        np.testing.assert_allclose(a.label_logprob[kept], b.label_logprob[kept], atol=1e-5)
        assert (b.label_logprob[~kept] >= a.label_logprob[~kept] - 1e-5).all()


def test_hf_is_lists_for_datasets(tmp_path: Path) -> None:
    """`--to hf` opens with load_from_disk, and a Parquet export with load_dataset."""
    reader = cache(tmp_path / "cache")
    export(reader.url, tmp_path / "hf", to="hf")
    export(reader.url, tmp_path / "lists")
    rows = rows_of(tmp_path / "hf")
    table = datasets.load_dataset(
        str(tmp_path / "lists"), split="train", cache_dir=str(tmp_path / "work")
    )
    assert rows == list(table) == pq.read_table(tmp_path / "lists").to_pylist()


def test_what_a_trainer_cannot_take_is_refused(tmp_path: Path) -> None:
    """Draws, temperatures that are not stored, rows of targets, options of another tool."""
    reader = cache(tmp_path / "cache")

    def refuse(message: str, url: str = reader.url, **options: Any) -> None:
        with pytest.raises(ValueError, match=message):
            export(url, tmp_path / "out", **options)
        assert not (tmp_path / "out").exists()

    refuse(r"--temperature 3 is not stored: .* has 1, 2", to="axolotl", temperature=3.0)
    refuse("--temperature 2 has no effect with --to distillkit", to="distillkit", temperature=2.0)
    refuse("--renormalise has no effect with --to lists", renormalise=True)
    refuse("--to axolotl reads a row per sequence", to="axolotl", rows="targets")
    refuse("--to hf writes a saved dataset", to="hf", file_format="parquet")
    refuse("expected .*'axolotl'", to="trl")
    drawn = cache(tmp_path / "drawn", truncation=Truncation(method="topk+sample", k=2, draws=3))
    refuse("keeps top 2 .* draws.*--to lists writes what there is", drawn.url, to="axolotl")
