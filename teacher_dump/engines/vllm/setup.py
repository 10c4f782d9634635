"""How vLLM is set up for a teacher: which route its numbers take, and with which options.

Two routes. `head` (`scoring_head`): our reduction runs inside vLLM on the full logits; exact for
every truncation and temperature. `prompt_logprobs` (`prompt_logprobs`): what vLLM offers by
itself, for architectures that cannot carry the head. vLLM is imported when a setup is made.
"""

import importlib.metadata
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from decant.teacher_dump.engines.vllm import prompt_logprobs
from decant.teacher_dump.engines.vllm.messages import Load, Ready, Refused
from decant.teacher_dump.engines.vllm.names import HEAD_VARIABLE, PLUGIN, WorkerExtension

KV_BLOCK_TOKENS = 128
"""On a CPU a sequence takes whole blocks of this size."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Setup:
    """What vLLM is started with."""

    options: dict[str, Any]
    """Arguments of `vllm.LLM`, which are also options of its server."""
    ready: Ready
    num_rows: int
    """Rows of the output layer."""


def choose(load: Load) -> Setup:
    """The first route that can do it, and its options. Raises Refused.

    Sets the variables of this process that vLLM's own processes are to inherit.
    """
    import vllm
    from transformers import AutoConfig
    from vllm.engine.arg_utils import EngineArgs

    settings = AutoConfig.from_pretrained(load.model_path, trust_remote_code=load.trust_remote_code)
    architecture = (settings.architectures or ["unknown"])[0]
    num_rows = int(settings.get_text_config().vocab_size)
    asked = load.route == "prompt_logprobs"
    no_head = "asked for" if asked else _put_head_on(architecture, load.tensor_parallel)
    if no_head and load.route == "head":
        raise Refused(f"vLLM {vllm.__version__} cannot score with its full logits: {no_head}")
    options: dict[str, Any] = {
        "model": load.model_path,
        "dtype": load.dtype if load.dtype != "auto" else saved_dtype(settings, load.model_path),
        "runner": "generate" if no_head else "pooling",
        "skip_tokenizer_init": True,
        "trust_remote_code": load.trust_remote_code,
    }
    refuse_changing_lengths(settings.get_text_config())
    model = EngineArgs(**options).create_model_config()
    max_length = load.max_length or model.max_model_len
    if max_length > model.max_model_len:
        raise Refused(
            f"vLLM reads at most {model.max_model_len} tokens with this model, sequences have up "
            f"to {max_length}: lower sequences.max_length, or use teacher.engine: transformers"
        )
    step_tokens = load.max_batch_tokens
    if no_head:
        step_tokens = min(step_tokens, prompt_logprobs.max_step_tokens(num_rows))
        # One token must be generated; it is never fed to the model, so no position is beyond it.
        options["max_model_len"] = max_length + 1
        if max_length == model.max_model_len:
            os.environ["VLLM_ALLOW_LONG_MAX_MODEL_LEN"] = "1"
        options["max_logprobs"] = -1  # no limit but the vocabulary
        options["logprobs_mode"] = "raw_logprobs"
        options["generation_config"] = "vllm"
    else:
        from decant.teacher_dump.engines.vllm import scoring_head

        options["max_model_len"] = max_length
        options["pooler_config"] = {"task": scoring_head.TASK}
    max_num_seqs = min(256, step_tokens)
    if load.on_cpu:
        options["enforce_eager"] = True
        options["kv_cache_memory_bytes"] = _kv_cache_bytes(
            model, max_length, step_tokens, max_num_seqs
        )
        # On a GPU the scoring head of a half precision model answers in float32 at no cost; on a
        # CPU vLLM would convert the whole output layer for every chunk.
        options["hf_overrides"] = {"head_dtype": "model"}
        if load.tensor_parallel > 1:
            threads = _thread_groups(sorted(os.sched_getaffinity(0)), load.tensor_parallel)
            os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", threads)
    if load.tensor_parallel > 1:
        options["tensor_parallel_size"] = load.tensor_parallel
        options["distributed_executor_backend"] = "mp"
    options |= {
        "seed": 0,
        "max_num_seqs": max_num_seqs,
        "max_num_batched_tokens": step_tokens,
        "enable_chunked_prefill": True,
        "enable_prefix_caching": False,  # cached tokens have no logits
        "worker_extension_cls": f"{WorkerExtension.__module__}.{WorkerExtension.__name__}",
    }
    return Setup(
        options=options,
        num_rows=num_rows,
        ready=Ready(
            route="prompt_logprobs" if no_head else "head",
            why=no_head,
            version=vllm.__version__,
            dtype=options["dtype"],
            max_length=max_length,
        ),
    )


def refuse_changing_lengths(settings: Any) -> None:
    """Raise Refused if the model rotates positions by factors that follow from each text's length.

    vLLM has one set of factors for all texts: with dynamic scaling those of the longest possible.
    """
    parameters = getattr(settings, "rope_parameters", None) or {}
    for rope in (parameters, *parameters.values()):
        if isinstance(rope, dict) and rope.get("rope_type") == "dynamic":
            raise Refused(
                "this model scales its positions by the length of each text (rope_type: dynamic), "
                "which vLLM does not: use teacher.engine: transformers"
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


def _put_head_on(architecture: str, tensor_parallel: int) -> str:
    """Register the scoring head here and in processes to come; "" if done, else why not."""
    try:
        from decant.teacher_dump.engines.vllm import scoring_head
    except ImportError as error:
        return f"this vLLM is laid out differently ({error})"
    try:
        scoring_head.register(architecture)
    except (scoring_head.NotPossible, AttributeError) as error:
        return str(error)
    if tensor_parallel > 1:
        require_plugin()
    os.environ[HEAD_VARIABLE] = architecture
    return ""


def require_plugin() -> None:
    """Raise Refused unless vLLM's own processes will find our entry points."""
    found = importlib.metadata.entry_points(group="vllm.general_plugins", name=PLUGIN)
    if not found:
        raise Refused(
            "vLLM's processes cannot find the scoring head: this project's entry points are not "
            "installed beside vLLM; run `pip install --no-deps decant` in its environment"
        )
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and PLUGIN not in allowed.split(","):
        os.environ["VLLM_PLUGINS"] = f"{allowed},{PLUGIN}"


def _thread_groups(cpus: list[int], num_ranks: int) -> str:
    """The CPUs of each rank in vLLM's notation, "0,1|2,3"; shared where there are too few."""
    if len(cpus) < num_ranks:
        return "|".join([str(cpus[rank % len(cpus)]) for rank in range(num_ranks)])
    size = len(cpus) // num_ranks
    groups = [cpus[rank * size : (rank + 1) * size] for rank in range(num_ranks)]
    return "|".join(",".join(map(str, group)) for group in groups)


def _kv_cache_bytes(model: Any, max_length: int, step_tokens: int, max_num_seqs: int) -> int:
    """Room for the longest sequence and for a step of short ones."""
    text = model.hf_text_config
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    token_bytes = 2 * text.num_hidden_layers * heads * head_dim * model.dtype.itemsize
    blocks = (max_length + step_tokens) // KV_BLOCK_TOKENS + max_num_seqs + 2
    return max(1 << 28, int(blocks * KV_BLOCK_TOKENS * token_bytes))
