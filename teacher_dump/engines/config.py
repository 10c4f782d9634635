"""Which teacher is loaded and how, and which options have an effect with which engine."""

import dataclasses
import urllib.parse
from dataclasses import dataclass, field

ENGINES = ("transformers", "vllm", "http", "openai")


APIS = ("auto", "vllm", "sglang", "completions", "chat")


CHAT = "chat"
"""The one of them that gives log probs of what it generates alone; it is never found by itself."""


REMOTE = ("http", "openai")
"""Engines whose teacher is elsewhere: nothing of it is read here."""


QUANTIZATIONS = ("", "bnb-4bit", "bnb-8bit")


DTYPES = ("auto", "float32", "bfloat16", "float16")


EFFECT = {
    "path": ("transformers", "vllm"),
    "revision": ("transformers", "vllm"),
    "trust_remote_code": ("transformers", "vllm"),
    "adapter": ("transformers",),
    "device": ("transformers",),
    "attention": ("transformers",),
    "quantization": ("transformers",),
    "max_memory": ("transformers",),
    "offload_folder": ("transformers",),
    "tensor_parallel": ("vllm",),
    "dtype": ("transformers", "vllm", "http"),
    "max_batch_tokens": ("transformers", "vllm", "http"),
    "endpoints": ("http", "openai"),
    "api_key_env": ("http", "openai"),
    "requests": ("http", "openai"),
    "wait_seconds": ("http", "openai"),
    "model": ("openai",),
    "api": ("openai",),
}
"""The engines with which an option has an effect; one that is not named here has it with all."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TeacherConfig:
    """The teacher and the engine that runs it."""

    path: str = ""
    """Directory of a causal language model in transformers format, a hub id, or a .gguf file; not
    with http and openai."""
    revision: str = ""
    """Branch, tag or commit of a hub id."""
    tokenizer: str = ""
    """Path of the tokenizer; the teacher's own by default. "none": the source holds ready ids.
    openai: must be given, since no server gives it."""
    adapter: str = ""
    """transformers: directory or hub id of a PEFT adapter (LoRA) of the model at path."""
    trust_remote_code: bool = False
    """Run the Python code that the model's own files bring along; look at it before."""
    engine: str = "transformers"
    """transformers | vllm | http (a teacher that `decant serve` offers) | openai (a stock server:
    vLLM, SGLang, or a completions API with echo and logprobs)."""
    dtype: str = "auto"
    """Computation dtype: auto (as saved) | float32 | bfloat16 | float16."""
    device: str = "auto"
    """transformers: a torch device, or auto (GPUs if there are any, through accelerate)."""
    attention: str = ""
    """transformers: attention implementation (sdpa, eager, flash_attention_2); "" = its default."""
    max_batch_tokens: int = 8192
    """Tokens per forward, padding included; also bounds memory. http: tokens per request."""
    quantization: str = ""
    """transformers: bnb-4bit (nf4) | bnb-8bit (LLM.int8), while loading; "" = as saved."""
    max_memory: dict[str, str] = field(default_factory=dict)
    """transformers: weights per device at most, {"0": 20GiB, cpu: 60GiB}; what is left goes to
    offload_folder."""
    offload_folder: str = ""
    """transformers: directory for weights that no memory holds, read at each forward."""
    tensor_parallel: int = 1
    """vllm: GPUs over which every layer is split."""
    endpoints: tuple[str, ...] = ()
    """http, openai: URLs of servers that offer the same teacher; the work is spread over them."""
    api_key_env: str = ""
    """http, openai: environment variable that holds the servers' API key."""
    requests: int = 4
    """http, openai: requests in flight per endpoint, which bound the memory; with openai each is a
    sequence."""
    wait_seconds: float = 300.0
    """http, openai: how long no endpoint may answer before the job gives up."""
    model: str = ""
    """openai: name of the model at the server; needed where it serves several, and with chat."""
    api: str = "auto"
    """openai: auto | vllm (prompt_logprobs) | sglang (/generate) | completions (echo, logprobs) |
    chat (hosted chat APIs: log probs of the answers of source.generate alone)."""

    def __post_init__(self) -> None:
        for name, allowed in (
            ("engine", ENGINES),
            ("dtype", DTYPES),
            ("quantization", QUANTIZATIONS),
            ("api", APIS),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"teacher.{name} {getattr(self, name)!r} is not one of {allowed}")
        self._refuse_without_effect()
        if self.engine in REMOTE:
            self._check_endpoints()
        elif not self.path:
            raise ValueError("teacher.path is empty; it must name a model")
        for name in ("tensor_parallel", "max_batch_tokens", "requests"):
            if getattr(self, name) < 1:
                raise ValueError(f"teacher.{name} is {getattr(self, name)}, must be >= 1")
        if not self.wait_seconds >= 0:
            raise ValueError(f"teacher.wait_seconds is {self.wait_seconds}, must be >= 0")
        if self.device.partition(":")[0] == "meta":
            raise ValueError("teacher.device meta holds no weights: use cpu, cuda, or auto")
        if (self.max_memory or self.offload_folder) and self.device != "auto":
            raise ValueError(
                "teacher.max_memory and offload_folder have no effect with "
                f"teacher.device {self.device}: leave it auto"
            )

    @property
    def is_chat(self) -> bool:
        """Whether nothing but its own answers can be scored, from what it tells beside them."""
        return self.api == CHAT

    def _refuse_without_effect(self) -> None:
        """Raise ValueError for options that are set and that this engine would ignore."""
        idle = []
        for option in dataclasses.fields(self):
            default = (
                option.default
                if option.default_factory is dataclasses.MISSING
                else option.default_factory()
            )
            is_set = getattr(self, option.name) != default
            if is_set and self.engine not in EFFECT.get(option.name, ENGINES):
                idle.append(option.name)
        if not idle:
            return
        have = "have" if len(idle) > 1 else "has"
        why = ""
        if self.engine in REMOTE and {"path", "revision"} & {*idle}:
            why = ": the services at teacher.endpoints say which teacher they offer"
            if self.engine == "openai":
                why += "; of several, teacher.model names one"
        raise ValueError(
            f"teacher.{', '.join(idle)} {have} no effect with engine {self.engine}{why}"
        )

    def _check_endpoints(self) -> None:
        if not self.endpoints:
            raise ValueError(
                f"teacher.engine {self.engine} needs teacher.endpoints: [http://host:port, ...]"
            )
        if self.engine == "openai" and self.tokenizer in ("", "none"):
            raise ValueError(
                "teacher.engine openai needs teacher.tokenizer: the directory or hub id of the "
                "teacher's tokenizer, which no server gives"
            )
        if self.is_chat and not self.model:
            raise ValueError(
                "teacher.api chat needs teacher.model: the name that requests give the model, best "
                "with its version"
            )
        for url in self.endpoints:
            try:
                parts = urllib.parse.urlsplit(url)
                known = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
            except ValueError as error:  # in the port
                raise ValueError(f"teacher.endpoints: {url!r}: {error}") from error
            if not known:
                raise ValueError(f"teacher.endpoints: {url!r} is not http://host:port")
            if parts.username or parts.password:
                raise ValueError(
                    "teacher.endpoints: a URL holds a password; name an environment variable in "
                    "teacher.api_key_env"
                )
        if len({url.rstrip("/") for url in self.endpoints}) < len(self.endpoints):
            raise ValueError("teacher.endpoints names an endpoint twice")
