"""Stock servers for tests: a real HTTP server in a thread, a tiny model behind it, faults to order.

It answers as vLLM's server, SGLang's, or a completions API of ids or of text does; what it says is
the model's own plain forward unless it is told to spoil it. Shapes: L tokens, V vocabulary.
"""

import asyncio
import collections
import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from aiohttp import web
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers import models as tokenizer_models
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from decant.teacher_dump.engines import TeacherConfig
from tests.support import models

V = 130
KINDS = ("vllm", "sglang", "ids", "text")
"""`ids` and `text` are completions APIs that take the one or the other."""


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of ASCII alone: every id has a text of its own."""
    tokenizer = Tokenizer(tokenizer_models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        [models.SENTENCE] * 2,
        trainers.BpeTrainer(
            vocab_size=V,
            special_tokens=["<s>", "</s>"],
            initial_alphabet=[*map(chr, range(33, 127)), "\u0120"],
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def save_teacher(path: Path, **options: Any) -> Any:
    """Save a tiny teacher without padding rows, its tokenizer beside it; returns the model.

    Special tokens are never among its most probable: llama.cpp's server has no text for them.
    """
    model = models.build_model(vocab_size=V, hidden_size=64, **options)
    with torch.no_grad():
        model.get_output_embeddings().weight[:2] = 0
    model.save_pretrained(path)
    tokenizer = build_tokenizer()
    assert len(tokenizer) == V
    tokenizer.save_pretrained(path)
    return model


@torch.inference_mode()
def log_probs(model: Any, ids: Any) -> NDArray[np.float64]:
    """[L, V] of a plain forward: row t is what follows token t."""
    logits = model(torch.tensor(np.asarray(ids)).long()[None]).logits[0].double()
    values: NDArray[np.float64] = torch.log_softmax(logits, dim=-1).numpy()
    return values


class StockServer:
    """One server of a kind; its attributes may be changed while it runs."""

    def __init__(self, kind: str, path: Path) -> None:
        """Serve the teacher at `path` until `close`."""
        self.kind, self.model = kind, AutoModelForCausalLM.from_pretrained(path).eval()
        self.tokenizer = build_tokenizer()
        self.limit = 1000
        self.key = ""
        self.names = ["tiny"]
        self.context = models.MAX_POSITIONS
        self.has_tokenize = True
        self.shift = 0
        self.renormalises = self.adds_token = self.cuts = False
        self.spoil: Callable[[dict[str, Any]], None] | None = None
        """Changes an answer before it is sent."""
        self.failures: collections.deque[int | str] = collections.deque()
        """HTTP statuses for the next requests of log probs, or "drop" to close in the middle."""
        self.retry_after = ""
        self.reason = "made to fail"
        """What is said with such a status."""
        self.bodies: list[dict[str, Any]] = []
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self.url = asyncio.run_coroutine_threadsafe(self._start(), self._loop).result()

    def close(self) -> None:
        """End the server."""
        asyncio.run_coroutine_threadsafe(self._runner.cleanup(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    @property
    def path(self) -> str:
        """Where requests are posted."""
        return "/generate" if self.kind == "sglang" else "/v1/completions"

    async def _start(self) -> str:
        application = web.Application(client_max_size=1 << 30)
        application.router.add_route("*", "/{path:.*}", self._handle)
        self._runner = web.AppRunner(application, access_log=None)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        return f"http://127.0.0.1:{self._runner.addresses[0][1]}"

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        if self.key and request.headers.get("Authorization") != f"Bearer {self.key}":
            return _refusal(401, "no")
        if request.path == "/v1/models":
            length = self.context if self.kind in ("vllm", "sglang") else None
            cards = [{"id": name, "root": "r", "max_model_len": length} for name in self.names]
            return web.json_response({"object": "list", "data": cards})
        if request.path == "/tokenize" and self.has_tokenize and self.kind in ("vllm", "sglang"):
            text = (await request.json())["prompt"]
            return web.json_response({"tokens": self.tokenizer(text)["input_ids"]})
        if request.path != self.path:
            return _refusal(404, "Not Found")
        body = await request.json()
        self.bodies.append(body)
        failure = self.failures.popleft() if self.failures else None
        if isinstance(failure, int):
            headers = {"Retry-After": self.retry_after} if self.retry_after else {}
            return _refusal(failure, self.reason, headers)
        status, answer = self._answer(body)
        if status == 200 and self.spoil is not None:
            self.spoil(answer)
        data = json.dumps(answer).encode()
        if failure == "drop":
            response = web.StreamResponse(headers={"Content-Length": str(len(data))})
            await response.prepare(request)
            await response.write(data[: len(data) // 2])
            assert request.transport is not None
            request.transport.abort()
            return response
        return web.Response(status=status, body=data, content_type="application/json")

    def _answer(self, body: dict[str, Any]) -> tuple[int, Any]:
        prompt = body["input_ids"] if self.kind == "sglang" else body["prompt"]
        if self.kind != "sglang" and body["model"] not in self.names:
            return 404, {"error": {"message": f"The model `{body['model']}` does not exist."}}
        if isinstance(prompt, str) is (self.kind != "text"):
            return 422, {"detail": "prompt: Input should be valid"}
        ids = [0, *self.tokenizer(prompt)["input_ids"]] if self.kind == "text" else prompt
        if self.adds_token:
            ids = [ids[0], *ids]
        if self.cuts:
            ids = ids[:20]
        if len(ids) >= self.context:
            return 400, {"error": {"message": f"maximum context length is {self.context} tokens"}}
        k = {"vllm": body.get("prompt_logprobs"), "sglang": body.get("top_logprobs_num")}.get(
            self.kind, body.get("logprobs")
        )
        if k is None:
            return self._sampled(ids, body)
        if k > self.limit:
            message = f"Requested logprobs of {k}, which is greater than max allowed: {self.limit}"
            return 400, {"error": {"message": message}}
        logp = np.roll(log_probs(self.model, ids), -self.shift, axis=0)
        rows = [self._row(logp[t - 1], ids[t], k) for t in range(1, len(ids))]
        return 200, getattr(self, f"_as_{self.kind}")(ids, rows, body)

    def _row(
        self, logp: NDArray[np.float64], label: int, k: int
    ) -> tuple[float, list[tuple[int, float]]]:
        """The label's log prob, and the top k."""
        best = np.argsort(-logp)[:k]
        offset = np.logaddexp.reduce(logp[best]) if self.renormalises else 0.0
        top = [(int(i), float(logp[i] - offset)) for i in best]
        return dict(top).get(label, float(logp[label])), top

    def _as_vllm(self, ids: list[int], rows: list[Any], body: dict[str, Any]) -> Any:
        given: list[Any] = [None]
        for label, (value, top) in zip(ids[1:], rows, strict=True):
            entries = {label: value} | dict(top)
            given.append(
                {
                    str(i): {"logprob": x, "rank": 1, "decoded_token": self._text(i)}
                    for i, x in entries.items()
                }
            )
        choice = {"text": "x", "prompt_logprobs": given, "prompt_token_ids": ids}
        return {"model": body["model"], "choices": [choice]}

    def _as_sglang(self, ids: list[int], rows: list[Any], body: dict[str, Any]) -> Any:
        text = self._text if body["return_text_in_logprobs"] else lambda _: None
        actual: list[Any] = [[None, ids[0], text(ids[0])]]
        actual += [[row[0], i, text(i)] for i, row in zip(ids[1:], rows, strict=True)]
        top = [None, *([[x, i, text(i)] for i, x in row[1]] for row in rows)]
        info = {"prompt_tokens": len(ids), "input_token_logprobs": actual}
        return {"text": "", "meta_info": info | {"input_top_logprobs": top}}

    def _as_ids(self, ids: list[int], rows: list[Any], body: dict[str, Any]) -> Any:
        names = body.get("return_tokens_as_token_ids")
        text = (lambda i: f"token_id:{i}") if names else self._text
        return self._completion(ids, rows, text, len(ids))

    def _as_text(self, ids: list[int], rows: list[Any], body: dict[str, Any]) -> Any:
        """As llama.cpp's server: without the beginning token, and nothing of the first of text."""
        return self._completion(ids[1:], rows[1:], self._text, len(ids))

    def _completion(
        self, ids: list[int], rows: list[Any], text: Callable[[int], str], count: int
    ) -> Any:
        end = [text(7)]  # one token is sampled
        logprobs = {
            "tokens": [text(i) for i in ids] + end,
            "token_logprobs": [None, *(row[0] for row in rows), -1.0],
            "top_logprobs": [None, *({text(i): x for i, x in row[1]} for row in rows), {}],
        }
        usage = {"prompt_tokens": count, "completion_tokens": 1}
        return {"choices": [{"text": "", "logprobs": logprobs}], "usage": usage}

    def _sampled(self, ids: list[int], body: dict[str, Any]) -> tuple[int, Any]:
        """The most probable ids, whatever the settings."""
        settings = body.get("sampling_params", body)
        found: list[int] = []
        for _ in range(settings.get("max_new_tokens", settings.get("max_tokens"))):
            found.append(int(log_probs(self.model, [*ids, *found])[-1].argmax()))
        if self.kind == "sglang":
            return 200, {"text": "", "output_ids": found, "meta_info": {}}
        return 200, {"choices": [{"text": "", "token_ids": found}]}

    def _text(self, index: int) -> str:
        return self.tokenizer.decode([index])


def _refusal(status: int, message: str, headers: dict[str, str] | None = None) -> web.Response:
    return web.json_response({"error": {"message": message}}, status=status, headers=headers)


@contextlib.contextmanager
def stock_server(kind: str, path: Path, **attributes: Any) -> Iterator[StockServer]:
    """A server with these attributes."""
    server = StockServer(kind, path)
    try:
        for name, value in attributes.items():
            assert hasattr(server, name)
            setattr(server, name, value)
        yield server
    finally:
        server.close()


def stock_config(path: Path, *servers: StockServer | str, **options: Any) -> TeacherConfig:
    """A client's configuration of servers or their URLs; nobody waits long."""
    urls = tuple(server if isinstance(server, str) else server.url for server in servers)
    settings: dict[str, Any] = {"wait_seconds": 5.0, "tokenizer": str(path)} | options
    return TeacherConfig(engine="openai", endpoints=urls, **settings)
