"""`examples`: copies the example configurations and the demo that come with the package."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from decant.storage.cli import process
from decant.storage.cli.commands import Command
from decant.storage.cli.options import Word
from decant.storage.files.durable import staged_file

EXAMPLES_FOLDER = Path(__file__).parent / "examples"
SHIPPED = ("accelerate", "demo", "dump", "loops", "train")
"""The folders that an installed package has; others need the repository around them."""


@dataclass(frozen=True, kw_only=True)
class ExamplesArguments:
    """Where to copy them."""

    folder: Annotated[str, Word("DIR")]
    """A folder; it is made. Files that are there stay as they are."""


def copy_examples(folder: Path) -> tuple[list[Path], list[Path]]:
    """Copy the examples; returns the files written, and those left alone because they exist."""
    written, kept = [], []
    for source in sorted(EXAMPLES_FOLDER.rglob("*")):
        name = source.relative_to(EXAMPLES_FOLDER)
        if name.parts[0] not in SHIPPED or "__pycache__" in name.parts or not source.is_file():
            continue
        target = folder / name
        if target.exists():
            kept.append(target)
            continue
        with staged_file(target) as temporary:
            shutil.copyfile(source, temporary)
        written.append(target)
    return written, kept


def run_examples(arguments: ExamplesArguments) -> int:
    """Copy the examples and list them; returns the exit code."""
    folder = Path(arguments.folder)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is not a folder: choose another")
    written, kept = copy_examples(folder)
    for path in written:
        first = ""
        if path.suffix == ".yaml":
            first = path.read_text(encoding="utf-8").split("\n")[0].removeprefix("#").strip()
        print(f"{path}  {first}".rstrip())
    if kept:
        print(f"{len(kept)} files were there already and stay as they are")
    return process.DONE


EXAMPLES = Command(
    text="""
  decant examples examples
  python examples/demo/run.py      the whole loop, a few minutes on two cores
  decant train --config examples/train/tiny-cpu.yaml --cache caches/mine

dump/         configurations of dumps and of a service
train/        configurations of trainings
loops/        programs for PyTorch, Lightning, transformers and TRL
accelerate/   configurations of accelerate for several GPUs
demo/         a teacher of 4.5 M parameters, and a program that dumps,
              inspects, trains and compares
""",
    arguments=ExamplesArguments,
    run=run_examples,
)
