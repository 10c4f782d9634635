"""Is the student's tokenizer the cache's? As transformers loads it, or as its file says."""

from typing import Any

from transformers import PreTrainedTokenizerFast
from transformers.utils import cached_file

from decant.schemas import FormatError, check_same_tokenizer
from decant.schemas.tokenizer import has_fingerprint


def as_fingerprinted(tokenizer: Any, folder: str, fingerprint: str) -> Any:
    """The tokenizer loaded from a folder, or that of its `tokenizer.json` if that alone fits.

    Classes of transformers may build another one from the vocabulary than the file describes.
    """
    if has_fingerprint(tokenizer, fingerprint) or not getattr(tokenizer, "is_fast", False):
        return tokenizer
    plain = PreTrainedTokenizerFast.from_pretrained(folder)
    return plain if has_fingerprint(plain, fingerprint) else tokenizer


def check_student_tokenizer(tokenizer: Any, own: Any, path: str, where: str) -> None:
    """Raise FormatError with the first difference unless the student's tokenizer is the cache's.

    `own` is what transformers loads for the student at `path`; if it differs, its `tokenizer.json`
    is asked, which is what a teacher is read by.
    """
    try:
        check_same_tokenizer(tokenizer, own, where)
    except FormatError:
        if cached_file(path, "tokenizer.json", _raise_exceptions_for_missing_entries=False) is None:
            raise
        plain = PreTrainedTokenizerFast.from_pretrained(path)
        try:
            check_same_tokenizer(tokenizer, plain, where)
            return
        except FormatError:
            pass
        raise
