"""Which student is trained, and which of its weights."""

from dataclasses import dataclass, field
from typing import Any

from decant.student_train.config.paths import expand_home


@dataclass(frozen=True, kw_only=True)  # no slots: jsonargparse reads defaults through vars()
class StudentConfig:
    """The student: a pretrained model, or a fresh one from a configuration."""

    path: str = ""
    """Directory or hub id of a pretrained causal LM; the ids of the cache must mean the same to its
    tokenizer, or tokenizer_mismatch be align."""
    config: dict[str, Any] = field(default_factory=dict)
    """Instead of a path: fields of a transformers configuration with its model_type, for random
    initialisation. vocab_size is the cache's unless given."""
    tokenizer: str = ""
    """Directory or hub id of the student's tokenizer; by default that of its path, or with a config
    the cache's."""
    dtype: str = "float32"
    """Dtype of the weights: float32 | bfloat16 | float16."""
    attention: str = ""
    """Attention implementation of transformers, for example sdpa, eager or flash_attention_2; its
    own choice if empty."""
    trust_remote_code: bool = False
    """Run the Python code that comes with the student's path, where its architecture is not one of
    transformers'. Only for code that you have read."""

    def __post_init__(self) -> None:
        expand_home(self, "path", "tokenizer")
        if bool(self.path) == bool(self.config):
            raise ValueError("student needs either a path or a config, not both, not neither")
        if self.config and "model_type" not in self.config:
            raise ValueError("student.config needs a model_type, for example llama")
        if self.config and self.trust_remote_code:
            raise ValueError("student.trust_remote_code has no effect without student.path")
        if self.dtype not in ("float32", "bfloat16", "float16"):
            raise ValueError(f"student.dtype {self.dtype!r} is not float32, bfloat16 or float16")


QUANTIZATIONS = ("", "4bit", "8bit")


@dataclass(frozen=True, kw_only=True)  # no slots: jsonargparse reads defaults through vars()
class AdapterConfig:
    """LoRA on a student whose own weights stay as they are."""

    r: int = 0
    """Rank; 0 = no adapter, all weights are trained."""
    alpha: int = 16
    """Scale of the adapter is alpha / r."""
    dropout: float = 0.0
    """Dropout before the adapter."""
    target_modules: list[str] = field(default_factory=list)
    """Names of the linear layers that get one, for example [q_proj, v_proj]; none, or
    [all-linear], = all of them but the head."""
    quantization: str = ""
    """4bit (NF4) or 8bit: hold the frozen weights so, through bitsandbytes (QLoRA)."""
    merge: bool = True
    """Save a student with the adapter merged into its weights; false saves the adapter alone."""

    def __post_init__(self) -> None:
        if self.r < 0 or self.alpha <= 0 or not 0 <= self.dropout < 1:
            raise ValueError(
                f"adapter needs r >= 0, alpha > 0 and 0 <= dropout < 1, found r {self.r}, "
                f"alpha {self.alpha}, dropout {self.dropout}"
            )
        if self.quantization not in QUANTIZATIONS:
            raise ValueError(
                f"adapter.quantization {self.quantization!r} is not one of {QUANTIZATIONS}"
            )
        if "all-linear" in self.target_modules and len(self.target_modules) > 1:
            raise ValueError(
                f"adapter.target_modules {self.target_modules}: all-linear names all layers "
                "already; give it alone, or the names without it"
            )
        others = (self.alpha, self.dropout, self.target_modules, self.quantization, self.merge)
        if self.r == 0 and others != (16, 0.0, [], "", True):
            raise ValueError("adapter: the other keys have no effect without r above 0")
