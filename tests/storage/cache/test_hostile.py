"""Caches of a stranger, sound by every hash: refused in one line that names the file, or read."""

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import zstandard

from decant.schemas import FormatError
from decant.storage import CacheReader, verify
from decant.storage.__main__ import main
from decant.storage.cache import paths
from decant.storage.cli import process
from decant.storage.inspect.head import head
from decant.student_train.model.student import load_tokenizer
from tests.support import ROOT, hostile

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
