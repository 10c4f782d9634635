"""The probe of a stock server's teacher: a short fixed text, and what was found out by it.

The log probs of its tokens are the teacher's fingerprint; `look` says what else is looked at. Knows
no endpoints.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from decant.teacher_dump.engines.openai.api import Api, Form
from decant.teacher_dump.engines.openai.completions import CompletionsApi
from decant.teacher_dump.engines.openai.fingerprint import fingerprint_of
from decant.teacher_dump.engines.openai.sglang import SglangApi
from decant.teacher_dump.engines.openai.token_texts import TokenTexts
from decant.teacher_dump.engines.openai.vllm import VllmApi
from decant.teacher_dump.engines.seam import EngineError, Unavailable

TEXT = (
    " The ferry left Lisbon at 07:45 with eleven violins, and nobody asked the captain why. "
    "def area(r): return 3.14159 * r ** 2 # metres"
)
MOST_TOKENS = 48
"""Of the probe: a server of short contexts takes it too."""


class Refused(EngineError):
    """The server does not take a request."""

    def __init__(self, message: str, status: int) -> None:
        """Remember the status."""
        super().__init__(message)
        self.status = status


@dataclass(frozen=True, kw_only=True, slots=True)
class ServerCard:
    """What was found out about a server and its teacher."""

    api: str
    form: Form
    root: str
    """What the server says that its model was loaded from; "" if it does not."""
    version: str
    """Of the server's software; "" if it does not say."""
    max_length: int
    """Longest sequence; 0 if it does not say."""
    max_entries: int
    """Entries per token that it gives, as far as was tried."""
    limit: str
    """What would let it give more; "" if no limit was found."""
    values: tuple[float, ...]
    """Log probs of the probe's tokens."""

    @property
    def has_ids(self) -> bool:
        """Whether entries are named by ids; texts may be of several."""
        return self.api != "completions" or self.form.names_ids

    @property
    def name(self) -> str:
        """What a manifest calls the teacher."""
        model = self.form.model or "unnamed"
        return f"{model} ({self.root})" if self.root not in ("", model) else model

    @property
    def fingerprint(self) -> str:
        """What tells it from other teachers."""
        return fingerprint_of(list(self.values))


class Probe:
    """A tokenizer's probe, and the ways of asking it."""

    def __init__(self, tokenizer: Any, vocab_size: int) -> None:
        """The tokenizer is the teacher's, as the user says."""
        self.vocab_size = vocab_size
        self._tokenizer = tokenizer
        self.text = TEXT
        ids = self._encode(TEXT)[:MOST_TOKENS]
        if len(ids) < 8 or max(ids) >= vocab_size:
            raise Unavailable("teacher.tokenizer makes no tokens of a plain English text")
        self._ids = ids
        bos = getattr(tokenizer, "bos_token_id", None)
        self.begins = () if bos is None or bos >= vocab_size else (int(bos),)

    @cached_property
    def texts(self) -> TokenTexts:
        """The texts of all ids."""
        return TokenTexts(self._tokenizer, self.vocab_size)

    def apis(self, name: str) -> list[Api]:
        """The ways to try, best first; `name` is one, or auto."""
        makers: dict[str, Callable[[], Api]] = {
            "vllm": VllmApi,
            "sglang": SglangApi,
            "completions": lambda: CompletionsApi(self.texts),
        }
        return [make() for each, make in makers.items() if name in ("auto", each)]

    def ids(self, form: Form) -> NDArray[np.int32]:
        """The probe, behind what begins a text where a server can be given that."""
        return self._behind(form, self._ids)

    def encoded(self) -> list[int]:
        """All of the text's ids."""
        return self._encode(self.text)

    def swaps(self, form: Form) -> list[NDArray[np.int32]]:
        """Two texts that differ in their last token alone, and both with one more token.

        None where none are found that a server of texts would read as these tokens.
        """
        words = list(dict.fromkeys(self._ids))
        for at in range(len(words) - 2):
            head, (a, b, c) = self._ids[: len(self._ids) // 2], words[at : at + 3]
            found = [[*head, a], [*head, b], [*head, a, c], [*head, b, c]]
            if not form.sends_text or all(self._is_stable(ids) for ids in found):
                return [self._behind(form, ids) for ids in found]
        return []

    def _behind(self, form: Form, ids: list[int]) -> NDArray[np.int32]:
        begins = self.begins if form.begins or not form.sends_text else ()
        return np.array([*begins, *ids], np.int32)

    def _encode(self, text: str) -> list[int]:
        return [int(i) for i in self._tokenizer(text, add_special_tokens=False)["input_ids"]]

    def _is_stable(self, ids: list[int]) -> bool:
        text = self.texts.text_of(ids)
        return text is not None and self._encode(text) == ids
