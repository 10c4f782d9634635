"""`align`: what it takes and what it prints."""

import dataclasses
from dataclasses import dataclass
from typing import Annotated, Any

from decant.storage.cli import process
from decant.storage.cli.commands import Command
from decant.storage.cli.options import Shown, Word


@dataclass(frozen=True, kw_only=True)
class AlignArguments:
    """Which cache, with which student's tokenizer."""

    url: Annotated[str, Word("CACHE")]
    """A cache: a directory or an fsspec URL."""
    tokenizer: Annotated[str, Shown("DIR")]
    """Directory of the student's tokenizer, or of the student."""
    messages: Annotated[str, Shown("FILE")] = ""
    """The messages of a chat cache that does not hold them, as decant messages writes them."""
    groups: int = 0
    """Look at so many row groups, spread evenly; 0 = all."""
    json: bool = False
    """Print one JSON object."""

    def __post_init__(self) -> None:
        if self.groups < 0:
            raise ValueError(f"--groups must be >= 0, found {self.groups}")


def run_align(arguments: AlignArguments) -> int:
    """Align a cache and print how that went; returns the exit code."""
    from decant.storage import CacheReader
    from decant.storage.cache.command import refuse_missing
    from decant.storage.cli.terminal import json_text
    from decant.student_train.alignment.aligner import Aligner, in_row_groups

    refuse_missing(arguments.url)
    reader = CacheReader(arguments.url)
    has_chats = reader.manifest.messages or bool(arguments.messages)
    aligner = Aligner(
        reader,
        _tokenizer(arguments.tokenizer, has_chats),
        where=arguments.tokenizer,
        max_left_out=1.0,
        messages=arguments.messages,
    )
    found = in_row_groups(reader, aligner, arguments.groups)
    if arguments.json:
        print(json_text({**dataclasses.asdict(found), "chunks": found.chunks}))
        return process.DONE
    rows = [("cache", arguments.url), ("student's", arguments.tokenizer), *found.lines()]
    width = max(len(name) for name, _ in rows)
    print("\n".join(f"{name:<{width}}  {text}" for name, text in rows))
    return process.DONE


def _tokenizer(path: str, has_chats: bool) -> Any:
    """As its files say, or as transformers loads it where a chat template is to be rendered."""
    if has_chats:
        from transformers import AutoTokenizer

        try:
            return AutoTokenizer.from_pretrained(path)
        except (OSError, ValueError) as error:
            raise ValueError(f"tokenizer {path} cannot be loaded: {error}") from error
    from decant.storage.cache.tokenizer_files import TokenizerFiles

    return TokenizerFiles.read(path)


ALIGN = Command(
    text="""
  decant align caches/mine --tokenizer path/of/a/student
  decant align caches/mine --tokenizer A --json | jq .found_mass/.kept_mass
  decant align caches/chat --tokenizer A --messages messages.jsonl

What a student of another tokenizer could learn from a cache, without a model.
A text is cut wherever both tokenisations have a boundary: into chunks of one
token on either side (1:1), of one and several (1:N, M:1), or of several (M:N).
Printed are their shares, how many of the teacher's targets lie in chunks, what
part of the probability that the teacher's kept ids hold some token of the
student's completes as well, and the sequences that cannot be aligned, with why.
The closer both shares are to 100 %, the less is lost. `tokenizer_mismatch:
align` trains such a student. Exit code 0, or 2 with one line of why not.
""",
    arguments=AlignArguments,
    run=run_align,
    goes_on=False,
)
