"""`python -m storage inspect|head|diff|verify|export|import|migrate`: see `--help` of each."""

import argparse
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from decant.schemas import PRECISIONS, to_json
from decant.storage.cache.integrity import verify
from decant.storage.cli import process as cli
from decant.storage.files.store import Store

DESCRIPTION = """Look at caches of teacher distributions, and exchange them with other tools.

  python -m storage inspect caches/demo              size, retained mass, teacher quality
  python -m storage inspect caches/demo --json | jq .bytes_per_target
  python -m storage head caches/demo                 the first targets in context
  python -m storage diff caches/demo caches/other    two teachers, two k, two precisions
  python -m storage verify caches/demo && echo whole
  python -m storage verify s3://bucket/caches/demo   any fsspec URL works
  python -m storage export caches/demo exported      plain lists, as Parquet
  python -m storage import dump.parquet caches/new --format distillkit --teacher NAME ...

Nothing here changes a cache that exists; inspect keeps its figures beside it, in stats/.
--debug, anywhere, shows the traceback of an error.
"""
INSPECT = """What a cache holds and how good it is, from one pass over all of it.

  python -m storage inspect caches/demo
  python -m storage inspect caches/demo --html demo.html       one page that opens from disk
  python -m storage inspect caches/demo --json > demo.json
  python -m storage inspect caches/large --sample 0.05         a twentieth of it: estimates
  python -m storage inspect caches/large --sample 20 --seed 1  20 row groups

Works while a dump is still running: then it reports the shards committed so far and says so.
The figures of a complete cache in a directory are kept in its stats/ and shown at once the next
time; they count only as long as the cache is the same. The keys of --json are listed in
docs/format.md. Exit code 0, or 2 if there is no readable cache.
"""
HEAD = """The first targets of a sequence: context, actual token, the teacher's top entries, tail.

  python -m storage head caches/demo
  python -m storage head caches/demo --sequence 17 --targets 30
  python -m storage head caches/demo --sample doc-000123

Texts come from the tokenizer in the cache; without one, ids are shown as #123. The table is as wide
as a terminal of 100 columns; --json has every entry that --entries asks for. Exit code 0, or 2 with
one line of why not.
"""
DIFF = """How far apart two caches of the same sequences are: two teachers, two k, two precisions.

  python -m storage diff caches/teacher-a caches/teacher-b
  python -m storage diff caches/f32 caches/compact --json | jq .temperatures[0].kl_ab.mean

Both must be complete and hold the same tokens in the same order. KL is over the ids that both keep
and one bucket for all others, so it is at most the KL over the vocabulary. Exit code 0 however much
they differ, or 2 with one line of why they cannot be compared.
"""
VERIFY = """Is a cache whole? Every byte is hashed, every row group decoded, every value checked.

  python -m storage verify caches/demo
  python -m storage verify caches/demo --json | jq .problems

Exit code 0 only if the cache is complete and undamaged; 1 with one line per problem if it is not;
2 if there is no such directory. To mend a damaged shard, delete its file and run the dump again
with the same config: it scores that shard again and nothing else.
"""
EXPORT = """Write a cache as plain lists that other tools read without our code.

  python -m storage export caches/demo exported
  python -m storage export caches/demo exported --rows targets
  python -m storage export caches/demo dataset --format hf

--rows sequences   a row per sequence: input_ids, is_target, positions of its n targets, and for
                   each of them a list of token_ids and one of logprobs (float32, natural log)
--rows targets     a row per target: position, label, token_ids, logprobs; the form for SQL
--format parquet   OUT is a directory with a Parquet file per shard
--format hf        OUT opens with datasets.load_from_disk("OUT")

Lists hold the entries in use. Scalars are named as in the shards: log_tail_t1, label_logprob, ...
Position t is about token t, never about the next. OUT appears when it is complete; what exists is
never overwritten. docs/exchange.md has every column. Exit code 0, or 2 with one line of why not.
"""
IMPORT = """Make a cache from a top-k dump of another tool.

  python -m storage import dump.parquet caches/new --format distillkit \\
      --teacher Qwen/Qwen3-8B --tokenizer models/qwen3-8b
  python -m storage import last_run_prepared/0a1b caches/new --format axolotl \\
      --teacher Qwen/Qwen3-8B --tokenizer models/qwen3-8b --renormalised

SRC is a .parquet, .jsonl or .arrow file, a directory of them, or a saved Hugging Face dataset.

--format distillkit   input_ids, token_ids, top_values; list j is about token j + 1
--format axolotl      input_ids, target_token_ids, target_logprobs, target_mask as prepared for
                      training (list j is about token j + 1, renormalised); or as collected:
                      input_ids, logprobs and target_token_ids (the last list is about the last
                      token)
Both honour labels (-100 is no target) and attention_mask.

Values must be natural log probs at temperature 1 over the whole vocabulary; the mass that is not
kept is what they leave of 1. A dump that is renormalised, shifted by a token or of logits is
refused with the option that imports it all the same; the manifest records that option. OUT appears
when it is complete. docs/exchange.md has the details. Exit code 0, or 2 with one line of why not.
"""


MIGRATE = """Make an older cache again in the present version of the format.

  python -m storage migrate caches/old caches/new

The shards are the same, byte for byte (hard links within one file system); records and manifest
are written new, and OLD is only read. Older caches need not be migrated: they are read for ever.
Run it again to complete what was interrupted. Exit code 0, or 2 with one line of why not.
"""


def _inspect_arguments(command: argparse.ArgumentParser) -> None:
    _verify_arguments(command)
    command.add_argument("--html", metavar="FILE", help="write one self-contained page as well")
    command.add_argument(
        "--sample",
        type=_sample,
        metavar="FRACTION_OR_N",
        help="look at this share of the row groups, or this many, chosen at random",
    )
    command.add_argument("--seed", type=int, default=0, help="of the choice (default: 0)")


def _sample(text: str) -> float:
    value = float(text)
    if not 0 < value < 1 and not (value >= 1 and text.isdigit()):
        raise argparse.ArgumentTypeError(f"{text} is neither between 0 and 1 nor a whole number")
    return value


def _inspect(options: argparse.Namespace) -> int:
    from decant.storage.inspect.collect import inspect, report_text

    _refuse_missing(options.url)
    if options.seed and options.sample is None:
        raise ValueError("--seed has no effect without --sample")
    with _bar("inspect", "row groups") as progress:
        report = inspect(options.url, progress, sample=options.sample, seed=options.seed, keep=True)
    if options.html:
        from decant.storage.inspect.html import report_html

        file = Path(options.html)
        Store(file.parent).publish(file.name, report_html(report).encode())
    print(_json(to_json(report)) if options.json else report_text(report))
    return cli.DONE


def _head_arguments(command: argparse.ArgumentParser) -> None:
    _verify_arguments(command)
    which = command.add_mutually_exclusive_group()
    which.add_argument("--sequence", type=int, metavar="N", help="by its index in the plan")
    which.add_argument("--sample", metavar="ID", help="the first sequence of this sample id")
    command.add_argument("--targets", type=int, default=10, metavar="M", help="default: 10")
    command.add_argument("--entries", type=int, default=8, metavar="M", help="default: 8")


def _head(options: argparse.Namespace) -> int:
    from decant.storage.inspect.head import head, head_text

    _refuse_missing(options.url)
    targets = head(
        options.url,
        sequence=options.sequence,
        sample=options.sample,
        targets=options.targets,
        entries=options.entries,
    )
    print(_json(to_json(targets)) if options.json else head_text(targets))
    return cli.DONE


def _diff_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("url_a", metavar="A", help="a cache: a directory or an fsspec URL")
    command.add_argument("url_b", metavar="B", help="another cache of the same sequences")
    command.add_argument("--json", action="store_true", help="print one JSON object")


def _diff(options: argparse.Namespace) -> int:
    from decant.storage.inspect.diff import diff, diff_text

    _refuse_missing(options.url_a)
    _refuse_missing(options.url_b)
    with _bar("diff", "sequences") as progress:
        found = diff(options.url_a, options.url_b, progress)
    print(_json(to_json(found)) if options.json else diff_text(found))
    return cli.DONE


def _verify_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("url", metavar="DIR", help="the cache: a directory or an fsspec URL")
    command.add_argument("--json", action="store_true", help="print one JSON object")


def _verify(options: argparse.Namespace) -> int:
    _refuse_missing(options.url)
    with _bar("verify", "shards") as progress:
        report = verify(options.url, progress)
    problems = [" ".join(problem.split()) for problem in report.problems]
    if options.json:
        print(_json({"ok": report.ok, **to_json(report), "problems": problems}))
    elif report.ok:
        print(
            f"{options.url} is whole: {report.targets} targets in {report.sequences} sequences, "
            f"{report.shards} shards, {report.bytes} bytes"
        )
    else:
        print("\n".join(problems))
    return cli.DONE if report.ok else cli.BAD_DATA


def _export_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("url", metavar="CACHE", help="the cache: a directory or an fsspec URL")
    command.add_argument("out", metavar="OUT", help="a local directory that does not exist yet")
    command.add_argument(
        "--format", default="parquet", choices=["parquet", "hf"], help="default: parquet"
    )
    command.add_argument(
        "--rows", default="sequences", choices=["sequences", "targets"], help="default: sequences"
    )


def _export(options: argparse.Namespace) -> int:
    from decant.storage.exchange.export import export

    _refuse_missing(options.url)
    with _bar("export", "row groups") as progress:
        report = export(
            options.url,
            options.out,
            file_format=options.format,
            rows=options.rows,
            progress=progress,
        )
    print(
        f"{options.out}: {report.targets} targets in {report.sequences} sequences, "
        f"{report.bytes} bytes"
    )
    return cli.DONE


def _import_arguments(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("source", metavar="SRC", help="the dump")
    add("out", metavar="OUT", help="the cache: a local directory that does not exist yet")
    add("--format", required=True, choices=["distillkit", "axolotl"], help="which tool's columns")
    add("--teacher", required=True, help="whose distributions these are: a name for the manifest")
    add("--tokenizer", default="", metavar="DIR", help="of the ids; kept in the cache")
    add(
        "--vocab-size",
        type=int,
        default=0,
        metavar="V",
        help="rows of the teacher's output layer (default: the tokenizer's largest id plus 1)",
    )
    add("--k", type=int, default=0, help="entries to keep (default: all that every target has)")
    add("--renormalised", action="store_true", help="values add up to 1 over k, or are logits")
    add(
        "--unknown-label",
        default="refuse",
        choices=["refuse", "bound", "skip"],
        help="when the actual token is not among the entries: refuse the dump (default), store an "
        "upper bound of its log prob, or leave the target out",
    )
    add("--shift", type=int, default=0, metavar="N", help="move every list by N tokens")
    add(
        "--logprobs-field",
        default="logprobs",
        metavar="NAME",
        help="axolotl: the column of log probs (default: logprobs)",
    )
    add("--precision", default="f32", choices=list(PRECISIONS), help="default: f32, lossless")
    add("--shard-targets", type=int, default=2_000_000, metavar="N", help="targets per shard")


def _import(options: argparse.Namespace) -> int:
    from decant.storage.exchange.importing import import_cache
    from decant.storage.exchange.survey import ImportConfig

    config = ImportConfig(
        path=options.source,
        file_format=options.format,
        teacher=options.teacher,
        tokenizer=options.tokenizer,
        vocab_size=options.vocab_size,
        k=options.k,
        renormalised=options.renormalised,
        unknown_label=options.unknown_label,
        shift=options.shift,
        logprobs_field=options.logprobs_field,
        precision=options.precision,
        shard_targets=options.shard_targets,
    )
    with _bar("import", "records") as progress:
        manifest = import_cache(config, options.out, progress)
    print(
        f"{options.out}: {manifest.num_targets} targets in {manifest.num_sequences} sequences, "
        f"{manifest.num_shards} shards, k={manifest.truncation.k}"
    )
    return cli.DONE


def _migrate_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("url", metavar="OLD", help="the cache: a directory or an fsspec URL")
    command.add_argument("out", metavar="NEW", help="a directory or URL that holds nothing yet")


def _migrate(options: argparse.Namespace) -> int:
    from decant.storage.cache.migration import migrate

    _refuse_missing(options.url)
    with _bar("migrate", "shards") as progress:
        manifest = migrate(options.url, options.out, progress)
    assert manifest.totals is not None
    print(
        f"{options.out}: format version {manifest.format_version}, {manifest.totals.targets} "
        f"targets in {manifest.num_shards} shards"
    )
    return cli.DONE


@dataclass(frozen=True, slots=True)
class _Command:
    """A subcommand."""

    text: str
    """Its help page; the first line stands in the list of commands."""
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]
    goes_on: bool = False
    """Whether an interrupted run is continued by the next."""


COMMANDS = {
    "inspect": _Command(INSPECT, _inspect_arguments, _inspect),
    "head": _Command(HEAD, _head_arguments, _head),
    "diff": _Command(DIFF, _diff_arguments, _diff),
    "verify": _Command(VERIFY, _verify_arguments, _verify),
    "export": _Command(EXPORT, _export_arguments, _export),
    "import": _Command(IMPORT, _import_arguments, _import),
    "migrate": _Command(MIGRATE, _migrate_arguments, _migrate, goes_on=True),
}


def parser() -> argparse.ArgumentParser:
    """The command line of all subcommands."""
    root = argparse.ArgumentParser(
        prog="python -m storage",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    subparsers = root.add_subparsers(dest="command", required=True, metavar="|".join(COMMANDS))
    for name, command in COMMANDS.items():
        subparser = subparsers.add_parser(
            name,
            help=command.text.split("\n")[0],
            description=command.text,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.add_arguments(subparser)
    return root


def main(arguments: list[str]) -> int:
    """Parse and run; returns the exit code."""
    cli.interrupt_on_terminate()  # so that what was staged is removed
    options = parser().parse_args(arguments)
    command = COMMANDS[options.command]
    try:
        return command.run(options)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(cli.GOES_ON if command.goes_on else cli.STARTS_OVER) from None


def _refuse_missing(url: str) -> None:
    if not Store(url).exists(""):
        raise FileNotFoundError(f"{url}: no such directory")


@contextmanager
def _bar(name: str, unit: str) -> Iterator[Callable[[int, int], None]]:
    with tqdm(desc=name, unit=f" {unit}", disable=None, leave=False) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total or None
            bar.update(done - bar.n)

        yield progress


def _json(value: object) -> str:
    return json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False)


if __name__ == "__main__":
    cli.run(main)
