"""What the evaluation of a finished student takes."""

from dataclasses import dataclass, field
from typing import Annotated, Any

from decant.storage.cli.options import Shown
from decant.student_train.config.alignment import check_mismatch


@dataclass(frozen=True, kw_only=True)
class EvaluateArguments:
    """Which student, on which targets, and what is measured."""

    student: Annotated[str, Shown("PATH")]
    """The student: a directory, a hub id, or the output folder of a training."""
    cache: Annotated[str, Shown("DIR")]
    """The cache with the targets: a directory or an fsspec URL."""
    heldout_fraction: float = 0.0
    """Take only the part that a training with this eval.heldout_fraction never saw; 0 = all."""
    kind: str = "fkl"
    """Divergence to measure: fkl, rkl, akl, jeffreys, jsd, tvd, skew_fkl, skew_rkl or
    alpha_beta."""
    temperature: float = 1.0
    """Temperature of the divergence, which must be stored in the cache."""
    tail: str = "bucket"
    """What stands for the ids that were not kept: bucket, renormalize, teacher_renormalize or
    uniform, as in a training's loss.tail."""
    options: Annotated[dict[str, Any], Shown("{...}")] = field(default_factory=dict)
    """Options of the kind, for example {mu: 0.5} for akl."""
    batch_size: int = 16
    """Sequences per batch and process."""
    dtype: str = "float32"
    """Dtype of the weights: float32 | bfloat16 | float16."""
    attention: str = ""
    """Attention implementation of transformers, for example sdpa or eager; "" = its own choice."""
    mixed_precision: str = "no"
    """no | bf16 | fp16, through accelerate."""
    tokenizer_mismatch: str = "refuse"
    """Where the student's tokenizer is not the cache's: refuse, or align, as in a training."""
    messages: Annotated[str, Shown("FILE")] = ""
    """For align: the messages of a chat cache that does not hold them, from decant messages."""
    json: bool = False
    """Print one JSON object."""

    def __post_init__(self) -> None:
        check_mismatch(self.tokenizer_mismatch)
        if self.messages and self.tokenizer_mismatch == "refuse":
            raise ValueError("--messages has no effect without --tokenizer-mismatch align")
