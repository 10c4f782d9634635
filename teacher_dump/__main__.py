"""`python -m teacher_dump run|plan --config dump.yaml [--key value ...]`, and `audit DIR`."""

import argparse
import itertools
import json
from typing import Any

from jsonargparse import ArgumentParser
from tqdm import tqdm

from schemas import to_json
from storage import cli
from teacher_dump.config import DumpConfig
from teacher_dump.engines import TeacherConfig
from teacher_dump.engines.base import DTYPES, ENGINES

DESCRIPTION = """Score a text source with a teacher once, into a cache that students train from.

  python -m teacher_dump plan --config dump.yaml   what it will cost, from a scored sample
  python -m teacher_dump run --config dump.yaml    the job; run it again to resume
  python -m teacher_dump run --config dump.yaml --truncation.k 32 --output caches/k32
  python -m teacher_dump run --config dump.yaml --worker-index 3 --num-workers 16   one of many
  python -m teacher_dump audit DIR --teacher PATH  does the cache say what this teacher says?

`run --help` lists every key; `run --config dump.yaml --print_config` writes the resolved YAML.
"""
COMMANDS = {
    "run": "Fill the cache; a rerun scores only what is missing.",
    "plan": "Score a sample, predict bytes, hours and retained mass per k; writes nothing.",
}
AUDIT = """Score a random sample of a cache again with a live teacher and compare.

  python -m teacher_dump audit caches/mine --teacher path/or/hub-id
  python -m teacher_dump audit caches/mine --teacher path/or/hub-id --sample 200 --json

The sample is scored twice, in common batches and one by one; what the teacher then differs from
itself (control) sets the tolerance: 1e-4 nats plus 4 times its 99 % quantile, beyond what the
stored precision explains. Compared are kept ids (ties may change places), log probs, log Z and log
tail at every temperature, the actual token's log prob, and counts of draws. No sequence as a whole
and at most 1 % of the targets may lie beyond.

A disagreement is named: shifted by one token; wrong temperature; another normalisation, tokenizer,
vocabulary or teacher. One that is no larger than what bfloat16 differs from float32 by is a note.
Works while a dump is running. Exit code 0: the cache agrees; 1: it does not, one line per finding;
2: nothing could be compared, one line of why not.
"""


def parser() -> ArgumentParser:
    """The command line of both subcommands."""
    root = ArgumentParser(
        prog="python -m teacher_dump",
        description=DESCRIPTION,
        formatter_class=cli.HelpFormatter,
        usage="%(prog)s {run,plan} --config FILE [...] | audit DIR --teacher PATH [...]",
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
    audit = _audit_parser()
    commands.add_subcommand("audit", audit, help=AUDIT.split("\n")[0])
    audit.prog = "python -m teacher_dump audit"
    return root


def _audit_parser() -> ArgumentParser:
    command = ArgumentParser(
        description=AUDIT, formatter_class=argparse.RawDescriptionHelpFormatter, exit_on_error=False
    )
    add = command.add_argument
    add("url", metavar="DIR", help="the cache: a directory or an fsspec URL")
    add("--teacher", required=True, metavar="PATH", help="directory or hub id of the teacher")
    add("--revision", default="", help="branch, tag or commit of a hub id")
    add("--tokenizer", default="", metavar="PATH", help="unless the teacher's own")
    add("--engine", default="transformers", choices=ENGINES, help="which runs it")
    add("--dtype", default="auto", choices=DTYPES, help="auto: that of the dump")
    add("--device", default="auto", help="transformers: a torch device; auto: GPUs if any")
    add("--max-batch-tokens", type=int, default=8192, metavar="N", help="tokens per forward")
    add("--sample", type=int, default=32, metavar="N", help="sequences to score")
    add("--seed", type=int, default=0, help="of the choice of sequences")
    add("--json", action="store_true", help="print one JSON object")
    return command


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
        command = "audit" if "audit" in arguments[:1] else "run"
        raise ValueError(
            f"{where}{message} (`{root.prog} {command} --help` lists the keys)"
        ) from error
    try:
        values = root.instantiate(parsed)[parsed.command]
    except TypeError as error:  # `truncation: 64` in place of `truncation: {k: 64}`
        raise ValueError(f"a group of keys has a single value: {error}") from error
    if parsed.command == "audit":
        return _audit(values)
    config = DumpConfig(**{name: values[name] for name in DumpConfig.__dataclass_fields__})

    _quiet()
    if parsed.command == "plan":
        from teacher_dump.plan import plan

        print(plan(config, sample=values["sample"]))
        return cli.DONE
    from teacher_dump.dump import Worker, dump

    manifest = dump(config, Worker(values["worker_index"], values["num_workers"]))
    state = "" if manifest.is_final else ", not all of them committed yet"
    print(f"{config.output}: {manifest.num_targets} targets in {manifest.num_shards} shards{state}")
    return cli.DONE


def _audit(options: Any) -> int:
    _quiet()
    from teacher_dump.audit import audit, report_text

    config = TeacherConfig(
        path=options["teacher"],
        revision=options["revision"],
        tokenizer=options["tokenizer"],
        engine=options["engine"],
        dtype=options["dtype"],
        device=options["device"],
        max_batch_tokens=options["max_batch_tokens"],
    )
    with tqdm(desc="audit", unit=" sequences", disable=None, leave=False) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        report = audit(
            options["url"],
            config,
            sample=options["sample"],
            seed=options["seed"],
            progress=progress,
        )
    if options["json"]:
        print(
            json.dumps(
                {"ok": report.ok, **to_json(report)}, indent=1, ensure_ascii=False, allow_nan=False
            )
        )
    else:
        print(report_text(report))
    return cli.DONE if report.ok else cli.BAD_DATA


def _quiet() -> None:
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()  # what it warns of is refused or not our case
    transformers_logging.disable_progress_bar()


if __name__ == "__main__":
    cli.run(main)
