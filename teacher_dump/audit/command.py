"""`audit`: what it takes and what it prints."""

import dataclasses
from dataclasses import dataclass
from typing import Annotated

from decant.storage.cli import process
from decant.storage.cli.commands import Command
from decant.storage.cli.options import Hidden, Shown, Word
from decant.teacher_dump.engines.config import REMOTE, TeacherConfig


@dataclass(frozen=True, kw_only=True)
class AuditArguments(TeacherConfig):
    """Which cache, which teacher, and how much of it; the teacher's options are its config's."""

    url: Annotated[str, Word("DIR")]
    """The cache: a directory or an fsspec URL."""
    teacher: Annotated[str, Shown("PATH")]
    """Directory or hub id of the teacher; with engines http and openai the URL of a server."""
    sample: int = 32
    """Sequences to score."""
    seed: int = 0
    """Of the choice of sequences."""
    json: bool = False
    """Print one JSON object."""
    path: Annotated[str, Hidden()] = ""
    """Given as `teacher`."""
    endpoints: Annotated[tuple[str, ...], Hidden()] = ()
    """Given as `teacher`."""

    def __post_init__(self) -> None:
        self.config()

    def config(self) -> TeacherConfig:
        """The teacher. Raises ValueError where its options do not go together."""
        given = {f.name: getattr(self, f.name) for f in dataclasses.fields(TeacherConfig)}
        is_remote = self.engine in REMOTE
        given["path"] = "" if is_remote else self.teacher
        given["endpoints"] = (self.teacher,) if is_remote else ()
        return TeacherConfig(**given)


def run_audit(arguments: AuditArguments) -> int:
    """Audit a cache and print the findings; returns the exit code."""
    from decant.schemas import to_json
    from decant.storage.cli.terminal import json_text
    from decant.teacher_dump.audit.report import report_text
    from decant.teacher_dump.audit.run import audit
    from decant.teacher_dump.engines.quiet import quiet_transformers
    from decant.teacher_dump.progress import progress

    quiet_transformers()
    with progress("audit", "sequences", keep=False) as bar:
        report = audit(
            arguments.url,
            arguments.config(),
            sample=arguments.sample,
            seed=arguments.seed,
            progress=bar.to,
        )
    if arguments.json:
        print(json_text({"ok": report.ok, **to_json(report)}))
    else:
        print(report_text(report))
    return process.DONE if report.ok else process.BAD_DATA


AUDIT = Command(
    text="""
  decant audit caches/mine --teacher path/or/hub-id
  decant audit caches/mine --teacher path/or/hub-id --sample 200 --json

A random sample is scored twice, in common batches and one by one; what the
teacher then differs from itself (control) sets the tolerance: 1e-4 nats plus 4
times its 99 % quantile, beyond what the stored precision explains. A control
above what the teacher's dtype rounds (0.01 nats in float32, 0.1 in float16, 0.5
in bfloat16 or with quantised weights) is a finding of its own. Compared are
kept ids (ties may change places), log probs, log Z and log tail at every
temperature, the actual token's log prob, and counts of draws. No sequence as a
whole and at most 1 % of the targets may lie beyond.

A disagreement is named: shifted by one token; wrong temperature; another
normalisation, tokenizer, vocabulary or teacher. One that is no larger than what
bfloat16 differs from float32 by is a note. Works while a dump is running. Exit
code 0: the cache agrees; 1: it does not, one line per finding; 2: nothing could
be compared, one line of why not.
""",
    arguments=AuditArguments,
    common=("sample", "engine", "dtype", "device", "max_batch_tokens", "seed", "json"),
    run=run_audit,
    goes_on=False,
)
