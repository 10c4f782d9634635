"""Claims about dumps that keep a share of the targets: those of which the teacher is least sure."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from decant.schemas import FormatError, ScoredSequence, Truncation
from decant.schemas.selection import num_selected
from decant.storage import CacheReader, CacheWriter, verify
from decant.storage.inspect.collect import inspect
from decant.storage.inspect.text import report_text
from decant.student_train import train
from decant.teacher_dump import ConfigChanged, DumpConfig, dump
from decant.teacher_dump.job.run import Worker
from decant.teacher_dump.job.selection import lost_targets, select_targets
from decant.teacher_dump.planning.predict import predict
from tests.support import trainings
from tests.support.dumps import HALF, assert_same, change, failing_after

SHARE = 0.2


@pytest.fixture(scope="module")
def settings(dump_config: DumpConfig) -> DumpConfig:
    config = change(dump_config, "sequences.target_share", SHARE)
    return dataclasses.replace(config, shard_targets=60)


@pytest.fixture(scope="module")
def selected(settings: DumpConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cache of `settings`. Never write to it."""
    path = tmp_path_factory.mktemp("selected") / "cache"
    dump(dataclasses.replace(settings, output=str(path)))
    return path


def entropy_of(sequence: ScoredSequence) -> np.ndarray:
    """[n] nats, of the entries and the tail as one class, in float64."""
    p = np.exp(np.c_[sequence.logprobs, sequence.log_tail[:, :1]].astype(np.float64))
    return -(p * np.log(np.maximum(p, 1e-300))).sum(axis=1)


def test_the_targets_of_the_highest_entropy_are_kept(selected: Path, cache: Path) -> None:
    """A share of each sequence's, as they are in the whole cache; the others are context."""
    for found, whole in zip(CacheReader(selected), CacheReader(cache), strict=True):
        np.testing.assert_array_equal(found.input_ids, whole.input_ids)
        assert found.num_targets == num_selected(whole.num_targets, SHARE)
        kept = np.isin(whole.positions, found.positions)
        entropy = entropy_of(whole)
        assert entropy[kept].min() >= entropy[~kept].max(initial=0) - 1e-3
        np.testing.assert_allclose(found.logprobs, whole.logprobs[kept], atol=1e-3)
        np.testing.assert_allclose(found.label_logprob, whole.label_logprob[kept], atol=1e-3)


def test_plan_manifest_and_inspect_count_what_is_kept(
    selected: Path, cache: Path, settings: DumpConfig
) -> None:
    """And say what became of the rest; `plan` predicts as many."""
    assert verify(selected).problems == ()
    manifest, whole = CacheReader(selected).manifest, CacheReader(cache).manifest
    counts = manifest.sequences["counts"]
    assert manifest.totals.targets == manifest.num_targets == counts["targets"]
    assert counts["targets"] + counts["unselected_targets"] == whole.num_targets
    assert manifest.totals.tokens == whole.totals.tokens
    text = report_text(inspect(str(selected)))
    assert f"{counts['unselected_targets']:,} targets of lower entropy kept as context" in text
    predicted = predict(dataclasses.replace(settings, output=str(selected) + "-none"), sample=16)
    assert predicted.counts.targets == manifest.num_targets
    assert predicted.bytes_per_target == pytest.approx(
        manifest.totals.bytes / manifest.totals.targets, rel=0.5
    )


def test_context_takes_no_room(selected: Path, cache: Path) -> None:
    """Bytes of the entries go with the targets that are kept."""

    def entries(path: Path) -> int:
        reader = CacheReader(path)
        return sum(
            size
            for group in reader.row_groups()
            for name, size in reader.column_bytes(group).items()
            if name.startswith(("topk", "log_", "label"))
        )

    assert entries(selected) < 0.5 * entries(cache)  # the pages of so small shards have headers


def test_workers_and_reruns_give_the_same(settings: DumpConfig, tmp_path: Path) -> None:
    """The choice is each sequence's own, whoever scores it and when."""
    config = dataclasses.replace(settings, output=str(tmp_path / "alone"))
    dump(config)
    for index in (1, 0):
        dump(dataclasses.replace(settings, output=str(tmp_path / "two")), Worker(index, 2))
    assert_same(tmp_path / "two", tmp_path / "alone")
    cut = dataclasses.replace(settings, output=str(tmp_path / "cut"))
    with failing_after(HALF), pytest.raises(RuntimeError):
        dump(cut)
    with pytest.raises(ConfigChanged, match=r"sequences.target_share: the cache has 0.2"):
        dump(change(cut, "sequences.target_share", 0.5))
    dump(cut)
    assert_same(tmp_path / "cut", tmp_path / "alone")


@pytest.mark.parametrize(
    "truncation",
    [
        Truncation(method="sample", draws=12, seed=1),
        Truncation(method="topk+sample", k=4, draws=6),
        Truncation(method="topp", k=24, p=0.5),
    ],
    ids=lambda t: t.method,
)
def test_every_truncation_has_an_entropy(
    settings: DumpConfig, truncation: Truncation, tmp_path: Path
) -> None:
    """And trains a student."""
    config = change(settings, "source.limit", 12)
    config = change(change(config, "temperatures", [1.0]), "precision", "compact")
    config = dataclasses.replace(config, output=str(tmp_path / "cache"), truncation=truncation)
    dump(config)
    assert verify(config.output).problems == ()
    train(trainings.config(Path(config.output), tmp_path / "run", steps=2, plots=False))


def test_without_entries_it_is_refused(dump_config: DumpConfig) -> None:
    """The label alone says nothing of the rest."""
    config = dataclasses.replace(dump_config, truncation=Truncation(method="label"))
    with pytest.raises(ValueError, match=r"target_share keeps .*method label has none: use topk"):
        change(config, "sequences.target_share", SHARE)
    with pytest.raises(ValueError, match=r"target_share is 0, must lie in \(0, 1\]"):
        change(dump_config, "sequences.target_share", 0)


def test_a_rejected_sequence_loses_what_would_be_kept(
    settings: DumpConfig, selected: Path, cache: Path, tmp_path: Path
) -> None:
    """So that plan and commit record agree."""
    writer = CacheWriter(selected)
    sequences = list(CacheReader(cache))[: writer.plan[0].num_sequences]
    draft = dataclasses.replace(
        CacheReader(selected).manifest, cache_id="", totals=None, records=None, rejected=()
    )
    started = CacheWriter.create(tmp_path, draft, [writer.plan[0]])
    with started.shard(0) as shard:
        for number, sequence in enumerate(sequences):
            if number == 1:
                lost = lost_targets(sequence, SHARE)
                shard.reject(sequence.sample_id, sequence.input_ids, lost, "cannot be scored")
            else:
                shard.write(select_targets(sequence, SHARE))
    (rejected,) = started.finalize().rejected
    assert rejected.targets == num_selected(sequences[1].num_targets, SHARE)
    assert settings.sequences.target_share == SHARE
    with pytest.raises(FormatError, match="planned"):
        other = CacheWriter.create(tmp_path / "other", draft, [writer.plan[0]])
        with other.shard(0) as shard:
            for sequence in sequences:
                shard.write(sequence)
