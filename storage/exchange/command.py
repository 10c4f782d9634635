"""`export` and `import`: what they take and what they print."""

from dataclasses import dataclass
from typing import Annotated, Literal

from decant.storage.cache.command import refuse_missing
from decant.storage.cli import process
from decant.storage.cli.commands import Command
from decant.storage.cli.options import Named, Shown, Word
from decant.storage.exchange.config import ImportConfig


@dataclass(frozen=True, kw_only=True)
class ExportArguments:
    """What to export, and in which form."""

    url: Annotated[str, Word("CACHE")]
    """The cache: a directory or an fsspec URL."""
    out: Annotated[str, Word("OUT")]
    """A local directory that does not exist yet."""
    to: Literal["lists", "hf", "axolotl", "distillkit"] = "lists"
    """Who is to read it; hf: lists, for datasets.load_from_disk."""
    format: Literal["parquet", "hf"] | None = None
    """parquet: a file per shard, as lists are; hf: opens with datasets.load_from_disk, as the
    others do."""
    rows: Literal["sequences", "targets"] = "sequences"
    """lists, hf: what a row is; targets is the form for SQL."""
    temperature: float = 1.0
    """axolotl: log probs at this stored temperature, for its kd_temperature."""
    renormalise: bool = False
    """axolotl: log probs that add up to 1 over the kept ids, as its own preparation makes them."""


@dataclass(frozen=True, kw_only=True)
class ImportArguments(ImportConfig):
    """What to import, how, and where to."""

    path: Annotated[str, Word("SRC")]
    """What the other tool wrote: a .parquet, .jsonl or .arrow file, a directory of them, a saved
    Hugging Face dataset; a directory of tars; a .kld file."""
    out: Annotated[str, Word("OUT")]
    """The cache: a local directory that does not exist yet."""
    file_format: Annotated[
        Literal["distillkit", "axolotl", "vllm", "trl", "tinker", "megatron", "llamacpp"],
        Named("format"),
    ]
    """Which tool wrote it."""
    tokenizer: Annotated[str, Shown("DIR")] = ""
    """Directory of the tokenizer of the ids; it is kept in the cache."""


def run_export(arguments: ExportArguments) -> int:
    """Export a cache; returns the exit code."""
    from decant.storage.cli.terminal import progress_bar
    from decant.storage.exchange.export import export

    refuse_missing(arguments.url)
    with progress_bar("export", "row groups") as progress:
        report = export(
            arguments.url,
            arguments.out,
            to=arguments.to,
            file_format=arguments.format,
            rows=arguments.rows,
            temperature=arguments.temperature,
            renormalise=arguments.renormalise,
            progress=progress,
        )
    print(
        f"{arguments.out}: {report.targets} targets in {report.sequences} sequences, "
        f"{report.bytes} bytes"
    )
    return process.DONE


def run_import(arguments: ImportArguments) -> int:
    """Import a foreign dump; returns the exit code."""
    from decant.storage.cli.terminal import progress_bar
    from decant.storage.exchange.importing import import_cache

    with progress_bar("import", "records") as progress:
        manifest = import_cache(arguments, arguments.out, progress)
    print(
        f"{arguments.out}: {manifest.num_targets} targets in {manifest.num_sequences} sequences, "
        f"{manifest.num_shards} shards, k={manifest.truncation.k}"
    )
    return process.DONE


EXPORT = Command(
    text="""
  decant export caches/demo exported
  decant export caches/demo exported --rows targets
  decant export caches/demo dataset --to hf
  decant export caches/demo for-axolotl --to axolotl
  decant export caches/demo for-distillkit --to distillkit

--to lists, hf     all that the cache holds, in plain lists, as below
--to axolotl       input_ids, attention_mask, labels, target_token_ids,
                   target_logprobs, target_mask: its KD plug-in trains from them
--to distillkit    input_ids, attention_mask, labels, token_ids, top_values, all
                   of one length: its dataset.prepacked trains from them
--rows sequences   a row per sequence: input_ids, is_target, positions of its n
                   targets, and for each of them a list of token_ids and one of
                   logprobs (float32, natural log)
--rows targets     a row per target: position, label, token_ids, logprobs

Lists hold the entries in use. Scalars are named as in the shards: log_tail_t1,
label_logprob, ... Position t is about token t, never about the next. OUT
appears when it is complete; what exists is never overwritten. docs/exchange.md
has every column. Exit code 0, or 2 with one line of why not.
""",
    arguments=ExportArguments,
    run=run_export,
    goes_on=False,
)
IMPORT = Command(
    text="""
  decant import dump.parquet caches/new --format distillkit \\
      --teacher Qwen/Qwen3-8B --tokenizer models/qwen3-8b
  decant import packed caches/new --format distillkit --codec run.yaml \\
      --teacher Qwen/Qwen3-235B-A22B --tokenizer models/qwen3-235b
  decant import base.kld caches/new --format llamacpp --k 64 \\
      --precision compact --teacher Qwen/Qwen3-8B --tokenizer models/qwen3-8b

--format distillkit   input_ids with token_ids and top_values, or compressed
                      (--codec, or compression_config.yaml beside the rows),
                      also packed; list j is about token j + 1
--format axolotl      input_ids, target_token_ids, target_logprobs, target_mask
                      as prepared for training (list j is about token j + 1,
                      renormalised); or as collected: input_ids, logprobs and
                      target_token_ids (the last list is about the last token)
--format vllm         JSON lines with prompt_logprobs and prompt_token_ids, of
                      the engine, the server or the batch runner
--format trl          JSON lines: answers of TRL's vLLM server, with sequences
                      and prompt_lengths of the request, or of /generate/
--format tinker       JSON lines: sample responses with the request's prompt
--format megatron     the directory of --logits-save-dir, and --tokens
--format llamacpp     the file of llama-perplexity --kl-divergence-base
Rows honour labels (-100 is not a target) and attention_mask.

Values must be natural log probs at temperature 1 over the whole vocabulary; the
mass that is not kept is what they leave of 1. A dump that is renormalised,
shifted by a token or of logits is refused with the option that imports it all
the same; the manifest records that option. OUT appears when it is complete.
docs/exchange.md says what is read of each, and what is lost. Exit code 0, or 2
with one line of why not.
""",
    arguments=ImportArguments,
    run=run_import,
    goes_on=False,
)
