"""`python -m teacher_dump run|plan --config dump.yaml [--key value ...]`."""

from jsonargparse import ArgumentParser

from storage import cli
from teacher_dump.config import DumpConfig

DESCRIPTION = """Score a text source with a teacher once, into a cache that students train from.

  python -m teacher_dump plan --config dump.yaml   what it will cost, from a scored sample
  python -m teacher_dump run --config dump.yaml    the job; run it again to resume
  python -m teacher_dump run --config dump.yaml --truncation.k 32 --output caches/k32

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
    )
    commands = root.add_subcommands(dest="command", required=True)
    for name, text in COMMANDS.items():
        command = cli.config_parser(
            DumpConfig, prog=f"python -m teacher_dump {name}", description=text
        )
        if name == "plan":
            command.add_argument(
                "--sample", type=int, default=64, help="sequences to score for the prediction"
            )
        commands.add_subcommand(name, command, help=text)
    return root


def main(arguments: list[str]) -> int:
    """Parse and run; returns the exit code."""
    cli.interrupt_on_terminate()
    root = parser()
    parsed = root.parse_args(arguments)
    values = root.instantiate(parsed)[parsed.command]
    config = DumpConfig(**{name: values[name] for name in DumpConfig.__dataclass_fields__})
    if parsed.command == "plan":
        from teacher_dump.plan import plan

        print(plan(config, sample=values["sample"]))
        return cli.DONE
    from teacher_dump.dump import dump

    manifest = dump(config)
    print(f"{config.output}: {manifest.num_targets} targets in {manifest.num_shards} shards")
    return cli.DONE


if __name__ == "__main__":
    cli.run(main)
