"""Which teacher is loaded and how, and which options have an effect with which engine."""

import urllib.parse
from dataclasses import dataclass, field

ENGINES = ("transformers", "vllm", "http")


QUANTIZATIONS = ("", "bnb-4bit", "bnb-8bit")


DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True, kw_only=True, slots=True)
class TeacherConfig:
    """The teacher and the engine that runs it."""

    path: str = ""
    """Directory of a causal language model in transformers format, or a hub id; not with http."""
    revision: str = ""
    """Branch, tag or commit of a hub id."""
    tokenizer: str = ""
    """Path of the tokenizer; the teacher's own by default. "none": the source holds ready ids."""
    engine: str = "transformers"
    """transformers | vllm | http (a teacher that `decant serve` offers)."""
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
    """http: URLs of services that offer the same teacher; the work is spread over them."""
    api_key_env: str = ""
    """http: environment variable that holds the services' API key."""
    requests: int = 4
    """http: requests in flight per endpoint; with max_batch_tokens they bound the memory."""
    wait_seconds: float = 300.0
    """http: how long no endpoint may answer before the job gives up."""

    def __post_init__(self) -> None:
        if self.engine == "http":
            self._check_http()
        elif self.endpoints or self.api_key_env or self.requests != 4 or self.wait_seconds != 300:
            raise ValueError(
                "teacher.endpoints, api_key_env, requests and wait_seconds have no effect with "
                f"engine {self.engine}"
            )
        elif not self.path:
            raise ValueError("teacher.path is empty; it must name a model")
        if self.tensor_parallel < 1:
            raise ValueError(f"teacher.tensor_parallel is {self.tensor_parallel}, must be >= 1")
        if self.tensor_parallel > 1 and self.engine != "vllm":
            raise ValueError(f"teacher.tensor_parallel has no effect with engine {self.engine}")
        for name, allowed in (("engine", ENGINES), ("dtype", DTYPES)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"teacher.{name} {getattr(self, name)!r} is not one of {allowed}")
        if self.max_batch_tokens < 1:
            raise ValueError(f"teacher.max_batch_tokens is {self.max_batch_tokens}, must be >= 1")
        if self.quantization not in QUANTIZATIONS:
            raise ValueError(
                f"teacher.quantization {self.quantization!r} is not one of {QUANTIZATIONS}"
            )
        placed = bool(self.max_memory or self.offload_folder)
        if self.engine != "transformers" and (
            self.attention or self.device != "auto" or self.quantization or placed
        ):
            raise ValueError(
                "teacher.attention, device, quantization, max_memory and offload_folder have no "
                f"effect with engine {self.engine}"
            )
        if self.device.partition(":")[0] == "meta":
            raise ValueError("teacher.device meta holds no weights: use cpu, cuda, or auto")
        if placed and self.device != "auto":
            raise ValueError(
                "teacher.max_memory and offload_folder have no effect with "
                f"teacher.device {self.device}: leave it auto"
            )

    def _check_http(self) -> None:
        if self.path or self.revision:
            raise ValueError(
                "teacher.path and revision have no effect with engine http: the services at "
                "teacher.endpoints say which teacher they offer"
            )
        if not self.endpoints:
            raise ValueError("teacher.engine http needs teacher.endpoints: [http://host:port, ...]")
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
        if self.requests < 1:
            raise ValueError(f"teacher.requests is {self.requests}, must be >= 1")
        if self.wait_seconds < 0:
            raise ValueError(f"teacher.wait_seconds is {self.wait_seconds}, must be >= 0")
