"""Which student is trained, and which of its weights."""

from dataclasses import dataclass, field
from typing import Any

from decant.student_train.config.paths import expand_home


@dataclass(frozen=True, kw_only=True)  # no slots: jsonargparse reads defaults through vars()
class CutConfig:
    """A student that is some of the layers of a teacher, and all else of it."""

    path: str = ""
    """Directory or hub id of the teacher; none = the one that the cache names."""
    layers: list[int] = field(default_factory=list)
    """Which of its layers, counted from 0, in their order, for example [0, 4, 9]."""
    keep: int = 0
    """Or how many, at even distances, the first and the last among them."""

    @property
    def is_given(self) -> bool:
        """Whether there is something to cut."""
        return bool(self.layers or self.keep)

    def __post_init__(self) -> None:
        expand_home(self, "path")
        if self.layers and self.keep:
            raise ValueError(
                f"student.from_teacher: give layers or keep, found {self.layers} and {self.keep}"
            )
        if self.path and not self.is_given:
            raise ValueError("student.from_teacher needs layers or keep; give student.path for all")
        if (
            self.keep < 0
            or sorted(set(self.layers)) != self.layers
            or min(self.layers, default=0) < 0
        ):
            raise ValueError(
                "student.from_teacher needs keep >= 1, or layers >= 0 that ascend, found "
                f"{self.layers or self.keep}"
            )


QUANTISATIONS = ("", "int4", "int8_dynamic", "int8_dynamic_int4")


@dataclass(frozen=True, kw_only=True)  # no slots: jsonargparse reads defaults through vars()
class QatConfig:
    """Train a student for the rounding of the numbers that it will be served in (torchao)."""

    scheme: str = ""
    """int4: weights of 4 bits in groups. int8_dynamic: weights of 8 bits by output, and inputs of
    8 bits by token. int8_dynamic_int4: those inputs, and weights of 4 bits in groups. The head and
    the embeddings stay as they are."""
    group_size: int = 32
    """Weights that share a scale, in the schemes with 4 bits."""

    def __post_init__(self) -> None:
        if self.scheme not in QUANTISATIONS:
            raise ValueError(f"student.qat.scheme {self.scheme!r} is not one of {QUANTISATIONS}")
        if self.group_size < 1:
            raise ValueError(f"student.qat.group_size must be at least 1, found {self.group_size}")
        if self.group_size != 32 and not self.scheme.endswith("int4"):
            raise ValueError("student.qat.group_size has no effect without a scheme of 4 bits")


@dataclass(frozen=True, kw_only=True)  # no slots: jsonargparse reads defaults through vars()
class StudentConfig:
    """The student: a pretrained model, one cut from a teacher, or a fresh one."""

    path: str = ""
    """Directory or hub id of a pretrained causal LM; the ids of the cache must mean the same to its
    tokenizer, or tokenizer_mismatch be align."""
    config: dict[str, Any] = field(default_factory=dict)
    """Instead of a path: fields of a transformers configuration with its model_type, for random
    initialisation. vocab_size is the cache's unless given."""
    tokenizer: str = ""
    """Directory or hub id of the student's tokenizer; by default that of its path, or with a config
    the cache's."""
    from_teacher: CutConfig = field(default_factory=CutConfig)
    """Instead of a path: some of a teacher's layers, for example {keep: 10}."""
    qat: QatConfig = field(default_factory=QatConfig)
    """Quantisation-aware training, for example {scheme: int4}: beside the student, which stays in
    its dtype, a quantised one is saved."""
    dtype: str = "float32"
    """Dtype of the weights: float32 | bfloat16 | float16."""
    attention: str = ""
    """Attention implementation of transformers, for example sdpa, eager or flash_attention_2; its
    own choice if empty."""
    revision: str = ""
    """Branch, tag or commit, where the path is a hub id."""
    trust_remote_code: bool = False
    """Run the Python code that comes with the student's path, where its architecture is not one of
    transformers'. Only for code that you have read."""

    def __post_init__(self) -> None:
        expand_home(self, "path", "tokenizer")
        if bool(self.path) + bool(self.config) + self.from_teacher.is_given != 1:
            raise ValueError("student needs one of path, config and from_teacher")
        if self.config and "model_type" not in self.config:
            raise ValueError("student.config needs a model_type, for example llama")
        if self.config and self.trust_remote_code:
            raise ValueError("student.trust_remote_code has no effect with student.config")
        if self.config and self.revision:
            raise ValueError("student.revision has no effect with student.config")
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
