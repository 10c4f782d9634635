"""`audit`: its arguments and what it prints."""

import argparse
from typing import Any

from jsonargparse import ArgumentParser

from decant.schemas import to_json
from decant.storage.cli import process as cli
from decant.storage.cli.terminal import json_text
from decant.teacher_dump.engines import TeacherConfig
from decant.teacher_dump.engines.config import DTYPES, ENGINES
from decant.teacher_dump.engines.quiet import quiet_transformers
from decant.teacher_dump.progress import progress

AUDIT = """Score a random sample of a cache again with a live teacher and compare.

  python -m teacher_dump audit caches/mine --teacher path/or/hub-id
  python -m teacher_dump audit caches/mine --teacher path/or/hub-id --sample 200 --json

The sample is scored twice, in common batches and one by one; what the teacher then differs from
itself (control) sets the tolerance: 1e-4 nats plus 4 times its 99 % quantile, beyond what the
stored precision explains. A control above what the teacher's dtype rounds (0.01 nats in float32,
0.1 in float16, 0.5 in bfloat16 or with quantised weights) is a finding of its own. Compared are
kept ids (ties may change places), log probs, log Z and log tail at every temperature, the actual
token's log prob, and counts of draws. No sequence as a whole and at most 1 % of the targets may lie
beyond.

A disagreement is named: shifted by one token; wrong temperature; another normalisation, tokenizer,
vocabulary or teacher. One that is no larger than what bfloat16 differs from float32 by is a note.
Works while a dump is running. Exit code 0: the cache agrees; 1: it does not, one line per finding;
2: nothing could be compared, one line of why not.
"""


def audit_parser() -> ArgumentParser:
    """The command line of `audit`."""
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
    add("--adapter", default="", metavar="PATH", help="transformers: PEFT adapter of the teacher")
    add("--trust-remote-code", action="store_true", help="run the code that the model brings")
    add("--engine", default="transformers", choices=ENGINES, help="which runs it")
    add("--dtype", default="auto", choices=DTYPES, help="auto: that of the dump")
    add("--device", default="auto", help="transformers: a torch device; auto: GPUs if any")
    add("--max-batch-tokens", type=int, default=8192, metavar="N", help="tokens per forward")
    add("--sample", type=int, default=32, metavar="N", help="sequences to score")
    add("--seed", type=int, default=0, help="of the choice of sequences")
    add("--json", action="store_true", help="print one JSON object")
    return command


def run_audit(options: Any) -> int:
    """Audit a cache and print the findings; returns the exit code."""
    quiet_transformers()
    from decant.teacher_dump.audit.report import report_text
    from decant.teacher_dump.audit.run import audit

    config = TeacherConfig(
        path="" if options["engine"] == "http" else options["teacher"],
        endpoints=(options["teacher"],) if options["engine"] == "http" else (),
        api_key_env=options["api_key_env"],
        revision=options["revision"],
        tokenizer=options["tokenizer"],
        adapter=options["adapter"],
        trust_remote_code=options["trust_remote_code"],
        engine=options["engine"],
        dtype=options["dtype"],
        device=options["device"],
        max_batch_tokens=options["max_batch_tokens"],
    )
    with progress("audit", "sequences", keep=False) as bar:
        report = audit(
            options["url"],
            config,
            sample=options["sample"],
            seed=options["seed"],
            progress=bar.to,
        )
    if options["json"]:
        print(json_text({"ok": report.ok, **to_json(report)}))
    else:
        print(report_text(report))
    return cli.DONE if report.ok else cli.BAD_DATA
