"""The wheel that `pip install` makes of the project has all of it, and its licence."""

import shutil
import subprocess
import sys
import tomllib
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def project_files() -> list[str]:
    """The files of the project that git knows or would add."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    return [name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel of a clean copy: nothing that an earlier build left lies beside the sources."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in project_files():
        copy = folder / "source" / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, copy)
    build = ["wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder)]
    done = subprocess.run(
        [sys.executable, "-m", "pip", *build, str(folder / "source")],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = folder.glob("*.whl")
    return zipfile.ZipFile(built)


def test_the_wheel_has_every_file_of_the_packages(wheel: zipfile.ZipFile) -> None:
    """Each package that the import contracts name, whole; and no tests, benchmarks or examples."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packages = set(project["tool"]["importlinter"]["root_packages"])
    expected = {name for name in project_files() if name.split("/")[0] in packages}
    found = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert expected and found == expected


def test_the_wheel_says_its_licence_and_carries_it(wheel: zipfile.ZipFile) -> None:
    """Apache-2.0, by the Decant developers; the text is that of the repository."""
    (path,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    metadata = Parser().parsestr(wheel.read(path).decode())
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Author"] == "the Decant developers"
    (text,) = (name for name in wheel.namelist() if name.endswith("/LICENSE"))
    assert wheel.read(text) == (ROOT / "LICENSE").read_bytes()
