"""The configuration of a training run: one frozen tree, the important fields first."""

from dataclasses import dataclass, field
from typing import Any

from student_train.distiller import LossConfig

SCHEDULES = ("cosine", "linear", "constant")
PRECISIONS = ("no", "bf16", "fp16")


@dataclass(frozen=True, kw_only=True)  # no slots: jsonargparse reads defaults through vars()
class StudentConfig:
    """The student: a pretrained model, or a fresh one from a configuration."""

    path: str = ""
    """Directory or hub id of a pretrained causal LM; its tokenizer must be the teacher's."""
    config: dict[str, Any] = field(default_factory=dict)
    """Instead of a path: fields of a transformers configuration with its model_type, for random
    initialisation. vocab_size is the cache's unless given."""
    dtype: str = "float32"
    """Dtype of the weights: float32 | bfloat16 | float16."""

    def __post_init__(self) -> None:
        if bool(self.path) == bool(self.config):
            raise ValueError("student needs either a path or a config, not both, not neither")
        if self.config and "model_type" not in self.config:
            raise ValueError("student.config needs a model_type, for example llama")
        if self.dtype not in ("float32", "bfloat16", "float16"):
            raise ValueError(f"student.dtype {self.dtype!r} is not float32, bfloat16 or float16")


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW and its learning-rate schedule."""

    lr: float = 1e-4
    """Peak learning rate."""
    schedule: str = "cosine"
    """After the warmup: cosine or linear decay to min_lr_ratio at the last step, or constant."""
    warmup_steps: int = 0
    """Steps of linear warmup from 0."""
    min_lr_ratio: float = 0.0
    """Final learning rate over lr."""
    weight_decay: float = 0.0
    """Decoupled weight decay of matrices; biases and norms have none."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    """AdamW's betas."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this norm; 0 switches clipping off."""

    def __post_init__(self) -> None:
        if self.schedule not in SCHEDULES:
            raise ValueError(f"optimizer.schedule {self.schedule!r} is not one of {SCHEDULES}")
        if self.lr <= 0 or self.warmup_steps < 0 or self.max_grad_norm < 0:
            raise ValueError("optimizer.lr must be > 0, warmup_steps and max_grad_norm >= 0")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"optimizer.betas must be two numbers in [0, 1), found {self.betas}")
        if not 0 <= self.min_lr_ratio <= 1:
            raise ValueError(f"optimizer.min_lr_ratio must lie in [0, 1]: {self.min_lr_ratio}")
        if self.schedule == "constant" and self.min_lr_ratio:
            raise ValueError("optimizer.min_lr_ratio has no effect with schedule constant")


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Evaluation on held-out targets, from a cache: no teacher."""

    cache: str = ""
    """A held-out cache of the same teacher tokenizer."""
    heldout_fraction: float = 0.0
    """Instead of a cache: this share of the training cache's sequences is never trained on."""
    every_steps: int = 0
    """Also evaluate every so many steps; 0 = only at the end."""
    batch_size: int = 16
    """Sequences per batch and process."""

    def __post_init__(self) -> None:
        if self.cache and self.heldout_fraction:
            raise ValueError("eval.cache and eval.heldout_fraction exclude each other")
        if not 0 <= self.heldout_fraction < 1:
            raise ValueError(f"eval.heldout_fraction must lie in [0, 1): {self.heldout_fraction}")
        if self.every_steps < 0 or self.batch_size < 1:
            raise ValueError("eval.every_steps must be >= 0 and eval.batch_size >= 1")
        if self.every_steps and not (self.cache or self.heldout_fraction):
            raise ValueError("eval.every_steps needs eval.cache or eval.heldout_fraction")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Train a student from a cache."""

    cache: str
    """The cache to train from: directory or fsspec URL."""
    output: str
    """Directory for metrics, checkpoints and the trained student; a rerun resumes there."""
    student: StudentConfig
    """Who learns."""
    loss: LossConfig = field(default_factory=LossConfig)
    """What is minimised."""
    steps: int = 0
    """Optimizer steps; or give epochs."""
    epochs: float = 0.0
    """Passes over the cache; or give steps."""
    batch_size: int = 8
    """Sequences per microbatch and process."""
    gradient_accumulation: int = 1
    """Microbatches per optimizer step; the loss is averaged over the targets of all of them."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """How."""
    mixed_precision: str = "no"
    """no | bf16 | fp16, through accelerate."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""
    eval: EvalConfig = field(default_factory=EvalConfig)
    """Evaluation."""
    save_every_steps: int = 0
    """Checkpoint every so many steps; 0 = only when the run is interrupted."""
    keep_checkpoints: int = 2
    """Older checkpoints are removed."""
    log_every_steps: int = 10
    """A line in metrics.jsonl every so many steps."""
    trackers: list[str] = field(default_factory=list)
    """Trackers of accelerate, for example [tensorboard] or [wandb]."""
    seed: int = 0
    """Initialisation and order of the data."""

    def __post_init__(self) -> None:
        if not self.cache or not self.output:
            raise ValueError("cache and output must be given")
        if (self.steps > 0) == (self.epochs > 0):
            raise ValueError(f"give steps or epochs: steps is {self.steps}, epochs {self.epochs}")
        for name in ("batch_size", "gradient_accumulation", "log_every_steps", "keep_checkpoints"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, found {getattr(self, name)}")
        if self.save_every_steps < 0 or self.seed < 0:
            raise ValueError("save_every_steps and seed must be >= 0")
        if self.mixed_precision not in PRECISIONS:
            raise ValueError(f"mixed_precision {self.mixed_precision!r} is not one of {PRECISIONS}")
