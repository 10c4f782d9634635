"""`python -m student_train --config train.yaml [--key value ...]`, also under accelerate launch."""

from decant.search_path import leave_out_working_directory


def main(arguments: list[str]) -> int:
    """Train; returns the exit code."""
    from decant.commands import STUDENT
    from decant.storage.cli.commands import perform

    (train,) = [entry for entry in STUDENT if entry.name == "train"]
    return perform("python -m student_train", train, arguments)


if __name__ == "__main__":
    leave_out_working_directory()
    from decant.storage.cli import process

    process.run(main)
