"""`python -m student_train --config train.yaml [--key value ...]`, also under accelerate launch.

`python -m student_train rounds --config rounds.yaml` is `decant rounds`.
"""

from decant.search_path import leave_out_working_directory


def main(arguments: list[str]) -> int:
    """Train, or do rounds if that is the first word; returns the exit code."""
    from decant.commands import STUDENT
    from decant.storage.cli.commands import perform

    entries = {entry.name: entry for entry in STUDENT}
    if arguments[:1] == ["rounds"]:
        return perform("python -m student_train rounds", entries["rounds"], arguments[1:])
    return perform("python -m student_train", entries["train"], arguments)


if __name__ == "__main__":
    leave_out_working_directory()
    from decant.storage.cli import process

    process.run(main)
