"""`python -m teacher_dump run|plan --config dump.yaml [--key value ...]`, and `audit DIR`."""

import argparse
import itertools
import json
from typing import Any

from jsonargparse import ArgumentParser
from tqdm import tqdm

from decant.schemas import to_json
from decant.storage.cli import process as cli
from decant.teacher_dump.config import DumpConfig, ServeConfig
from decant.teacher_dump.engines import TeacherConfig
from decant.teacher_dump.engines.seam import DTYPES, ENGINES
from decant.teacher_dump.job.ray_executor import RayConfig

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
SERVE = """Offer a teacher to dump jobs on other machines, on the machine with the GPUs.

  python -m teacher_dump serve --teacher.path path/or/hub-id --teacher.engine vllm --port 8000
  python -m teacher_dump serve --config serve.yaml --host 0.0.0.0 --api_key_env TEACHER_KEY

A job uses it with `teacher: {engine: http, endpoints: [http://host:8000]}`: it needs neither the
model's files nor vLLM. Truncation and temperatures come with each job, so that one service is
enough for several. GET /health answers 200 once the teacher is loaded.
"""
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
    add(
        "--teacher",
        required=True,
        metavar="PATH",
        help="directory or hub id of the teacher; with engine http the URL of a service",
    )
    add("--api-key-env", default="", metavar="NAME", help="http: variable with the service's key")
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
        command = arguments[0] if arguments[:1] in (["audit"], ["serve"]) else "run"
        raise ValueError(
            f"{where}{message} (`{root.prog} {command} --help` lists the keys)"
        ) from error
    try:
        values = root.instantiate(parsed)[parsed.command]
    except TypeError as error:  # `truncation: 64` in place of `truncation: {k: 64}`
        raise ValueError(f"a group of keys has a single value: {error}") from error
    if parsed.command == "audit":
        return _audit(values)
    if parsed.command == "serve":
        service = ServeConfig(**{name: values[name] for name in ServeConfig.__dataclass_fields__})
        _quiet()
        from decant.teacher_dump.service.serve import serve

        serve(service)
        return cli.DONE
    config = DumpConfig(**{name: values[name] for name in DumpConfig.__dataclass_fields__})

    _quiet()
    if parsed.command == "plan":
        from decant.teacher_dump.planning.predict import plan_text, predict

        prediction = predict(config, values["sample"], values["engines"])
        print(_json(prediction) if values["json"] else plan_text(prediction, config))
        return cli.DONE
    from decant.teacher_dump.job.run import Worker, dump

    worker = Worker(values["worker_index"], values["num_workers"])
    manifest = dump(config, worker, _ray(values), retry_rejected=values["retry_rejected"])
    targets, state = manifest.num_targets, ", not all of them committed yet"
    if manifest.totals is not None:
        targets, state = manifest.totals.targets, ""
        if manifest.totals.rejected:
            state = f", {manifest.totals.rejected} sequences rejected"
    print(f"{config.output}: {targets} targets in {manifest.num_shards} shards{state}")
    return cli.DONE


def _ray(values: Any) -> RayConfig | None:
    ray = values["ray"]
    if values["executor"] == "local" and ray != RayConfig():
        raise ValueError("ray.* have no effect with executor local: add --executor ray")
    if values["executor"] == "ray" and values["num_workers"] != 1:
        raise ValueError("num-workers has no effect with executor ray, which counts its actors")
    return ray if values["executor"] == "ray" else None


def _audit(options: Any) -> int:
    _quiet()
    from decant.teacher_dump.audit.run import audit, report_text

    config = TeacherConfig(
        path="" if options["engine"] == "http" else options["teacher"],
        endpoints=(options["teacher"],) if options["engine"] == "http" else (),
        api_key_env=options["api_key_env"],
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
        print(_json({"ok": report.ok, **to_json(report)}))
    else:
        print(report_text(report))
    return cli.DONE if report.ok else cli.BAD_DATA


def _json(value: Any) -> str:
    fields = value if isinstance(value, dict) else to_json(value)
    return json.dumps(fields, indent=1, ensure_ascii=False, allow_nan=False)


def _quiet() -> None:
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()  # what it warns of is refused or not our case
    transformers_logging.disable_progress_bar()


if __name__ == "__main__":
    cli.run(main)
