"""Imported dumps become truthful caches."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from decant.schemas import (
    Truncation,
    tokenizer_fingerprint,
)
from decant.storage import CacheReader, verify
from decant.storage.exchange.foreign import ForeignError
from decant.storage.exchange.importing import import_cache
from decant.storage.inspect.collect import inspect
from decant.student_train import CacheStream
from tests.support import models
from tests.support.foreign import (
    K,
    Known,
    V,
    assert_is_known,
    axolotl_object_rows,
    axolotl_rows,
    config,
    distillkit_rows,
    imported,
    known_records,
    prepared_rows,
    write,
)

ROWS: dict[str, tuple[str, Callable[[list[Known]], list[dict[str, Any]]]]] = {
    "distillkit": ("distillkit", distillkit_rows),
    "axolotl": ("axolotl", axolotl_rows),
    "axolotl objects": ("axolotl", axolotl_object_rows),
}


@pytest.mark.parametrize("name", ["dump.parquet", "dump.jsonl", "dump"])
@pytest.mark.parametrize("kind", list(ROWS))
def test_a_dump_becomes_a_cache(kind: str, name: str, tmp_path: Path) -> None:
    """Every layout in every kind of file, over several shards: verified, inspected, streamed."""
    file_format, make = ROWS[kind]
    records = known_records()
    source = write(tmp_path / name, make(records))
    cache = tmp_path / "cache"
    manifest = import_cache(config(source, file_format, shard_targets=30), cache)
    report = verify(cache)
    assert report.ok, report.problems
    assert manifest.num_shards == 2 and manifest.truncation == Truncation(k=K)
    reader = CacheReader(cache)
    assert len(reader) == len(records)
    for i, record in enumerate(records):
        assert_is_known(reader[i], record)
    assert [s.sample_id for s in reader] == ["0", "1", "2", "3", "4"]
    looked = inspect(cache)
    own = [r.dense[np.arange(len(r.dense)), r.input_ids[1:]] for r in records]
    assert looked.teacher_ce == pytest.approx(-np.concatenate(own).mean(), abs=1e-6)
    batch = next(iter(CacheStream(cache, batch_size=len(records))))
    assert batch.num_targets == manifest.num_targets == looked.targets


def test_the_manifest_says_where_it_comes_from(tmp_path: Path) -> None:
    """The teacher as named, unknown what is unknown, the files with their hashes, the options."""
    manifest, _ = imported(tmp_path, distillkit_rows(known_records()))
    teacher, source = manifest.teacher, manifest.source
    assert (teacher.name, teacher.fingerprint) == ("some/teacher", "unknown")
    assert teacher.engine == "imported from distillkit" and teacher.vocab_size == V
    assert source["files"][0]["name"] == "dump.parquet"
    assert source["files"][0]["bytes"] == (tmp_path / "dump.parquet").stat().st_size
    assert source["normalised_over"] == "vocabulary" and source["unknown_labels"] == 0
    assert manifest.temperatures == (1.0,) and manifest.tokenizer.files == {}
    again = import_cache(config(tmp_path / "dump.parquet"), tmp_path / "again")
    assert again.cache_id == manifest.cache_id


def test_a_prepared_dataset_is_imported_as_renormalised(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Only with the option: no tail, masked and padded lists are no targets, a warning."""
    records = known_records()
    rows = prepared_rows(records)
    source = write(tmp_path / "dump.parquet", rows)
    with pytest.raises(ForeignError, match=r"add up to 1: renormalised.*give --renormalised"):
        import_cache(config(source, "axolotl"), tmp_path / "cache")
    manifest, found = imported(tmp_path, rows, "axolotl", renormalised=True)
    assert manifest.source["normalised_over"] == "kept ids" and "overconfident" in caplog.text
    for sequence, record, row in zip(found, records, rows, strict=True):
        np.testing.assert_array_equal(sequence.positions, range(3, len(record.input_ids)))
        np.testing.assert_array_equal(sequence.token_ids, row["target_token_ids"][2:-1])
        np.testing.assert_allclose(sequence.logprobs, row["target_logprobs"][2:-1], rtol=1e-6)
        assert (sequence.log_tail == -np.inf).all()


def test_logits_are_imported_as_renormalised(tmp_path: Path) -> None:
    """DistillKit's oldest dumps: the softmax over the kept ids, and only if asked for."""
    rows = distillkit_rows(known_records())
    for row in rows:
        row["top_values"] = [[v + 11.5 for v in values] for values in row["top_values"]]
        row["token_ids"].append(row["token_ids"][-1])  # a list for the last token too
        row["top_values"].append(row["top_values"][-1])
    source = write(tmp_path / "dump.parquet", rows)
    with pytest.raises(ForeignError, match=r"is a logit, expected log probs.*--renormalised"):
        import_cache(config(source), tmp_path / "cache")
    _, found = imported(tmp_path, rows, renormalised=True)
    for sequence, row in zip(found, rows, strict=True):
        values = np.array(row["top_values"][:-1])
        expected = values - np.logaddexp.reduce(values, axis=1)[:, None]
        np.testing.assert_allclose(sequence.logprobs, expected, rtol=1e-5, atol=1e-6)


def test_log_probs_over_the_vocabulary_are_not_renormalised(tmp_path: Path) -> None:
    """The option on a dump that does not need it is an error: it would lose the tails."""
    with pytest.raises(ForeignError, match="import them without --renormalised"):
        imported(tmp_path, distillkit_rows(known_records()), renormalised=True)


def test_vllm_lists_with_the_actual_token_first_are_cut_to_k(tmp_path: Path) -> None:
    """One entry more where the actual token is not in the top k: its log prob is exact."""
    records = known_records(labels_kept=False)
    rows = axolotl_rows(records)
    extra = 0
    for row, record in zip(rows, records, strict=True):
        for j, label in enumerate(record.input_ids[1:]):
            ids, values = row["target_token_ids"][j], row["logprobs"][j]
            if label not in ids:
                ids.insert(0, label)
                values.insert(0, float(np.float32(record.dense[j, label])))
                extra += 1
    assert extra > 5
    _, found = imported(tmp_path, rows, "axolotl")
    for sequence, record in zip(found, records, strict=True):
        assert_is_known(sequence, record)


def test_unknown_labels_are_refused_bounded_or_skipped(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing is invented: a count and a place, an upper bound that says so, or no target."""
    records = known_records(labels_kept=False)
    rows = distillkit_rows(records)
    known = [
        np.array([label in ids for label, ids in zip(r.input_ids[1:], r.top()[0], strict=True)])
        for r in records
    ]
    unknown = sum(int((~k).sum()) for k in known)
    source = write(tmp_path / "dump.parquet", rows)
    with pytest.raises(ForeignError, match=rf"row \d, list \d+: the actual.*for {unknown} of 75"):
        import_cache(config(source), tmp_path / "cache")
    manifest, found = imported(tmp_path, rows, unknown_label="bound")
    assert manifest.source["unknown_labels"] == unknown
    assert f"{unknown} of 75 targets" in caplog.text and "upper bound" in caplog.text
    for sequence, record, is_known in zip(found, records, known, strict=True):
        own = record.dense[np.arange(len(record.dense)), record.input_ids[1:]]
        np.testing.assert_allclose(sequence.label_logprob[is_known], own[is_known], rtol=1e-6)
        assert (sequence.label_logprob[~is_known] >= own[~is_known] - 1e-5).all()
        assert (sequence.label_logprob <= sequence.logprobs[:, -1])[~is_known].all()
    skipped = import_cache(config(source, unknown_label="skip"), tmp_path / "skipped")
    assert verify(tmp_path / "skipped").ok and skipped.num_targets == 75 - unknown
    for sequence, is_known in zip(CacheReader(tmp_path / "skipped"), known, strict=True):
        np.testing.assert_array_equal(sequence.positions, np.flatnonzero(is_known) + 1)


@pytest.mark.parametrize("moved", [-1, 1])
def test_a_shifted_dump_is_recognised(moved: int, tmp_path: Path) -> None:
    """Lists one token off are refused with the --shift that mends them, which then does."""
    records = known_records()
    rows = distillkit_rows(records)
    for row in rows:
        for name in ("token_ids", "top_values"):
            row[name] = [row[name][0], *row[name]][: len(row[name])] if moved > 0 else row[name][1:]
            row[name] += [row[name][-1]] * (moved < 0)
    source = write(tmp_path / "dump.parquet", rows)
    way = "earlier" if moved > 0 else "later"
    with pytest.raises(
        ForeignError, match=f"one token {way}: the rows are shifted; give --shift {-moved}"
    ):
        import_cache(config(source), tmp_path / "cache")
    options = {"shift": -moved, "unknown_label": "bound"}
    _, found = imported(tmp_path, rows, **options)
    for sequence, record in zip(found, records, strict=True):
        first = sequence.positions[0] - 1
        n = min(sequence.num_targets, len(record.dense) - first) - 1
        expected = np.array(record.top()[0])[first : first + n]
        np.testing.assert_array_equal(sequence.token_ids[:n], expected)


def test_labels_and_attention_mask_leave_tokens_out(tmp_path: Path) -> None:
    """-100 is not a target, padding is cut on either side, records without a target are counted."""
    records = known_records(3)
    rows = distillkit_rows(records)
    pad = {"token_ids": [list(range(K))], "top_values": [[-float("inf")] * K]}
    for row, (left, right) in zip(rows, [(0, 2), (2, 0), (0, 0)], strict=True):
        length = len(row["input_ids"])
        row["attention_mask"] = [0] * left + [1] * length + [0] * right
        row["labels"] = [-100] * (left + 4) + row["input_ids"][4:] + [-100] * right
        row["input_ids"] = [0] * left + row["input_ids"] + [0] * right
        for name, value in pad.items():
            row[name] = value * left + row[name] + value * right
    rows.append({**rows[2], "labels": [-100] * len(rows[2]["labels"])})
    manifest, found = imported(tmp_path, rows)
    assert manifest.sequences["counts"] == {"records": 4, "without_target": 1}
    for sequence, record in zip(found, records, strict=True):
        np.testing.assert_array_equal(sequence.input_ids, record.input_ids)
        np.testing.assert_array_equal(sequence.positions, range(4, len(record.input_ids)))
        np.testing.assert_array_equal(sequence.token_ids, record.top()[0][3:])


def test_tails_stay_within_what_is_possible(tmp_path: Path) -> None:
    """Near-certain teachers: no tail below the resolution or beyond what the other ids can hold."""
    manifest, found = imported(tmp_path, distillkit_rows(known_records(spread=12.0)))
    log_tail = np.concatenate([s.log_tail[:, 0] for s in found])
    last = np.concatenate([s.logprobs[:, -1] for s in found])
    assert manifest.source["unresolved_tails"] > 0
    assert (log_tail <= np.log(V - K) + last + 1e-5).all()
    assert (np.exp(log_tail) <= 1).all() and np.isfinite(log_tail).all()


@pytest.mark.parametrize("precision", ["f16", "compact"])
def test_every_precision_can_be_written(precision: str, tmp_path: Path) -> None:
    """Import at less than float32 passes verify, and K can be lowered."""
    rows = distillkit_rows(known_records())
    manifest, found = imported(
        tmp_path, rows, precision=precision, k=5, unknown_label="bound", vocab_size=70_000
    )
    assert manifest.precision == precision and found[0].token_ids.shape[1] == 5


def test_the_tokenizer_is_kept_with_the_fingerprint_of_a_dump(tmp_path: Path) -> None:
    """Equal to what transformers gives; the vocabulary size follows from it."""
    tokenizer = models.build_tokenizer()
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    rows = distillkit_rows(known_records())
    options = {"tokenizer": str(tmp_path / "tokenizer"), "vocab_size": 0}
    manifest, _ = imported(tmp_path, rows, **options)
    assert manifest.tokenizer.fingerprint == tokenizer_fingerprint(tokenizer)
    assert manifest.shared_vocab_size == models.VOCAB_SIZE
    assert "tokenizer.json" in manifest.tokenizer.files
    with pytest.raises(ValueError, match="do not belong together"):
        import_cache(
            config(tmp_path / "dump.parquet", **(options | {"vocab_size": V})), tmp_path / "other"
        )
    with pytest.raises(ValueError, match=r"no tokenizer\.json there"):
        import_cache(config(tmp_path / "dump.parquet", tokenizer=str(tmp_path)), tmp_path / "other")
