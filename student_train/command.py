"""`train` and `evaluate`: what they take and what they print."""

import json
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from decant.storage.cli import process
from decant.storage.cli.commands import Command
from decant.student_train.config.run import TrainConfig
from decant.student_train.config.verdict import EvaluateArguments

if TYPE_CHECKING:
    from decant.student_train.evaluation.model_report import ModelsReport

TEXT = """
  decant train --config train.yaml
  decant train --config train.yaml --loss.kind akl --output runs/akl
  decant train --config train.yaml --dry-run    what it needs; writes nothing
  decant train --config train.yaml --follow     while the cache is being dumped
  accelerate launch -m decant.student_train --config train.yaml

The same command again goes on from the last checkpoint, to the sample.
"""


@dataclass(frozen=True, kw_only=True)
class TrainArguments:
    """What a training takes beside its configuration."""

    dry_run: bool = False
    """Build everything, take one step, print sizes, memory and steps; write nothing."""
    json: bool = False
    """End with the summary as JSON in place of a table."""


def run_train(config: TrainConfig, arguments: TrainArguments) -> int:
    """Train and print the summary; returns the exit code."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    logging.getLogger("accelerate").setLevel(logging.WARNING)
    # That tied weights are saved once: they are tied again on resuming.
    logging.getLogger("accelerate.utils.other").setLevel(logging.ERROR)
    if arguments.dry_run:
        from decant.student_train.dry_run import dry_run

        with process.libraries_on_stderr():
            report = dry_run(config)
        if int(os.environ.get("RANK", "0")) == 0:
            print(report)
        return process.DONE
    from decant.student_train.loop import train

    with process.libraries_on_stderr():
        summary = train(config)
    if int(os.environ.get("RANK", "0")) == 0:
        from decant.student_train.outputs.closing import closing_text

        print(json.dumps(summary) if arguments.json else closing_text(summary, Path(config.output)))
    return process.DONE


TRAIN = Command(
    text=TEXT,
    config=TrainConfig,
    arguments=TrainArguments,
    common=(
        "cache",
        "output",
        "student.path",
        "loss.kind",
        "loss.temperature",
        "steps",
        "epochs",
        "batch_size",
        "optimizer.lr",
        "mixed_precision",
    ),
    run=run_train,
)


def run_evaluate(arguments: EvaluateArguments) -> int:
    """Evaluate a student and print what was found; returns the exit code."""
    with process.libraries_on_stderr():
        result = _verdict(arguments)
    if int(os.environ.get("RANK", "0")) == 0:
        print(result)
    return process.DONE


def _verdict(arguments: EvaluateArguments) -> str:
    """The verdict as text, or as JSON."""
    from transformers.utils import logging as transformers_logging

    from decant.schemas import to_json
    from decant.storage.cache.command import refuse_missing
    from decant.storage.cli.terminal import json_text

    transformers_logging.disable_progress_bar()
    if arguments.samples:
        return _risks(arguments)
    refuse_missing(arguments.cache)
    if arguments.model:
        return _models(arguments)
    from decant.student_train.config.alignment import AlignConfig
    from decant.student_train.config.loss import LossConfig
    from decant.student_train.config.student import StudentConfig
    from decant.student_train.verdict import (
        evaluate_student,
        student_folder,
        verdict_text,
    )

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
        tokenizer_mismatch=arguments.tokenizer_mismatch,
        align=AlignConfig(messages=arguments.messages),
    )
    return json_text(to_json(verdict)) if arguments.json else verdict_text(verdict)


def _models(arguments: EvaluateArguments) -> str:
    """Models against the cache, as text, or as JSON; the page is written."""
    from decant.schemas import to_json
    from decant.storage.cli.terminal import json_text
    from decant.storage.files.durable import publish_bytes
    from decant.student_train.evaluation.model_html import models_html
    from decant.student_train.evaluation.model_text import models_text

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("evaluate --model runs in one process: call it without accelerate launch")
    if arguments.html and not Path(arguments.html).expanduser().absolute().parent.is_dir():
        raise FileNotFoundError(f"{arguments.html}: no such folder to write it into")
    report = _measured(arguments, worst=arguments.worst)
    if arguments.html:
        page = models_html(report).encode(errors="replace")
        publish_bytes(Path(arguments.html).expanduser().absolute(), page)
    return json_text(to_json(report)) if arguments.json else models_text(report)


def _measured(arguments: EvaluateArguments, worst: int) -> "ModelsReport":
    """The models that are named, against the cache."""
    from decant.storage.cli.terminal import progress_bar
    from decant.student_train.versus import Part, measure_models

    with progress_bar("evaluate", "sequences") as progress:
        return measure_models(
            arguments.model,
            arguments.cache,
            arguments,
            part=Part(limit=arguments.limit, sample=arguments.sample, seed=arguments.seed),
            batch_size=arguments.batch_size,
            worst=worst,
            progress=progress,
        )


def _risks(arguments: EvaluateArguments) -> str:
    """Risks of a student from caches over samples, as text, or as JSON."""
    from decant.schemas import to_json
    from decant.storage.cache.command import refuse_missing
    from decant.storage.cli.terminal import escaped_lines, json_text, progress_bar
    from decant.student_train.evaluation.risks import Risks, measure_samples, risks_text

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("evaluate --samples runs in one process: call it without a launcher")
    refuse_missing(arguments.samples)
    if arguments.cache:
        refuse_missing(arguments.cache)
    with progress_bar("samples", "row groups") as progress:
        samples = measure_samples(
            arguments.samples,
            references=arguments.references,
            cache=arguments.cache,
            seed=arguments.seed,
            progress=progress,
        )
    found = Risks(samples=samples)
    if arguments.model:
        report = _measured(arguments, worst=0)
        (its,) = report.models
        found = Risks(
            samples=samples,
            model=its.model,
            cache=report.cache,
            coverage_risk=its.means["cross_entropy"],
            coverage_risk_interval=its.intervals["cross_entropy"],
            coverage_gap=its.sequence_gap,
            targets=report.targets,
        )
    return json_text(to_json(found)) if arguments.json else escaped_lines(risks_text(found))


EVALUATE = Command(
    text="""
  decant evaluate --student runs/first --cache caches/heldout
  decant evaluate --model models/q4.gguf --cache caches/heldout
  decant evaluate --model models/full --model models/pruned \\
      --cache caches/heldout --sample 500 --html versus.html
  decant evaluate --student runs/first --cache caches/mine \\
      --heldout-fraction 0.01
  decant evaluate --student path/or/hub-id --cache caches/heldout --json
  accelerate launch -m decant evaluate --student runs/first --cache caches/a
  decant evaluate --samples caches/by-student
  decant evaluate --samples caches/by-student --model runs/first/student \\
      --cache caches/by-teacher --references data/test.jsonl

No teacher is loaded: what it said is in the cache. Printed are the student's
cross-entropy and perplexity on the actual tokens, its divergence from the
teacher, how often its most probable token is the actual one or the teacher's,
the share of its tokens that the teacher would accept from it as a draft model,
and the calibration error: the means that a training has in metrics.jsonl.

--model takes any causal LM of the cache's tokenizer: a directory or hub id,
also with quantised weights, a .gguf file, a PEFT adapter; with
--tokenizer-mismatch align of any other one, compared by bits per byte. It
says how far the model is from the teacher: KL both ways, with bounds where ids
are not kept, perplexity, top-1 agreement, acceptance, calibration, intervals
over sequences, and the worst targets in context. Given twice, the paired
differences of the two are added.

--samples takes a cache over what a student samples (source.generate.by of a
dump): the teacher's negative log likelihood of the samples (likelihood risk),
distinct-n, and ROUGE against references. With --model and a cache over what
the teacher samples, the model's of those (coverage risk).
""",
    arguments=EvaluateArguments,
    run=run_evaluate,
    goes_on=False,
)
