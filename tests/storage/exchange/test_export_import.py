"""The commands export and import: what they say, and how they end."""

import subprocess
import sys
from pathlib import Path

import pytest

from decant.storage.__main__ import main
from decant.storage.cli import process as cli
from tests.support import FIXTURES, ROOT
from tests.support.foreign import (
    V,
    axolotl_rows,
    distillkit_rows,
    known_records,
    write,
)


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
