"""Caches of a stranger, sound by every hash: refused in one line that names the file, or read."""

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tokenizers
import xxhash
import zstandard

from decant.schemas import FormatError, TokenizerInfo
from decant.storage import CacheReader, CacheWriter, Store, verify
from decant.storage.__main__ import main
from decant.storage.cache import paths
from decant.storage.cache.plan import plan_of
from decant.storage.cli import process
from decant.storage.files.sealed import publish_json
from decant.storage.hub.card import dataset_card
from decant.storage.inspect.collect import inspect
from decant.storage.inspect.head import head
from decant.student_train.model.student import load_tokenizer
from tests.support import ROOT, bombs, caches, hostile

TERMINAL = "\x1b[31m\x9b2J\u202e<script>alert(1)</script>"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole cache. Never write to it."""
    return hostile.make(tmp_path_factory.mktemp("whole") / "cache")


@pytest.fixture
def cache(whole: Path, tmp_path: Path) -> Path:
    """A copy, to change."""
    return Path(shutil.copytree(whole, tmp_path / "cache"))


@pytest.fixture
def soon() -> Iterator[None]:
    """Fail, in place of waiting for ever on a pipe."""

    def give_up(*_: object) -> None:
        raise TimeoutError("it hangs")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("count", [120, pytest.param(6000, marks=pytest.mark.slow)])
def test_false_values_behind_good_hashes_are_refused_or_harmless(
    tmp_path: Path, count: int
) -> None:
    """Fields of manifest, plan, records and kept figures, and bytes of a shard, in bounded memory.

    Whatever reads the cache says which file is wrong, or gives the rows that it gave before.
    """
    command = [sys.executable, "-m", "tests.support.hostile", str(tmp_path), "0", str(count)]
    done = subprocess.run(
        command,
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]


def record(path: tuple[Any, ...], value: Any) -> Callable[[Path], None]:
    """A false value in the sealed records."""
    return lambda cache: hostile.write_records(
        cache, hostile.put(hostile.read_records(cache), path, value)
    )


def manifest(path: tuple[Any, ...], value: Any) -> Callable[[Path], None]:
    """A false value in the manifest."""
    return lambda cache: hostile.write_manifest(
        cache, hostile.put(hostile.read_manifest(cache), path, value)
    )


def plan(path: tuple[Any, ...], value: Any) -> Callable[[Path], None]:
    """A false value in the plan."""
    return lambda cache: hostile.write_plan(
        cache, hostile.put(hostile.read_plan(cache), path, value)
    )


GROUP = (0, "row_groups", 0)
FALSE = {
    "a long precision": (
        manifest(("precision",), "x" * 10**6),
        "manifest.json: precision 'xx.*x' is not one of",
    ),
    "a long version": (manifest(("format_version",), ["x"] * 9999), "format_version \\['x'"),
    "length of 2^40": (record((*GROUP, "data", "length"), 2**40), "row_groups|footer"),
    "length of 2^62": (record((*GROUP, "data", "length"), 2**62), "row_groups.data.length"),
    "shard of 2^31": (record((1, "shard"), 2**31), "row 1 is of shard"),
    "no hash": (
        record((*GROUP, "data", "xxh3_128"), None),
        "data.xxh3_128 holds a null",
    ),
    "targets of -2^63": (record((0, "targets"), -(2**63)), "targets holds"),
    "k of 2e9": (manifest(("truncation", "k"), 2_000_000_000), "entries per target"),
    "vocabulary of 2^40": (manifest(("shared_vocab_size",), 2**40), "shared_vocab_size"),
    "shards of 2^31": (manifest(("num_shards",), 2**31), "num_shards"),
    "2^63": (manifest(("num_tokens",), 2**63), "num_tokens: expected a number of 64 bits"),
    "a plan outside": (manifest(("plan", "name"), "../plan"), "plan.*no name of a file inside"),
    "an absolute plan": (manifest(("plan", "name"), "/etc/passwd"), "no name of a file inside"),
    "a chain": (manifest(("plan", "name"), "zip::http://a/b"), "no name of a file inside"),
    "a tokenizer outside": (
        manifest(("tokenizer", "files", "../../x"), "0" * 32),
        "tokenizer.files.*no name of a file inside",
    ),
    "generated outside": (
        manifest(("source", "generated"), {"../x": "0" * 32}),
        "source.generated.*no name of a file inside",
    ),
    "a lineage of nothing": (manifest(("source", "lineage"), {}), "source.lineage.operation"),
    "a plan that jumps": (plan((1, "shard"), 7), "line 1 does not continue the plan"),
    "a plan of null": (plan((0, "num_tokens"), None), "num_tokens: expected int, found null"),
}


@pytest.mark.parametrize("name", FALSE)
def test_a_false_value_is_named(cache: Path, name: str) -> None:
    """File and field, in one line, before anything is allocated; it exits with 1."""
    change, expected = FALSE[name]
    change(cache)
    (problem, *_) = verify(cache).problems
    assert re.search(expected, problem) and str(cache) in problem and "\n" not in problem
    assert len(problem) < 6000
    if not isinstance(expected, str) or "plan" not in name:  # which only verify reads
        with pytest.raises(FormatError, match=expected):
            CacheReader(cache)


def deep(cache: Path) -> None:
    nested: Any = []
    for _ in range(300):
        nested = [nested]
    fields = hostile.read_manifest(cache)
    hostile.write_manifest(cache, {**fields, "source": {"path": "x", "more": nested}})


def bomb(cache: Path) -> None:
    line = b'{"a": "' + b"x" * (1 << 26)
    hostile.write_segment(cache, "plan", zstandard.compress(line), 2)


def many_lines(cache: Path) -> None:
    hostile.write_segment(cache, "plan", zstandard.compress(b"{}\n" * (1 << 24)), 2)


@pytest.mark.parametrize("change", [deep, bomb, many_lines])
def test_what_unpacks_without_end_is_refused(cache: Path, change: Callable[[Path], None]) -> None:
    """JSON of any depth, a line of 64 MB, lines without number."""
    change(cache)
    (problem,) = verify(cache).problems
    assert str(cache) in problem
    assert re.search("nested deeper than 100|lines of at most|fields of ShardPlan", problem)


def test_pages_that_hold_more_than_is_said_are_refused(cache: Path) -> None:
    """A sample id of 64 MB in 20 KB for every row, and records whose footer lies."""
    shard = pq.read_table(cache / paths.shard(0))
    at = shard.schema.get_field_index("sample_id")
    texts = pa.DictionaryArray.from_arrays(np.zeros(len(shard), np.int32), ["x" * (1 << 26)])
    hostile.write_rows(cache, shard.set_column(at, shard.schema.field(at), texts))
    (problem,) = [one for one in verify(cache).problems if "unpack" in one]
    assert re.search(
        r"part-000000\.parquet: column sample_id: \d+ values of up to 67108864", problem
    )
    with pytest.raises(FormatError, match="column sample_id"):
        list(CacheReader(cache))
    data = (cache / paths.RECORD_INDEX).read_bytes()
    lie = bombs.lying(data, bombs.sizes(data)[1])
    hostile.write_segment(cache, "records", lie, 2)
    with pytest.raises(FormatError, match="column shard: its pages hold 2 values"):
        CacheReader(cache)


@pytest.mark.parametrize("name", [paths.MANIFEST, paths.RECORD_INDEX, paths.shard(0)])
def test_only_regular_files_inside_are_opened(
    cache: Path, tmp_path: Path, name: str, soon: None
) -> None:
    """No pipe, no device, no link that leads out; a link inside is followed."""
    good = (cache / name).read_bytes()
    (tmp_path / "outside").write_bytes(good)
    for make, expected in (
        (os.mkfifo, "no regular file"),
        (lambda path: os.symlink("/dev/zero", path), "outside of"),
        (lambda path: os.symlink(tmp_path / "outside", path), "outside of"),
    ):
        (cache / name).unlink()
        make(cache / name)
        assert any(name in problem for problem in verify(cache).problems)
        with pytest.raises(FormatError, match=expected):
            list(CacheReader(cache))
    (cache / name).unlink()
    (cache / "elsewhere").write_bytes(good)
    (cache / name).symlink_to(cache / "elsewhere")
    assert verify(cache).ok
    assert len(list(CacheReader(cache))) == 4


def test_a_changed_tokenizer_is_refused_by_all(cache: Path) -> None:
    """As `verify` does: head, inspect and training name it."""
    file = cache / paths.TOKENIZER / "tokenizer.json"
    file.write_bytes(file.read_bytes().replace(b"w7", b"w8"))
    for look in (
        lambda: head(cache),
        lambda: main(["inspect", str(cache)]),
        lambda: load_tokenizer(CacheReader(cache)),
    ):
        with pytest.raises(FormatError, match=r"tokenizer\.json is damaged"):
            look()


def test_a_tokenizer_of_a_terabyte_is_refused_by_its_size(cache: Path, soon: None) -> None:
    """And not read to its end."""
    os.truncate(cache / paths.TOKENIZER / "tokenizer.json", 1 << 40)
    problems = verify(cache).problems
    assert any("tokenizer.json has 1099511627776 bytes" in problem for problem in problems)
    with pytest.raises(FormatError, match="more than the 268435456 bytes"):
        load_tokenizer(CacheReader(cache))


@pytest.mark.parametrize("checksum", ["\x1b" * 10**6, [["x" * 10**6]], None])
def test_an_error_is_short_whatever_it_quotes(cache: Path, checksum: Any) -> None:
    """A checksum of a megabyte."""
    fields = {**hostile.read_manifest(cache), "checksum": checksum}
    (cache / paths.MANIFEST).write_text(json.dumps(fields))
    (problem,) = verify(cache).problems
    assert "is damaged: checksum" in problem and len(problem) < 2000 and problem.isprintable()


def test_other_columns_are_named_in_one_line(cache: Path) -> None:
    """The first of them."""
    other = pa.table({f"c{i}\n\x1b": [1, 2] for i in range(1000)})
    hostile.write_segment(cache, "records", bombs.parquet(other), 2)
    (problem, *_) = verify(cache).problems
    assert "'shard': expected int64 not null, found none" in problem
    assert len(problem) < 2000 and "\n" not in problem


def planted(value: Any) -> Any:
    """The same with what a terminal obeys in every text of any length that may hold any."""
    if isinstance(value, dict):
        fixed = ("name", "method", "precision", "ids", "xxh3_128", "cache_id", "files", "dtype")
        return {k: v if k in fixed else planted(v) for k, v in value.items()}
    if isinstance(value, list):
        return [planted(item) for item in value]
    return value + TERMINAL if isinstance(value, str) else value


def test_nothing_of_a_cache_is_obeyed(
    cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither by a terminal nor by a browser, whatever command shows it."""
    rows = hostile.read_records(cache)
    for row in rows:
        row["worker"] += TERMINAL
    hostile.write_records(cache, rows)
    fields = planted(hostile.read_manifest(cache))
    fields["teacher"]["name"] += TERMINAL
    fields["source"] |= {
        "lineage": {"operation": TERMINAL, "options": {TERMINAL: TERMINAL}, "from": []}
    }
    hostile.write_manifest(cache, fields)
    page = tmp_path / "page.html"
    commands = [
        ["verify", cache],
        ["verify", cache, "--json"],
        ["inspect", cache, "--html", page],
        ["inspect", cache, "--json"],
        ["head", cache],
        ["head", cache, "--json"],
        ["diff", cache, cache],
        ["export", cache, tmp_path / "exported"],
        ["subset", cache, tmp_path / "subset", "--where", "length > 1"],
        ["dedupe", cache, tmp_path / "dedupe"],
    ]
    for command in commands:
        try:
            main([str(word) for word in command])
        except ValueError as error:
            print(process.escaped_lines(str(error)))
        said = "".join(capsys.readouterr())
        shown = [c for c in said if not (c.isprintable() or c == "\n")]
        assert not shown, (command, said)
    html = page.read_text()
    assert "alert(1)" in html
    assert "<script>alert" not in html and "\x1b" not in html


@pytest.fixture(scope="module")
def planted_rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache whose ids of samples, tokens, reasons and messages hold it. Never write to it."""
    folder = tmp_path_factory.mktemp("planted") / "cache"
    words = {f"w{i}{TERMINAL}": i for i in range(300)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token=f"w0{TERMINAL}"))
    data = tokenizer.to_str().encode()
    files = {"tokenizer.json": xxhash.xxh3_128(data).hexdigest()}
    settings = hostile.SETTINGS
    draft = dataclasses.replace(
        settings.draft(), tokenizer=TokenizerInfo(fingerprint=f"sha256:{TERMINAL}", files=files)
    )
    (sequences,) = caches.random_shards(settings, num_shards=1)
    sequences = [dataclasses.replace(s, sample_id=s.sample_id + TERMINAL) for s in sequences]
    started = CacheWriter.create(folder, draft, plan_of([sequences]))
    with started.shard(0) as shard:
        lost, *rest = sequences
        shard.reject(lost.sample_id, lost.input_ids, lost.is_target, f"failed {TERMINAL}")
        for sequence in rest:
            shard.write(sequence)
    Store(folder).publish(f"{paths.TOKENIZER}/tokenizer.json", data)
    started.finalize()
    return folder


def test_nothing_in_rows_is_obeyed(
    planted_rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Sample ids, tokens and reasons, wherever they are shown, and in errors about them."""
    page = tmp_path / "page.html"
    parts = tmp_path / "dump.jsonl"
    parts.write_text(
        json.dumps({"sample_id": TERMINAL, TERMINAL: 1, "prompt_token_ids": [1, 2]}) + "\n"
    )
    commands = [
        ["verify", planted_rows],
        ["inspect", planted_rows, "--html", page],
        ["inspect", planted_rows, "--json"],
        ["head", planted_rows],
        ["head", planted_rows, "--sequence", "1"],
        ["head", planted_rows, "--sample", TERMINAL],
        ["head", planted_rows, "--sequence", "1", "--json"],
        ["diff", planted_rows, planted_rows],
        ["dedupe", planted_rows, tmp_path / "dedupe"],
        ["subset", planted_rows, tmp_path / "subset", "--where", f"{TERMINAL} > 1"],
        ["merge", tmp_path / "merged", planted_rows, planted_rows],
        ["migrate", planted_rows, tmp_path / "migrated"],
        ["import", parts, tmp_path / "made", "--format=vllm", "--vocab-size=9", "--teacher", "x"],
    ]
    for command in commands:
        try:
            main([str(word) for word in command])
        except (ValueError, OSError) as error:
            print(process.escaped_lines(str(error)))
        except SystemExit:
            pass
        said = "".join(capsys.readouterr())
        shown = [c for c in said if not (c.isprintable() or c == "\n")]
        assert said and not shown, (command, said)
    html = page.read_text()
    assert "alert(1)" in html
    assert "<script>alert" not in html and "\x1b" not in html
    card = dataset_card(CacheReader(planted_rows).manifest, inspect(planted_rows), "a/b", "other")
    assert "<script" not in card and "\x1b" not in card


def test_whatever_is_printed_is_escaped(planted_rows: Path) -> None:
    """By the process of every command, also where a report would forget it."""
    code = "from decant.storage.cli import process; process.run(lambda _: print(*_) or 0)"
    done = subprocess.run(
        [sys.executable, "-c", code, f"a\tb{TERMINAL}\nc\r"], cwd=ROOT, capture_output=True
    )
    assert done.stdout == b"a\tb\\x1b[31m\\x9b2J\\u202e<script>alert(1)</script>\nc\\r\n"


def hub_snapshot(cache: Path, folder: Path) -> Path:
    """As the client of the hub keeps it: links to files that have no names."""
    repository = folder / "datasets--somebody--cache"
    snapshot = repository / "snapshots" / "0123456789abcdef"
    (repository / "blobs").mkdir(parents=True)
    for number, file in enumerate(sorted(path for path in cache.rglob("*") if path.is_file())):
        blob = repository / "blobs" / f"{number:040x}"
        shutil.copy(file, blob)
        link = snapshot / file.relative_to(cache)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    return snapshot


def test_a_snapshot_of_the_hub_is_read_where_it_lies(whole: Path, tmp_path: Path) -> None:
    """Its links lead to the blobs beside it, and those to nowhere else."""
    snapshot = hub_snapshot(whole, tmp_path)
    assert verify(snapshot).ok and len(list(CacheReader(snapshot))) == 4
    assert head(snapshot)
    shard = snapshot / paths.shard(0)
    blob = shard.resolve()
    blob.rename(tmp_path / "outside")
    blob.symlink_to(tmp_path / "outside")
    assert "outside of" in verify(snapshot).problems[0]
    blob.unlink()
    os.mkfifo(blob)
    assert "no regular file" in verify(snapshot).problems[0]
    blob.unlink()
    blobs = blob.parent
    blobs.rename(tmp_path / "elsewhere")
    blobs.symlink_to(tmp_path / "elsewhere")
    assert not verify(snapshot).ok


@pytest.mark.parametrize("name", [paths.MANIFEST, "plan/plan-000000.jsonl.zst", paths.shard(0)])
def test_what_is_no_file_is_one_line(cache: Path, name: str, soon: None) -> None:
    """A directory, a link to itself, a file that nobody may read, 2 GB of nothing."""

    def sparse(path: Path) -> None:
        with open(path, "wb") as file:
            file.truncate(1 << 31)

    for make in (
        lambda path: path.mkdir(),
        lambda path: path.symlink_to(path),
        lambda path: path.symlink_to(path.parent),
        sparse,
    ):
        (cache / name).unlink()
        make(cache / name)
        (problem, *_) = verify(cache).problems
        assert name.rsplit("/", 1)[-1] in problem and "\n" not in problem
        if (cache / name).is_dir() and not (cache / name).is_symlink():
            (cache / name).rmdir()
            (cache / name).touch()


@pytest.mark.parametrize("name", [paths.SHARDS, paths.PLAN, paths.RECORDS, paths.TOKENIZER])
def test_what_is_no_folder_is_one_line(cache: Path, name: str, soon: None) -> None:
    """A file, a pipe, a link to itself, a link that leads out."""
    for make in (
        lambda path: path.touch(),
        os.mkfifo,
        lambda path: path.symlink_to(path),
        lambda path: path.symlink_to("/proc"),
    ):
        if (cache / name).is_dir() and not (cache / name).is_symlink():
            shutil.rmtree(cache / name)
        (cache / name).unlink(missing_ok=True)
        make(cache / name)
        problems = verify(cache).problems
        assert problems and all("\n" not in problem for problem in problems)
        assert any(f"{cache}/{name}" in problem for problem in problems)


def test_a_tokenizer_of_a_cache_runs_no_code(cache: Path, tmp_path: Path) -> None:
    """Also where its configuration names some; what its `tokenizer.json` says is taken."""
    ran = tmp_path / "ran"
    evil = f"from pathlib import Path\nPath({str(ran)!r}).touch()\nclass Evil: pass\n"
    settings = {"auto_map": {"AutoTokenizer": ["evil.Evil", None]}, "tokenizer_class": "Evil"}
    files = {"evil.py": evil.encode(), "tokenizer_config.json": json.dumps(settings).encode()}
    fields = hostile.read_manifest(cache)
    for name, data in files.items():
        Store(cache).publish(f"{paths.TOKENIZER}/{name}", data)
        fields["tokenizer"]["files"][name] = xxhash.xxh3_128(data).hexdigest()
    hostile.write_manifest(cache, fields)
    tokenizer = load_tokenizer(CacheReader(cache))
    assert tokenizer is not None and len(tokenizer) >= 300
    assert not ran.exists()


def test_the_process_escapes_and_exits_with_one(cache: Path) -> None:
    """An error and a log line that quote a cache, and the code for bad data."""
    fields = hostile.read_manifest(cache)
    hostile.write_manifest(cache, {**fields, TERMINAL: 1})
    done = subprocess.run(
        [sys.executable, "-m", "storage", "inspect", str(cache)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == process.BAD_DATA
    assert done.stderr.startswith("error: ") and paths.MANIFEST in done.stderr
    assert "\x1b" not in done.stderr and "Traceback" not in done.stderr


def test_nothing_that_runs_code_is_loaded() -> None:
    """No pickle, no YAML with tags, no torch.load of anything but weights, in any package."""
    bad = re.compile(
        r"pickle\.loads?\(|yaml\.(load|unsafe_load|full_load)\(|allow_pickle=True|weights_only=False"
        r"|\beval\(\w|\bexec\(\w|torch\.load\((?!.*weights_only=True)"
    )
    for package in ("schemas", "storage", "teacher_dump", "student_train"):
        for file in (ROOT / package).rglob("*.py"):
            for line in file.read_text().splitlines():
                code = line.split("#")[0]
                assert not bad.search(code) or ".eval()" in code, (file, line)


@pytest.mark.parametrize("name", ["kl_error_max", "kl_error_mean", "calibration_error", "beyond_k"])
def test_kept_figures_that_lack_one_are_counted_anew(cache: Path, name: str) -> None:
    """Null where the cache has such a figure is nobody's report."""
    expected = inspect(cache, workers=1, keep=True)
    kept = json.loads((cache / paths.KEPT_REPORT).read_bytes())
    del kept["checksum"]
    kept["report"][name] = None
    publish_json(Store(cache), paths.KEPT_REPORT, kept)
    assert inspect(cache, workers=1, keep=True) == expected
