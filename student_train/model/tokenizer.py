"""Is the student's tokenizer the cache's? As transformers loads it, or as its file says.

A student keeps the tokenizer that it is saved with: the cache's, or its own where that has more
tokens, with the choices that the cache's makes. What ends a text in its configuration follows.
"""

import logging
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerFast
from transformers.utils import cached_file

from decant.schemas import FormatError, SameIds, check_same_tokenizer
from decant.schemas.tokenizer import has_fingerprint

log = logging.getLogger(__name__)

CHOSEN = ("bos_token", "eos_token", "unk_token")
"""What a student with a larger vocabulary takes of the cache's tokenizer: it learns to say them."""


def as_fingerprinted(tokenizer: Any, folder: str, fingerprint: str) -> Any:
    """The tokenizer loaded from a folder, or that of its `tokenizer.json` if that alone fits.

    Classes of transformers may build another one from the vocabulary than the file describes.
    """
    if has_fingerprint(tokenizer, fingerprint) or not getattr(tokenizer, "is_fast", False):
        return tokenizer
    plain = PreTrainedTokenizerFast.from_pretrained(folder)
    return plain if has_fingerprint(plain, fingerprint) else tokenizer


def check_student_tokenizer(
    tokenizer: Any, own: Any, path: str, where: str, vocab_size: int | None = None
) -> tuple[Any, SameIds]:
    """The student's tokenizer and what differs from the cache's, of which all ids mean the same.

    `own` is what transformers loads for the student at `path`; if it is another one, its
    `tokenizer.json` is asked, which is what a teacher is read by. `vocab_size`: ids below it count.
    Raises FormatError with the first difference if an id means something else.
    """
    try:
        return own, check_same_tokenizer(tokenizer, own, where, vocab_size=vocab_size)
    except FormatError:
        if cached_file(path, "tokenizer.json", _raise_exceptions_for_missing_entries=False) is None:
            raise
        plain = PreTrainedTokenizerFast.from_pretrained(path)
        try:
            return plain, check_same_tokenizer(tokenizer, plain, where, vocab_size=vocab_size)
        except FormatError:
            pass
        raise


def agreed_tokenizer(tokenizer: Any, own: Any, path: str, where: str, vocab_size: int) -> Any:
    """The tokenizer to save with a student whose own may make other choices than the cache's.

    Arguments and errors are those of `check_student_tokenizer`. It is the cache's, or where the
    student's has more tokens that one, with the beginning and end of texts, the unknown token and
    the chat template of the cache's: those are what the student learns.
    """
    found, same = check_student_tokenizer(tokenizer, own, path, where, vocab_size)
    if text := same.text():
        saved = "its own, with these choices of the cache's," if same.more else "the cache's"
        log.info(
            "student.path %s: its tokenizer means the same by every id of %s and differs in: %s. "
            "The tokenizer that is saved with the student is %s",
            path,
            where,
            text,
            saved,
        )
    if not same.more:
        return tokenizer
    vocab = found.get_vocab()
    for name in CHOSEN:
        token = getattr(tokenizer, name, None)
        if token is not None and str(token) in vocab:
            setattr(found, name, str(token))
    if getattr(tokenizer, "chat_template", None):
        found.chat_template = tokenizer.chat_template
    ours, theirs = (getattr(t, "backend_tokenizer", None) for t in (found, tokenizer))
    if ours is not None and theirs is not None and theirs.post_processor is not None:
        ours.post_processor = theirs.post_processor
    return found


def tokens_more(tokenizer: Any | None, kept: Any | None) -> int:
    """How many ids the vocabulary of a student's tokenizer has, where the cache's has fewer.

    0 where the two have the same tokens, or there is no tokenizer.
    """
    if tokenizer is None or kept is None:
        return 0
    ours, theirs = tokenizer.get_vocab(), kept.get_vocab()
    return 0 if ours.items() <= theirs.items() else max(ours.values()) + 1


def follow_tokenizer(student: PreTrainedModel, tokenizer: Any | None, path: str) -> None:
    """Let what begins and ends a text in a student's configuration be its tokenizer's.

    Several end tokens stay if the tokenizer's is among them. What pads a text is set for generation
    alone: in the configuration it would take its embedding out of later trainings.
    """
    if tokenizer is None:
        return
    everywhere = [student.config, student.config.get_text_config(), student.generation_config]
    parts = {
        "bos_token_id": everywhere,
        "eos_token_id": everywhere,
        "pad_token_id": [student.generation_config],
    }
    rows = student.get_output_embeddings().weight.shape[0]
    changed = {}
    for name, holders in parts.items():
        token = getattr(tokenizer, name, None)
        if token is None or token >= rows:
            continue
        for holder in holders:
            value = getattr(holder, name, None) if holder is not None else None
            several = value if isinstance(value, list | tuple) else [value]
            if value is not None and token not in several:
                setattr(holder, name, token)
                changed[name] = (value, token)
    if changed:
        log.info(
            "student.path %s: %s, as the tokenizer that is saved with it says",
            path,
            ", ".join(f"{name} {old} becomes {new}" for name, (old, new) in changed.items()),
        )
