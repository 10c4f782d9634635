"""A cache is finished or absent, whole or refused: writer, reader and verify.

One file, as the tests share caches that are written once.
"""

import dataclasses
import shutil
import signal
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow.parquet as pq
import pytest

from decant.schemas import FormatError, Truncation
from decant.storage import Busy, CacheReader, CacheWriter, Store, verify
from decant.storage.cache import paths
from decant.storage.cache.checks import check_sequence
from decant.storage.cache.plan import plan_of
from decant.storage.cache.writer import ROW_GROUP_ROWS, write_cache
from decant.storage.files.durable import TEMPORARY_SUFFIX
from decant.storage.inspect.collect import inspect
from tests.support import ROOT, caches

SETTINGS = caches.Settings()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole cache of two shards. Never write to it."""
    path = tmp_path_factory.mktemp("whole") / "cache"
    caches.write_cache(path, SETTINGS, caches.random_shards(SETTINGS))
    return path


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    """A copy of the whole cache, to damage."""
    return Path(shutil.copytree(whole, tmp_path / "cache"))


def read_all(path: Path | str) -> None:
    for sequence in CacheReader(path, allow_incomplete=True):
        assert np.isfinite(sequence.log_z).all()


# Writing and reading


def test_what_is_written_is_read(whole: Path) -> None:
    """By index, from the end, in order and by row group; verify finds nothing."""
    expected = [s for shard in caches.random_shards(SETTINGS) for s in shard]
    reader = CacheReader(whole)
    assert len(reader) == len(expected) == reader.manifest.num_sequences
    for found, sequence in zip(reader, expected, strict=True):
        caches.assert_equal(found, sequence)
    for index in (5, 0, -1, 3):
        caches.assert_equal(reader[index], expected[index])
    with pytest.raises(IndexError, match="sequence 8 of 8"):
        reader[8]
    firsts = [group.first_sequence for group in reader.row_groups()]
    assert [int(reader.read(g).sequence[0]) for g in reader.row_groups()] == firsts == [0, 4]
    report = verify(whole)
    assert report.ok and (report.shards, report.sequences) == (2, 8)
    assert report.targets == sum(s.num_targets for s in expected)


@pytest.mark.parametrize("precision", ["f32", "f16", "compact"])
@pytest.mark.parametrize(
    "truncation",
    [
        Truncation(method="topp", k=9, p=0.8, min_k=2),
        Truncation(method="sample", draws=7),
        Truncation(method="topk+sample", k=3, draws=6),
    ],
    ids=lambda t: t.method,
)
def test_every_truncation_and_precision_is_whole(
    truncation: Truncation, precision: str, tmp_path: Path
) -> None:
    """Varying K and draws go through files, verify included."""
    settings = dataclasses.replace(SETTINGS, truncation=truncation, precision=precision)
    shards = caches.random_shards(settings, num_shards=1)
    caches.write_cache(tmp_path / "cache", settings, shards)
    assert verify(tmp_path / "cache").problems == ()
    for found, sequence in zip(CacheReader(tmp_path / "cache"), shards[0], strict=True):
        caches.assert_equal(found, sequence, logprobs=precision == "f32")


def test_row_t_holds_token_t_and_the_distribution_for_it(whole: Path) -> None:
    """The label of a distribution stands in its own row, token 0 has none."""
    sequence = caches.random_shards(SETTINGS)[0][0]
    table = pq.read_table(whole / paths.shard(0)).slice(0, len(sequence.input_ids))
    rows = table.to_pylist()
    assert [r["token_id"] for r in rows] == sequence.input_ids.tolist()
    assert [r["position"] for r in rows] == list(range(len(rows)))
    assert not rows[0]["is_target"] and rows[0]["topk_lo"] == bytes(8)
    for target, position in enumerate(sequence.positions):
        row = rows[position]
        assert row["is_target"]
        assert list(row["topk_lo"]) == sequence.token_ids[target].tolist()
        planes = [np.frombuffer(row[f"topk_logprob_{i}"], np.uint8) for i in range(4)]
        steps = np.stack(planes, axis=1).copy().view("<u4")[:, 0]
        logprob = np.cumsum(steps, dtype="<u4").view("<f4")
        assert logprob.tolist() == sequence.logprobs[target].tolist()
        if row["token_id"] in sequence.token_ids[target]:
            slot = sequence.token_ids[target].tolist().index(row["token_id"])
            assert row["label_logprob"] == logprob[slot]


@pytest.fixture(scope="module")
def long_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sequences of many lengths, one longer than a row group."""
    settings = caches.Settings(truncation=Truncation(k=2), vocab_size=4, temperatures=(1.0,))
    generator = np.random.default_rng(0)
    base, _ = caches.random_sequence(generator, settings, length=2 * ROW_GROUP_ROWS + 7)

    def cut(length: int, index: int) -> Any:
        n = length - 1
        fields = {"input_ids": length, "is_target": length, "positions": n, "token_ids": n}
        fields |= {"logprobs": n, "log_z": n, "log_tail": n, "label_logprob": n}
        parts = {name: getattr(base, name)[:size] for name, size in fields.items()}
        return dataclasses.replace(base, sample_id=f"s{index}", **parts)

    lengths = [5000, 5000, 5000, 5000, 2, len(base.input_ids), 3, 9000, 9000, 9000]
    path = tmp_path_factory.mktemp("long") / "cache"
    caches.write_cache(path, settings, [[cut(n, i) for i, n in enumerate(lengths)]])
    return path


def test_row_groups_hold_whole_sequences(long_cache: Path) -> None:
    """None is cut, however long; groups stay within the limit where more than one sequence fits."""
    reader = CacheReader(long_cache)
    groups = [(g.sequences, g.rows) for g in reader.row_groups()]
    assert groups == [(3, 15_000), (3, 2 * ROW_GROUP_ROWS + 5009), (2, 9003), (1, 9000), (1, 9000)]
    metadata = pq.read_metadata(long_cache / paths.shard(0))
    assert [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)] == [
        rows for _, rows in groups
    ]
    assert len(reader[5].input_ids) == 2 * ROW_GROUP_ROWS + 7
    assert verify(long_cache).ok


def test_sample_ids_are_any_text(tmp_path: Path) -> None:
    """Unicode, empty, repeated, with separators: as given."""
    names = ["Ünï/côdé", "", "日本語\n\t", "a" * 3000, "\U0001f40d\0", "Ünï/côdé"]
    generator = np.random.default_rng(0)
    shard = [caches.random_sequence(generator, SETTINGS, sample_id=name)[0] for name in names]
    caches.write_cache(tmp_path / "cache", SETTINGS, [shard])
    assert [s.sample_id for s in CacheReader(tmp_path / "cache")] == names
    assert verify(tmp_path / "cache").ok


def test_the_commit_record_bounds_the_decoding_error(tmp_path: Path) -> None:
    """It is measured on what is decoded from the table, and zero without loss."""
    for precision in ("f32", "f16", "compact"):
        settings = dataclasses.replace(SETTINGS, precision=precision)
        caches.write_cache(tmp_path / precision, settings, caches.random_shards(settings))
        records = CacheReader(tmp_path / precision).index
        for record in records:
            assert 0 <= record.kl_error_mean <= record.kl_error_max <= 3e-4
            assert (record.kl_error_max == 0) == (precision == "f32")
            mean, largest = record.logprob_error_mean, record.logprob_error_max
            assert mean is not None and largest is not None and 0 <= mean <= largest < 0.2
            assert (largest == 0) == (precision == "f32")
        sequences = [s for shard in caches.random_shards(settings) for s in shard]
        apart = [
            np.abs(given.logprobs - found.logprobs).max(axis=1)
            for given, found in zip(sequences, CacheReader(tmp_path / precision), strict=True)
        ]
        stated = [record.logprob_error_max for record in records]
        assert max(stated) == pytest.approx(np.concatenate(apart).max(), rel=1e-6)
        targets = [record.targets for record in records]
        mean = np.dot([record.logprob_error_mean for record in records], targets) / sum(targets)
        assert mean == pytest.approx(np.concatenate(apart).mean(), rel=1e-6)
        report = inspect(tmp_path / precision)
        assert report.logprob_error_mean == pytest.approx(mean)
        assert report.logprob_error_max == max(stated)


# Finished or absent


def test_an_exception_inside_a_shard_publishes_nothing(tmp_path: Path) -> None:
    """Neither the shard nor its record nor a temporary stays behind."""
    shards = caches.random_shards(SETTINGS)
    writer = caches.start_cache(tmp_path / "cache", SETTINGS, shards)
    with pytest.raises(RuntimeError, match="teacher died"), writer.shard(0) as shard:
        shard.write(shards[0][0])
        raise RuntimeError("teacher died")
    assert list((tmp_path / "cache" / paths.SHARDS).iterdir()) == []
    assert [s.shard for s in writer.missing()] == [0, 1]


def test_a_shard_that_differs_from_its_plan_is_not_published(tmp_path: Path) -> None:
    """One sequence too few or too many is an error that names the shard and both counts."""
    shards = caches.random_shards(SETTINGS)
    writer = caches.start_cache(tmp_path / "cache", SETTINGS, shards)
    for sequences in (shards[0][:-1], [*shards[0], shards[1][0]]):
        with pytest.raises(FormatError, match=r"shard 0: .*written .* planned"):
            caches.write_shard(writer, 0, sequences)
        assert list((tmp_path / "cache" / paths.SHARDS).iterdir()) == []


def test_an_incomplete_cache_is_refused_unless_asked_for(tmp_path: Path) -> None:
    """Sealing names the missing shards; the reader and verify say how many there are."""
    shards = caches.random_shards(SETTINGS, num_shards=3)
    writer = caches.start_cache(tmp_path / "cache", SETTINGS, shards)
    caches.write_shard(writer, 1, shards[1])
    with pytest.raises(FormatError, match=r"2 of 3 shards are missing, first \[0, 2\]"):
        writer.finalize()
    with pytest.raises(FormatError, match="not complete: 1 of 3 shards"):
        CacheReader(tmp_path / "cache")
    assert any("2 of 3 shards missing" in p for p in verify(tmp_path / "cache").problems)
    partial = CacheReader(tmp_path / "cache", allow_incomplete=True)
    assert len(partial) == 4
    caches.assert_equal(partial[0], shards[1][0])
    for index in (2, 0):  # in any order, by another process
        caches.write_shard(CacheWriter(tmp_path / "cache"), index, shards[index])
    CacheWriter(tmp_path / "cache").finalize()
    assert verify(tmp_path / "cache").ok
    caches.assert_equal(CacheReader(tmp_path / "cache")[0], shards[0][0])


def test_a_cache_is_not_started_over_another(copy: Path) -> None:
    """The files of the first stay as they are."""
    before = (copy / paths.MANIFEST).read_bytes()
    with pytest.raises(FileExistsError, match="already holds a cache"):
        caches.start_cache(copy, SETTINGS, caches.random_shards(SETTINGS, num_shards=1))
    assert (copy / paths.MANIFEST).read_bytes() == before and verify(copy).ok


KILLED_WRITER = """
import sys, time
from storage import CacheWriter
from tests.storage.cache.test_cache import kill_shard
writer = CacheWriter(sys.argv[1])
with writer.store.lock(), writer.shard(0) as shard:
    for sequence in kill_shard():
        shard.write(sequence)
    print("ready", flush=True)
    time.sleep(600)
"""
KILL_SETTINGS = caches.Settings(truncation=Truncation(k=2), vocab_size=4, temperatures=(1.0,))


def kill_shard() -> list[Any]:
    """More rows than a row group, so that a part of the shard is on disk."""
    generator = np.random.default_rng(0)
    return [caches.random_sequence(generator, KILL_SETTINGS, length=7000)[0] for _ in range(3)]


def test_a_killed_writer_publishes_nothing_and_a_rerun_completes(tmp_path: Path) -> None:
    """Killed in the middle of a shard: no published file, no held lock, nothing lost after."""
    path = tmp_path / "cache"
    caches.start_cache(path, KILL_SETTINGS, [kill_shard()])
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED_WRITER, str(path)], stdout=subprocess.PIPE, cwd=ROOT
    )
    assert process.stdout is not None and process.stdout.readline() == b"ready\n"
    store = Store(path)
    with pytest.raises(Busy, match="written by another process"), store.lock():
        pass
    process.send_signal(signal.SIGKILL)
    process.wait()
    (leftover,) = (path / paths.SHARDS).iterdir()
    assert leftover.name.endswith(TEMPORARY_SUFFIX) and leftover.stat().st_size > 4
    assert not list(CacheWriter(path).committed())
    with store.lock():
        store.remove_temporaries(paths.SHARDS)
        writer = CacheWriter(path)
        assert [s.shard for s in writer.missing()] == [0]
        caches.write_shard(writer, 0, kill_shard())
        writer.finalize()
    assert verify(path).ok and not leftover.exists()


# What verify names; damage to every file is in test_corruption.py


def test_a_missing_or_damaged_tokenizer_file_is_found(tmp_path: Path) -> None:
    """The files that the ids belong to are part of the cache."""
    store = Store(tmp_path)
    store.publish("tokenizer/vocab.json", b"{}")
    tokenizer = dataclasses.replace(
        SETTINGS.draft().tokenizer, files={"vocab.json": store.hash("tokenizer/vocab.json")}
    )
    shards = caches.random_shards(SETTINGS, num_shards=1, sequences=1)
    draft = dataclasses.replace(SETTINGS.draft(), tokenizer=tokenizer)
    writer = CacheWriter.create(tmp_path, draft, caches.plan_of(shards))
    caches.write_shard(writer, 0, shards[0])
    writer.finalize()
    assert verify(tmp_path).ok
    (tmp_path / "tokenizer/vocab.json").write_bytes(b"[]")
    assert "tokenizer/vocab.json is damaged" in verify(tmp_path).problems[0]
    (tmp_path / "tokenizer/vocab.json").unlink()
    assert "tokenizer/vocab.json is missing" in verify(tmp_path).problems[0]


def test_files_that_belong_to_nothing_are_named(copy: Path) -> None:
    """A foreign file among the shards is a problem; a killed writer's temporary is not data."""
    (copy / "shards/.part-000000.parquet.1a.tmp").write_bytes(b"x")
    assert verify(copy).ok
    (copy / "shards/part-000007.parquet").write_bytes(b"x")
    (problem,) = verify(copy).problems
    assert "part-000007.parquet belongs to no shard" in problem


# Refused before it is written


def broken(**changes: Callable[[np.ndarray], Any]) -> Callable[[Any], Any]:
    """A change of the fields of a sequence, each made on a copy of the array."""

    def change(sequence: Any) -> Any:
        fields = {}
        for name, edit in changes.items():
            value = getattr(sequence, name)
            value = value.copy() if isinstance(value, np.ndarray) else value
            result = edit(value)
            fields[name] = value if result is None else result
        return dataclasses.replace(sequence, **fields)

    return change


def put(row: int, column: int, value: float) -> Callable[[np.ndarray], None]:
    def edit(array: np.ndarray) -> None:
        array[row, column] = value

    return edit


def at(index: int, value: float) -> Callable[[np.ndarray], None]:
    def edit(array: np.ndarray) -> None:
        array[index] = value

    return edit


REFUSED = {
    "a NaN log prob": (broken(logprobs=put(2, 3, np.nan)), "log prob is not finite"),
    "a -inf log prob": (broken(logprobs=put(2, 7, -np.inf)), "log prob is not finite"),
    "a NaN label": (broken(label_logprob=at(1, np.nan)), "label_logprob is not finite"),
    "a NaN tail": (broken(log_tail=put(1, 1, np.nan)), "log tail is not a number"),
    "an infinite log Z": (broken(log_z=put(1, 1, np.inf)), "log Z is not finite"),
    "a log Z at T=1": (broken(log_z=put(1, 0, 0.5)), "log Z at T=1"),
    "unsorted entries": (
        broken(logprobs=lambda a: a[:, ::-1].copy(), token_ids=lambda a: a[:, ::-1].copy()),
        "not in descending order",
    ),
    "a duplicate id": (broken(token_ids=lambda a: put(0, 1, a[0, 0])(a)), "kept twice"),
    "an id beyond the vocabulary": (broken(token_ids=put(0, 0, 50)), "kept id not below 50"),
    "an unused slot": (broken(token_ids=put(0, 7, -1)), "fewer than 8 entries"),
    "a token beyond the vocabulary": (broken(input_ids=at(0, 50)), r"token id outside \[0, 50\)"),
    "a negative token": (broken(input_ids=at(1, -1)), r"token id outside \[0, 50\)"),
    "mass above 1": (broken(logprobs=put(0, 0, -1e-5)), "mass"),
    "mass below 1": (broken(log_tail=put(0, 0, -30)), "mass"),
    "the tail of another temperature": (broken(log_tail=lambda a: a[:, ::-1].copy()), "mass"),
    "a positive tail": (broken(log_tail=put(0, 0, 0.1)), "log tail above 0"),
    "a positive label": (broken(label_logprob=at(0, 0.1)), "label_logprob above 0"),
    "a target at position 0": (
        broken(is_target=at(0, True), positions=lambda a: a),
        "token 0 is a target",
    ),
    "positions that are not the mask": (broken(positions=at(0, 5)), "positions are not"),
    "other shapes": (broken(logprobs=lambda a: a[:, :-1].copy()), "logprobs must be float32"),
    "fewer targets": (broken(log_z=lambda a: a[:-1]), "log_z must be"),
    "another dtype": (broken(token_ids=lambda a: a.astype(np.int64)), "token_ids must be int32"),
    "a list": (broken(label_logprob=lambda a: a.tolist()), "label_logprob must be float32"),
    "draws without sampling": (
        broken(draws=lambda _: np.zeros((11, 8), np.int32)),
        "draws given",
    ),
}


def label_of_another_token(sequence: Any) -> Any:
    """Log probs of the labels shifted by one: the off-by-one of this field."""
    return dataclasses.replace(sequence, label_logprob=np.roll(sequence.label_logprob, 1))


@pytest.mark.parametrize("name", REFUSED)
def test_a_sequence_that_is_not_valid_is_refused_by_name(name: str, tmp_path: Path) -> None:
    """The message names the sample and what is wrong; nothing of the shard is published."""
    change, message = REFUSED[name]
    good, _ = caches.random_sequence(np.random.default_rng(0), SETTINGS, sample_id="wiki/7")
    assert good.num_targets == 11
    check_sequence(good, SETTINGS.draft().layout)
    with pytest.raises(FormatError, match=f"sample wiki/7: .*{message}"):
        check_sequence(change(good), SETTINGS.draft().layout)


def test_a_shifted_label_is_refused(tmp_path: Path) -> None:
    """label_logprob must be that of the row's own token where the token is kept."""
    good, _ = caches.random_sequence(np.random.default_rng(0), SETTINGS, sample_id="wiki/7")
    with pytest.raises(FormatError, match=r"sample wiki/7: label_logprob differs"):
        check_sequence(label_of_another_token(good), SETTINGS.draft().layout)
    writer = caches.start_cache(tmp_path / "cache", SETTINGS, [[good]])
    with pytest.raises(FormatError, match="wiki/7"):
        caches.write_shard(writer, 0, [label_of_another_token(good)])
    assert list((tmp_path / "cache" / paths.SHARDS).iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"token_ids": put(0, 0, -1)}, "no kept entry"),
        ({"token_ids": put(0, 1, -1)}, "unused slot before a used one"),
        ({"logprobs": lambda a: np.maximum(a, -99)}, "unused slot that does not hold"),
        ({"draws": put(0, -1, 3)}, "draws without an entry"),
        ({"draws": put(0, 0, -3)}, "draws outside"),
    ],
)
def test_unused_slots_are_empty_and_last(changes: dict[str, Any], message: str) -> None:
    """With a varying K the slots behind the kept entries hold nothing."""
    settings = dataclasses.replace(SETTINGS, truncation=Truncation(method="sample", draws=9))
    good, _ = caches.random_sequence(np.random.default_rng(0), settings, sample_id="wiki/7")
    assert (good.token_ids[0] >= 0).sum() in range(2, 9)
    check_sequence(good, settings.draft().layout)
    with pytest.raises(FormatError, match=f"sample wiki/7: {message}"):
        check_sequence(broken(**changes)(good), settings.draft().layout)


def test_verify_checks_values_behind_good_hashes(tmp_path: Path) -> None:
    """An engine that reuses its arrays after handing them over is found out by the numbers."""
    shards = caches.random_shards(SETTINGS, num_shards=1)
    path = tmp_path / "cache"
    writer = caches.start_cache(path, SETTINGS, shards)
    with writer.shard(0) as shard:
        for sequence in shards[0]:
            shard.write(sequence)
        shards[0][0].log_tail[:] -= 2
        shards[0][1].label_logprob[:] = np.roll(shards[0][1].label_logprob, 1)
    writer.finalize()
    found = [problem.split("row group 0: ")[1] for problem in verify(path).problems]
    assert [problem[:25] for problem in found] == [
        "kept mass + tail at T=1 i",
        "kept mass + tail at T=2 i",
        "label_logprob differs fro",
    ]


# Object stores


@pytest.fixture
def memory_url() -> Iterator[str]:
    """A folder of fsspec's in-memory object store, removed afterwards."""
    url = f"memory://caches-{uuid.uuid4().hex}"
    yield url
    files, root = fsspec.core.url_to_fs(url)
    if files.exists(root):
        files.rm(root, recursive=True)


def test_an_object_store_holds_a_cache(memory_url: str, tmp_path: Path) -> None:
    """Write, interrupt, resume, read, verify and inspect through an fsspec URL."""
    url = f"{memory_url}/deep/cache"
    shards = caches.random_shards(SETTINGS)
    writer = caches.start_cache(url, SETTINGS, shards)
    with pytest.raises(RuntimeError), writer.shard(0) as shard:
        shard.write(shards[0][0])
        raise RuntimeError
    assert Store(url).names(paths.SHARDS) == []
    caches.write_shard(writer, 1, shards[1])
    assert len(CacheReader(url, allow_incomplete=True)) == 4
    caches.write_shard(CacheWriter(url), 0, shards[0])
    CacheWriter(url).finalize()
    expected = [s for shard in shards for s in shard]
    for found, sequence in zip(CacheReader(url), expected, strict=True):
        caches.assert_equal(found, sequence)
    assert verify(url).ok
    assert inspect(url).targets == sum(s.num_targets for s in expected)
    store = Store(url)
    data = bytearray(store.read(paths.shard(0)))
    data[len(data) // 2] ^= 4
    store.publish(paths.shard(0), bytes(data))
    assert any("is damaged" in problem for problem in verify(url).problems)
    with pytest.raises(FormatError, match="is damaged"):
        read_all(url)


def test_an_unknown_protocol_is_a_clean_error() -> None:
    """The message holds the URL."""
    with pytest.raises(ValueError, match="nowhere://cache"):
        Store("nowhere://cache")


def test_a_whole_cache_in_one_call(tmp_path: Path) -> None:
    """Of one shard, or by a plan that takes the sequences in turn; they may be a generator."""
    settings = caches.Settings()
    shards = caches.random_shards(settings, num_shards=2, sequences=2)
    sequences = [sequence for shard in shards for sequence in shard]
    one = write_cache(tmp_path / "one", settings.draft(), iter(sequences))
    two = write_cache(tmp_path / "two", settings.draft(), iter(sequences), plan_of(shards))
    assert (one.num_shards, two.num_shards) == (1, 2) and one.is_final and two.is_final
    for url in (tmp_path / "one", tmp_path / "two"):
        assert verify(url).ok
        for found, given in zip(CacheReader(url), sequences, strict=True):
            caches.assert_equal(found, given)
    with pytest.raises(FormatError, match=r"written .*, planned"):
        write_cache(tmp_path / "few", settings.draft(), sequences[:3], plan_of(shards))
