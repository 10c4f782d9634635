"""What is published is whole, and there is one place that publishes."""

import re
from pathlib import Path

import pytest

from decant.storage.files.durable import publish, publish_bytes, staged_directory, temporary_for
from tests.support import ROOT


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    """By new bytes, with no temporary file left; its folder is made if it is not there."""
    for data in (b"one", b"other"):
        publish_bytes(tmp_path / "file", data)
        assert (tmp_path / "file").read_bytes() == data
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    publish_bytes(tmp_path / "absent/file", b"one")
    assert (tmp_path / "absent/file").read_bytes() == b"one"


def test_a_directory_takes_the_place_of_another(tmp_path: Path) -> None:
    """With all that is in it, and nothing of what was there."""
    target = tmp_path / "folder"
    for name in ("one", "other"):
        temporary = temporary_for(target)
        (temporary / "inner").mkdir(parents=True)
        (temporary / "inner" / name).write_text(name)
        publish(temporary, target)
        assert [path.name for path in target.rglob("*")] == ["inner", name]
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_a_directory_that_fails_leaves_nothing(tmp_path: Path) -> None:
    """Neither under its name nor under another."""
    with pytest.raises(KeyError), staged_directory(tmp_path / "folder") as folder:
        (folder / "file").write_text("half")
        raise KeyError
    assert list(tmp_path.iterdir()) == []


def test_one_file_renames_and_syncs() -> None:
    """Whoever publishes does it by `durable`: nobody else renames a file or calls fsync."""
    call = re.compile(r"os\.(?:fsync|rename|replace)\(|\btemporary\.(?:rename|replace)\(")
    found = [
        path.relative_to(ROOT).as_posix()
        for folder in ("schemas", "storage", "teacher_dump", "student_train", "examples")
        for path in (ROOT / folder).rglob("*.py")
        if call.search(path.read_text())
    ]
    assert found == ["storage/files/durable.py"]
