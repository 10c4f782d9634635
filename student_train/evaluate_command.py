"""`evaluate`: what it takes and what it prints."""

import os
from dataclasses import dataclass, field
from typing import Annotated, Any

from decant.storage.cli import process
from decant.storage.cli.commands import Command
from decant.storage.cli.options import Shown


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
    json: bool = False
    """Print one JSON object."""


def run_evaluate(arguments: EvaluateArguments) -> int:
    """Evaluate a student and print what was found; returns the exit code."""
    with process.libraries_on_stderr():
        result = _result(arguments)
    if int(os.environ.get("RANK", "0")) == 0:
        print(result)
    return process.DONE


def _result(arguments: EvaluateArguments) -> str:
    """The verdict as text, or as JSON."""
    from transformers.utils import logging as transformers_logging

    from decant.schemas import to_json
    from decant.storage.cache.command import refuse_missing
    from decant.storage.cli.terminal import json_text
    from decant.student_train.config.loss import LossConfig
    from decant.student_train.config.student import StudentConfig
    from decant.student_train.evaluate_student import (
        evaluate_student,
        student_folder,
        verdict_text,
    )

    transformers_logging.disable_progress_bar()
    refuse_missing(arguments.cache)
    student = StudentConfig(
        path=student_folder(arguments.student),
        dtype=arguments.dtype,
        attention=arguments.attention,
    )
    loss = LossConfig(
        kind=arguments.kind,
        temperature=arguments.temperature,
        tail=arguments.tail,
        options=arguments.options,
    )
    verdict = evaluate_student(
        student,
        arguments.cache,
        loss,
        batch_size=arguments.batch_size,
        heldout_fraction=arguments.heldout_fraction,
        mixed_precision=arguments.mixed_precision,
    )
    return json_text(to_json(verdict)) if arguments.json else verdict_text(verdict)


EVALUATE = Command(
    text="""
  decant evaluate --student runs/first --cache caches/heldout
  decant evaluate --student runs/first --cache caches/mine \\
      --heldout-fraction 0.01
  decant evaluate --student path/or/hub-id --cache caches/heldout --json
  accelerate launch -m decant evaluate --student runs/first --cache caches/a

No teacher is loaded: what it said is in the cache. Printed are the student's
cross-entropy and perplexity on the actual tokens, its divergence from the
teacher, how often its most probable token is the actual one or the teacher's,
the share of its tokens that the teacher would accept from it as a draft model,
and the calibration error: the means that a training has in metrics.jsonl.
""",
    arguments=EvaluateArguments,
    run=run_evaluate,
    goes_on=False,
)
