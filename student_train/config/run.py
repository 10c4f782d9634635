"""The configuration of a training run: one frozen tree, the important fields first."""

from dataclasses import dataclass, field

from decant.student_train.config.alignment import AlignConfig, check_mismatch
from decant.student_train.config.evaluation import EvalConfig
from decant.student_train.config.loss import LossConfig, Terms
from decant.student_train.config.mixture import CacheShare
from decant.student_train.config.paths import expand_home
from decant.student_train.config.presets import losses_of
from decant.student_train.config.schedule import values_of
from decant.student_train.config.selection import SelectionConfig
from decant.student_train.config.student import AdapterConfig, StudentConfig

SCHEDULES = ("cosine", "linear", "constant")
PRECISIONS = ("no", "bf16", "fp16")
PACKINGS = ("none", "rows", "padding_free")


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW and its learning-rate schedule."""

    lr: float = 1e-4
    """Peak learning rate."""
    schedule: str = "cosine"
    """After the warmup: cosine or linear decay to min_lr_ratio at the last step, or constant."""
    warmup_steps: int = 0
    """Steps of linear warmup from 0."""
    warmup_ratio: float = 0.0
    """Instead of warmup_steps: this share of the run's steps, at least one."""
    min_lr_ratio: float = 0.0
    """The last step's learning rate over lr; 0 = it would be 0 in the step after the last."""
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
        if not 0 <= self.warmup_ratio < 1:
            raise ValueError(f"optimizer.warmup_ratio must lie in [0, 1): {self.warmup_ratio}")
        if self.warmup_steps and self.warmup_ratio:
            raise ValueError(
                f"give optimizer.warmup_steps or warmup_ratio: found {self.warmup_steps} and "
                f"{self.warmup_ratio}"
            )
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"optimizer.betas must be two numbers in [0, 1), found {self.betas}")
        if not 0 <= self.min_lr_ratio <= 1:
            raise ValueError(f"optimizer.min_lr_ratio must lie in [0, 1]: {self.min_lr_ratio}")
        if self.schedule == "constant" and self.min_lr_ratio:
            raise ValueError("optimizer.min_lr_ratio has no effect with schedule constant")


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
    """A pretrained model, or a new one from a configuration."""
    tokenizer_mismatch: str = "refuse"
    """What to do where the student's tokenizer is not the cache's. refuse: stop; align: train on
    what both can say, chunk by chunk of equal bytes."""
    align: AlignConfig = field(default_factory=AlignConfig)
    """How a cache is aligned with a student of another tokenizer."""
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    """An adapter (LoRA, QLoRA) that is trained in place of all weights."""
    loss: LossConfig = field(default_factory=LossConfig)
    """What is minimised: kd_weight * divergence(teacher, student) + ce_weight * cross-entropy."""
    selection: SelectionConfig = field(default_factory=SelectionConfig)
    """Train on a share of the targets alone, for example {by: student_entropy, share: 0.2}."""
    steps: int = 0
    """Optimizer steps; or give epochs."""
    epochs: float = 0.0
    """Passes over the cache; or give steps."""
    batch_size: int = 8
    """Sequences per microbatch and process."""
    gradient_accumulation: int = 1
    """Microbatches per optimizer step; the loss is averaged over the targets of all of them."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """AdamW, and the learning rate over the run."""
    mixed_precision: str = "no"
    """no | bf16 | fp16, through accelerate."""
    packing: str = "none"
    """How sequences are laid out in a microbatch. none: one to a row, padded, alike lengths
    together in the microbatches of a step. rows: several to a row as long as the longest sequence,
    kept apart by position ids and attention masks. padding_free: all in one row, for flash
    attention."""
    compile: bool = False
    """Compile the student's layers with torch.compile."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""
    eval: EvalConfig = field(default_factory=EvalConfig)
    """Evaluation on targets that are not trained on, and which student is kept."""
    save_every_steps: int = 0
    """Checkpoint every so many steps, and after the last: a later run can take more steps. 0 = only
    when the run is interrupted, and after the last step until the student is saved."""
    keep_checkpoints: int = 2
    """Older checkpoints are removed."""
    log_every_steps: int = 10
    """A line in metrics.jsonl, and on stderr where it is not a terminal, every so many steps."""
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
        expand_home(self, "cache", "output")
        if "://" in self.output:
            raise ValueError(
                f"output {self.output} must be a local directory; copy or push afterwards"
            )
        check_mismatch(self.tokenizer_mismatch)
        if self.tokenizer_mismatch == "refuse" and self.align != AlignConfig():
            raise ValueError("align has no effect without tokenizer_mismatch: align")
        if bool(self.cache) == bool(self.mixture):
            raise ValueError("give a cache or a mixture of caches, not both, not neither")
        if not self.student.path and (self.adapter.quantization or not self.adapter.merge):
            raise ValueError(
                "a student of student.config or student.from_teacher has no files to quantise or "
                "to name as the adapter's base: give student.path"
            )
        if self.student.qat.scheme and self.adapter.r:
            raise ValueError(
                "student.qat trains the weights themselves, an adapter leaves them as they are: "
                "give one of the two"
            )
        if self.student.dtype == "float16" and not self.adapter.r:
            raise ValueError(
                "student.dtype float16 cannot be trained: AdamW's steps overflow it within a few "
                "steps. Give student.dtype float32 and mixed_precision bf16 (or fp16), or bfloat16"
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
        if self.steps:
            self.refuse_long_warmup(self.steps)
        for share in self.mixture:
            own = share.own
            kd, ce = (own.get(n, getattr(self.loss, n)) for n in ("kd_weight", "ce_weight"))
            if max(*values_of(kd), *values_of(ce)) == 0:
                raise ValueError(
                    f"mixture: kd_weight and ce_weight of {share.cache} are both 0: nothing would "
                    "be learned from it; leave it out, or give it a weight"
                )
        assert len(self.losses) == max(1, len(self.mixture))
        for name in ("batch_size", "gradient_accumulation", "log_every_steps", "keep_checkpoints"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, found {getattr(self, name)}")
        if self.save_every_steps < 0 or self.seed < 0:
            raise ValueError("save_every_steps and seed must be >= 0")
        if self.mixed_precision not in PRECISIONS:
            raise ValueError(f"mixed_precision {self.mixed_precision!r} is not one of {PRECISIONS}")
        if self.packing not in PACKINGS:
            raise ValueError(f"packing {self.packing!r} is not one of {PACKINGS}")

    @property
    def losses(self) -> tuple[LossConfig, ...]:
        """The loss of each cache of the mixture, or of the one cache."""
        return losses_of(self.loss, self.mixture)

    @property
    def scheduled(self) -> tuple[str, ...]:
        """Which numbers of the loss of any cache change over the run."""
        return tuple(dict.fromkeys(name for loss in self.losses for name in loss.scheduled))

    def terms(self, step: int, steps: int) -> Terms:
        """The numbers of the loss at a step (0-based): one for all, or one per cache."""
        found = tuple(loss.at(step, steps) for loss in self.losses)
        return found[0] if all(terms == found[0] for terms in found) else found

    def refuse_long_warmup(self, steps: int) -> None:
        """Raise ValueError if the warmup does not end within a run of so many steps."""
        warmup = self.optimizer.warmup_steps
        if warmup > steps > 0:
            raise ValueError(
                f"optimizer.warmup_steps {warmup} is more than the run's {steps} steps: the "
                f"learning rate would never reach lr. Give at most {steps}, or 0"
            )
