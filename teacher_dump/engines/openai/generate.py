"""Sample responses from a stock server that gives the ids of what it samples; see `seam.Generator`.

A response depends on its prompt, its seed and the settings as far as the server keeps seeds apart
from what else it batches.
"""

import collections
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

from decant.teacher_dump.engines.config import TeacherConfig
from decant.teacher_dump.engines.openai.answers import AnswerError
from decant.teacher_dump.engines.openai.engine import Connection
from decant.teacher_dump.engines.openai.probe import Refused
from decant.teacher_dump.engines.seam import EngineError, Prompt, Response, Sampling


class OpenAIGenerator:
    """A teacher behind one or several stock servers, which samples there."""

    def __init__(
        self,
        config: TeacherConfig,
        model_path: str,
        *,
        sampling: Sampling,
        max_length: int,
        tokenizer: Any,
    ) -> None:
        """Connect; `model_path` is "". Raises EngineError if the servers give no sampled ids."""
        assert not model_path
        self._sampling = sampling
        self._connection = Connection(config, tokenizer, sampling.vocab_size)
        limit = self._connection.card.max_length
        if self._connection.card.api == "completions":
            self.close()
            raise EngineError(
                f"{config.endpoints[0]} gives texts of what it samples, not ids: source.generate "
                "with teacher.engine openai needs vLLM's or SGLang's server"
            )
        if limit and max_length > limit + 1:
            self.close()
            raise EngineError(
                f"{config.endpoints[0]} has a context of {limit + 1} tokens, prompts and responses "
                f"up to {max_length}: lower sequences.max_length"
            )

    def generate(self, prompts: Sequence[Prompt]) -> list[Response]:
        """One response per prompt, in the order given."""
        ahead: collections.deque[Future[Any]] = collections.deque()
        waiting, responses = iter(prompts), []
        try:
            for prompt in prompts:
                while len(ahead) < self._connection.num_ahead:
                    if (following := next(waiting, None)) is None:
                        break
                    ahead.append(self._connection.start(self._answer(following)))
                try:
                    answer = ahead.popleft().result()
                    responses.append(self._connection.way.sampled(answer, self._sampling))
                except (AnswerError, Refused) as error:
                    raise EngineError(f"{prompt.name}, asked of a server: {error}") from error
        finally:
            for future in ahead:
                future.cancel()
        return responses

    def close(self) -> None:
        """Drop all connections; calling it again does no harm."""
        self._connection.close()

    async def _answer(self, prompt: Prompt) -> Any:
        connection = self._connection
        body = connection.way.sample_request(connection.card.form, prompt, self._sampling)
        return await connection.client.score(body)
