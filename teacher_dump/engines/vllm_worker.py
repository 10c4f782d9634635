"""The process that holds vLLM: windows of token ids in, packed rows out.

vLLM replaces functions of torch, binds threads and takes memory: it gets a process of its own, and
nothing but numpy arrays crosses. The engine's side is `vllm_engine`. vLLM is imported when a job
arrives, never with this file.

Two routes. `head`: our reduction runs inside vLLM on the full logits (`vllm_model`); exact for
every truncation and temperature. `prompt_logprobs`: vLLM's public answer, the top k at T=1 only,
for architectures that cannot carry the head.
"""

import json
import logging
import os
import queue
import sys
import threading
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from schemas import Truncation

log = logging.getLogger(__name__)

ROUTES = ("head", "prompt_logprobs")
TAIL_RESOLUTION = 2.0**-23
"""prompt_logprobs: float32 log probs cannot say whether less than this is left."""
PROMPT_LOGPROBS_BYTES = 1 << 30
"""prompt_logprobs: vLLM holds the float32 log probs of a whole step at once, up to this much."""
KV_BLOCK_TOKENS = 128
"""On a CPU a sequence takes whole blocks of this size."""


class Refused(Exception):
    """Something that the user must change; the message says what."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """What the worker loads."""

    model_path: str
    dtype: str
    max_batch_tokens: int
    vocab_size: int
    truncation: Truncation
    temperatures: tuple[float, ...]
    max_length: int
    route: str
    """One of ROUTES, or "" to choose."""
    on_cpu: bool


@dataclass(frozen=True, slots=True)
class Ready:
    """The worker's answer to a job."""

    route: str
    why: str
    """Why this route, if it is not the first choice."""
    version: str
    dtype: str
    max_length: int
    """Longest sequence that can be scored: the job's, or less if the model allows less."""


@dataclass(frozen=True, slots=True, eq=False)
class Window:
    """Sequences to score, laid end to end."""

    number: int
    first_sequence: int
    sample_ids: list[str]
    lengths: NDArray[np.int64]
    input_ids: NDArray[np.int32]
    is_target: NDArray[np.bool_]

    def sequences(self) -> Iterable[tuple[str, NDArray[np.int32], NDArray[np.int64]]]:
        """Sample id, token ids and target positions of each."""
        ends = np.cumsum(self.lengths)[:-1]
        ids, masks = np.split(self.input_ids, ends), np.split(self.is_target, ends)
        for sample_id, tokens, mask in zip(self.sample_ids, ids, masks, strict=True):
            yield sample_id, tokens, np.flatnonzero(mask)


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """The packed rows of a window's targets, in order."""

    number: int
    rows: NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Failed:
    """The last message of a worker that gives up."""

    message: str


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

    settings = AutoConfig.from_pretrained(job.model_path)
    architecture = (settings.architectures or ["unknown"])[0]
    num_rows = int(settings.get_text_config().vocab_size)
    if num_rows < job.vocab_size:
        raise Refused(f"the teacher has {num_rows} output rows, fewer than {job.vocab_size} ids")
    dtype = job.dtype if job.dtype != "auto" else saved_dtype(settings, job.model_path)

    why = "" if job.route != "prompt_logprobs" else "asked for"
    if not why:
        why = _put_head_on(architecture, job)
    if why and job.route == "head":
        raise Refused(f"vLLM {vllm.__version__} cannot score with its full logits: {why}")
    route = "prompt_logprobs" if why else "head"
    if why:
        _check_prompt_logprobs(job, num_rows, why)

    options: dict[str, Any] = {
        "model": job.model_path,
        "dtype": dtype,
        "skip_tokenizer_init": True,
        "runner": "generate" if why else "pooling",
        "max_model_len": None,
    }
    from vllm.engine.arg_utils import EngineArgs

    model = EngineArgs(**options).create_model_config()
    longest = model.max_model_len
    max_length = min(job.max_length, longest)
    options["max_model_len"] = max_length
    step_tokens = job.max_batch_tokens
    if why:
        # One token must be generated; it is never fed to the model, so no position is beyond it.
        options["max_model_len"] = max_length + 1
        if max_length == longest:
            os.environ["VLLM_ALLOW_LONG_MAX_MODEL_LEN"] = "1"
        step_tokens = min(step_tokens, max(512, PROMPT_LOGPROBS_BYTES // (4 * num_rows)))
        options |= {
            "logprobs_mode": "raw_logprobs",
            "max_logprobs": job.truncation.k,
            "generation_config": "vllm",
        }
    else:
        from vllm.config import PoolerConfig

        from teacher_dump.engines.vllm_model import TASK

        options["pooler_config"] = PoolerConfig(task=TASK)
    max_num_seqs = min(256, step_tokens)
    if job.on_cpu:
        options |= {
            "enforce_eager": True,
            "kv_cache_memory_bytes": _kv_cache_bytes(model, max_length, step_tokens, max_num_seqs),
            # Elsewhere a half precision head accumulates and answers in float32 at no cost; on a
            # CPU vLLM would convert the whole head for every chunk.
            "hf_overrides": {"head_dtype": "model"},
        }
    llm = vllm.LLM(
        **options,
        seed=0,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=step_tokens,
        enable_chunked_prefill=True,
        enable_prefix_caching=False,  # cached tokens have no logits
    )
    score = _score_prompt_logprobs if why else _score_head

    def score_window(window: Window) -> NDArray[np.int32]:
        return score(llm, job, window)

    return score_window, Ready(route, why, vllm.__version__, dtype, max_length)


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
    reduction = vllm_model.Reduction(
        vocab_size=job.vocab_size, truncation=job.truncation, temperatures=job.temperatures
    )
    try:
        vllm_model.register(architecture, reduction)
    except (vllm_model.NotPossible, AttributeError) as error:
        return str(error)
    return ""


def _check_prompt_logprobs(job: Job, num_rows: int, why: str) -> None:
    """Raise Refused unless prompt_logprobs can give what is asked."""
    problem = ""
    if job.truncation.method != "topk":
        problem = f"truncation.method {job.truncation.method}"
    elif job.temperatures != (1.0,):
        problem = f"temperatures {list(job.temperatures)}"
    elif num_rows != job.vocab_size:
        problem = f"{num_rows} output rows for a vocabulary of {job.vocab_size} (padding)"
    if problem:
        raise Refused(
            f"{problem} cannot be had from vLLM's prompt_logprobs, which are the top k at T=1 over "
            f"all output rows, and its full logits cannot be used ({why}). "
            "Use teacher.engine: transformers"
        )


def _kv_cache_bytes(model: Any, max_length: int, step_tokens: int, max_num_seqs: int) -> int:
    """Room for the longest sequence and for a step of short ones."""
    text = model.hf_text_config
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    token_bytes = 2 * text.num_hidden_layers * heads * head_dim * model.dtype.itemsize
    blocks = (max_length + step_tokens) // KV_BLOCK_TOKENS + max_num_seqs + 2
    return max(1 << 28, int(blocks * KV_BLOCK_TOKENS * token_bytes))


def _score_head(llm: Any, job: Job, window: Window) -> NDArray[np.int32]:
    from vllm import TokensPrompt

    from teacher_dump.engines.vllm_model import TASK, params_for

    prompts, params, expected = [], [], []
    for offset, (sample_id, ids, positions) in enumerate(window.sequences()):
        prompts.append(TokensPrompt(prompt_token_ids=ids.tolist()))
        params.append(params_for(positions, ids[positions], window.first_sequence + offset))
        expected.append((sample_id, positions))
    outputs = llm.encode(prompts, params, pooling_task=TASK, use_tqdm=False)
    parts = []
    for (sample_id, positions), output in zip(expected, outputs, strict=True):
        rows = output.outputs.data.numpy()
        if rows.shape == (1, 1):
            raise _not_finite(sample_id, int(positions[rows[0, 0]]))
        assert len(rows) == len(positions) and rows.dtype == np.int32
        parts.append(rows)
    return np.concatenate(parts)


def _score_prompt_logprobs(llm: Any, job: Job, window: Window) -> NDArray[np.int32]:
    from vllm import SamplingParams, TokensPrompt

    k = job.truncation.k
    params = SamplingParams(
        prompt_logprobs=k, max_tokens=1, temperature=0, detokenize=False, flat_logprobs=True
    )
    sequences = list(window.sequences())
    prompts = [TokensPrompt(prompt_token_ids=ids.tolist()) for _, ids, _ in sequences]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    return np.concatenate(
        [
            _rows_from_flat(output.prompt_logprobs, k, job.vocab_size, sample_id, ids, positions)
            for (sample_id, ids, positions), output in zip(sequences, outputs, strict=True)
        ]
    )


def _rows_from_flat(
    flat: Any,
    k: int,
    vocab_size: int,
    sample_id: str,
    ids: NDArray[np.int32],
    positions: NDArray[np.int64],
) -> NDArray[np.int32]:
    """Packed rows of the targets from vLLM's flat answer: per token itself, then ranks 1 to k.

    The mass not kept is 1 - sum p, as exact as float32 log probs allow, at least what is known to
    be missing (an actual token outside the top k) and at most V - k times the last kept.
    """
    import torch

    from teacher_dump.engines.vllm_rows import pack
    from teacher_dump.sparsify import LOGPROB_FLOOR, Sparse

    entries = (len(ids) - 1, k + 1)
    token_ids = np.array(flat.token_ids, dtype=np.int32).reshape(entries)[positions - 1]
    logprobs = np.array(flat.logprobs, dtype=np.float32).reshape(entries)[positions - 1]
    assert np.array_equal(token_ids[:, 0], ids[positions])
    bad = ~(logprobs < np.inf).all(axis=1)
    if bad.any():
        raise _not_finite(sample_id, int(positions[np.flatnonzero(bad)[0]]))
    label_logprob, kept = logprobs[:, 0], logprobs[:, 1:]
    outside = ~(token_ids[:, 1:] == token_ids[:, :1]).any(axis=1)
    p = np.exp(kept.astype(np.float64))
    missing = np.where(outside, np.exp(label_logprob.astype(np.float64)), 0.0)
    tail = np.maximum(1 - p.sum(axis=1), np.maximum(missing, TAIL_RESOLUTION))
    tail = np.minimum(tail, (vocab_size - k) * p[:, -1])
    with np.errstate(divide="ignore"):
        log_tail = np.log(tail).astype(np.float32)
    packed = pack(
        Sparse(
            token_ids=torch.from_numpy(token_ids[:, 1:]),
            logprobs=torch.from_numpy(np.maximum(kept, LOGPROB_FLOOR)),
            draws=None,
            log_z=torch.zeros(len(positions), 1),
            log_tail=torch.from_numpy(log_tail[:, None]),
            label_logprob=torch.from_numpy(np.maximum(label_logprob, LOGPROB_FLOOR)),
        )
    )
    return packed.numpy()


def _not_finite(sample_id: str, position: int) -> Refused:
    return Refused(
        f"the teacher gives NaN or infinite logits for sample {sample_id} at token {position}; "
        "try teacher.dtype: float32, and look at the record"
    )
