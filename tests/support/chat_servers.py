"""A chat API for tests: a real HTTP server in a thread, a tiny model behind it, faults to order.

It answers as hosted APIs do: tokens by their bytes, at most so many entries, sampled by the seed.
"""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerFast

from decant.teacher_dump.engines import TeacherConfig
from tests.support.stock_servers import (
    StockServer,
    build_tokenizer,
    log_probs,
    save_teacher,
    stock_config,
)

TEMPLATE = (
    "{% for m in messages %}{{ '<s>' + m.role + ' ' + m.content + '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>assistant ' }}{% endif %}"
)
END = 1
KNOWN = {
    *("messages", "model", "logprobs", "top_logprobs", "n", "temperature", "top_p", "seed"),
    *("tools", "frequency_penalty", "presence_penalty"),
}
"""What a request may have, beside the name of its limit."""


def build_chat_tokenizer() -> PreTrainedTokenizerFast:
    """One whose every id has bytes of its own, with a chat template."""
    tokenizer = build_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def save_chat_teacher(path: Path) -> Any:
    """Save a tiny teacher and its tokenizer; returns the model."""
    model = save_teacher(path)
    build_chat_tokenizer().save_pretrained(path)
    return model


class ChatServer(StockServer):
    """A chat API; its attributes may be changed while it runs."""

    def __init__(self, path: Path) -> None:
        """Serve the teacher at `path` until `close`."""
        super().__init__("chat", path)
        self.tokenizer = build_chat_tokenizer()
        self.limit = 20
        self.length = 6
        """Tokens of an answer before its end."""
        self.lists_end = False
        self.names_ids = False
        self.takes_anything = False
        self.limit_name = "max_tokens"
        self.answers_as = "tiny-2026-01-31"
        self.is_scaled = False
        """Whether log probs are of what is sampled."""
        self.hides: int = 0
        """Entries less probable than so many are not told (-9999)."""

    @property
    def path(self) -> str:
        """Where requests are posted."""
        return "/v1/chat/completions"

    @property
    def paid(self) -> list[dict[str, Any]]:
        """The requests but those of probes."""
        return [b for b in self.bodies if "eleven violins" not in json.dumps(b["messages"])]

    def _answer(self, body: dict[str, Any]) -> tuple[int, Any]:
        known = KNOWN | {self.limit_name} | ({"return_tokens_as_token_ids"} & {self._names})
        if (unknown := sorted(body.keys() - known)) and not self.takes_anything:
            return 400, {"error": {"message": f"Unrecognized request argument: {unknown[0]}"}}
        if body["model"] not in self.names:
            return 404, {"error": {"message": f"The model `{body['model']}` does not exist."}}
        if body["top_logprobs"] > self.limit:
            message = f"top_logprobs must be at most {self.limit}"
            return 400, {"error": {"message": message}}
        ids = self.tokenizer.apply_chat_template(
            body["messages"], add_generation_prompt=True, return_dict=False
        )
        rng = np.random.default_rng(body["seed"])
        names = self.names_ids and body.get("return_tokens_as_token_ids", False)
        listed, said, reason = [], [], "length"
        for _ in range(body[self.limit_name]):
            logp = log_probs(self.model, [*ids, *said])[-1]
            drawn = self._drawn(logp, body)
            index = END if len(said) == self.length else int(rng.choice(len(logp), p=drawn))
            told = np.log(np.maximum(drawn, 1e-30)) if self.is_scaled else logp
            if index != END or self.lists_end:
                listed.append(self._entry(told, index, body["top_logprobs"], names))
            if index == END:
                reason = "stop"
                break
            said.append(index)
        message = {"role": "assistant", "content": self.tokenizer.decode(said), "refusal": None}
        choice = {"index": 0, "message": message, "finish_reason": reason}
        return 200, {
            "model": self.answers_as,
            "system_fingerprint": "fp_1",
            "choices": [choice | {"logprobs": {"content": listed, "refusal": None}}],
            "usage": {"prompt_tokens": len(ids), "completion_tokens": len(said)},
        }

    @property
    def _names(self) -> str:
        return "return_tokens_as_token_ids" if self.names_ids else ""

    def _drawn(self, logp: NDArray[np.float64], body: dict[str, Any]) -> NDArray[np.float64]:
        """[V] what is sampled from; nothing is as probable as the end token."""
        if not body["temperature"]:
            return np.asarray(np.arange(len(logp)) == logp.argmax(), np.float64)
        p = np.exp(logp / body["temperature"])
        p[:2] = 0
        order = np.argsort(-p)
        beyond = np.cumsum(p[order]) - p[order] > body["top_p"] * p.sum()
        p[order[beyond]] = 0
        drawn: NDArray[np.float64] = p / p.sum()
        return drawn

    def _entry(self, logp: NDArray[np.float64], index: int, k: int, names: bool) -> dict[str, Any]:
        best = np.argsort(-logp)[:k]
        hidden = self.hides and logp[index] < logp[np.argsort(-logp)[self.hides - 1]]
        said = self._said(index, -9999.0 if hidden else float(logp[index]), names)
        return said | {"top_logprobs": [self._said(int(i), float(logp[i]), names) for i in best]}

    def _said(self, index: int, value: float, names: bool) -> dict[str, Any]:
        token = f"token_id:{index}" if names else self._text(index)
        return {"token": token, "logprob": value, "bytes": list(token.encode())}


@contextlib.contextmanager
def chat_server(path: Path, **attributes: Any) -> Iterator[ChatServer]:
    """A server with these attributes."""
    server = ChatServer(path)
    try:
        for name, value in attributes.items():
            assert hasattr(server, name)
            setattr(server, name, value)
        yield server
    finally:
        server.close()


def chat_config(path: Path, *servers: StockServer | str, **options: Any) -> TeacherConfig:
    """A client's configuration; nobody waits long."""
    return stock_config(path, *servers, **{"api": "chat", "model": "tiny"} | options)
