"""SGLang's own server: `/generate` over token ids, with the log probs of its input."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from decant.teacher_dump.engines.openai.answers import AnswerError, TokenEntries, check_tokens
from decant.teacher_dump.engines.openai.api import Form, member, response_of
from decant.teacher_dump.engines.seam import Prompt, Response, Sampling


class SglangApi:
    """`/generate`, which knows no model's name: a server has one."""

    name = "sglang"
    path = "/generate"
    raises_limit = "look for the limit in SGLang's own options"
    most_entries = 1024

    def forms(self, model: str, begins: tuple[int, ...]) -> list[Form]:
        """Ids are all it needs."""
        return [Form(model=model)]

    def request(self, form: Form, ids: NDArray[np.int32], k: int) -> dict[str, Any]:
        """Nothing is generated; the whole input is looked at."""
        return {
            "input_ids": ids.tolist(),
            "sampling_params": {"max_new_tokens": 0, "temperature": 1.0},
            "return_logprob": True,
            "logprob_start_len": 0,
            "top_logprobs_num": k,
            "return_text_in_logprobs": k == 1,  # for the texts of a probe
        }

    def rows(self, form: Form, answer: Any, ids: NDArray[np.int32]) -> list[TokenEntries | None]:
        """Of each token [log prob, id, text], and such triples of the most probable ones."""
        info = member(answer, "meta_info")
        actual, top = (member(info, f"input_{name}_logprobs") for name in ("token", "top"))
        if not isinstance(actual, list) or not isinstance(top, list):
            raise AnswerError("its answer has no log probs of the input")
        check_tokens([member(entry, 1) for entry in actual], ids)
        if len(top) != len(actual):
            raise AnswerError(f"it gives the most probable of {len(top)} of {len(ids)} tokens")
        rows: list[TokenEntries | None] = []
        for entry, entries in zip(actual[1:], top[1:], strict=True):
            if not entries:
                rows.append(None)
                continue
            pairs: list[tuple[int | str, Any]] = [
                (_id(member(pair, 1)), member(pair, 0)) for pair in entries
            ]
            rows.append(TokenEntries(token_id=entry[1], logprob=member(entry, 0), top=pairs))
        return rows

    def texts(self, answer: Any) -> list[str] | None:
        """Of tokens 1 to L - 1."""
        actual = member(answer, "meta_info", "input_token_logprobs")
        texts = [entry[2] for entry in actual[1:] if len(entry) > 2 and entry[2] is not None]
        return [str(text) for text in texts] or None

    def sample_request(self, form: Form, prompt: Prompt, sampling: Sampling) -> dict[str, Any]:
        """Every setting is said, so that no default of the server's has a part in it."""
        return {
            "input_ids": prompt.token_ids.tolist(),
            "sampling_params": {
                "max_new_tokens": prompt.max_new_tokens,
                "temperature": sampling.temperature,
                "top_p": sampling.top_p,
                "top_k": -1,
                "min_p": 0.0,
                "repetition_penalty": 1.0,
                "presence_penalty": 0.0,
                "frequency_penalty": 0.0,
                "sampling_seed": prompt.seed,
                "ignore_eos": True,
                "stop_token_ids": list(sampling.stop_ids),
                "no_stop_trim": True,
            },
        }

    def sampled(self, answer: Any, sampling: Sampling) -> Response:
        """The ids that were sampled."""
        return response_of(member(answer, "output_ids"), sampling)


def _id(value: Any) -> int:
    if type(value) is not int:
        raise AnswerError(f"it names {value!r} among the most probable, which is no id")
    return value
