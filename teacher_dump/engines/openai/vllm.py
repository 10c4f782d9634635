"""vLLM's own server without our plugin: `prompt_logprobs` over token ids."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from decant.teacher_dump.engines.openai.answers import AnswerError, TokenEntries, check_tokens
from decant.teacher_dump.engines.openai.api import Form, member, response_of
from decant.teacher_dump.engines.seam import Prompt, Response, Sampling


class VllmApi:
    """`/v1/completions` with vLLM's extensions."""

    name = "vllm"
    path = "/v1/completions"
    raises_limit = "start vLLM with --max-logprobs {k}"
    most_entries = 1024

    def forms(self, model: str, begins: tuple[int, ...]) -> list[Form]:
        """Ids are all it needs."""
        return [Form(model=model)]

    def request(self, form: Form, ids: NDArray[np.int32], k: int) -> dict[str, Any]:
        """One sampled token is the least that a request may have."""
        return {
            "model": form.model,
            "prompt": ids.tolist(),
            "max_tokens": 1,
            "temperature": 0,
            "prompt_logprobs": k,
            "return_token_ids": True,
        }

    def rows(self, form: Form, answer: Any, ids: NDArray[np.int32]) -> list[TokenEntries | None]:
        """Of each token an object by id: k entries, and the actual token where it is not one."""
        choice = member(answer, "choices", 0)
        given = member(choice, "prompt_logprobs")
        if not isinstance(given, list):
            raise AnswerError("its answer has no prompt_logprobs")
        if (read := choice.get("prompt_token_ids")) is not None:
            check_tokens(read, ids)
        if len(given) != len(ids):
            raise AnswerError(f"it gives prompt_logprobs of {len(given)} of {len(ids)} tokens")
        return [
            _entries(row, index) for row, index in zip(given[1:], ids[1:].tolist(), strict=True)
        ]

    def texts(self, answer: Any) -> list[str] | None:
        """Of tokens 1 to L - 1; vLLM writes the actual token first."""
        rows = member(answer, "choices", 0, "prompt_logprobs")
        first = [next(iter(row.values())) for row in rows[1:] if row]
        return [str(member(entry, "decoded_token")) for entry in first]

    def sample_request(self, form: Form, prompt: Prompt, sampling: Sampling) -> dict[str, Any]:
        """Every setting is said, so that no default of the server's has a part in it."""
        return {
            "model": form.model,
            "prompt": prompt.token_ids.tolist(),
            "max_tokens": prompt.max_new_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": 0,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "seed": prompt.seed,
            "ignore_eos": True,
            "stop_token_ids": list(sampling.stop_ids),
            "include_stop_str_in_output": True,
            "return_token_ids": True,
        }

    def sampled(self, answer: Any, sampling: Sampling) -> Response:
        """The ids of the one choice."""
        return response_of(member(answer, "choices", 0, "token_ids"), sampling)


def _entries(row: Any, index: int) -> TokenEntries | None:
    if row is None:
        return None
    if not isinstance(row, dict) or str(index) not in row:
        raise AnswerError(f"its prompt_logprobs say nothing of id {index} where it was sent")
    return TokenEntries(token_id=index, logprob=member(row, str(index), "logprob"), top=_pairs(row))


def _pairs(row: dict[str, Any]) -> list[tuple[int | str, Any]]:
    if not all(key.isdecimal() for key in row):
        raise AnswerError(f"its prompt_logprobs name {sorted(row)[-1]!r}, which is no id")
    return [(int(key), member(value, "logprob")) for key, value in row.items()]
