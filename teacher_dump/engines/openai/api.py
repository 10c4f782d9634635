"""What the three ways of asking have in common: a request for a prompt, and how its answer is read.

Sent are token ids wherever a server takes them. Each way is one small class; none knows of
endpoints, retries or caches.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from decant.teacher_dump.engines.openai.answers import AnswerError, TokenEntries
from decant.teacher_dump.engines.seam import Prompt, Response, Sampling


@dataclass(frozen=True, kw_only=True, slots=True)
class Form:
    """How a server takes prompts; found out once, the same for all of a teacher's servers."""

    model: str
    """Its name there; "" where requests name none."""
    names_ids: bool = False
    """Whether it is asked to write ids where a completions API has texts of tokens."""
    sends_text: bool = False
    """Whether prompts go as text, since the server takes no ids."""
    begins: tuple[int, ...] = ()
    """With text: the ids that the server puts before every prompt."""


class Api(Protocol):
    """A way of asking."""

    @property
    def name(self) -> str:
        """As in `teacher.api`."""
        ...

    @property
    def path(self) -> str:
        """Where requests are posted."""
        ...

    @property
    def raises_limit(self) -> str:
        """What lets the server give `{k}` entries per token, for an error's end."""
        ...

    @property
    def most_entries(self) -> int:
        """Entries per token up to which a server is tried, to find its limit."""
        ...

    def forms(self, model: str, begins: tuple[int, ...]) -> list[Form]:
        """The forms to try, best first; `begins` is what the tokenizer puts first, if anything."""
        ...

    def request(self, form: Form, ids: NDArray[np.int32], k: int) -> dict[str, Any]:
        """The body that asks for the top `k` >= 1 of every token of a prompt."""
        ...

    def rows(self, form: Form, answer: Any, ids: NDArray[np.int32]) -> list[TokenEntries | None]:
        """What an answer says of tokens 1 to L - 1; None where it says nothing of one.

        Raises AnswerError if the server read other tokens.
        """
        ...

    def texts(self, answer: Any) -> list[str] | None:
        """The texts of the tokens of an answer that `rows` has read; None where it has none."""
        ...

    def sample_request(self, form: Form, prompt: Prompt, sampling: Sampling) -> dict[str, Any]:
        """The body that asks for a response. Raises AnswerError if it cannot be asked for."""
        ...

    def sampled(self, answer: Any, sampling: Sampling) -> Response:
        """The response in an answer, by its ids. Raises AnswerError."""
        ...


def member(values: Any, *names: str | int) -> Any:
    """A value inside objects and lists. Raises AnswerError if it is not there."""
    found = values
    for name in names:
        try:
            found = found[name]
        except (KeyError, IndexError, TypeError):
            path = ".".join(str(part) for part in names)
            raise AnswerError(f"its answer has no {path}") from None
    return found


def response_of(ids: Any, sampling: Sampling) -> Response:
    """A response of these ids, which end with the first stop id. Raises AnswerError."""
    if not isinstance(ids, list) or not ids or not all(type(index) is int for index in ids):
        raise AnswerError("its answer has no ids of sampled tokens")
    stops = [place for place, index in enumerate(ids) if index in sampling.stop_ids]
    if stops:
        ids = ids[: stops[0] + 1]
    if max(ids) >= sampling.vocab_size or min(ids) < 0:
        raise AnswerError(
            f"it sampled id {max(ids)}, teacher.tokenizer has ids below {sampling.vocab_size}"
        )
    return Response(token_ids=np.array(ids, np.int32), finish_reason="stop" if stops else "length")
