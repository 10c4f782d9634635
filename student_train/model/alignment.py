"""Which caches of a run are of another tokenizer than the student's, and what aligns them."""

import logging
from typing import Any

import torch
from transformers import AutoTokenizer

from decant.schemas import FormatError
from decant.storage import CacheReader
from decant.student_train.alignment.aligner import Aligner, in_row_groups, refuse_cache
from decant.student_train.alignment.report import Figures
from decant.student_train.alignment.token_bytes import TokenTable
from decant.student_train.config.alignment import AlignConfig
from decant.student_train.config.student import StudentConfig
from decant.student_train.model.student import load_tokenizer
from decant.student_train.model.tokenizer import check_student_tokenizer

SAMPLED_GROUPS = 4
"""Row groups of a cache that are aligned before training, to say how that goes."""

log = logging.getLogger(__name__)


class Alignment:
    """Makes an aligner for each cache that needs one; what `StreamConfig.alignment` takes."""

    def __init__(self, student: StudentConfig, align: AlignConfig) -> None:
        """Load the student's tokenizer. Raises ValueError if it has none of its own."""
        self.where = student.tokenizer or student.path
        if not self.where:
            raise ValueError(
                "tokenizer_mismatch: align has no effect on a student that is made from "
                "student.config and takes the cache's tokenizer: name its own in student.tokenizer"
            )
        self._trusted = {"trust_remote_code": student.trust_remote_code}
        self._align = align
        self.tokenizer = own_tokenizer(self.where, **self._trusted)
        self.vocab_size = max(self.tokenizer.get_vocab().values()) + 1
        """Of the student."""
        self.figures: dict[str, Figures] = {}
        """By cache, those of a sample of each one that is aligned."""
        self._aligners: dict[str, Aligner | None] = {}

    def __call__(self, reader: CacheReader) -> Aligner | None:
        """The aligner of a cache; None if it is of the student's own tokenizer.

        Raises ValueError for a cache that cannot be aligned, or hardly.
        """
        if reader.url not in self._aligners:
            self._aligners[reader.url] = self._made(reader)
        return self._aligners[reader.url]

    @property
    def stream_options(self) -> dict[str, Any]:
        """Fields of `StreamConfig`."""
        return {"alignment": self, "vocab_size": self.vocab_size}

    @property
    def any(self) -> bool:
        """Whether a cache that was asked for is aligned."""
        return any(self._aligners.values())

    def _made(self, reader: CacheReader) -> Aligner | None:
        refuse_cache(reader)
        theirs = load_tokenizer(reader)
        try:
            shared = reader.manifest.shared_vocab_size
            check_student_tokenizer(theirs, self.tokenizer, self.where, reader.url, shared)
        except FormatError:
            pass
        else:
            log.info("%s: the student's own tokenizer, nothing is aligned", reader.url)
            return None
        aligner = Aligner(
            reader,
            self.tokenizer,
            where=self.where,
            max_left_out=self._align.max_left_out,
            messages=self._align.messages,
        )
        found = in_row_groups(reader, aligner, SAMPLED_GROUPS)
        if found.sequences:
            self.figures[reader.url] = found
            for name, text in found.lines():
                log.info("%s, aligned with %s: %s %s", reader.url, self.where, name, text)
        return aligner


def own_tokenizer(path: str, **options: Any) -> Any:
    """The tokenizer of a student. Raises ValueError if there is none at `path`."""
    try:
        return AutoTokenizer.from_pretrained(path, **options)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} has no tokenizer that can be loaded: {error}") from error


def label_bytes(tokenizer: Any | None, vocab_size: int) -> torch.Tensor | None:
    """[V] the bytes of each token of a vocabulary; None where they cannot be known."""
    if tokenizer is None:
        return None
    try:
        table = TokenTable.of(tokenizer, "the student", vocab_size)
    except ValueError:
        return None
    return torch.from_numpy(table.lengths[:vocab_size])
