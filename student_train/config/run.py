"""The configuration of a training run: one frozen tree, the important fields first."""

from dataclasses import dataclass, field
from typing import Any

from decant.student_train.config.loss import LossConfig
from decant.student_train.config.schedule import values_of
from decant.student_train.data.mixture import CacheShare
from decant.student_train.evaluation.answers import ROUGE, GenerationConfig
from decant.student_train.evaluation.heldout_sums import NAMES
from decant.student_train.model.adapters import AdapterConfig

SCHEDULES = ("cosine", "linear", "constant")
PRECISIONS = ("no", "bf16", "fp16")
PACKINGS = ("none", "rows", "padding_free")


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
    attention: str = ""
    """Attention implementation of transformers, for example sdpa, eager or flash_attention_2; its
    own choice if empty."""

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
        if self.lr <= 0 or min(self.warmup_steps, self.weight_decay, self.max_grad_norm) < 0:
            raise ValueError(
                "optimizer needs lr > 0, warmup_steps, weight_decay and max_grad_norm >= 0, found "
                f"{self.lr}, {self.warmup_steps}, {self.weight_decay} and {self.max_grad_norm}"
            )
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
    keep_best: str = ""
    """A figure of the evaluation, for example heldout_ce: the saved student is then the one with
    the best, not the last; also `figure/name` for one cache of a mixture."""
    patience: int = 0
    """Stop when so many evaluations were no better than the best; 0 = never."""
    generation: GenerationConfig = field(default_factory=GenerationConfig)
    """Prompts to answer at every evaluation."""

    @property
    def has_targets(self) -> bool:
        """Whether there are held-out targets."""
        return bool(self.cache or self.heldout_fraction)

    def __post_init__(self) -> None:
        if self.cache and self.heldout_fraction:
            raise ValueError("eval.cache and eval.heldout_fraction exclude each other")
        if not 0 <= self.heldout_fraction < 1:
            raise ValueError(f"eval.heldout_fraction must lie in [0, 1): {self.heldout_fraction}")
        if self.every_steps < 0 or self.batch_size < 1:
            raise ValueError("eval.every_steps must be >= 0 and eval.batch_size >= 1")
        if self.every_steps and not (self.has_targets or self.generation.path):
            raise ValueError(
                "eval.every_steps needs eval.cache, eval.heldout_fraction or eval.generation.path"
            )
        figures = (*NAMES * self.has_targets, *ROUGE * bool(self.generation.path))
        if self.keep_best and self.keep_best.split("/")[0] not in figures:
            raise ValueError(
                f"eval.keep_best {self.keep_best!r} is not among the figures of this evaluation: "
                f"{', '.join(figures) or 'there are none'}"
            )
        if self.keep_best and not self.every_steps:
            raise ValueError("eval.keep_best has no effect without eval.every_steps")
        if self.patience < 0 or (self.patience and not self.keep_best):
            raise ValueError("eval.patience must be >= 0, and needs eval.keep_best")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Train a student from a cache."""

    cache: str = ""
    """The cache to train from: directory or fsspec URL."""
    mixture: list[CacheShare] = field(default_factory=list)
    """Instead of a cache: several, each with its share of the sequences, for example
    [{cache: caches/code, weight: 0.7}, {cache: caches/chat, weight: 0.3, kd_weight: 0.5}]."""
    follow: bool = False
    """The cache is still being dumped: train on its shards as they come, wait where they do not.
    The first epoch has the order in which they came."""
    output: str
    """Directory for metrics, checkpoints and the trained student; a rerun resumes there."""
    student: StudentConfig
    """Who learns."""
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    """LoRA in place of training all weights."""
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
    packing: str = "none"
    """How sequences lie in a microbatch. none: one to a row, padded, alike lengths together in the
    microbatches of a step. rows: several to a row as long as the longest sequence, kept apart by
    position ids and attention masks. padding_free: all in one row, for flash attention."""
    compile: bool = False
    """Compile the student's layers with torch.compile."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""
    eval: EvalConfig = field(default_factory=EvalConfig)
    """Evaluation."""
    save_every_steps: int = 0
    """Checkpoint every so many steps; 0 = only when the run is interrupted. Before the last
    evaluation there is always one, until the student is saved."""
    keep_checkpoints: int = 2
    """Older checkpoints are removed."""
    log_every_steps: int = 10
    """A line in metrics.jsonl every so many steps."""
    trackers: list[str] = field(default_factory=list)
    """Trackers of accelerate, for example [tensorboard] or [wandb]."""
    plots: bool = True
    """Draw metrics.png beside metrics.jsonl, where matplotlib is installed."""
    push_to_hub: str = ""
    """Repository (name/repo) on the Hugging Face hub to upload the finished student to."""
    hub_private: bool = True
    """Whether that repository is private, if it has to be made."""
    seed: int = 0
    """Initialisation and order of the data."""

    def __post_init__(self) -> None:
        if not self.output:
            raise ValueError("output must be given")
        if "://" in self.output:
            raise ValueError(
                f"output {self.output} must be a local directory; copy or push afterwards"
            )
        if bool(self.cache) == bool(self.mixture):
            raise ValueError("give a cache or a mixture of caches, not both, not neither")
        if self.student.config and (self.adapter.quantization or not self.adapter.merge):
            raise ValueError(
                "a student made from student.config has no weights to quantise or to name as the "
                "adapter's base: give student.path"
            )
        if self.follow and (self.mixture or self.eval.heldout_fraction):
            raise ValueError(
                "follow needs one cache and, to evaluate, an eval.cache of its own: a held-out "
                "part of a cache is whole when the cache is"
            )
        if self.mixture and self.epochs:
            raise ValueError("the caches of a mixture end at different times: give steps")
        if (self.steps > 0) == (self.epochs > 0):
            raise ValueError(f"give steps or epochs: steps is {self.steps}, epochs {self.epochs}")
        if self.steps and self.optimizer.warmup_steps > self.steps:
            raise ValueError(
                f"optimizer.warmup_steps {self.optimizer.warmup_steps} is more than the run's "
                f"{self.steps} steps: the learning rate would never reach lr"
            )
        for share in self.mixture:
            kd = self.loss.kd_weight if share.kd_weight is None else share.kd_weight
            ce = self.loss.ce_weight if share.ce_weight is None else share.ce_weight
            if max(*values_of(kd), *values_of(ce)) == 0:
                raise ValueError(
                    f"mixture: kd_weight and ce_weight of {share.cache} are both 0: nothing would "
                    "be learned from it; leave it out, or give it a weight"
                )
        for name in ("batch_size", "gradient_accumulation", "log_every_steps", "keep_checkpoints"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, found {getattr(self, name)}")
        if self.save_every_steps < 0 or self.seed < 0:
            raise ValueError("save_every_steps and seed must be >= 0")
        if self.mixed_precision not in PRECISIONS:
            raise ValueError(f"mixed_precision {self.mixed_precision!r} is not one of {PRECISIONS}")
        if self.packing not in PACKINGS:
            raise ValueError(f"packing {self.packing!r} is not one of {PACKINGS}")
