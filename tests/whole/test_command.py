"""The command `decant`: its help costs little, it works in any folder, and as it is installed.

Every command runs in a process of its own, in which nothing is loaded yet.
"""

import json
import os
import re
import resource
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import decant
from decant.commands import ALL
from decant.copy_examples import SHIPPED
from decant.storage import CacheReader
from decant.storage.cli.options import groups
from decant.student_train.config.loss import LossConfig
from decant.student_train.config.verdict import EvaluateArguments
from decant.student_train.losses.kinds import DIVERGENCES, TAIL_MODES
from tests.support import ROOT
from tests.support.trainings import STUDENT

NAMES = [entry.name for _, entries in ALL for entry in entries]
HEAVY = ("torch", "transformers", "datasets", "accelerate", "tokenizers", "peft", "vllm", "ray")
HELP_SECONDS = 1.0
CLASHING = {
    "schemas.py": "OWN = 'schemas'\n",
    "storage/__init__.py": "OWN = 'storage'\n",
    "storage/__main__.py": "raise SystemExit('not ours')\n",
    "student_train.py": "OWN = 'student_train'\n",
    "teacher_dump.py": "OWN = 'teacher_dump'\n",
    "examples.py": "OWN = 'examples'\n",
}
"""What a project of its own may hold."""
SHADOWING = {
    f"{name}.py": f"raise ImportError('the {name} of the working directory')\n"
    for name in ("datasets", "evaluate", "fsspec", "numpy", "tokenizers", "torch", "yaml")
}
"""Names that libraries import: a folder may hold scripts that are called so."""


def environment(*paths: Path) -> dict[str, str]:
    """That of an installed package, which is these folders."""
    variables = {"PYTHONPATH": os.pathsep.join(map(str, paths)), "OMP_NUM_THREADS": "1"}
    return {**os.environ, **variables, "HF_HUB_OFFLINE": "1"}


def python(
    *words: object, folder: Path, where: Path = ROOT, code: int = 0
) -> subprocess.CompletedProcess[str]:
    """Run an interpreter in a folder, with our package on its path, to an exit code."""
    done = subprocess.run(
        [sys.executable, *map(str, words)],
        cwd=folder,
        env=environment(where),
        capture_output=True,
        text=True,
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A folder with packages and modules that are called as ours are."""
    return write(tmp_path / "project", CLASHING)


def write(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


# Help


@pytest.mark.parametrize("words", [[], *([name] for name in NAMES)], ids=lambda w: " ".join(w))
def test_help_costs_little(words: list[str], tmp_path: Path) -> None:
    """Less than a second of CPU, and none of the libraries that compute is imported."""
    program = (
        "import sys, runpy\n"
        f"sys.argv = ['decant', *{[*words, '--help']!r}]\n"
        "try:\n    runpy.run_module('decant', run_name='__main__', alter_sys=True)\n"
        f"finally:\n    print(*[m for m in {HEAVY!r} if m in sys.modules], file=sys.stderr)\n"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = python("-c", program, folder=tmp_path)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.stderr.strip() == ""
    seconds = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
    assert seconds < HELP_SECONDS * 3  # other tests may run beside: docs/measurements.md has more


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("columns", ["80", "100"])
def test_a_help_page_fits_and_names_every_option(
    name: str, columns: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No line is wider than the terminal, every option has a text, an example begins the page."""
    from decant.__main__ import command

    monkeypatch.setenv("COLUMNS", columns)
    assert command([name, "--help"]) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= int(columns)
    (entry,) = [e for _, entries in ALL for e in entries if e.name == name]
    shown = entry.load()
    assert entry.line in out and f"  decant {name}" in out
    for kind in filter(None, (shown.config, shown.arguments)):
        for group in groups(kind):
            assert group.text or not group.key
            for option in group.options:
                assert option.text and option.text[-1] in ".)", option.key
                spelled = (f"--{option.key}", "--" + option.key.replace("_", "-"))
                assert option.word or any(f"  {way}" in out for way in spelled), option.key


def test_help_lists_the_values_of_the_loss() -> None:
    """Every kind and every tail that the code knows."""
    for config in (LossConfig, EvaluateArguments):
        texts = {option.key: option.text for option in groups(config)[0].options}
        for name, values in (("kind", DIVERGENCES), ("tail", TAIL_MODES)):
            assert set(values) <= set(re.findall(r"\w+", texts[name]))


def test_a_wrong_command_is_one_line_with_a_suggestion(tmp_path: Path) -> None:
    """Exit code 2; without a command, the list of them."""
    done = python("-m", "decant", "inspct", "x", folder=tmp_path, code=2)
    assert done.stderr.startswith(
        "error: 'inspct' is not a command of decant: did you mean inspect?"
    )
    done = python("-m", "decant", folder=tmp_path, code=2)
    assert all(f"  {name} " in done.stdout for name in NAMES)
    done = python("-m", "storage", "dump", folder=tmp_path, code=2)
    assert "'dump' is not a command of python -m storage" in done.stderr


def test_the_version_is_the_packages(tmp_path: Path) -> None:
    """`decant --version` and `decant.__version__`."""
    done = python("-m", "decant", "--version", folder=tmp_path)
    assert done.stdout == f"decant {decant.__version__}\n"


# The package


def test_importing_the_package_loads_nothing(tmp_path: Path) -> None:
    """Each public name is there, listed, and loaded when it is asked for."""
    program = (
        "import sys; before = set(sys.modules); import decant; new = set(sys.modules) - before"
    )
    program += "\nprint(sorted(m for m in new if not m.startswith('decant')))"
    done = python("-c", program, folder=tmp_path)
    assert not {"numpy", "pyarrow", *HEAVY} & set(eval(done.stdout))
    for name in decant.__all__:
        assert getattr(decant, name) is not None and name in dir(decant)
    with pytest.raises(AttributeError, match="no attribute 'absent'"):
        _ = decant.absent


def test_short_and_full_names_are_the_same_objects() -> None:
    """What `storage`, `schemas`, `teacher_dump` and `student_train` offer, and `decant` too."""
    for short in ("schemas", "storage", "teacher_dump", "student_train"):
        package, full = __import__(short), getattr(__import__(f"decant.{short}"), short)
        assert package.__all__ == full.__all__
        for name in full.__all__:
            assert getattr(package, name) is getattr(full, name)
    assert decant.CacheReader is CacheReader


# A folder that has modules of the same names


def test_commands_work_beside_modules_of_the_same_names(project: Path, cache: Path) -> None:
    """Also beside scripts with the names of libraries; the folder's own files stay untouched."""
    write(project, SHADOWING)
    before = {path: path.read_bytes() for path in project.rglob("*.py")}
    done = python("-m", "decant", "inspect", cache, "--json", folder=project)
    assert json.loads(done.stdout)["shards"] > 1
    assert "is whole" in python("-m", "decant", "verify", cache, folder=project).stdout
    assert before == {path: path.read_bytes() for path in project.rglob("*.py")}


def test_a_script_has_its_own_modules_and_ours(project: Path, cache: Path) -> None:
    """`storage` and `schemas` are the project's, `decant` is ours, and both go on working."""
    script = f"""
import schemas, storage, decant
from decant import CacheReader
reader = CacheReader({str(cache)!r})
import student_train, teacher_dump
print(len(reader), reader[0].num_targets > 0, schemas.OWN, storage.OWN, student_train.OWN)
assert decant.verify({str(cache)!r}).ok
"""
    done = python("-c", script, folder=project)
    assert done.stdout.split()[1:] == ["True", "schemas", "storage", "student_train"]


def test_a_dump_and_a_training_work_there(
    project: Path, teacher_path: Path, texts_path: Path
) -> None:
    """From text to an evaluated student, as `python -m decant` and under accelerate launch."""
    write(project, SHADOWING)
    teacher = ("--teacher.path", teacher_path, "--source.path", texts_path)
    teacher += ("--sequences.max_length", 64, "--truncation.k", 8)
    python("-m", "decant", "dump", "--output", "cache", *teacher, folder=project)
    assert (project / "cache/manifest.json").exists()
    training = {"cache": "cache", "output": "run", "student": {"config": STUDENT}, "steps": 2}
    (project / "train.yaml").write_text(json.dumps(training))
    launched = ("accelerate.commands.launch", "--cpu", "-m", "decant.student_train")
    python("-P", "-m", *launched, "--config", "train.yaml", folder=project)
    assert (project / "run/student/config.json").exists()
    words = ("evaluate", "--student", "run", "--cache", "cache", "--json")
    found = json.loads(python("-m", "decant", *words, folder=project).stdout)
    assert found["metrics"]["heldout_ce"] > 0


JOB = """
import multiprocessing
import subprocess
import sys

from decant.teacher_dump.engines.vllm.process import worker_environment

CHILD = "import decant.storage, numpy, yaml; print(decant.storage.__name__)"


def work(queue):
    import storage
    from decant.storage import CacheReader
    queue.put(f"{CacheReader.__module__} {storage.OWN}")


if __name__ == "__main__":
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=work, args=(queue,))
    process.start()
    print(queue.get(timeout=100))
    process.join()
    done = subprocess.run([sys.executable, "-c", CHILD], env=worker_environment(True),
                          cwd="scripts", capture_output=True, text=True, check=True)
    print(done.stdout)
"""


def test_children_find_our_modules_and_not_the_folders(project: Path) -> None:
    """Processes that a script spawns have both; those of vLLM have nothing of their folder."""
    write(project / "scripts", SHADOWING)
    (project / "job.py").write_text(JOB)
    done = python("job.py", folder=project)
    assert done.stdout.split() == ["decant.storage.cache.reader", "storage", "decant.storage"]


def test_the_working_directory_stays_where_it_holds_the_package(cache: Path) -> None:
    """From a clone that is not installed, commands find the clone."""
    words = ("-m", "decant", "verify", str(cache))
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "is whole" in done.stdout


# As it is installed


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that a wheel is installed into, built from a copy of the repository."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for path in ROOT.iterdir():
        if path.name in ("decant", "examples", *os.listdir(ROOT / "decant")):
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(path, source / path.name, symlinks=True, ignore=ignored)
        elif path.is_file() and path.suffix in (".toml", ".md", "") and path.name != ".git":
            shutil.copy(path, source / path.name)
    pip = (sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check")
    options = ("--no-deps", "--no-build-isolation", "--wheel-dir", str(folder))
    subprocess.run([*pip, "wheel", *options, str(source)], check=True)
    (wheel,) = folder.glob("decant-*.whl")
    target = ("--no-deps", "--no-index", "--target", str(folder / "site"))
    subprocess.run([*pip, "install", *target, str(wheel)], check=True)
    with zipfile.ZipFile(wheel) as names:
        (folder / "names.json").write_text(json.dumps(names.namelist()))
    return folder / "site"


@pytest.mark.xdist_group("wheel")
def test_the_wheel_carries_the_code_and_the_examples(installed: Path) -> None:
    """All modules under `decant`, the doors of the short names, what `decant examples` copies."""
    names = set(json.loads((installed.parent / "names.json").read_text()))
    tops = {name.split("/")[0] for name in names if not name.startswith("decant-")}
    assert tops == {"decant", "schemas", "storage", "student_train", "teacher_dump"}
    for package in ("schemas", "storage", "student_train", "teacher_dump"):
        for path in (ROOT / package).rglob("*.py"):
            assert f"decant/{path.relative_to(ROOT)}" in names
    files = {
        f"decant/{path.relative_to(ROOT)}"
        for folder in SHIPPED
        for path in (ROOT / "examples" / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert files == {name for name in names if name.startswith("decant/examples/")}


@pytest.mark.xdist_group("wheel")
def test_the_installed_command_works_in_any_folder(
    installed: Path, project: Path, cache: Path, tmp_path: Path
) -> None:
    """The console script and `python -m decant`, beside modules of the same names."""
    write(project, SHADOWING)
    script = installed / "bin" / "decant"
    done = python(script, "--version", folder=project, where=installed)
    assert (
        done.stdout
        == "decant "
        + tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
        + "\n"
    )
    for command in ((script,), ("-m", "decant")):
        done = python(*command, "inspect", cache, "--json", folder=project, where=installed)
        assert json.loads(done.stdout)["shards"] > 1
    place = "import decant.storage; print(decant.storage.__file__)"
    assert str(installed) in python("-c", place, folder=project, where=installed).stdout
    done = python(script, "examples", tmp_path / "copied", folder=project, where=installed)
    assert (tmp_path / "copied/train/tiny-cpu.yaml").exists()
    assert (tmp_path / "copied/demo/teacher/model.safetensors").exists()
    again = python(script, "examples", tmp_path / "copied", folder=project, where=installed)
    assert "stay as they are" in again.stdout
