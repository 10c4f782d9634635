"""The package's public names: loaded when first used, the same under both of its import names."""

import ast
import importlib
import json
import subprocess
import sys

import pytest

from tests.support import ROOT

HEAVY = {"torch", "transformers", "accelerate", "datasets", "peft"}


def modules_after(program: str) -> set[str]:
    """Top-level modules that a fresh interpreter has loaded when a program has run."""
    ending = "\nimport json, sys\nprint(json.dumps(sorted({m.split('.')[0] for m in sys.modules})))"
    done = subprocess.run(
        [sys.executable, "-c", program + ending],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize("option", ["--help", "--print_config"])
def test_the_command_line_is_explained_without_torch(option: str) -> None:
    """`--help` and `--print_config` load none of the libraries that compute."""
    arguments = [option, "--output=x", "--cache=c", "--steps=1", "--student.path=p"]
    program = f"""
import runpy, sys
sys.argv = ["student_train", *{arguments if option != "--help" else [option]!r}]
try:
    runpy.run_module("student_train", run_name="__main__")
except SystemExit as end:
    assert not end.code, end.code
"""
    assert modules_after(program).isdisjoint(HEAVY)


def test_a_configuration_is_made_and_checked_without_torch() -> None:
    """Kinds, options and schedules of the loss included."""
    program = """
from decant.student_train import AdapterConfig, LossConfig, Schedule, StudentConfig, TrainConfig
from decant.student_train.losses import DIVERGENCES
student = StudentConfig(path="p")
TrainConfig(cache="c", output="o", steps=1, student=student, adapter=AdapterConfig(r=2))
for kind in DIVERGENCES:
    LossConfig(kind=kind, ce_weight=Schedule(values=[0, 1], at=[0, 1]))
"""
    assert modules_after(program).isdisjoint(HEAVY)


def test_other_trainers_are_loaded_when_they_are_named() -> None:
    """Neither transformers nor TRL come with the package of the trainers."""
    program = "import decant.student_train.trainers as t; assert 'DistillationTrainer' in dir(t)"
    assert modules_after(program).isdisjoint({*HEAVY, "trl"})


@pytest.mark.parametrize(
    "package", ["student_train", "student_train.losses", "student_train.trainers"]
)
def test_both_import_names_give_the_same_objects(package: str) -> None:
    """`from student_train import x` and `from decant.student_train import x`, for every x."""
    short, full = importlib.import_module(package), importlib.import_module(f"decant.{package}")
    assert short.__all__ == full.__all__
    for name in full.__all__:
        assert getattr(short, name) is getattr(full, name), name
        assert name in dir(short)
    with pytest.raises(AttributeError, match="has no attribute 'absent'"):
        _ = short.absent


@pytest.mark.parametrize(
    "package", ["student_train", "student_train/losses", "student_train/trainers"]
)
def test_type_checkers_see_each_name_where_it_is_loaded_from(package: str) -> None:
    """The imports for type checkers, the table for the interpreter and `__all__` agree."""
    module = importlib.import_module(f"decant.{package.replace('/', '.')}")
    tree = ast.parse((ROOT / package / "__init__.py").read_text())
    imports = [
        node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level == 0
    ]
    told = {
        alias.name: node.module.removeprefix(f"{module.__name__}.")
        for node in imports
        if node.module and node.module.startswith("decant.")
        for alias in node.names
    }
    assert told == module._MODULES
    assert sorted(told) == sorted(module.__all__)
