"""`dump`: what it takes and what it prints."""

from dataclasses import dataclass
from typing import Annotated

from decant.storage.cli import process
from decant.storage.cli.commands import Command
from decant.storage.cli.options import Shown
from decant.teacher_dump.config import DumpConfig
from decant.teacher_dump.job.config import ShareConfig

TEXT = """
  decant dump --config dump.yaml
  decant dump --config dump.yaml --truncation.k 32 --output caches/k32
  decant dump --config dump.yaml --worker-index 3 --num-workers 16
  decant dump --config dump.yaml --executor ray --ray.num_gpus 1
  decant dump --config more.yaml --extend       more records, the same output

The same command again goes on where the last one stopped: shards that are
committed stay. A changed config, source, tokenizer or teacher is refused.
"""
COMMON = (
    "output",
    "teacher.path",
    "teacher.engine",
    "source.path",
    "sequences.max_length",
    "truncation.method",
    "truncation.k",
    "temperatures",
)


def run_dump(config: DumpConfig, arguments: ShareConfig) -> int:
    """Fill the cache and say what it holds; returns the exit code."""
    from decant.teacher_dump.engines.quiet import quiet_transformers
    from decant.teacher_dump.job.run import Worker, dump

    quiet_transformers()
    worker = Worker(arguments.worker_index, arguments.num_workers)
    ray = arguments.ray if arguments.executor == "ray" else None
    manifest = dump(
        config,
        worker,
        ray,
        retry_rejected=arguments.retry_rejected,
        extend=arguments.on_known if arguments.extend else None,
    )
    targets, state = manifest.num_targets, ", not all of them committed yet"
    if manifest.totals is not None:
        targets, state = manifest.totals.targets, ""
        if manifest.totals.rejected:
            state = f", {manifest.totals.rejected} sequences rejected"
    print(f"{config.output}: {targets} targets in {manifest.num_shards} shards{state}")
    return process.DONE


DUMP = Command(text=TEXT, config=DumpConfig, arguments=ShareConfig, common=COMMON, run=run_dump)

MESSAGES_TEXT = """
  decant messages --config dump.yaml --out messages.jsonl

For a cache that was dumped without sequences.keep_messages: a student of
another tokenizer needs the words of its conversations. Takes the
configuration of that dump; loads no teacher and no tokenizer. A line is
{"id", "messages"}, with "tools" and "chat_template_kwargs" where a record has
them, and is a record itself.
"""


@dataclass(frozen=True, kw_only=True)
class MessagesArguments:
    """Where the conversations go."""

    out: Annotated[str, Shown("FILE")] = ""
    """The file of JSON lines to write; it must not exist yet."""

    def __post_init__(self) -> None:
        if not self.out:
            raise ValueError("--out is missing: name the file of JSON lines to write")


def run_messages(config: DumpConfig, arguments: MessagesArguments) -> int:
    """Write the conversations; returns the exit code."""
    from decant.teacher_dump.job.messages import write_messages
    from decant.teacher_dump.progress import progress

    with progress("read", "records") as bar:
        written, read = write_messages(config, arguments.out, bar.to)
    print(f"{arguments.out}: {written} conversations of {read} records")
    return process.DONE


MESSAGES = Command(
    text=MESSAGES_TEXT,
    config=DumpConfig,
    arguments=MessagesArguments,
    common=("source.path", "source.id_field"),
    run=run_messages,
    goes_on=False,
)
