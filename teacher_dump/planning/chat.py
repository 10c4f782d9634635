"""What a dump through a chat API will ask for, counted before anything is: it is paid by the token.

Nothing is asked of the API. Counts are exact but for the answers, of which only the limit is known.
"""

from dataclasses import dataclass

from decant.storage import Store
from decant.storage.cache import paths
from decant.teacher_dump.config import DumpConfig
from decant.teacher_dump.inputs.records import SourceError
from decant.teacher_dump.job.refusals import (
    refuse_before_asking,
    refuse_foreign,
    refuse_misfits,
)
from decant.teacher_dump.job.response_files import part_names, read_part
from decant.teacher_dump.job.responses import questions
from decant.teacher_dump.progress import progress
from decant.teacher_dump.teacher import describe_chat_teacher


@dataclass(frozen=True, kw_only=True, slots=True)
class ChatPrediction:
    """What will be asked of a chat API."""

    model: str
    prompts: int
    """With room for an answer."""
    without_room: int
    """Left out."""
    requests: int
    """One for each answer."""
    prompt_tokens: int
    """Of all requests, as the chat template of teacher.tokenizer makes them."""
    answer_tokens: int
    """Of all answers, at most."""
    answered: int
    """Answers that lie in the output already, and are not asked for again."""


def predict_chat(config: DumpConfig) -> ChatPrediction:
    """Count what would be asked. Raises ValueError as `dump` would, as far as nobody is asked."""
    refuse_before_asking(config)
    teacher = describe_chat_teacher(config.teacher, asks=False)
    refuse_misfits(config, teacher)
    refuse_foreign(config)
    n = config.source.generate.n
    prompts = without_room = read = written = 0
    with progress("tokenise", "prompts") as bar:
        for question in questions(config, teacher):
            bar.add(1)
            without_room += not question.room
            if question.room:
                prompts += 1
                read += len(question.token_ids)
                written += question.room
    if not prompts:
        raise SourceError(f"{config.source.path} has no prompt that leaves room for a response")
    return ChatPrediction(
        model=teacher.info.name,
        prompts=prompts,
        without_room=without_room,
        requests=n * prompts,
        prompt_tokens=n * read,
        answer_tokens=n * written,
        answered=_answered(Store(config.output)),
    )


def chat_text(p: ChatPrediction) -> str:
    """The prediction for a terminal."""
    lines = [
        f"chat API             {p.model}: nothing was asked of it",
        f"prompts              {p.prompts:,} ({p.without_room:,} more leave no room for an answer)",
        f"requests             {p.requests:,}, and 2 or 3 of a few tokens at each start",
        f"prompt tokens        {p.prompt_tokens:,} by teacher.tokenizer and its chat template",
        f"answer tokens        {p.answer_tokens:,} at most; all are targets but those whose log "
        "prob the API does not tell",
    ]
    if p.answered:
        lines.append(
            f"answered             {p.answered:,} answers lie in the output and are not asked for "
            "again by the same configuration"
        )
    return "\n".join(lines)


def _answered(store: Store) -> int:
    """Answers in parts, and beside them."""
    count = sum(len(read_part(store, name)) for name in part_names(store))
    folders = store.names(paths.ANSWERS)
    names = (name for folder in folders for name in store.names(f"{paths.ANSWERS}/{folder}"))
    return count + sum(not name.startswith(".") for name in names)
