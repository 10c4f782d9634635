"""What the evaluation of a finished student, or of any model, takes."""

from dataclasses import dataclass, field, fields
from typing import Annotated, Any, Literal

from decant.storage.cli.options import Shown
from decant.student_train.config.alignment import check_mismatch

STUDENT_ALONE = ("heldout_fraction", "kind", "temperature", "tail", "options", "mixed_precision")
MODEL_ALONE = (
    *("device", "quantization", "base", "tokenizer", "trust_remote_code", "limit", "sample"),
    *("seed", "worst", "html"),
)


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """How a model that is to be measured is loaded."""

    dtype: str = "float32"
    """Dtype of the weights: float32 | bfloat16 | float16, with --model also auto: as saved."""
    attention: str = ""
    """Attention implementation of transformers, for example sdpa or eager; "" = its own choice."""
    device: str = "auto"
    """--model: where it is computed: cpu, cuda, cuda:1, ...; auto = cuda if there is one."""
    quantization: Literal["", "4bit", "8bit"] = ""
    """--model: quantise the weights so while they are loaded, through bitsandbytes (4bit: NF4)."""
    base: Annotated[str, Shown("PATH")] = ""
    """--model: the base of a PEFT adapter, if it is not the one that the adapter names."""
    tokenizer: Annotated[str, Shown("DIR")] = ""
    """--model: where its tokenizer is, if it is not beside it."""
    trust_remote_code: bool = False
    """--model: run the Python code that comes with it. Only for code that you have read."""
    tokenizer_mismatch: str = "refuse"
    """Where its tokenizer is not the cache's: refuse, or align, as in a training."""
    messages: Annotated[str, Shown("FILE")] = ""
    """For align: the messages of a chat cache that does not hold them, from decant messages."""


@dataclass(frozen=True, kw_only=True)
class EvaluateArguments(ModelOptions):
    """Which student or models, on which targets, and what is measured."""

    cache: Annotated[str, Shown("DIR")] = ""
    """The cache with the targets: a directory or an fsspec URL. With --samples, one over what the
    teacher samples."""
    student: Annotated[str, Shown("PATH")] = ""
    """A student: a directory, a hub id, or the output folder of a training."""
    model: Annotated[tuple[str, ...], Shown("PATH")] = ()
    """Any model: a directory, a hub id, a .gguf file or a PEFT adapter. Given twice, the two are
    compared."""
    samples: Annotated[str, Shown("DIR")] = ""
    """A cache over what a student samples: the teacher's risk of them, how they vary, ROUGE; with
    --model and --cache, the model's risk of what the teacher samples."""
    references: Annotated[str, Shown("FILE")] = ""
    """--samples: JSON lines of id and response to compare the samples with; by default the targets
    of --cache under the same ids."""
    heldout_fraction: float = 0.0
    """--student: take only the part that a training with this eval.heldout_fraction never saw;
    0 = all."""
    kind: str = "fkl"
    """--student: divergence to measure: fkl, rkl, akl, jeffreys, jsd, tvd, skew_fkl, skew_rkl,
    alpha_beta, tail_kl, acceptance, acceptance_hybrid, hinge or logistic."""
    temperature: float = 1.0
    """--student: temperature of the divergence, which must be stored in the cache."""
    tail: str = "bucket"
    """--student: what stands for the ids that were not kept: bucket, renormalize,
    teacher_renormalize, uniform or label, as in a training's loss.tail."""
    options: Annotated[dict[str, Any], Shown("{...}")] = field(default_factory=dict)
    """--student: options of the kind, for example {mu: 0.5} for akl."""
    batch_size: int = 16
    """Sequences per batch and process."""
    mixed_precision: str = "no"
    """--student: no | bf16 | fp16, through accelerate."""
    limit: int = 0
    """--model: only the first sequences of the cache, this many; 0 = all."""
    sample: int = 0
    """--model: only this many sequences, chosen at random; 0 = all."""
    seed: int = 0
    """--model: of the random choice and of the intervals."""
    worst: int = 10
    """--model: targets to show on which it is farthest from the teacher."""
    json: bool = False
    """Print one JSON object."""
    html: Annotated[str, Shown("FILE")] = ""
    """--model: write one self-contained page as well."""

    def __post_init__(self) -> None:
        check_mismatch(self.tokenizer_mismatch)
        if self.messages and self.tokenizer_mismatch == "refuse":
            raise ValueError("--messages has no effect without --tokenizer-mismatch align")
        self._check_samples()
        if not self.samples and not self.cache:
            raise ValueError("give --cache, the cache with the targets")
        if bool(self.student) == bool(self.model) and not self.samples:
            raise ValueError("give --student, or --model once or twice")
        if len(self.model) > 2:
            raise ValueError(f"--model was given {len(self.model)} times: two can be compared")
        defaults = {f.name: f.default for f in fields(self)} | {"options": {}}
        idle: tuple[str, ...] = STUDENT_ALONE if self.model else MODEL_ALONE
        given = "--model" if self.model else "--student"
        if self.samples:
            alone = tuple(name for name in MODEL_ALONE if name != "seed") if not self.model else ()
            own = ("html", "worst", "tokenizer_mismatch", "messages")
            idle, given = (*STUDENT_ALONE, *alone, *own), "--samples"
        for name in idle:
            if getattr(self, name) != defaults[name]:
                more = ", whose risks are of the teacher's tokens" * (name == "tokenizer_mismatch")
                raise ValueError(f"--{name.replace('_', '-')} has no effect with {given}{more}")
        if self.limit and self.sample:
            raise ValueError("--limit and --sample exclude each other: give one")
        for name in ("limit", "sample", "seed", "worst"):
            if getattr(self, name) < 0:
                raise ValueError(f"--{name} {getattr(self, name)} must be at least 0")
        if self.batch_size < 1:
            raise ValueError(f"--batch-size {self.batch_size} must be at least 1")
        if self.model and self.dtype not in ("auto", "float32", "bfloat16", "float16"):
            raise ValueError(f"--dtype {self.dtype!r} is not auto, float32, bfloat16 or float16")

    def _check_samples(self) -> None:
        """Raise ValueError for what does not go with samples, and what goes with nothing else."""
        if not self.samples:
            if self.references:
                raise ValueError("--references has no effect without --samples")
            return
        if self.student or len(self.model) > 1:
            raise ValueError("--samples goes with --model once, or without a model")
        if self.model and not self.cache:
            raise ValueError(
                "--samples with --model needs --cache: a cache over what the teacher samples, of "
                "which the model's coverage risk is"
            )
