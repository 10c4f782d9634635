"""`export` and `import`: their arguments and what they print."""

import argparse

from decant.schemas import PRECISIONS
from decant.storage.cache.command import refuse_missing
from decant.storage.cli import process as cli
from decant.storage.cli.terminal import progress_bar

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


def export_arguments(command: argparse.ArgumentParser) -> None:
    """Give the parser the arguments of `export`."""
    command.add_argument("url", metavar="CACHE", help="the cache: a directory or an fsspec URL")
    command.add_argument("out", metavar="OUT", help="a local directory that does not exist yet")
    command.add_argument(
        "--format", default="parquet", choices=["parquet", "hf"], help="default: parquet"
    )
    command.add_argument(
        "--rows", default="sequences", choices=["sequences", "targets"], help="default: sequences"
    )


def run_export(options: argparse.Namespace) -> int:
    """Export a cache; returns the exit code."""
    from decant.storage.exchange.export import export

    refuse_missing(options.url)
    with progress_bar("export", "row groups") as progress:
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


def import_arguments(command: argparse.ArgumentParser) -> None:
    """Give the parser the arguments of `import`."""
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


def run_import(options: argparse.Namespace) -> int:
    """Import a foreign dump; returns the exit code."""
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
    with progress_bar("import", "records") as progress:
        manifest = import_cache(config, options.out, progress)
    print(
        f"{options.out}: {manifest.num_targets} targets in {manifest.num_sequences} sequences, "
        f"{manifest.num_shards} shards, k={manifest.truncation.k}"
    )
    return cli.DONE
