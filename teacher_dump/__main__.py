"""`python -m teacher_dump run|plan --config dump.yaml [--key value ...]`, and `audit DIR`."""

import argparse
import itertools

from jsonargparse import ArgumentParser

from decant.schemas import to_json
from decant.storage.cli import process as cli
from decant.storage.cli.terminal import json_text
from decant.teacher_dump.audit.command import AUDIT, audit_parser, run_audit
from decant.teacher_dump.config import DumpConfig, ServeConfig
from decant.teacher_dump.engines.config import ENGINES
from decant.teacher_dump.engines.quiet import quiet_transformers
from decant.teacher_dump.job.command import ray_config
from decant.teacher_dump.job.ray_pool import RayConfig
from decant.teacher_dump.service.command import SERVE

DESCRIPTION = """Score a text source with a teacher once, into a cache that students train from.

  python -m teacher_dump plan --config dump.yaml   what it will cost, from a scored sample
  python -m teacher_dump run --config dump.yaml    the job; run it again to resume
  python -m teacher_dump run --config dump.yaml --truncation.k 32 --output caches/k32
  python -m teacher_dump run --config dump.yaml --worker-index 3 --num-workers 16   one of many
  python -m teacher_dump run --config dump.yaml --executor ray   on all machines of a Ray cluster
  python -m teacher_dump serve --config serve.yaml  the teacher as a service for jobs elsewhere
  python -m teacher_dump audit DIR --teacher PATH  does the cache say what this teacher says?

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
        usage="%(prog)s {run,plan,serve} --config FILE [...] | audit DIR --teacher PATH [...]",
        exit_on_error=False,
    )
    commands = root.add_subcommands(dest="command", required=True)
    for name, text in COMMANDS.items():
        command = cli.config_parser(DumpConfig, description=text, exit_on_error=False)
        if name == "plan":
            command.add_argument(
                "--sample", type=int, default=64, help="sequences to score for the prediction"
            )
            command.add_argument(
                "--engines",
                nargs="+",
                default=[],
                choices=ENGINES,
                help="further engines to time on the sample",
            )
            command.add_argument("--json", action="store_true", help="print one JSON object")
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
            command.add_argument(
                "--retry-rejected",
                action="store_true",
                help="score shards again of which the teacher could not score all sequences",
            )
            command.add_argument(
                "--executor",
                choices=("local", "ray"),
                default="local",
                help="who fills the shards: this process, or actors of a Ray cluster",
            )
            command.add_class_arguments(RayConfig, "ray")
        commands.add_subcommand(name, command, help=text)
        command.prog = f"python -m teacher_dump {name}"
    service = cli.config_parser(ServeConfig, description=SERVE, exit_on_error=False)
    commands.add_subcommand("serve", service, help=SERVE.split("\n")[0])
    service.prog = "python -m teacher_dump serve"
    audit = audit_parser()
    commands.add_subcommand("audit", audit, help=AUDIT.split("\n")[0])
    audit.prog = "python -m teacher_dump audit"
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
        command = arguments[0] if arguments[:1] in (["audit"], ["serve"]) else "run"
        raise ValueError(
            f"{where}{message} (`{root.prog} {command} --help` lists the keys)"
        ) from error
    try:
        values = root.instantiate(parsed)[parsed.command]
    except TypeError as error:  # `truncation: 64` in place of `truncation: {k: 64}`
        raise ValueError(f"a group of keys has a single value: {error}") from error
    if parsed.command == "audit":
        return run_audit(values)
    if parsed.command == "serve":
        service = ServeConfig(**{name: values[name] for name in ServeConfig.__dataclass_fields__})
        quiet_transformers()
        from decant.teacher_dump.service.serve import serve

        serve(service)
        return cli.DONE
    config = DumpConfig(**{name: values[name] for name in DumpConfig.__dataclass_fields__})

    quiet_transformers()
    if parsed.command == "plan":
        from decant.teacher_dump.planning.predict import predict
        from decant.teacher_dump.planning.text import plan_text

        prediction = predict(config, values["sample"], values["engines"])
        print(json_text(to_json(prediction)) if values["json"] else plan_text(prediction, config))
        return cli.DONE
    from decant.teacher_dump.job.run import Worker, dump

    worker = Worker(values["worker_index"], values["num_workers"])
    manifest = dump(config, worker, ray_config(values), retry_rejected=values["retry_rejected"])
    targets, state = manifest.num_targets, ", not all of them committed yet"
    if manifest.totals is not None:
        targets, state = manifest.totals.targets, ""
        if manifest.totals.rejected:
            state = f", {manifest.totals.rejected} sequences rejected"
    print(f"{config.output}: {targets} targets in {manifest.num_shards} shards{state}")
    return cli.DONE


if __name__ == "__main__":
    cli.run(main)
