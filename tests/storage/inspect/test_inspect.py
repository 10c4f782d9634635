"""What inspect and verify say equals what the dense distributions give; their commands behave.

One file, as all tests look at one cache, whose report is made once.
"""

import dataclasses
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from numpy.typing import NDArray

from decant.schemas import (
    Truncation,
    shard_schema,
    to_json,
)
from decant.storage import CacheReader
from decant.storage.__main__ import main
from decant.storage.cache import paths
from decant.storage.cli import process as cli
from decant.storage.cli.terminal import width
from decant.storage.inspect.collect import inspect
from decant.storage.inspect.html import report_html
from decant.storage.inspect.report import (
    RANKS,
    Histogram,
)
from decant.storage.inspect.sketches import SequenceHashes
from decant.storage.inspect.statistics import Statistics, reliability_bin
from decant.storage.inspect.text import report_text
from decant.student_train.evaluation import gathered, heldout_sums
from tests.support import ROOT, caches
from tests.support.inspected import SETTINGS, Known, assert_spread, known_cache


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> Known:
    """At k=8, lossless. Never write to it."""
    return known_cache(tmp_path_factory.mktemp("known") / "cache", SETTINGS)


def test_the_numbers_equal_a_dense_computation(known: Known) -> None:
    """Mass, entropy, cross-entropy and agreement, from the float64 distributions themselves."""
    report = inspect(known.path)
    dense, k = known.dense, SETTINGS.truncation.k
    labels = np.concatenate([s.labels for s in known.sequences])
    lengths = np.array([len(s.input_ids) for s in known.sequences])
    order = np.argsort(-dense, axis=1)
    assert report.complete and report.targets == len(dense) == report.planned_targets
    assert report.tokens == lengths.sum() and report.sequences == 6 and report.shards == 2
    assert_spread(report.sequence_length, lengths)
    assert_spread(report.num_kept, np.full(len(dense), k))
    assert [at.temperature for at in report.temperatures] == list(SETTINGS.temperatures)
    for at in report.temperatures:
        p = np.exp(dense / at.temperature)
        p /= p.sum(axis=1, keepdims=True)
        kept = np.take_along_axis(p, order[:, :k], axis=1)
        tail = np.take_along_axis(p, order[:, k:], axis=1).sum(axis=1, keepdims=True)
        classes = np.concatenate([kept, tail], axis=1)
        assert_spread(at.retained_mass, kept.sum(axis=1))
        assert_spread(at.teacher_entropy, -(classes * np.log(classes)).sum(axis=1))
        full = -(p * np.log(p)).sum(axis=1)
        assert at.teacher_entropy.mean < at.teacher_entropy_least.mean < full.mean()
        assert full.mean() < at.teacher_entropy_most.mean
        r, cap = tail[:, 0], kept[:, -1]
        bucket = -(classes * np.log(classes)).sum(axis=1)
        least = bucket + r * np.maximum(np.log(r / cap), 0)
        most = bucket + r * np.log(dense.shape[1] - k)
        assert (least <= full + 1e-9).all() and (full <= most + 1e-9).all()
        assert_spread(at.teacher_entropy_least, least, within=4e-6)
        assert_spread(at.teacher_entropy_most, most, within=4e-6)
        assert at.akl_inexact == pytest.approx((kept.sum(axis=1) < 0.5).mean())
    label_logprob = dense[np.arange(len(dense)), labels]
    assert report.teacher_ce == pytest.approx(-label_logprob.mean(), abs=1e-6)
    assert report.teacher_perplexity == pytest.approx(math.exp(-label_logprob.mean()), abs=1e-5)
    assert report.top1_agreement == pytest.approx((order[:, 0] == labels).mean())
    in_top = (order[:, :k] == labels[:, None]).any(axis=1)
    assert 0 < in_top.mean() < 1 and report.label_kept == pytest.approx(in_top.mean())
    assert report.kl_error_mean == report.kl_error_max == 0


def assert_histogram(found: Histogram | None, values: NDArray) -> None:
    assert found is not None and sum(found.counts) == len(values)
    edges = np.array(found.edges)
    expected, _ = np.histogram(values, np.append(edges[:-1], np.inf))
    np.testing.assert_array_equal(found.counts, expected)
    assert found.counts[0] and found.counts[-1] and values.max() <= edges[-1] + 1e-6


def test_histograms_hold_every_value(known: Known) -> None:
    """Counts by numpy over the dense distributions, in the same bins."""
    report = inspect(known.path)
    lengths = np.array([len(s.input_ids) for s in known.sequences])
    assert_histogram(report.sequence_length_histogram, lengths)
    mass = np.exp(-np.sort(-known.dense, axis=1)[:, : SETTINGS.truncation.k]).sum(axis=1)
    assert_histogram(report.temperatures[0].retained_mass_histogram, mass)
    kept = np.concatenate([s.token_ids for s in known.sequences])
    assert report.ids_kept == len(np.unique(kept)) <= 50
    data = np.concatenate([s.input_ids for s in known.sequences])
    assert report.ids_in_data == len(np.unique(data)) < 50


def test_calibration_is_that_of_the_dense_teacher(known: Known) -> None:
    """15 equal bins of the top-1 probability against how often its id is the token."""
    report = inspect(known.path)
    confidence = np.exp(known.dense.max(axis=1))
    labels = np.concatenate([s.labels for s in known.sequences])
    correct = known.dense.argmax(axis=1) == labels
    assert_spread(report.top1_probability, confidence)
    error, bins = 0.0, np.maximum(np.ceil(confidence * 15) - 1, 0)
    for number, at in enumerate(report.reliability):
        inside = bins == number
        assert at.targets == inside.sum()
        if at.targets:
            assert at.confidence == pytest.approx(confidence[inside].mean(), abs=1e-6)
            assert at.accuracy == pytest.approx(correct[inside].mean())
            error += inside.mean() * abs(correct[inside].mean() - confidence[inside].mean())
        else:
            assert at.confidence is at.accuracy is None
    assert len(report.reliability) == 15 and report.calibration_error == pytest.approx(error)


def test_the_bounds_of_the_entropy_enclose_what_a_bucket_leaves_out(tmp_path: Path) -> None:
    """At T=2 nearly all of a Zipf's mass is in the tail; a bucket has a fifth of its entropy."""
    form = caches.Settings(truncation=Truncation(k=64), vocab_size=9000)
    ranks = np.log(np.arange(1, 9001))
    dense = -1.1 * ranks + np.random.default_rng(0).normal(scale=0.1, size=(8, 9000))
    dense -= caches.log_sum_exp(dense)[:, None]
    one = caches.scored_sequence(dense, np.zeros(9, np.int32), np.arange(9) > 0, form)
    caches.write_cache(tmp_path / "cache", form, [[one]])
    at = inspect(tmp_path / "cache").temperatures[1]
    hot = dense / 2 - caches.log_sum_exp(dense / 2)[:, None]
    full = -(np.exp(hot) * hot).sum(axis=1).mean()
    assert at.teacher_entropy.mean < 0.2 * full
    assert 0.7 * full < at.teacher_entropy_least.mean < full < at.teacher_entropy_most.mean
    assert at.teacher_entropy_most.mean < 1.1 * full


@pytest.mark.parametrize("edge", [1, 3, 6, 9, 12, 15])
def test_a_confidence_on_an_edge_is_in_the_bin_that_training_puts_it_in(edge: int) -> None:
    """(b, b+1] / 15 for inspect, for `evaluate` and for the held-out figures of a training."""
    near = edge / 15 + np.array([-1e-9, 1e-9])
    values = np.array([edge / 15, *near[near <= 1]])
    ours = np.bincount(reliability_bin(values), minlength=15)
    np.testing.assert_array_equal(ours, gathered.binned(values, values)[:, 0])
    theirs = heldout_sums._binned(torch.tensor(values), torch.ones(len(values)))[:, 0]
    np.testing.assert_array_equal(ours, theirs.numpy())
    assert reliability_bin(values)[0] == edge - 1


def test_a_drawn_cache_has_no_truncation_curve(tmp_path: Path) -> None:
    """Its entries are no top k; the text says so."""
    truncation = Truncation(method="topk+sample", k=2, draws=9)
    settings = dataclasses.replace(SETTINGS, truncation=truncation)
    report = inspect(known_cache(tmp_path / "cache", settings).path)
    assert report.truncation_curve == () and report.recommended_k is report.beyond_k is None
    assert "no estimate for drawn entries" in report_text(report)


def test_draws_without_log_probs_are_reported(tmp_path: Path) -> None:
    """Entropy over the whole vocabulary, labels and counts; nothing that takes log probs."""
    settings = dataclasses.replace(SETTINGS, truncation=Truncation(method="sample", draws=9))
    known = known_cache(tmp_path / "cache", settings)
    report = inspect(known.path)
    kept = [(s.token_ids >= 0).sum(axis=1) for s in known.sequences]
    assert_spread(report.num_kept, np.concatenate(kept))
    (at,) = report.temperatures
    entropy = -(np.exp(known.dense) * known.dense).sum(axis=1)
    for spread in (at.teacher_entropy, at.teacher_entropy_least, at.teacher_entropy_most):
        assert_spread(spread, entropy, within=2**-13)
    labels = np.concatenate([s.labels for s in known.sequences])
    ids = np.concatenate([s.token_ids for s in known.sequences])
    assert report.label_kept == pytest.approx((ids == labels[:, None]).any(axis=1).mean())
    label_logprob = known.dense[np.arange(len(labels)), labels]
    assert report.teacher_ce == pytest.approx(-label_logprob.mean(), abs=2**-13)
    assert at.retained_mass is None and at.retained_mass_histogram.counts == ()
    for name in ("top1_agreement", "top1_probability", "calibration_error", "akl_head_size"):
        assert getattr(report, name) is None, name
    assert report.kl_error_mean is report.kl_error_max is report.akl_inexact is None
    assert report.reliability == report.worst_targets == report.truncation_curve == ()
    text = report_text(report)
    assert "9 draws of 50, stored without log probs" in text and "of the whole dist" in text
    assert max(map(width, text.splitlines())) <= 100
    page = report_html(report)
    assert "Draws without log probs" in page and "None" not in text + page


def test_the_worst_targets_are_shown_in_context(known: Known) -> None:
    """The least retained mass first, with the tokens before, the actual one and the entries."""
    report = inspect(known.path)
    mass = np.concatenate([1 - np.exp(s.log_tail[:, 0]) for s in known.sequences])
    places = [(i, int(p)) for i, s in enumerate(known.sequences) for p in s.positions]
    order = np.argsort(mass, kind="stable")[:20]
    assert [(t.sequence, t.position) for t in report.worst_targets] == [places[i] for i in order]
    for found, row in zip(report.worst_targets, order, strict=True):
        scored = known.sequences[found.sequence]
        assert 1 - found.tail_mass == pytest.approx(mass[row], abs=1e-6)
        before = scored.input_ids[: found.position][-24:]
        assert found.context_ids == tuple(before) and found.context is None
        assert found.token_id == scored.input_ids[found.position]
        dense = known.dense[row]
        assert found.probability == pytest.approx(math.exp(dense[found.token_id]), rel=1e-5)
        assert [e.token_id for e in found.entries] == list(np.argsort(-dense)[:3])
        rank = int((dense > dense[found.token_id]).sum()) + 1
        assert found.rank == (rank if rank <= 8 else None)


def test_worst_targets_do_not_repeat_a_context(tmp_path: Path) -> None:
    """Copies of a sequence are shown once, and counted as duplicates."""
    shards = caches.random_shards(SETTINGS)
    caches.write_cache(tmp_path / "cache", SETTINGS, [*shards, shards[0][:3]])
    report = inspect(tmp_path / "cache")
    assert (report.duplicate_sequences, report.duplicates_exact) == (3, True)
    contexts = [found.context_ids for found in report.worst_targets]
    assert len(set(contexts)) == len(contexts) == 20


def test_duplicates_beyond_the_limit_are_estimated() -> None:
    """In bounded memory, close to the count, merged or not."""
    hashes = np.random.default_rng(0).integers(0, 2**64, 20_000, dtype=np.uint64)
    whole, one, other = (SequenceHashes(limit=2000) for _ in range(3))
    repeated = np.concatenate([hashes, hashes[:5000]])
    whole.add(repeated)
    one.add(repeated[:100])
    other.add(repeated[100:])
    one.merge(other)
    assert one.duplicates() == whole.duplicates()
    count, exact = whole.duplicates()
    assert not exact and count == pytest.approx(5000, rel=0.25)


def test_parts_merge_to_the_whole(known: Known) -> None:
    """Any number of threads, and statistics of row groups merged by hand, say the same."""
    reader = CacheReader(known.path)
    parts = []
    for group in reader.row_groups():
        parts.append(Statistics(reader.manifest))
        parts[-1].add(reader.read(group))
    parts[0].merge(parts[1])
    whole = inspect(known.path)
    assert parts[0].at_temperatures() == whole.temperatures
    means = parts[0].truncation_means()
    assert means is not None
    for name, column in (("fkl", means.fkl), ("fkl_error", means.fkl_error)):
        assert [getattr(at, name) for at in whole.truncation_curve] == column.tolist()
    assert inspect(known.path, workers=1) == inspect(known.path, workers=3) == whole


def test_dump_speed_is_that_of_the_records(known: Known) -> None:
    """By shard and by worker."""
    report = inspect(known.path)
    records = CacheReader(known.path).index
    rates = [r.targets / r.seconds for r in records]
    assert report.dump_speed.shard_rates == pytest.approx(rates)
    (worker,) = report.dump_speed.by_worker
    assert (worker.worker, worker.shards, worker.targets) == (records[0].worker, 2, report.targets)
    assert worker.seconds == pytest.approx(report.dump_seconds)


# Samples, and figures kept in the cache


def test_sizes_are_those_of_the_files(known: Known) -> None:
    """Bytes of the shards, of each column from the footers, and against dense fp16 logits."""
    report = inspect(known.path)
    files = [known.path / paths.shard(i) for i in range(2)]
    assert report.bytes == sum(file.stat().st_size for file in files)
    assert report.bytes_per_target == report.bytes / len(known.dense)
    assert report.dense_fp16_bytes == 2 * 50 * len(known.dense)
    assert report.times_smaller == report.dense_fp16_bytes / report.bytes
    assert list(report.column_bytes) == shard_schema(SETTINGS.draft().layout).names
    columns = {name: 0 for name in report.column_bytes}
    for file in files:
        group = pq.read_metadata(file).row_group(0)
        for i, name in enumerate(columns):
            columns[name] += group.column(i).total_compressed_size
    assert report.column_bytes == columns and sum(columns.values()) < report.bytes


@pytest.mark.parametrize("precision", ["f16", "compact"])
@pytest.mark.parametrize("method", ["topp", "topk+sample"])
def test_other_truncations_are_reported(method: str, precision: str, tmp_path: Path) -> None:
    """num_kept varies, and the decoding error is the mean of the records over targets."""
    truncation = {
        "topp": Truncation(method="topp", k=9, p=0.8),
        "topk+sample": Truncation(method="topk+sample", k=2, draws=9),
    }[method]
    settings = dataclasses.replace(SETTINGS, truncation=truncation, precision=precision)
    known = known_cache(tmp_path / "cache", settings)
    report = inspect(known.path)
    assert_spread(
        report.num_kept, np.concatenate([(s.token_ids >= 0).sum(axis=1) for s in known.sequences])
    )
    mass = np.concatenate([np.exp(s.logprobs).sum(axis=1) for s in known.sequences])
    assert_spread(report.temperatures[0].retained_mass, mass, within=2**-13)
    records = CacheReader(known.path).index
    errors = [r.kl_error_mean * r.targets for r in records]
    assert report.kl_error_mean == pytest.approx(sum(errors) / report.targets)
    assert report.kl_error_max == max(r.kl_error_max for r in records) > 0
    assert truncation.method.split("+")[0][:3] in report_text(report)


def test_quantiles_of_many_values_stay_within_the_stated_rank(tmp_path: Path) -> None:
    """Beyond what a sketch holds exactly: 0.2% of the rank, and min, max and mean are exact."""
    settings = caches.Settings(truncation=Truncation(k=2), vocab_size=5, temperatures=(1.0,))
    sequence, _ = caches.random_sequence(np.random.default_rng(0), settings, length=30_001)
    caches.write_cache(tmp_path / "cache", settings, [[sequence]])
    (at,) = inspect(tmp_path / "cache").temperatures
    values = np.sort(-np.expm1(sequence.log_tail[:, 0]))
    for name, rank in RANKS.items():
        low, high = (
            np.searchsorted(values, getattr(at.retained_mass, name), side) / len(values)
            for side in ("left", "right")
        )
        assert low - 0.002 <= rank <= high + 0.002
    assert (at.retained_mass.min, at.retained_mass.max) == (values[0], values[-1])
    assert at.retained_mass.mean == pytest.approx(values.mean(dtype=np.float64), abs=1e-6)


def test_an_incomplete_cache_is_reported_as_such(tmp_path: Path) -> None:
    """With no shard and with one: planned numbers and null instead of NaN; the text says so."""
    shards = caches.random_shards(SETTINGS, num_shards=3)
    writer = caches.start_cache(tmp_path / "cache", SETTINGS, shards)
    report = inspect(tmp_path / "cache")
    assert (report.complete, report.shards, report.planned_shards) == (False, 0, 3)
    assert report.teacher_ce is report.num_kept is report.kl_error_max is None
    assert report.temperatures == () and report.planned_targets > report.targets == 0
    assert "NOT COMPLETE: 0 of 3 shards" in report_text(report)
    json.dumps(to_json(report), allow_nan=False)
    caches.write_shard(writer, 1, shards[1])
    report = inspect(tmp_path / "cache")
    assert not report.complete and report.targets == sum(s.num_targets for s in shards[1])
    assert "NOT COMPLETE: 1 of 3 shards" in report_text(report)


def test_the_text_fits_a_terminal(known: Known) -> None:
    """No line beyond 100 columns, however long the names and large the numbers."""
    report = inspect(known.path)
    huge = dataclasses.replace(
        report,
        url="x" * 300,
        targets=10**13,
        tokens=10**13,
        bytes=10**15,
        sequences=10**11,
        shards=10**7,
        dump_seconds=1e9,
        targets_per_second=1e6,
        workers=12_345,
        teacher=dataclasses.replace(report.teacher, name="y" * 300),
        temperatures=tuple(
            dataclasses.replace(at, temperature=1 / 3) for at in report.temperatures
        ),
    )
    for shown in (report, huge):
        text = report_text(shown)
        assert max(map(len, text.splitlines())) <= 100
        assert "the tail as uneven as the last entry allows" in text


# Commands


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    code = main(list(arguments))
    return code, capsys.readouterr().out


def test_json_and_text_say_the_same(known: Known, capsys: pytest.CaptureFixture[str]) -> None:
    """--json is the report, strictly JSON; the text shows its numbers."""
    code, out = run(capsys, "inspect", str(known.path), "--json")
    report = inspect(known.path)
    assert code == cli.DONE
    assert json.loads(out, parse_constant=lambda name: pytest.fail(name)) == to_json(report)
    code, text = run(capsys, "inspect", str(known.path))
    assert code == cli.DONE and text.rstrip("\n") == report_text(report)
    assert f"cross-entropy {report.teacher_ce:.4f}" in text and f"{report.targets} targets" in text


def test_verify_exits_by_what_it_finds(
    known: Known, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """0 if whole, 1 with one line per problem if not."""
    code, out = run(capsys, "verify", str(known.path))
    assert code == cli.DONE and out.count("\n") == 1 and "is whole" in out
    shards = caches.random_shards(SETTINGS)
    writer = caches.start_cache(tmp_path / "cache", SETTINGS, shards)
    caches.write_shard(writer, 0, shards[0])
    (tmp_path / "cache" / paths.shard(0)).write_bytes(b"")
    code, out = run(capsys, "verify", str(tmp_path / "cache"))
    assert code == cli.BAD_DATA and len(out.splitlines()) == 2
    assert "1 of 2 shards missing" in out and "part-000000.parquet is damaged" in out
    code, out = run(capsys, "verify", str(tmp_path / "cache"), "--json")
    found = json.loads(out)
    assert code == cli.BAD_DATA and not found["ok"] and len(found["problems"]) == 2
    (tmp_path / "cache" / paths.MANIFEST).unlink()
    code, out = run(capsys, "verify", str(tmp_path / "cache"))
    assert code == cli.BAD_DATA and "manifest.json is missing" in out


def test_the_commands_end_with_clean_codes_and_lines(known: Known) -> None:
    """As processes: 2 and one line without a cache, 141 when nobody reads, no bar in a pipe."""

    def command(*arguments: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "storage", *arguments],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    started = [
        command("verify", "/nowhere/cache"),
        command("inspect", str(ROOT / "docs")),
        command("verify", str(known.path)),
    ]
    (_, err), (_, other_err), (out, whole_err) = [process.communicate() for process in started]
    assert [process.returncode for process in started] == [2, 2, 0]
    assert err.splitlines()[0] == "error: /nowhere/cache: no such directory"
    assert "manifest.json is missing" in other_err and "Traceback" not in err + other_err
    assert "is whole" in out and whole_err == ""


def test_a_closed_pipe_is_no_error(known: Known) -> None:
    """As when `head` has seen enough: no message, the code that a shell gives SIGPIPE."""
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-m", "storage", "verify", str(known.path)],
        cwd=ROOT,
        stdout=writing,
        stderr=subprocess.PIPE,
        check=False,
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, b"")


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    """Each page shows a command to copy."""
    for arguments in ([], ["inspect"], ["head"], ["diff"], ["verify"]):
        code, out = run(capsys, *arguments, "--help")
        assert code == 0 and "  decant " in out.split("\n\n", 1)[1]
    for arguments, said in (
        (["inspect", "--html", "x"], "DIR"),
        (["inspect", "x", "--sample", "1.5"], "neither a share between 0 and 1"),
        (["head", "x", "--sequence", "1", "--sample", "a"], "exclude each other"),
    ):
        with pytest.raises(ValueError, match=said):
            main(arguments)


# docs/format.md
