"""The engine of a teacher elsewhere: asks services that `decant serve` offers.

The machine needs neither weights nor GPU nor vLLM: tokenizer and description come from the service.
Requests are in flight several at a time, their answers are taken in order, and no more are asked
for than `teacher.requests` per endpoint, so the memory is bounded.
"""

import collections
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np

from decant.schemas import ScoredSequence, Truncation, tokenizer_fingerprint
from decant.storage.files.scratch import scratch_folder
from decant.teacher_dump.engines.batches import windows
from decant.teacher_dump.engines.config import TeacherConfig
from decant.teacher_dump.engines.http.client import TeacherClient
from decant.teacher_dump.engines.http.messages import (
    MAX_TOKENIZER_BYTES,
    SCORE_PATH,
    TOKENIZER_PATH,
    MessageError,
    ScoreAnswer,
    ScoreRequest,
    TeacherCard,
    most_answered,
    unframe_files,
)
from decant.teacher_dump.engines.packed_rows import Reduction, unpack
from decant.teacher_dump.engines.remote.loop import EventLoop
from decant.teacher_dump.engines.remote.texts import shown
from decant.teacher_dump.engines.seam import EngineError, not_finite
from decant.teacher_dump.inputs.records import TokenSequence

HAVE_NO_MASS = ("logprobs", "log_tail")


class HttpEngine:
    """A teacher behind one or several services."""

    def __init__(
        self,
        config: TeacherConfig,
        fingerprint: str,
        *,
        vocab_size: int,
        truncation: Truncation,
        temperatures: tuple[float, ...],
        max_length: int,
    ) -> None:
        """Connect to services of the teacher of this fingerprint, any if ""; see `open_engine`."""
        self._reduction = Reduction(
            vocab_size=vocab_size, truncation=truncation, temperatures=temperatures
        )
        self._request_tokens = config.max_batch_tokens
        self._num_ahead = config.requests * len(config.endpoints)
        self._loop = EventLoop()
        try:
            self._client: TeacherClient = self._loop.call(
                _open_client(config, fingerprint, max_length)
            )
            card = self._loop.call(self._client.connect())
        except BaseException:
            self.close()
            raise
        self._digest, self._max_length = card.digest(), card.max_length
        self.card = card
        self.dtype = card.teacher.dtype.partition("+")[0]

    def score(
        self, sequences: Sequence[TokenSequence], first_sequence: int
    ) -> Iterator[ScoredSequence]:
        """The scored sequences in the order given; see `Engine.score`."""
        ahead: collections.deque[tuple[int, Sequence[TokenSequence], Future[ScoreAnswer]]]
        ahead = collections.deque()
        cut = windows(sequences, self._request_tokens, max_length=self._max_length)
        try:
            while True:
                while len(ahead) < self._num_ahead and (window := next(cut, None)):
                    start, members = window
                    answer = self._loop.start(self._answer(members, first_sequence + start))
                    ahead.append((start, members, answer))
                if not ahead:
                    return
                start, members, answer = ahead.popleft()
                rows = answer.result().rows
                for member, part in zip(members, rows, strict=False):
                    scored = unpack(member, part, self._reduction)
                    _refuse_absurd(scored, self._reduction.vocab_size)
                    yield scored
                if len(rows) < len(members):
                    raise not_finite(members[len(rows)], start + len(rows))
        finally:
            for *_, answer in ahead:
                answer.cancel()

    def close(self) -> None:
        """Drop all connections; calling it again does no harm."""
        if hasattr(self, "_client") and self._loop.is_running:
            self._loop.call(self._client.close())
        self._loop.close()

    async def _answer(self, members: Sequence[TokenSequence], first_sequence: int) -> ScoreAnswer:
        request = ScoreRequest.of(self._digest, self._reduction, members, first_sequence)
        num_targets = [int(member.is_target.sum()) for member in members]
        most = most_answered(num_targets, self._reduction)
        data = await self._client.ask("POST", SCORE_PATH, request.to_bytes(), most=most)
        try:
            return ScoreAnswer.from_bytes(data, num_targets, self._reduction)
        except MessageError as error:
            raise EngineError(f"a teacher service answers wrongly: {error}") from error


def describe(config: TeacherConfig) -> tuple[TeacherCard, Any | None]:
    """The card of the services' teacher, and its tokenizer if the service has one.

    Raises EngineError.
    """
    loop = EventLoop()
    try:
        return loop.call(_describe(config))
    finally:
        loop.close()


async def _describe(config: TeacherConfig) -> tuple[TeacherCard, Any | None]:
    client = await _open_client(config)
    try:
        card = await client.connect()
        if not card.tokenizer_fingerprint or config.tokenizer:
            return card, None
        data = await client.ask("GET", TOKENIZER_PATH, most=MAX_TOKENIZER_BYTES)
    finally:
        await client.close()
    from transformers import AutoTokenizer

    with scratch_folder() as folder:
        try:
            for name, content in unframe_files(data).items():
                Path(folder, name).write_bytes(content)
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        except Exception as error:  # whatever a damaged or unknown tokenizer may raise
            raise EngineError(
                f"the service's tokenizer cannot be loaded: {shown(error)}"
            ) from error
    refuse_other_tokenizer(card, tokenizer)
    return card, tokenizer


def refuse_other_tokenizer(card: TeacherCard, tokenizer: Any) -> None:
    """Raise EngineError if this is not the tokenizer that the service's teacher reads."""
    found = tokenizer_fingerprint(tokenizer, like=card.tokenizer_fingerprint)
    if card.tokenizer_fingerprint and found != card.tokenizer_fingerprint:
        raise EngineError(
            f"the service's teacher {card.teacher.name} has tokenizer {card.tokenizer_fingerprint},"
            f" here it is {found}: use the service's own (teacher.tokenizer: ''), and the same "
            "version of transformers on both sides"
        )


def _refuse_absurd(scored: ScoredSequence, vocab_size: int) -> None:
    """Raise EngineError for numbers that no teacher gives; the writer checks the rest."""
    where = f"a teacher service answers wrongly for sample {scored.sample_id}"
    for name, value in scored.known().items():
        if value.dtype != np.float32:
            continue
        # An entry that is not kept, or a tail without mass, has log prob -inf.
        good = np.isfinite(value) | (value == -np.inf if name in HAVE_NO_MASS else False)
        if not good.all():
            raise EngineError(f"{where}: {name} is {value[~good].flat[0]}, which is not finite")
    ids = scored.token_ids
    if ids.size and not -1 <= int(ids.min()) <= int(ids.max()) < vocab_size:
        bad = ids[(ids < -1) | (ids >= vocab_size)].flat[0]
        raise EngineError(f"{where}: token id {bad} outside [0, {vocab_size})")


async def _open_client(
    config: TeacherConfig, fingerprint: str = "", max_length: int = 0
) -> TeacherClient:
    return TeacherClient(config, fingerprint, max_length)
