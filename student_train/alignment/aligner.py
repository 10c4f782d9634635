"""A cache's sequences for a student of another tokenizer: its tokens, its chunks, their events.

A pure function of cache and tokenizers, so that it may run in any thread that reads, as often as
is needed, and changes nothing about the order of sequences or about resuming.
"""

import dataclasses
import threading
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from decant.storage import CacheReader, StoredRows
from decant.storage.cache.given_messages import GivenMessages
from decant.storage.cache.rows import decode_rows
from decant.storage.cache.tokenizer_files import TokenizerFiles
from decant.student_train.alignment.chat import Chats, chat_pieces
from decant.student_train.alignment.encoder import REMEMBERED, Encoder
from decant.student_train.alignment.events import Events, Matching, events_of, last_rows
from decant.student_train.alignment.pieces import Aligned, Pieces, aligned
from decant.student_train.alignment.report import SHOWN, Figures
from decant.student_train.alignment.texts import text_pieces
from decant.student_train.alignment.token_bytes import HasTokenizer, TokenTable

FEW = 20
"""So many sequences are looked at before their share of those left out counts."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class AlignedRows:
    """S whole sequences in the student's tokens, with the C chunks of all of them."""

    sample_ids: list[str]
    """[S]."""
    token_id: NDArray[np.int32]
    """The student's tokens, sequence after sequence."""
    row_starts: NDArray[np.int64]
    """[S+1] tokens of sequence s are row_starts[s]:row_starts[s+1]; at least one each."""
    chunk_starts: NDArray[np.int64]
    """[S+1] chunks of sequence s are chunk_starts[s]:chunk_starts[s+1]; none if it is left out."""
    first: NDArray[np.int64]
    """[C] index of the first token of each chunk among all tokens."""
    size: NDArray[np.int64]
    """[C] how many tokens it has."""
    num_teacher: NDArray[np.int64]
    """[C] how many the teacher has there."""
    events: Events
    sampler_logprobs: NDArray[np.float32] | None = None
    """[C] what the sampler gave the token of each chunk; of a cache of the student's own tokenizer
    alone."""

    def __len__(self) -> int:
        return len(self.sample_ids)


class Aligner:
    """Aligns the row groups of one cache with a student's tokenizer. For several threads at once.

    `figures` are those of all that was aligned so far.
    """

    def __init__(
        self,
        reader: CacheReader,
        tokenizer: HasTokenizer,
        *,
        where: str,
        max_left_out: float = 0.01,
        messages: str = "",
        remembered: int = REMEMBERED,
    ) -> None:
        """`where` names the student's tokenizer in errors; the rest is as in `AlignConfig`.

        `remembered` are bytes of tokens that each encoder keeps of what it encoded.

        Raises ValueError for a cache that cannot be aligned with any student, naming what is wrong.
        """
        refuse_cache(reader)
        self.url, self.max_left_out = reader.url, max_left_out
        teacher = TokenTable.of(
            TokenizerFiles.of_cache(reader), reader.url, reader.manifest.shared_vocab_size
        )
        student = TokenTable.of(tokenizer, where)
        refuse_pair(teacher, student, reader.url, where)
        self.matching = Matching(teacher, student)
        self.vocab_size = len(student)
        self.layout = reader.manifest.layout
        self.figures = Figures()
        self._encode = Encoder(tokenizer, special_as_text=True, remembered=remembered)
        self._lock = threading.Lock()
        self._given = None
        if messages:
            windows = reader.manifest.sequences.get("overlong") == "split"
            self._given = GivenMessages(messages, windows=windows)
        self._chats = None
        if messages or reader.manifest.messages:
            encode = Encoder(tokenizer, special_as_text=False, remembered=remembered)
            self._chats = Chats(tokenizer, where, encode)

    def __call__(self, rows: StoredRows) -> AlignedRows:
        """Align a row group. Raises ValueError once more sequences than allowed are left out."""
        found, figures = self.measured(rows)
        with self._lock:
            self.figures += figures
            total = self.figures
        if total.sequences >= FEW and total.left_out_share > self.max_left_out:
            self.refuse(total)
        return found

    def measured(self, rows: StoredRows) -> tuple[AlignedRows, Figures]:
        """Align a row group, and say how that went."""
        pieces, matching = Pieces(), self.matching
        said = self._conversations(rows)
        texts = [sequence for sequence in range(len(rows)) if sequence not in said]
        reasons = text_pieces(pieces, rows, texts, matching, self._encode)
        if said:
            assert self._chats is not None
            teacher, student = matching.teacher, matching.student
            others, ends = chat_pieces(pieces, rows, said, teacher, student, self._chats)
            reasons |= others
            matching = matching.with_ends(ends)
            pieces = pieces.in_order()
        ids = rows.token_id.astype(np.int64)
        both = aligned(pieces, len(rows), ids, matching.teacher, matching.student)
        both = _usable(both, rows)
        events = self.events(both, rows, matching)
        figures = Figures.of(both, events, int(rows.is_target.sum()))
        figures.sequences, figures.left_out = len(rows), len(reasons)
        figures.examples = [
            f"{rows.sample_ids[sequence]}: {reason}"
            for sequence, reason in sorted(reasons.items())[:SHOWN]
        ]
        return _with_placeholders(both, events, rows.sample_ids), figures

    def events(self, both: Aligned, rows: StoredRows, matching: Matching) -> Events:
        """The events of the chunks of a row group."""
        at_ends = decode_rows(dataclasses.replace(rows, target_rows=last_rows(both)), self.layout)
        return events_of(both, at_ends, rows.scalars["label_logprob"], matching)

    def _conversations(self, rows: StoredRows) -> dict[int, str]:
        """What is known of what was said, by sequence."""
        if rows.messages is not None:
            return {s: text for s, text in enumerate(rows.messages) if text}
        if self._given is None:
            return {}
        found = {s: self._given.of(sample) for s, sample in enumerate(rows.sample_ids)}
        return {s: text for s, text in found.items() if text}

    def refuse(self, total: Figures) -> None:
        """Raise ValueError, with the first example, if too many sequences are left out, or all."""
        if total.left_out_share <= self.max_left_out and total.chunks:
            return
        if not total.left_out and not total.chunks:
            raise ValueError(
                f"{self.url}: none of the teacher's {total.targets:,} targets lies in a chunk of "
                "bytes that the student's tokenizer begins and ends with it: nothing could be "
                "learned"
            )
        most = f", more than align.max_left_out {self.max_left_out:g} of them" * bool(total.chunks)
        raise ValueError(
            f"{self.url}: {total.left_out:,} of {total.sequences:,} sequences cannot be aligned"
            f"{most}; the first: {total.examples[0]}"
        )


def in_row_groups(reader: CacheReader, aligner: Aligner, count: int) -> Figures:
    """The figures of so many row groups, spread evenly over a cache; 0 = of all.

    Raises ValueError if too many of their sequences cannot be aligned.
    """
    every = reader.row_groups()
    count = min(count or len(every), len(every))
    total = Figures()
    for index in np.linspace(0, len(every) - 1, count).astype(int).tolist():
        total += aligner.measured(reader.read_stored(every[index]))[1]
    if total.sequences:
        aligner.refuse(total)
    return total


def refuse_cache(reader: CacheReader) -> None:
    """Raise ValueError for a cache that no student of another tokenizer can be trained from."""
    manifest = reader.manifest
    if not manifest.tokenizer.files:
        raise ValueError(
            f"{reader.url} holds no copy of its tokenizer (its source was ready ids), so what its "
            "ids stand for is unknown: dump again with teacher.tokenizer named, or train a student "
            "of the same ids"
        )
    if manifest.layout.has_draws:
        raise ValueError(
            f"{reader.url} holds draws (truncation.method {manifest.truncation.method}), whose "
            "weights stand for single ids of the teacher and not for strings: a student of another "
            "tokenizer needs a cache of method topk, topp or label"
        )


def refuse_pair(teacher: TokenTable, student: TokenTable, url: str, where: str) -> None:
    """Raise ValueError if two tokenizers have nothing in common, or ends of texts are lost."""
    if student.eos < 0:
        raise ValueError(
            f"the tokenizer of {where} names no end token (eos_token), so the student could not be "
            "taught where a text ends: name one in its tokenizer_config.json"
        )
    pairs = teacher.paired_with(student)
    if not (pairs[teacher.kind == 0] >= 0).any():
        raise ValueError(
            f"no token of {url} has the bytes of any token of {where}: nothing of one could be "
            "said in the other"
        )


def _usable(both: Aligned, rows: StoredRows) -> Aligned:
    """Without chunks that hold a token which is no target, or whose first token none precedes."""
    chunks = both.chunks
    rows_t = both.teacher.where[chunks.teacher_first]
    targets = np.append(0, np.cumsum(rows.is_target))
    good = targets[rows_t + chunks.num_teacher] - targets[rows_t] == chunks.num_teacher
    begins = np.zeros(len(both.token_ids) + 1, np.bool_)
    begins[both.row_starts] = True
    good &= ~begins[both.student.where[chunks.student_first]]
    return Aligned(
        teacher=both.teacher,
        student=both.student,
        chunks=chunks[good],
        token_ids=both.token_ids,
        row_starts=both.row_starts,
    )


def _with_placeholders(both: Aligned, events: Events, sample_ids: list[str]) -> AlignedRows:
    """As columns; a sequence without tokens gets one, which is no target, and keeps its place."""
    lengths = np.diff(both.row_starts)
    is_empty = lengths == 0
    starts = np.append(0, np.cumsum(np.maximum(lengths, 1)))
    token_id = np.insert(both.token_ids, both.row_starts[:-1][is_empty], 0)
    first = both.student.where[both.chunks.student_first]
    shift = np.append(0, np.cumsum(is_empty))
    sequence = np.searchsorted(both.row_starts, first, side="right") - 1
    # Of several sequences that begin at the same token, all but the last are empty.
    return AlignedRows(
        sample_ids=sample_ids,
        token_id=token_id,
        row_starts=starts,
        chunk_starts=np.searchsorted(first, both.row_starts),
        first=first + shift[sequence],
        size=both.chunks.num_student,
        num_teacher=both.chunks.num_teacher,
        events=events,
    )
