"""`python -m teacher_dump run|plan --config dump.yaml [--key value ...]`."""

import argparse
import itertools

from jsonargparse import ArgumentParser

from storage import cli
from teacher_dump.config import DumpConfig

DESCRIPTION = """Score a text source with a teacher once, into a cache that students train from.

  python -m teacher_dump plan --config dump.yaml   what it will cost, from a scored sample
  python -m teacher_dump run --config dump.yaml    the job; run it again to resume
  python -m teacher_dump run --config dump.yaml --truncation.k 32 --output caches/k32
  python -m teacher_dump run --config dump.yaml --worker-index 3 --num-workers 16   one of many

`run --help` lists every key; `run --config dump.yaml --print_config` writes the resolved YAML.
"""
COMMANDS = {
    "run": "Fill the cache; a rerun scores only what is missing.",
    "plan": "Score a sample, predict bytes, hours and retained mass per k; writes nothing.",
}


def parser() -> ArgumentParser:
    """The command line of both subcommands."""
    root = ArgumentParser(
        prog="python -m teacher_dump",
        description=DESCRIPTION,
        formatter_class=cli.HelpFormatter,
        usage="%(prog)s {run,plan} --config FILE [--key value ...]",
        exit_on_error=False,
    )
    commands = root.add_subcommands(dest="command", required=True)
    for name, text in COMMANDS.items():
        command = cli.config_parser(DumpConfig, description=text, exit_on_error=False)
        if name == "plan":
            command.add_argument(
                "--sample", type=int, default=64, help="sequences to score for the prediction"
            )
        else:
            command.add_argument(
                "--worker-index", type=int, default=0, help="which of the workers this is, from 0"
            )
            command.add_argument(
                "--num-workers",
                type=int,
                default=1,
                help="processes that fill this cache together, each its share of the shards",
            )
        commands.add_subcommand(name, command, help=text)
        command.prog = f"python -m teacher_dump {name}"
    return root


def main(arguments: list[str]) -> int:
    """Parse and run; returns the exit code."""
    cli.interrupt_on_terminate()
    root = parser()
    try:
        parsed = root.parse_args(arguments)
    except (argparse.ArgumentError, UnicodeDecodeError) as error:
        files = [a for option, a in itertools.pairwise(arguments) if option == "--config"]
        where = "".join(f"{file}: " for file in files)
        message = " ".join(str(error).split())
        raise ValueError(f"{where}{message} (`{root.prog} run --help` lists the keys)") from error
    try:
        values = root.instantiate(parsed)[parsed.command]
    except TypeError as error:  # `truncation: 64` in place of `truncation: {k: 64}`
        raise ValueError(f"a group of keys has a single value: {error}") from error
    config = DumpConfig(**{name: values[name] for name in DumpConfig.__dataclass_fields__})

    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()  # what it warns of is refused or not our case
    transformers_logging.disable_progress_bar()
    if parsed.command == "plan":
        from teacher_dump.plan import plan

        print(plan(config, sample=values["sample"]))
        return cli.DONE
    from teacher_dump.dump import Worker, dump

    manifest = dump(config, Worker(values["worker_index"], values["num_workers"]))
    state = "" if manifest.is_final else ", not all of them committed yet"
    print(f"{config.output}: {manifest.num_targets} targets in {manifest.num_shards} shards{state}")
    return cli.DONE


if __name__ == "__main__":
    cli.run(main)
