"""Caches of the actual token's log prob alone: method `label`."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from decant.schemas import FormatError, Truncation, shard_schema
from decant.storage import CacheReader, CacheWriter, verify
from decant.storage.cache.checks import check_sequence
from decant.storage.exchange.export import export
from decant.storage.files.sealed import publish_json
from decant.storage.inspect.collect import inspect
from decant.storage.inspect.diff import diff
from decant.storage.inspect.diff_text import diff_text
from decant.storage.inspect.head import head, head_text
from decant.storage.inspect.html import report_html
from decant.storage.inspect.text import report_text
from decant.student_train import CacheStream
from decant.student_train.data.follow import FollowStream
from decant.student_train.data.mixture import MixtureStream
from decant.student_train.losses import EventTargets
from tests.support import caches

SETTINGS = caches.Settings(truncation=Truncation(method="label"), vocab_size=3_000)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    url = tmp_path_factory.mktemp("label") / "cache"
    caches.write_cache(url, SETTINGS, caches.random_shards(SETTINGS))
    return url


def test_what_is_written_is_read(cache: Path) -> None:
    """Tokens, targets and the log prob of each; no entries, at T=1, without a precision."""
    expected = [sequence for shard in caches.random_shards(SETTINGS) for sequence in shard]
    reader = CacheReader(cache)
    for found, given in zip(reader, expected, strict=True):
        caches.assert_equal(found, given)
        assert found.token_ids.shape == (found.num_targets, 0) and found.logprobs is None
    manifest = reader.manifest
    assert (manifest.precision, manifest.compact, manifest.temperatures) == ("none", None, (1.0,))
    assert shard_schema(manifest.layout).names[4:] == ["is_target", "label_logprob"]
    assert verify(cache).ok


def test_a_target_takes_three_bytes(tmp_path: Path) -> None:
    """Beside its token, which every cache holds: fewer than 3 bytes of log prob."""
    settings = dataclasses.replace(SETTINGS, vocab_size=500)
    shards = caches.random_shards(settings, num_shards=1, sequences=4, length=400)
    caches.write_cache(tmp_path, settings, shards)
    report = inspect(tmp_path)
    assert 2 < report.column_bytes["label_logprob"] / report.targets < 3


def test_wrong_values_are_refused() -> None:
    """Labels above 0 or not finite, and entries that the cache has no place for."""
    layout = SETTINGS.draft().layout
    ((sequence,),) = caches.random_shards(SETTINGS, num_shards=1, sequences=1)
    entries = np.zeros((sequence.num_targets, 3), np.int32)
    for changes, message in (
        ({"label_logprob": sequence.label_logprob + 99}, "label_logprob above 0"),
        ({"label_logprob": sequence.label_logprob * np.float32(np.nan)}, "is not finite"),
        ({"token_ids": entries}, r"token_ids must be int32 \(11, 0\)"),
        ({"draws": entries}, "does not sample"),
    ):
        with pytest.raises(FormatError, match=f"sample sample-0-0: .*{message}"):
            check_sequence(dataclasses.replace(sequence, **changes), layout)


def test_a_rejected_sequence_keeps_its_place(tmp_path: Path) -> None:
    """Its rows are stored without targets."""
    ((one, other),) = caches.random_shards(SETTINGS, num_shards=1, sequences=2)
    writer = caches.start_cache(tmp_path, SETTINGS, [[one, other]])
    with writer.shard(0) as shard:
        shard.write(one)
        shard.reject(other.sample_id, other.input_ids, other.is_target, "too hot")
    writer.finalize()
    assert verify(tmp_path).ok and CacheReader(tmp_path)[1].num_targets == 0


def test_another_temperature_precision_or_option_is_refused() -> None:
    """Each with what is possible."""
    draft = SETTINGS.draft()
    for changes, message in (
        ({"temperatures": (1.0, 2.0)}, r"temperatures must be \[1\]"),
        ({"precision": "f32"}, "precision must be 'none', found 'f32'"),
    ):
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(draft, **changes)
    with pytest.raises(ValueError, match=r"truncation.k has no effect with method 'label'"):
        Truncation(method="label", k=8)


def test_a_reader_refuses_a_method_it_does_not_know(cache: Path, tmp_path: Path) -> None:
    """By its name, with those that it knows."""
    writer = caches.start_cache(tmp_path, SETTINGS, caches.random_shards(SETTINGS))
    fields = writer.manifest.to_json()
    fields["truncation"]["method"] = "colour"
    publish_json(writer.store, "manifest.json", fields)
    known = r"'topk', .*, 'label'"
    with pytest.raises(FormatError, match=rf"manifest.json: .*'colour' is not one of \({known}\)"):
        CacheWriter(tmp_path)


def test_inspect_says_what_labels_tell(cache: Path) -> None:
    """Cross-entropy and perplexity; one line for what takes entries, and no figure of it."""
    report = inspect(cache)
    nats = -np.concatenate([sequence.label_logprob for sequence in CacheReader(cache)])
    assert report.teacher_ce == pytest.approx(nats.mean(dtype=np.float64))
    assert report.teacher_perplexity == pytest.approx(np.exp(nats.mean(dtype=np.float64)))
    empty = (report.num_kept, report.label_kept, report.top1_agreement, report.calibration_error)
    assert empty == (None,) * 4
    assert (report.temperatures, report.truncation_curve, report.worst_targets) == ((), (), ())
    text, page = report_text(report), report_html(report)
    for shown in (text, page):
        assert "No kept entries: what takes more than the log prob" in shown
        assert "cross-entropy" in shown and "None" not in shown and "entropy*" not in shown
        assert "the log prob of the actual token alone" in shown


def test_head_shows_the_tokens(cache: Path) -> None:
    """With their probabilities; neither rank, tail nor entries."""
    found = head(cache, targets=3)
    assert len(found) == 3 and all(target.entries == () for target in found)
    assert all(target.rank is None and target.tail_mass is None for target in found)
    sequence = CacheReader(cache)[0]
    assert [t.probability for t in found] == pytest.approx(np.exp(sequence.label_logprob[:3]))
    assert "no entries are kept" in head_text(found)


def test_diff_compares_the_labels(cache: Path, tmp_path: Path) -> None:
    """With another cache of labels, or one of entries."""
    entries = caches.Settings(temperatures=(1.0,), vocab_size=70_000)
    caches.write_cache(tmp_path / "entries", entries, caches.random_shards(entries))
    same, other = diff(cache, cache), diff(cache, tmp_path / "entries")
    for found in (same, other):
        assert found.label_difference is not None
        assert found.label_difference.max == (0 if found is same else pytest.approx(0, abs=2**-13))
        assert found.same_ids is None and found.top1_agreement is None
        assert "no KL" in diff_text(found) and "None" not in diff_text(found)


@pytest.mark.parametrize("rows", ["sequences", "targets"])
def test_export_gives_the_labels(cache: Path, tmp_path: Path, rows: str) -> None:
    """A column of log probs, and none of entries."""
    export(cache, tmp_path / "out", rows=rows)
    table = pq.read_table(tmp_path / "out/part-000000.parquet")
    assert "label_logprob" in table.column_names
    assert not {"token_ids", "logprobs", "draws"} & set(table.column_names)
    found = table.column("label_logprob").combine_chunks()
    flat = found.flatten() if rows == "sequences" else found
    expected = [s.label_logprob for s in CacheReader(cache)][: len(CacheReader(cache)) // 2]
    np.testing.assert_array_equal(flat.to_numpy(), np.concatenate(expected))
    assert json.loads(table.schema.metadata[b"decant"])["truncation"]["method"] == "label"


def test_training_takes_the_label_as_an_event(cache: Path) -> None:
    """In every stream: the label and all the rest, two classes; another temperature is refused."""
    for make in (
        CacheStream,
        FollowStream,
        lambda url, **o: MixtureStream([url, url], [1, 1], **o),
    ):
        stream = make(cache, batch_size=2)
        batch = next(iter(stream))
        events = batch.targets_at(1.0)
        assert isinstance(events, EventTargets)
        np.testing.assert_array_equal(events.token_ids[:, 0], batch.labels)
        np.testing.assert_array_equal(events.log_p[:, 0], batch.label_logprob)
        np.testing.assert_allclose(events.log_p.exp()[:, 0] + events.log_rest.exp(), 1, atol=1e-6)
        events.validate(70_000)
        with pytest.raises(ValueError, match=r"labels alone.*set loss.temperature to 1"):
            make(cache, batch_size=2, temperature=2.0)
