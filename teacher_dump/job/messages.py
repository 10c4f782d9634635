"""The conversations that a dump reads, by sample id: a file for caches that do not hold them.

Needs no tokenizer and no teacher; the responses of a teacher come from the cache they lie in.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

from decant.schemas import Conversation
from decant.storage import Store
from decant.storage.files.durable import staged_file
from decant.teacher_dump.config import DumpConfig
from decant.teacher_dump.inputs.kinds import MESSAGES, formed
from decant.teacher_dump.inputs.messages import read_conversation
from decant.teacher_dump.inputs.records import SourceError, Unrenderable
from decant.teacher_dump.inputs.sources import iter_records
from decant.teacher_dump.job.response_files import conversation_of, rows_of


def iter_messages(config: DumpConfig) -> Iterator[tuple[str, str]]:
    """(sample id, conversation as a cache keeps it) of every record, "" of one that is none.

    Raises SourceError for a record that a dump would stop at.
    """
    if config.source.generate.n:
        everything = config.sequences.targets == "all"
        for where, row in rows_of(Store(config.output)):
            yield row["id"], conversation_of(row, where, everything)
        return
    for record in iter_records(config.source):
        found = formed(record)
        said = ""
        if found.form == MESSAGES and found.record.fields["messages"]:
            try:
                said = read_conversation(found.record).kept().to_text()
            except Unrenderable:  # which a dump leaves out, and counts
                continue
        yield record.sample_id, said


def write_messages(
    config: DumpConfig, out: str, progress: Callable[[int], None] = lambda _: None
) -> tuple[int, int]:
    """Write a line per conversation to a file that is finished or absent; (written, records read).

    Raises FileExistsError if there is something at `out`, SourceError if no record is one.
    """
    target = Path(out).expanduser().absolute()
    if target.exists():
        raise FileExistsError(f"{out} exists already: remove it, or choose another place")
    written = read = 0
    with staged_file(target) as temporary:
        with temporary.open("w", encoding="utf-8") as file:
            for sample_id, text in iter_messages(config):
                read += 1
                progress(read)
                if text:
                    Conversation.of_text(text, f"sample {sample_id}")
                    file.write(f'{{"id":{json.dumps(sample_id)},{text[1:]}\n')
                    written += 1
        if not written:
            place = config.output if config.source.generate.n else config.source.path
            raise SourceError(f"{place}: none of its {read} records is a conversation")
    return written, read
