"""The wheel that `pip install` makes of the project has its licence."""

import os
import shutil
import subprocess
import sys
import zipfile
from email.parser import Parser

import pytest

from tests.support import ROOT


def project_files() -> list[str]:
    """The files of the project that git knows or would add."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    return [name for name in listed.stdout.split("\0") if name and os.path.lexists(ROOT / name)]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel of a clean copy: nothing that an earlier build left lies beside the sources."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in project_files():
        copy = folder / "source" / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, copy, follow_symlinks=False)
    build = ["wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder)]
    done = subprocess.run(
        [sys.executable, "-m", "pip", *build, str(folder / "source")],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = folder.glob("*.whl")
    return zipfile.ZipFile(built)


def test_the_wheel_says_its_licence_and_carries_it(wheel: zipfile.ZipFile) -> None:
    """Apache-2.0, by the Decant developers; the text is that of the repository."""
    (path,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    metadata = Parser().parsestr(wheel.read(path).decode())
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Author"] == "the Decant developers"
    (text,) = (name for name in wheel.namelist() if name.endswith("/LICENSE"))
    assert wheel.read(text) == (ROOT / "LICENSE").read_bytes()
