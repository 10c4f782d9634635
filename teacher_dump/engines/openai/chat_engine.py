"""The engine behind a chat API's answers: the entries come with them, and are read from there.

Nothing is asked. A chat API tells log probs of what it generates alone, so that only its own
answers can be scored, by what was kept of them. Shapes: n targets, K slots.
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from decant.schemas import ScoredSequence, Truncation
from decant.teacher_dump.engines.openai.answers import (
    AnswerError,
    NotFinite,
    TokenEntries,
    TooFew,
    top_entries,
)
from decant.teacher_dump.engines.openai.chat_answers import Answer
from decant.teacher_dump.engines.packed_rows import scored_sequence
from decant.teacher_dump.engines.seam import OwnFault
from decant.teacher_dump.engines.top_entries import known_of, refuse_request
from decant.teacher_dump.inputs.records import TokenSequence


class ChatEngine:
    """A teacher whose answers are kept with their entries."""

    dtype = "auto"

    def __init__(
        self,
        answer_of: Callable[[TokenSequence], Answer | None],
        *,
        vocab_size: int,
        truncation: Truncation,
        temperatures: tuple[float, ...],
    ) -> None:
        """`answer_of` finds what was kept of the answer that a sample is."""
        refuse_request(truncation, temperatures)
        self._answer_of, self._vocab_size = answer_of, vocab_size
        self._slots, self._given = truncation.slots, truncation.given

    def score(
        self, sequences: Sequence[TokenSequence], first_sequence: int
    ) -> Iterator[ScoredSequence]:
        """The scored sequences in the order given; see `Engine.score`."""
        for index, sequence in enumerate(sequences):
            try:
                known = self._known(sequence)
            except AnswerError as error:
                raise OwnFault(
                    f"sample {sequence.sample_id}, asked of a chat API: {error}", index
                ) from error
            yield scored_sequence(sequence, known)

    def close(self) -> None:
        """Nothing is held."""

    def _known(self, sequence: TokenSequence) -> dict[str, NDArray]:
        answer = self._answer_of(sequence)
        if answer is None:
            raise AnswerError("nothing is kept of its answer: it is none of source.generate's")
        if answer.problem:
            raise AnswerError(answer.problem)
        num_read = len(sequence.input_ids) - len(answer.token_ids)
        positions = np.flatnonzero(sequence.is_target)
        labels = sequence.input_ids[positions]
        if num_read < 1 or tuple(sequence.input_ids[num_read:].tolist()) != answer.token_ids:
            raise AnswerError("its tokens are not those of the answer that is kept")
        if len(positions) and positions[0] < num_read:
            raise AnswerError("it has targets before the answer, of which the API tells nothing")
        rows: list[TokenEntries | None] = [None] * (num_read - 1)
        rows += [
            TokenEntries(token_id=index, logprob=logprob, top=list(zip(ids, values, strict=True)))
            for index, logprob, ids, values in zip(
                answer.token_ids, answer.logprobs, answer.top_ids, answer.top_logprobs, strict=True
            )
        ]
        try:
            wanted = sequence.is_target[1:]
            entries = top_entries(rows, wanted, self._slots, self._vocab_size)
        except TooFew as error:
            raise AnswerError(
                f"{error}: {answer.num_unnamed} entries of the answer have no one id in "
                "teacher.tokenizer; lower truncation.k"
            ) from error
        except NotFinite as error:
            raise AnswerError(str(error)) from error
        at = entries.at(positions)
        unnamed = np.array(answer.unnamed_mass)[positions - num_read]
        return {
            name: values
            for name, values in known_of(
                at.token_ids,
                at.logprobs,
                labels,
                at.label_logprob,
                vocab_size=self._vocab_size,
                unnamed_mass=unnamed,
            ).items()
            if name in self._given
        }
