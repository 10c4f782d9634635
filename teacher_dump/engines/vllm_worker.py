"""The process that holds vLLM: windows of token ids in, packed rows out.

vLLM replaces functions of torch, binds threads and takes memory: it gets a process of its own. The
engine's side is `vllm_engine`. vLLM is imported when a job arrives, never with this file.

Two routes. `head` (`vllm_model`): our reduction runs inside vLLM on the full logits; exact for
every truncation and temperature. `prompt_logprobs` (`vllm_prompt_logprobs`): what vLLM offers by
itself, for architectures that cannot carry the head.
"""

import json
import os
import queue
import sys
import threading
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from teacher_dump.engines import vllm_prompt_logprobs
from teacher_dump.engines.vllm_messages import Failed, Job, Ready, Refused, Rows, Window

KV_BLOCK_TOKENS = 128
"""On a CPU a sequence takes whole blocks of this size."""

ScoreWindow = Callable[[Window], NDArray[np.int32]]


def main(descriptor: int) -> None:
    """Serve the engine at the other end of a socket until it closes."""
    os.set_inheritable(descriptor, False)
    connection = Connection(descriptor)
    windows: queue.SimpleQueue[Window] = queue.SimpleQueue()
    try:
        job: Job = connection.recv()
        # Reads ahead, so that neither side waits for the other to read; ends with the engine.
        threading.Thread(target=_receive, args=(connection, windows), daemon=True).start()
        score, ready = load(job)
        connection.send(ready)
        while True:
            window = windows.get()
            connection.send(Rows(window.number, score(window)))
    except Refused as error:
        connection.send(Failed(str(error)))
    except Exception as error:
        traceback.print_exc()
        connection.send(Failed(f"{type(error).__name__}: {error}"))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)  # vLLM's own threads and exit handlers have nothing left to do


def _receive(connection: Connection, windows: queue.SimpleQueue[Window]) -> None:
    try:
        while True:
            windows.put(connection.recv())
    except (EOFError, OSError):
        os._exit(0)


def load(job: Job) -> tuple[ScoreWindow, Ready]:
    """Load the teacher and say how windows are scored. Raises Refused."""
    import vllm
    from transformers import AutoConfig
    from vllm.engine.arg_utils import EngineArgs

    settings = AutoConfig.from_pretrained(job.model_path)
    architecture = (settings.architectures or ["unknown"])[0]
    num_rows = int(settings.get_text_config().vocab_size)
    if num_rows < job.vocab_size:
        raise Refused(f"the teacher has {num_rows} output rows, fewer than {job.vocab_size} ids")

    asked = job.route == "prompt_logprobs"
    no_head = "asked for" if asked else _put_head_on(architecture, job)
    if no_head and job.route == "head":
        raise Refused(f"vLLM {vllm.__version__} cannot score with its full logits: {no_head}")
    if no_head:
        vllm_prompt_logprobs.check(job, num_rows, no_head)
    options: dict[str, Any] = {
        "model": job.model_path,
        "dtype": job.dtype if job.dtype != "auto" else saved_dtype(settings, job.model_path),
        "runner": "generate" if no_head else "pooling",
        "skip_tokenizer_init": True,
    }
    model = EngineArgs(**options).create_model_config()
    max_length = min(job.max_length, model.max_model_len)
    step_tokens = job.max_batch_tokens
    if no_head:
        step_tokens = min(step_tokens, vllm_prompt_logprobs.max_step_tokens(num_rows))
        # One token must be generated; it is never fed to the model, so no position is beyond it.
        options["max_model_len"] = max_length + 1
        if max_length == model.max_model_len:
            os.environ["VLLM_ALLOW_LONG_MAX_MODEL_LEN"] = "1"
        options["max_logprobs"] = job.truncation.k
        options["logprobs_mode"] = "raw_logprobs"
        options["generation_config"] = "vllm"
    else:
        from vllm.config import PoolerConfig

        from teacher_dump.engines import vllm_model

        options["max_model_len"] = max_length
        options["pooler_config"] = PoolerConfig(task=vllm_model.TASK)
    max_num_seqs = min(256, step_tokens)
    if job.on_cpu:
        options["enforce_eager"] = True
        options["kv_cache_memory_bytes"] = _kv_cache_bytes(
            model, max_length, step_tokens, max_num_seqs
        )
        # On a GPU the scoring head of a half precision model answers in float32 at no cost; on a
        # CPU vLLM would convert the whole output layer for every chunk.
        options["hf_overrides"] = {"head_dtype": "model"}
    llm = vllm.LLM(
        **options,
        seed=0,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=step_tokens,
        enable_chunked_prefill=True,
        enable_prefix_caching=False,  # cached tokens have no logits
    )
    score = vllm_prompt_logprobs.score if no_head else vllm_model.score

    def score_window(window: Window) -> NDArray[np.int32]:
        return score(llm, job, window)

    return score_window, Ready(
        route="prompt_logprobs" if no_head else "head",
        why=no_head,
        version=vllm.__version__,
        dtype=options["dtype"],
        max_length=max_length,
    )


def saved_dtype(settings: Any, model_path: str) -> str:
    """The dtype a model was saved in; vLLM's own "auto" would halve float32."""
    for config in (settings, settings.get_text_config()):
        if config.dtype is not None:
            return str(config.dtype).removeprefix("torch.")
    for path in sorted(Path(model_path).glob("*.safetensors")):
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        names = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
        kinds = {value.get("dtype") for value in header.values()}
        for kind, name in names.items():
            if kind in kinds:
                return name
    raise Refused(f"{model_path} does not say its dtype; set teacher.dtype")


def _put_head_on(architecture: str, job: Job) -> str:
    """Register the scoring head; "" if done, else why it cannot be."""
    try:
        from teacher_dump.engines import vllm_model
    except ImportError as error:
        return f"this vLLM is laid out differently ({error})"
    try:
        vllm_model.register(architecture, job)
    except (vllm_model.NotPossible, AttributeError) as error:
        return str(error)
    return ""


def _kv_cache_bytes(model: Any, max_length: int, step_tokens: int, max_num_seqs: int) -> int:
    """Room for the longest sequence and for a step of short ones."""
    text = model.hf_text_config
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    token_bytes = 2 * text.num_hidden_layers * heads * head_dim * model.dtype.itemsize
    blocks = (max_length + step_tokens) // KV_BLOCK_TOKENS + max_num_seqs + 2
    return max(1 << 28, int(blocks * KV_BLOCK_TOKENS * token_bytes))
