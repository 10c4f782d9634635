"""Sequences that a teacher cannot score: kept in place without targets, counted and shown."""

import dataclasses
import html
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from decant.schemas import FormatError, Manifest, Rejected, Truncation
from decant.schemas.manifest import MAX_LISTED
from decant.schemas.shards import REASON_LENGTH
from decant.storage import CacheReader, CacheWriter, Store, verify
from decant.storage.cache.rejected import one_line
from decant.storage.exchange.export import export
from decant.storage.files.sealed import publish_json, read_json
from decant.storage.inspect.collect import inspect
from decant.storage.inspect.diff import diff
from decant.storage.inspect.head import head
from decant.storage.inspect.html import report_html
from decant.storage.inspect.text import report_text
from decant.student_train import CacheStream
from decant.student_train.losses import fused_linear_divergence, sparse_divergence
from decant.student_train.model.distiller import Distiller, LossConfig
from tests.support import caches, models
from tests.support.caches import fixture
from tests.support.commands import command

SETTINGS = caches.Settings()
REASON = "CUDA error: an illegal\nmemory access was encountered"
LOST = (2, 4, 5, 6, 7)
"""Plan indices: one of the first shard, all of the second."""


def write(path: Path, settings: caches.Settings, lost: tuple[int, ...] = LOST) -> Manifest:
    """Three shards of four sequences."""
    shards = caches.random_shards(settings, num_shards=3)
    writer = caches.start_cache(path, settings, shards)
    index = 0
    for number, sequences in enumerate(shards):
        with writer.shard(number) as shard:
            for sequence in sequences:
                if index in lost:
                    tokens = sequence.input_ids, sequence.is_target
                    shard.reject(sequence.sample_id, *tokens, REASON)
                else:
                    shard.write(sequence)
                index += 1
    return writer.finalize()


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Never write to it."""
    path = tmp_path_factory.mktemp("rejected") / "cache"
    write(path, SETTINGS)
    return path


def expected() -> Iterator[tuple[int, bool, object]]:
    shards = caches.random_shards(SETTINGS, num_shards=3)
    for index, sequence in enumerate(s for shard in shards for s in shard):
        yield index, index in LOST, sequence


METHODS = [
    Truncation(k=8),
    Truncation(method="topp", k=8, p=0.9),
    Truncation(method="sample", draws=6),
    Truncation(method="topk+sample", k=3, draws=6),
]


@pytest.mark.parametrize("truncation", METHODS, ids=lambda t: t.method)
@pytest.mark.parametrize("precision", ["f32", "f16", "compact"])
def test_rejected_sequences_keep_their_place(
    truncation: Truncation, precision: str, tmp_path: Path
) -> None:
    """Every kind of cache is whole with them, a shard of nothing else too, and reads as written."""
    settings = dataclasses.replace(SETTINGS, truncation=truncation, precision=precision)
    manifest = write(tmp_path / "cache", settings)
    report = verify(tmp_path / "cache")
    assert report.ok, report.problems
    written = [s for shard in caches.random_shards(settings, num_shards=3) for s in shard]
    reader = CacheReader(tmp_path / "cache")
    for index, (found, sequence) in enumerate(zip(reader, written, strict=True)):
        np.testing.assert_array_equal(found.input_ids, sequence.input_ids)
        assert found.sample_id == sequence.sample_id
        if index in LOST:
            assert found.num_targets == 0 and not found.is_target.any()
            assert found.token_ids.shape == (0, truncation.slots)
        else:
            kept = [np.sort(s.token_ids, axis=1) for s in (found, sequence)]
            np.testing.assert_array_equal(*kept)
            np.testing.assert_array_equal(found.positions, sequence.positions)
    lost = sum(written[i].num_targets for i in LOST)
    assert manifest.totals is not None
    assert manifest.num_targets == sum(s.num_targets for s in written)
    assert manifest.totals.targets == manifest.num_targets - lost == report.targets
    assert manifest.totals.rejected == len(LOST)


def test_every_rejected_sequence_is_named_with_its_reason(cache: Path) -> None:
    """In the sealed manifest, in the commit records and by the reader; the id stays the same."""
    written = [s for shard in caches.random_shards(SETTINGS, num_shards=3) for s in shard]
    named = tuple(
        Rejected(
            sequence=i,
            sample_id=written[i].sample_id,
            targets=written[i].num_targets,
            reason="CUDA error: an illegal memory access was encountered",
        )
        for i in LOST
    )
    reader = CacheReader(cache)
    assert reader.manifest.rejected == tuple(reader.rejected) == named
    stored = json.loads((cache / "shards" / "part-000001.json").read_text())
    assert [entry["sequence"] for entry in stored["rejected"]] == [4, 5, 6, 7]
    assert stored["targets"] == 0
    whole = caches.start_cache(
        cache.parent / "other", SETTINGS, caches.random_shards(SETTINGS, num_shards=3)
    )
    assert whole.manifest.cache_id == reader.manifest.cache_id


def test_the_rows_of_a_rejected_sequence_are_plain(cache: Path) -> None:
    """As docs/format.md says: every token in its row, is_target false, zero behind it."""
    table = pq.read_table(cache / "shards" / "part-000001.parquet")
    assert not any(table["is_target"].to_pylist())
    tokens = [s.input_ids for s in caches.random_shards(SETTINGS, num_shards=3)[1]]
    assert table["token_id"].to_pylist() == np.concatenate(tokens).tolist()
    assert sorted(set(table["sequence"].to_pylist())) == [4, 5, 6, 7]
    assert set(table["label_logprob"].to_pylist()) == {0.0}
    assert set(table["topk_lo"].to_pylist()) == {bytes(8)}


def test_reasons_are_one_printable_line() -> None:
    """Whatever an exception says: line breaks, control codes, lone surrogates, no end."""
    assert one_line(" a\r\n\tb ") == "a b"
    assert one_line("\x1b[31mred\x00 \udc80") == "\ufffd[31mred\ufffd \ufffd"
    assert one_line("") == ""
    long = one_line("x" * 10_000)
    assert len(long) == REASON_LENGTH and long.endswith("…")
    for bad in ({"reason": "x" * 201}, {"reason": "a\nb"}, {"sequence": -1}, {"targets": -1}):
        with pytest.raises(ValueError, match=r"reason is one line|needs an index"):
            Rejected(**{"sequence": 0, "sample_id": "a", "targets": 1, "reason": "b"} | bad)


def test_what_cannot_be_rejected_is_refused(tmp_path: Path) -> None:
    """Tokens that no shard may hold, and counts that are not the plan's: nothing is published."""
    shards = caches.random_shards(SETTINGS, num_shards=1)
    writer = caches.start_cache(tmp_path / "cache", SETTINGS, shards)
    ids, is_target = shards[0][0].input_ids, shards[0][0].is_target
    first = is_target.copy()
    first[0] = True
    for tokens, message in (
        ((ids + 50, is_target), "sample a: token id outside"),
        ((ids, is_target[1:]), r"sample a: is_target must be bool \[12\]"),
        ((ids, first), "sample a: is_target must be"),
        ((ids, ~is_target & (np.arange(12) > 0)), "written .*, planned"),
    ):
        with pytest.raises(FormatError, match=message), writer.shard(0) as shard:
            shard.reject("a", *tokens, "no")
            for sequence in shards[0][1:]:
                shard.write(sequence)
    assert [plan.shard for plan in writer.missing()] == [0]


@pytest.mark.parametrize("version", [1, 2])
def test_older_dumps_have_no_place_for_them(version: int, tmp_path: Path) -> None:
    """The error names the sample, the reason and the way out; the dump stays as it was."""
    shutil.copytree(fixture(version, "unfinished"), tmp_path / "cache")
    writer = CacheWriter(tmp_path / "cache")
    (missing,) = writer.missing()
    with (
        pytest.raises(FormatError, match=rf"version {version}, .* a cannot be scored \(no\): take"),
        writer.shard(missing.shard) as shard,
    ):
        shard.reject("a", np.zeros(6, np.int32), np.zeros(6, np.bool_), "no")
    assert writer.missing() == [missing]


def reseal(path: Path, name: str, **changes: object) -> None:
    store = Store(path)
    publish_json(store, name, {**read_json(store, name), **changes})


def test_verify_finds_records_that_do_not_agree(cache: Path, tmp_path: Path) -> None:
    """With the rows, with the plan, and with the manifest."""
    entry = {"sequence": 2, "sample_id": "sample-0-2", "targets": 17, "reason": "no"}
    for number, (rejected, message) in enumerate(
        [
            ([{**entry, "targets": 16}], "tokens, targets stored and lost"),
            ([{**entry, "sequence": 9}], r"rejected sequences \[9\] are not some of 0 to 3"),
            ([{**entry, "sequence": 1}], "rejected sequence 1 has 12 targets"),
            ([{**entry, "sample_id": "other"}], "is of sample 'sample-0-2', committed as 'other'"),
        ]
    ):
        path = Path(shutil.copytree(cache, tmp_path / str(number)))
        reseal(path, "manifest.json", totals=None, records=None, rejected=[])
        reseal(path, "shards/part-000000.json", rejected=rejected)
        problems = "\n".join(verify(path).problems)
        assert re.search(message, problems), problems
    path = Path(shutil.copytree(cache, tmp_path / "manifest"))
    reseal(path, "manifest.json", rejected=[])
    assert any("not those of the records" in problem for problem in verify(path).problems)


def test_a_manifest_lists_the_first_thousand(tmp_path: Path) -> None:
    """All are in the records and counted; a million do not make the manifest unreadable."""
    shards = caches.random_shards(SETTINGS, num_shards=1, sequences=1)
    shards[0] *= MAX_LISTED + 5
    writer = caches.start_cache(tmp_path / "cache", SETTINGS, shards)
    with writer.shard(0) as shard:
        for sequence in shards[0]:
            shard.reject(sequence.sample_id, sequence.input_ids, sequence.is_target, "no")
    manifest = writer.finalize()
    assert manifest.totals is not None and manifest.totals.rejected == MAX_LISTED + 5
    assert [entry.sequence for entry in manifest.rejected] == list(range(MAX_LISTED))
    assert len(list(CacheReader(tmp_path / "cache").rejected)) == MAX_LISTED + 5
    report = verify(tmp_path / "cache")
    assert report.ok, report.problems
    assert report.targets == 0


def test_inspect_shows_what_was_lost(cache: Path) -> None:
    """Count, share of the targets and the first reasons: in JSON, text and page."""
    report = inspect(cache)
    stored = sum(s.num_targets for _, lost, s in expected() if not lost)
    lost = report.planned_targets - stored
    assert (report.rejected_sequences, report.rejected_targets) == (len(LOST), lost)
    assert [entry.sequence for entry in report.rejected] == list(LOST)
    assert report.targets == stored and report.sequences == 12
    text = report_text(report).splitlines()
    share = f"{lost / report.planned_targets:.2%}"
    warning = f"5 of 12 sequences were rejected by the teacher: {share} of targets lost"
    assert text[2] == f"WARNING: {warning}"
    assert text[3].startswith("  sequence 2, sample 'sample-0-2', 17 targets: CUDA error")
    page = html.unescape(report_html(report))
    assert warning in page and "illegal memory access" in page
    found = json.loads(command("storage", "inspect", str(cache), "--json").stdout)
    assert found["rejected"][0]["sample_id"] == "sample-0-2"


def test_a_cache_of_nothing_else_can_be_looked_at(tmp_path: Path) -> None:
    """No ratio divides by its targets."""
    write(tmp_path / "cache", SETTINGS, tuple(range(12)))
    report = inspect(tmp_path / "cache")
    assert report.targets == 0 and report.bytes_per_target is None
    assert "100.00% of targets lost" in report_text(report)
    assert "100.00% of targets lost" in report_html(report)
    for rows in ("sequences", "targets"):
        done = export(tmp_path / "cache", tmp_path / rows, rows=rows)
        assert done.targets == 0 and done.sequences == 12
    difference = diff(tmp_path / "cache", tmp_path / "cache")
    assert difference.targets == 0 and difference.sequences == 12
    with pytest.raises(ValueError, match=r"sequence 0 .* the teacher rejected it: CUDA error"):
        head(tmp_path / "cache")


def test_other_commands_pass_over_them(cache: Path, tmp_path: Path) -> None:
    """`head` starts at the first that has targets; `export` and `diff` count what is stored."""
    write(tmp_path / "cache", SETTINGS, (0, 1))
    assert head(tmp_path / "cache")[0].sequence == 2
    with pytest.raises(ValueError, match=r"sequence 1 .* the teacher rejected it"):
        head(tmp_path / "cache", sequence=1)
    stored = sum(s.num_targets for _, lost, s in expected() if not lost)
    done = export(cache, tmp_path / "sequences")
    assert (done.sequences, done.targets) == (12, stored)
    tables = [pq.read_table(file) for file in sorted((tmp_path / "sequences").glob("*.parquet"))]
    lengths = [len(row) for table in tables for row in table["token_ids"].to_pylist()]
    assert [i for i, length in enumerate(lengths) if not length] == list(LOST)
    difference = diff(cache, tmp_path / "cache")
    first = [s.num_targets for i, _, s in expected() if i in (0, 1)]
    assert difference.targets_only_a == sum(first)
    assert difference.targets == stored - sum(first)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_batches_train_with_them(cache: Path, batch_size: int) -> None:
    """An epoch gives every sequence; a batch without targets gives a loss and a gradient of 0."""
    stream = CacheStream(cache, batch_size=batch_size)
    weight = torch.randn(SETTINGS.vocab_size, 8, requires_grad=True)
    seen, targets, empty = [], 0, 0
    for batch, _ in zip(stream, range(12 // batch_size), strict=False):
        seen += batch.sample_ids
        targets += batch.num_targets
        hidden = torch.randn(batch.num_targets, 8, requires_grad=True)
        out = fused_linear_divergence(hidden, weight, batch.targets, batch.labels, ce_weight=0.5)
        dense = sparse_divergence(hidden @ weight.T, batch.targets, kind="fkl")
        out.loss.backward()
        if not batch.num_targets:
            empty += 1
            assert out.loss == 0 and dense.sum() == 0
            assert weight.grad is not None and not weight.grad.any()
        weight.grad = None
    assert sorted(seen) == sorted(s.sample_id for _, _, s in expected())
    assert targets == sum(s.num_targets for _, lost, s in expected() if not lost)
    assert empty == (len(LOST) if batch_size == 1 else 0)


def test_a_step_of_rejected_sequences_alone_is_a_step_of_zero_gradient(cache: Path) -> None:
    """Fused or not, with no target in the whole step to divide by."""
    student = models.build_model()
    model = Distiller(student, LossConfig(ce_weight=0.5), SETTINGS.vocab_size)
    for batch, _ in zip(CacheStream(cache, batch_size=1), range(12), strict=False):
        if batch.num_targets:
            continue
        for options in (model.head, None):
            model.head = options
            loss = model(batch, 0.0).loss
            loss.backward()
            assert loss.item() == 0
            gradients = [p.grad for p in student.parameters() if p.grad is not None]
            assert gradients and not any(bool(gradient.any()) for gradient in gradients)
        return
    raise AssertionError("no batch without targets")
