"""The engine of a teacher behind stock servers: token ids there, top k log probs at T=1 back.

A request holds one sequence, so that a refusal is of that sequence; servers batch by themselves.
Requests are in flight several at a time, their answers are taken in order, and no more are asked
for than `teacher.requests` per endpoint, so the memory is bounded.
"""

import collections
from collections.abc import Coroutine, Iterator, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from decant.schemas import ScoredSequence, Truncation
from decant.teacher_dump.engines.config import TeacherConfig
from decant.teacher_dump.engines.openai.answers import AnswerError, NotFinite, top_entries
from decant.teacher_dump.engines.openai.api import Api
from decant.teacher_dump.engines.openai.client import ServerClient
from decant.teacher_dump.engines.openai.probe import Probe, Refused, ServerCard
from decant.teacher_dump.engines.packed_rows import scored_sequence
from decant.teacher_dump.engines.remote.loop import EventLoop
from decant.teacher_dump.engines.seam import (
    SequenceError,
    Unavailable,
    not_finite,
    refuse_overlong,
)
from decant.teacher_dump.engines.top_entries import known_of, refuse_request
from decant.teacher_dump.inputs.records import TokenSequence

T = TypeVar("T")


class Connection:
    """Stock servers that have been looked at."""

    def __init__(
        self,
        config: TeacherConfig,
        tokenizer: Any,
        vocab_size: int,
        *,
        fingerprint: str = "",
        k: int = 1,
    ) -> None:
        """Connect to servers of the teacher of this fingerprint, any if "". Raises EngineError."""
        self._loop = EventLoop()
        self.num_ahead = config.requests * len(config.endpoints)
        try:
            probe = Probe(tokenizer, vocab_size)
            self.client: ServerClient = self._loop.call(_open_client(config, probe, fingerprint, k))
            self.way, self.card = self._loop.call(self.client.connect())
        except BaseException:
            self.close()
            raise

    def start(self, coroutine: Coroutine[Any, Any, T]) -> Future[T]:
        """Run a coroutine of the client's."""
        return self._loop.start(coroutine)

    def close(self) -> None:
        """Drop all connections; calling it again does no harm."""
        if hasattr(self, "client") and self._loop.is_running:
            self._loop.call(self.client.close())
        self._loop.close()


class OpenAIEngine:
    """A teacher behind one or several stock servers."""

    dtype = "auto"
    """No server says what it computes in."""

    def __init__(
        self,
        config: TeacherConfig,
        fingerprint: str,
        tokenizer: Any,
        *,
        vocab_size: int,
        truncation: Truncation,
        temperatures: tuple[float, ...],
        max_length: int,
    ) -> None:
        """Connect to servers of the teacher of this fingerprint, any if ""; see `open_engine`."""
        refuse_request(truncation, temperatures)
        self._slots, self._given = truncation.slots, truncation.given
        self._k = max(1, self._slots)
        self._vocab_size = vocab_size
        self._connection = Connection(
            config, tokenizer, vocab_size, fingerprint=fingerprint, k=self._k
        )
        self.card = self._connection.card
        if self.card.max_length and max_length > self.card.max_length:
            self.close()
            raise Unavailable(
                f"{config.endpoints[0]} reads at most {self.card.max_length} tokens beside the one "
                f"it samples, sequences have up to {max_length}: lower sequences.max_length, or "
                "serve with a longer context"
            )

    def score(
        self, sequences: Sequence[TokenSequence], first_sequence: int
    ) -> Iterator[ScoredSequence]:
        """The scored sequences in the order given; see `Engine.score`."""
        ahead: collections.deque[Future[Any]] = collections.deque()
        asked = 0
        try:
            for index, sequence in enumerate(sequences):
                while asked < len(sequences) and len(ahead) < self._connection.num_ahead:
                    ahead.append(self._connection.start(self._answer(sequences[asked])))
                    asked += 1
                try:
                    known = self._read(sequence, ahead.popleft().result())
                except NotFinite as error:
                    raise not_finite(sequence, index) from error
                except (AnswerError, Refused) as error:
                    raise SequenceError(
                        f"sample {sequence.sample_id}, asked of a server: {error}", index
                    ) from error
                yield scored_sequence(sequence, known)
        finally:
            for answer in ahead:
                answer.cancel()

    def close(self) -> None:
        """Drop all connections; calling it again does no harm."""
        self._connection.close()

    async def _answer(self, sequence: TokenSequence) -> Any:
        if self.card.max_length:
            refuse_overlong(sequence, self.card.max_length)
        body = self._way.request(self.card.form, sequence.input_ids, self._k)
        return await self._connection.client.score(body)

    def _read(self, sequence: TokenSequence, answer: Any) -> dict[str, NDArray]:
        rows = self._way.rows(self.card.form, answer, sequence.input_ids)
        entries = top_entries(rows, sequence.is_target[1:], self._k, self._vocab_size)
        positions = np.flatnonzero(sequence.is_target)
        at = entries.at(positions)
        known = known_of(
            at.token_ids[:, : self._slots],
            at.logprobs[:, : self._slots],
            sequence.input_ids[positions],
            at.label_logprob,
            vocab_size=self._vocab_size,
        )
        return {name: known[name] for name in self._given}

    @property
    def _way(self) -> Api:
        return self._connection.way


def describe(config: TeacherConfig, tokenizer: Any, vocab_size: int) -> ServerCard:
    """What the servers say of their teacher. Raises EngineError."""
    connection = Connection(config, tokenizer, vocab_size)
    connection.close()
    return connection.card


async def _open_client(
    config: TeacherConfig, probe: Probe, fingerprint: str, k: int
) -> ServerClient:
    return ServerClient(config, probe, fingerprint=fingerprint, k=k)
