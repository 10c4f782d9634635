"""Exports are what the reader gives; imported dumps become truthful caches or are refused."""

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray

from decant.schemas import (
    FormatError,
    Manifest,
    ScoredSequence,
    Truncation,
    tokenizer_fingerprint,
)
from decant.storage import CacheReader, verify
from decant.storage.__main__ import main
from decant.storage.cache import paths
from decant.storage.cli import process as cli
from decant.storage.exchange.export import export
from decant.storage.exchange.foreign import ForeignError
from decant.storage.exchange.importing import import_cache
from decant.storage.exchange.survey import ImportConfig
from decant.storage.inspect.collect import inspect
from decant.student_train import CacheStream
from tests.support import FIXTURES, ROOT, caches, models

V, K = 60, 8
TRUNCATIONS = {
    "topk": Truncation(k=6),
    "topp": Truncation(method="topp", k=9, p=0.8),
    "topk+sample": Truncation(method="topk+sample", k=2, draws=5),
}


@pytest.fixture(scope="module", params=["topk", "topp", "topk+sample"])
def reader(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> CacheReader:
    """A cache of two shards; ids of three bytes, two temperatures, prompts. Never write to it."""
    precision = "compact" if request.param == "topp" else "f32"
    settings = caches.Settings(
        truncation=TRUNCATIONS[request.param], vocab_size=70_000, precision=precision
    )
    path = tmp_path_factory.mktemp("export") / "cache"
    caches.write_cache(path, settings, caches.random_shards(settings, sequences=2, length=5))
    return CacheReader(path)


# Export


def lists(values: NDArray, used: NDArray[np.bool_]) -> list[list[Any]]:
    """The entries in use of each target."""
    return [row[keep].tolist() for row, keep in zip(values, used, strict=True)]


def expected_row(reader: CacheReader, index: int) -> dict[str, Any]:
    """What a sequence export holds of one sequence."""
    s = reader[index]
    used = s.token_ids >= 0
    row = {
        "sequence": index,
        "sample_id": s.sample_id,
        "input_ids": s.input_ids.tolist(),
        "is_target": s.is_target.tolist(),
        "positions": s.positions.tolist(),
        "token_ids": lists(s.token_ids, used),
        "logprobs": lists(s.logprobs, used),
        "log_tail_t1": s.log_tail[:, 0].tolist(),
        "log_z_t2": s.log_z[:, 1].tolist(),
        "log_tail_t2": s.log_tail[:, 1].tolist(),
        "label_logprob": s.label_logprob.tolist(),
    }
    return row | ({"draws": lists(s.draws, used)} if s.draws is not None else {})


def test_a_parquet_export_is_what_the_reader_gives(reader: CacheReader, tmp_path: Path) -> None:
    """A row per sequence, a file per shard, lists as long as what is kept, values bit for bit."""
    report = export(reader.url, tmp_path / "out")
    files = sorted((tmp_path / "out").iterdir())
    assert [file.name for file in files] == ["part-000000.parquet", "part-000001.parquet"]
    rows = pq.read_table(tmp_path / "out").to_pylist()
    assert rows == [expected_row(reader, i) for i in range(len(reader))]
    assert (report.sequences, report.targets) == (len(reader), reader.manifest.num_targets)
    assert report.bytes == sum(file.stat().st_size for file in files)


def test_a_saved_dataset_is_what_the_reader_gives(reader: CacheReader, tmp_path: Path) -> None:
    """`datasets.load_from_disk` opens it; the description says whose values they are."""
    export(reader.url, tmp_path / "out", file_format="hf")
    dataset = datasets.load_from_disk(str(tmp_path / "out"))
    assert list(dataset) == [expected_row(reader, i) for i in range(len(reader))]
    assert json.loads(dataset.info.description)["cache_id"] == reader.manifest.cache_id
    names = [path.name for path in (tmp_path / "out").iterdir()]
    assert sorted(names) == ["data-00000-of-00001.arrow", "dataset_info.json", "state.json"]


@pytest.mark.parametrize("file_format", ["parquet", "hf"])
def test_a_target_export_has_a_row_per_target(
    file_format: str, reader: CacheReader, tmp_path: Path
) -> None:
    """The same values, with the actual token as the label."""
    export(reader.url, tmp_path / "out", file_format=file_format, rows="targets")
    if file_format == "hf":
        rows = list(datasets.load_from_disk(str(tmp_path / "out")))
    else:
        rows = pq.read_table(tmp_path / "out").to_pylist()
    expected = []
    for i in range(len(reader)):
        row, s = expected_row(reader, i), reader[i]
        per_target = {
            n: v for n, v in row.items() if n.startswith(("token_", "log", "label", "dr"))
        }
        for target in range(s.num_targets):
            expected.append(
                {"sequence": i, "sample_id": s.sample_id, "position": int(s.positions[target])}
                | {"label": int(s.labels[target])}
                | {name: values[target] for name, values in per_target.items()}
            )
    assert rows == expected


def test_an_export_is_whole_or_absent(tmp_path: Path) -> None:
    """Refused: what exists, a URL, a cache that is not final. Damage found late leaves nothing."""
    settings = caches.Settings()
    shards = caches.random_shards(settings)
    caches.write_cache(tmp_path / "cache", settings, shards)
    (tmp_path / "there").mkdir()
    with pytest.raises(FileExistsError, match="there exists already"):
        export(tmp_path / "cache", tmp_path / "there")
    with pytest.raises(ValueError, match="is a URL"):
        export(tmp_path / "cache", "memory://out")
    file = tmp_path / "cache" / paths.shard(1)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    before = sorted(tmp_path.iterdir())
    for file_format in ("parquet", "hf"):
        with pytest.raises(FormatError, match=r"part-000001\.parquet is damaged"):
            export(tmp_path / "cache", tmp_path / "out", file_format=file_format)
        assert sorted(tmp_path.iterdir()) == before
    caches.start_cache(tmp_path / "started", settings, shards)
    with pytest.raises(FormatError, match="is not complete"):
        export(tmp_path / "started", tmp_path / "out")


def test_an_interrupt_leaves_nothing(reader: CacheReader, tmp_path: Path) -> None:
    """Neither an export nor an import that is stopped in the middle."""

    def interrupt(done: int, total: int) -> None:
        if done == total > 1:
            raise KeyboardInterrupt

    for file_format in ("parquet", "hf"):
        with pytest.raises(KeyboardInterrupt):
            export(reader.url, tmp_path / "out", file_format=file_format, progress=interrupt)
    source = write(tmp_path / "dump.parquet", distillkit_rows(known_records()))
    with pytest.raises(KeyboardInterrupt):
        import_cache(config(source), tmp_path / "out", interrupt)
    assert [path.name for path in tmp_path.iterdir()] == ["dump.parquet"]


@pytest.mark.parametrize(("name", "says"), [("export", "starts over"), ("migrate", "goes on")])
def test_an_interrupt_says_what_the_next_run_does(
    name: str,
    says: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Ctrl-C at the first progress: exit code 130 and one line that is true of the command."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("tqdm.std.tqdm.update", interrupt)
    old = FIXTURES / "version-1" / "compact"
    monkeypatch.setattr(sys, "argv", ["storage", name, str(old), str(tmp_path / "out")])
    with pytest.raises(SystemExit) as end:
        cli.run(main)
    assert end.value.code == cli.INTERRUPTED
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("interrupted: ") and says in line
    assert (tmp_path / "out").exists() == (name == "migrate")


def test_exporting_needs_no_torch(tmp_path: Path) -> None:
    """Neither format imports torch or transformers."""
    settings = caches.Settings()
    caches.write_cache(tmp_path / "cache", settings, caches.random_shards(settings))
    code = (
        "import sys; from decant.storage.__main__ import main;"
        f"c = main(['export', {str(tmp_path / 'cache')!r}, {str(tmp_path / 'out')!r},"
        " '--format', 'hf']);"
        "print(c, [m for m in ('torch', 'transformers', 'vllm') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "0 []" and done.stderr == ""


# Import: dumps with known distributions


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
    with pytest.raises(ForeignError, match=f"one token {way}: give --shift {-moved}"):
        import_cache(config(source), tmp_path / "cache")
    options = {"shift": -moved, "unknown_label": "bound"}
    _, found = imported(tmp_path, rows, **options)
    for sequence, record in zip(found, records, strict=True):
        first = sequence.positions[0] - 1
        n = min(sequence.num_targets, len(record.dense) - first) - 1
        expected = np.array(record.top()[0])[first : first + n]
        np.testing.assert_array_equal(sequence.token_ids[:n], expected)


def test_labels_and_attention_mask_leave_tokens_out(tmp_path: Path) -> None:
    """-100 is no target, padding is cut on either side, records without a target are counted."""
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


# Import: what is refused


def without(row: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key != name}


def changed(name: str, place: int, entry: int, value: Any) -> Callable[[dict[str, Any]], dict]:
    """One entry of one list replaced."""

    def change(row: dict[str, Any]) -> dict[str, Any]:
        values = [list(items) for items in row[name]]
        values[place][entry] = value
        return {**row, name: values}

    return change


def cut(name: str, place: int, length: int = 3) -> Callable[[dict[str, Any]], dict]:
    """One list cut short."""

    def change(row: dict[str, Any]) -> dict[str, Any]:
        values = [list(items) for items in row[name]]
        values[place] = values[place][:length]
        return {**row, name: values}

    return change


def cut_both(row: dict[str, Any]) -> dict[str, Any]:
    return cut("top_values", 4)(cut("token_ids", 4)(row))


BAD: dict[str, tuple[Callable[[dict[str, Any]], dict[str, Any]], str]] = {
    "missing column": (
        lambda row: without(row, "top_values"),
        r"dump.parquet: no column top_values for --format distillkit; found input_ids, token_ids",
    ),
    "missing tokens": (lambda row: without(row, "input_ids"), "add the tokens that the teacher"),
    "compressed": (
        lambda row: {"input_ids": row["input_ids"], "compressed_logprobs": [[1]]},
        "these rows are compressed: decode them with DistillKit's LogprobCompressor",
    ),
    "ragged": (cut("top_values", 4), r"row 2, list 4: token_ids has 8 entries, top_values has 3"),
    "short list": (cut_both, r"row \d, list \d: 8 entries, but .*row 2, list 4: 3; .* --k 3"),
    "id too large": (
        changed("token_ids", 3, 1, V),
        f"row 2, list 3: {V} is no token id, expected 0 to {V - 1}: give the dump's own tokenizer",
    ),
    "negative id": (changed("token_ids", 3, 1, -5), "row 2, list 3: token id -5 is negative"),
    "token too large": (
        lambda row: {**row, "input_ids": [V + 7, *row["input_ids"][1:]]},
        f"row 2: input_ids has {V + 7}, expected 0 to {V - 1}",
    ),
    "NaN": (changed("top_values", 5, 2, float("nan")), "row 2, list 5: nan is no number"),
    "infinite": (changed("top_values", 5, 0, float("inf")), "row 2, list 5: inf is no log prob"),
    "logit": (changed("top_values", 5, 0, 3.5), "row 2, list 5: 3.5 is a logit"),
    "too much mass": (
        lambda row: changed("top_values", 5, 0, 0.0)(changed("top_values", 5, 1, 0.0)(row)),
        r"row 2, list 5: probabilities add up to 2\.\d+, expected at most 1",
    ),
    "lost mass": (
        lambda row: {**row, "top_values": [[-8.0 - i for i in range(K)]] * len(row["top_values"])},
        r"row 2, list 0: 0\.9\d+ of the mass is neither in the entries nor",
    ),
    "too many lists": (
        lambda row: {**row, **{n: row[n] * 2 for n in ("token_ids", "top_values")}},
        r"row 2: top_values has 30 lists for 16 tokens: expected one each, or all but the last",
    ),
    "labels too short": (lambda row: {**row, "labels": [1]}, "labels has 1 entries for 16 tokens"),
    "packed": (
        lambda row: {**row, "attention_mask": [1, 1, 0, *[1] * 13]},
        "attention_mask is not one run of 1 between zeros",
    ),
}


@pytest.mark.parametrize("name", list(BAD))
def test_bad_records_are_named(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Code 2 and one line with file, row, what was found and a way out; nothing is left."""
    change, message = BAD[name]
    rows = distillkit_rows(known_records())
    every = name in ("missing column", "missing tokens", "compressed", "labels too short", "packed")
    if name in ("labels too short", "packed"):
        rows = [rows[2]]
    rows = [change(row) if every or i == 2 else row for i, row in enumerate(rows)]
    source = write(tmp_path / "dump.parquet", rows)
    with pytest.raises(ForeignError, match=message) as caught:
        import_cache(config(source), tmp_path / "cache")
    assert str(source) in str(caught.value) and "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["dump.parquet"]


def test_a_doubled_id_is_named(tmp_path: Path) -> None:
    """Two entries of one id in one list have no meaning."""
    rows = distillkit_rows(known_records())
    rows[1]["token_ids"][2][1] = twice = rows[1]["token_ids"][2][0]
    with pytest.raises(ForeignError, match=f"row 1, list 2: {twice} stands twice"):
        imported(tmp_path, rows)


def test_sources_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    """No file, another kind of file, an empty one, broken JSON, several splits, mixed files."""

    def refuse(name: str, message: str, **options: Any) -> None:
        with pytest.raises(ForeignError, match=message):
            import_cache(config(tmp_path / name, **options), tmp_path / "out" / "cache")

    refuse("nowhere", "nowhere: no such file")
    (tmp_path / "dump.csv").write_text("a,b\n")
    refuse("dump.csv", r"expected a file ending in one of \.parquet")
    (tmp_path / "text.parquet").write_text("not Parquet")
    refuse("text.parquet", r"text\.parquet cannot be read as a Parquet file")
    (tmp_path / "bytes.jsonl").write_bytes(b"\x00\xff\n")
    refuse("bytes.jsonl", r"bytes\.jsonl line 1 is no JSON record")
    (tmp_path / "list.jsonl").write_text('{"input_ids": [1]}\n[1]\n')
    refuse("list.jsonl", r"list\.jsonl: no column token_ids, top_values")
    (tmp_path / "empty.jsonl").write_text("\n")
    refuse("empty.jsonl", "0 records give no target")
    rows = distillkit_rows(known_records(1))
    write(tmp_path / "text.jsonl", [{**rows[0], "input_ids": "abc"}])
    refuse("text.jsonl", "line 1: input_ids is string: expected a list of integers")
    write(tmp_path / "flat.jsonl", [{**rows[0], "top_values": [0.5]}])
    refuse("flat.jsonl", "top_values is list<.*: expected one list of entries per token")
    (tmp_path / "folder").mkdir()
    refuse("folder", "no .parquet or .jsonl file and no saved dataset inside")
    write(tmp_path / "folder/a.parquet", rows)
    write(tmp_path / "folder/b.jsonl", rows)
    refuse("folder", "both .parquet and .jsonl")
    splits = datasets.DatasetDict({"train": datasets.Dataset.from_list(rows)})
    splits.save_to_disk(str(tmp_path / "splits"))
    refuse("splits", "give one of .*splits/train")
    write(tmp_path / "axolotl.parquet", [{"messages": "hi", "logprobs": [[-0.1]]}])
    refuse("axolotl.parquet", "no column input_ids .*chat template", file_format="axolotl")
    objects = axolotl_object_rows(known_records(1))
    objects[0]["logprobs"][3][0]["token"] = "the"
    write(tmp_path / "objects.parquet", objects)
    refuse("objects.parquet", '"token": "token_id:N"', file_format="axolotl")
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


def test_options_without_effect_are_errors(tmp_path: Path) -> None:
    """What cannot be meant is refused before anything is read."""
    with pytest.raises(ValueError, match="give --tokenizer, or --vocab-size"):
        config(tmp_path, vocab_size=0)
    with pytest.raises(ValueError, match="--logprobs-field has no effect"):
        config(tmp_path, logprobs_field="x")
    with pytest.raises(ValueError, match="lies inside the source"):
        import_cache(config(tmp_path), tmp_path / "cache")
    rows = distillkit_rows(known_records())
    with pytest.raises(ForeignError, match=r"8 entries, fewer than --k 9: give --k 8 or less"):
        imported(tmp_path, rows, k=9)


# Commands


def test_the_commands_say_what_they_did(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Import, then export, in one line each; the axolotl column can have another name."""
    rows = [
        {
            "input_ids": r["input_ids"],
            "target_token_ids": r["target_token_ids"],
            "lp": r["logprobs"],
        }
        for r in axolotl_rows(known_records())
    ]
    source, cache, out = write(tmp_path / "a.jsonl", rows), tmp_path / "cache", tmp_path / "out"
    arguments = ["import", str(source), str(cache), "--format", "axolotl", "--teacher", "t"]
    assert main([*arguments, "--vocab-size", str(V), "--logprobs-field", "lp"]) == cli.DONE
    assert f"{cache}: 75 targets in 5 sequences, 1 shards, k=8" in capsys.readouterr().out
    assert main(["export", str(cache), str(out), "--rows", "targets"]) == cli.DONE
    assert f"{out}: 75 targets in 5 sequences, " in capsys.readouterr().out
    with pytest.raises(FileExistsError):
        main([*arguments, "--vocab-size", str(V), "--logprobs-field", "lp"])


def test_the_commands_end_with_clean_codes_and_lines(tmp_path: Path) -> None:
    """As a process: code 2, one line, no bar in a pipe, nothing left."""
    rows = distillkit_rows(known_records(1))
    rows[0]["token_ids"][2][0] = V
    source = write(tmp_path / "dump.parquet", rows)
    arguments = ["--format", "distillkit", "--teacher", "t", "--vocab-size", str(V)]
    done = subprocess.run(
        [sys.executable, "-m", "storage", "import", source, tmp_path / "cache", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (cli.USER_ERROR, "")
    first, hint = done.stderr.splitlines()
    assert (
        first.startswith(f"error: {source} row 0, list 2: {V} is no token id") and "--debug" in hint
    )
    assert [path.name for path in tmp_path.iterdir()] == ["dump.parquet"]


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    """Each page shows a command to copy."""
    for name in ("export", "import"):
        assert main([name, "--help"]) == cli.DONE
        out = capsys.readouterr().out
        assert f"  decant {name} " in out.split("\n\n", 1)[1]
        assert all(len(line) <= 100 for line in out.splitlines())
