"""Build a whole run, take one step, say what it will need; write nothing."""

import contextlib
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor

from decant.student_train.config.loss import LossTerms, of_source
from decant.student_train.config.run import TrainConfig
from decant.student_train.data.batch import Batch
from decant.student_train.data.heaviest import heaviest_heldout, heaviest_step
from decant.student_train.data.steps import StepData, steps_of
from decant.student_train.evaluation.answers import Generation
from decant.student_train.outputs.hub import check_hub
from decant.student_train.outputs.metrics import peak_memory_bytes
from decant.student_train.prepare import (
    Run,
    check_output,
    finished,
    prepare,
    refuse_disagreement,
)
from decant.student_train.prepare_data import names_of
from decant.student_train.runtime.distributed import (
    backward,
    microbatch,
    shards_weights,
    start_accelerator,
    sum_over_processes,
)

WAIT_SECONDS = 10.0
ROUNDS = 3


def dry_run(config: TrainConfig) -> str:
    """A report for people; raises what `train` would raise before its first step."""
    check_output(config)
    accelerator = start_accelerator(config)
    set_seed(config.seed)
    refuse_disagreement(config, accelerator)
    output = Path(config.output)
    if finished(output, config, accelerator.num_processes) is not None:
        return f"{output} is complete already: the run would do nothing"
    if config.push_to_hub and accelerator.is_main_process:
        check_hub(config.push_to_hub)
    run = prepare(config, accelerator)
    rows: list[tuple[str, str]] = _data_rows(config, accelerator, run)
    data, seconds = _first_step(config, accelerator, run)
    if data is not None:
        _heaviest(config, accelerator, run)
    parameters = list(run.model.parameters())
    trained = [p for p in parameters if p.requires_grad]
    states = [
        value
        for state in run.optimizer.state.values()
        for value in state.values()
        if isinstance(value, Tensor)
    ]
    weights, gradients, optimizer = (
        sum(_bytes(tensor) for tensor in tensors) for tensors in (parameters, trained, states)
    )
    where = "GPU" if accelerator.device.type == "cuda" else "process"
    rows += [
        ("parameters", f"{sum(p.numel() for p in parameters):,} held"),
        ("", f"{sum(p.numel() for p in trained):,} trained"),
        ("weights", f"{_size(weights)} per process"),
        ("gradients", _size(gradients)),
        ("optimizer", _size(optimizer)),
        (
            "peak memory",
            f"{_size(peak_memory_bytes())} of the {where}, in the heaviest of the steps",
        ),
        ("", "with the optimizer's state, and in an evaluation"),
    ]
    kept = config.keep_checkpoints + 1 if config.save_every_steps else 1
    free = shutil.disk_usage(_there(output)).free
    shares = accelerator.num_processes if shards_weights(accelerator) else 1
    needed = shares * (kept * (weights + optimizer) + weights)
    rows.append(("disk", f"{_size(needed)} for checkpoints and student, {_size(free)} free"))
    if data is None:
        rows.append(("one step", "none: the cache has too few shards yet"))
    else:
        left = (run.steps - run.first_step) * seconds / 3600
        tokens = sum_over_processes(accelerator, data.num_tokens)
        targets = sum_over_processes(accelerator, data.num_targets)
        rows += [
            ("one step", f"{tokens:,.0f} tokens, {targets:,.0f} targets"),
            ("", f"{seconds:.2f} s, the first is slow; all steps at this pace: {left:.1f} h"),
            ("all steps", f"about {tokens * (run.steps - run.first_step):,.0f} tokens"),
        ]
    accelerator.end_training()
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {text}" for name, text in rows) + "\nnothing was written"


def _data_rows(config: TrainConfig, accelerator: Accelerator, run: Run) -> list[tuple[str, str]]:
    stream = run.stream
    per_step = stream.sequences_per_step * config.gradient_accumulation
    rows = [
        ("data", ", ".join(reader.url for reader in stream.readers)),
        ("", f"{stream.num_sequences:,} sequences an epoch"),
        *_loss_rows(config, run),
        ("processes", f"{accelerator.num_processes} ({accelerator.distributed_type.value})"),
        (
            "steps",
            f"{run.steps:,} of {per_step} sequences: {config.batch_size} x "
            f"{config.gradient_accumulation} x {accelerator.num_processes}",
        ),
        ("epochs", f"{run.steps * per_step / stream.num_sequences:.2f}"),
    ]
    if run.first_step:
        rows.append(("resumes at", f"step {run.first_step:,}"))
    if run.alignment:
        for url, figures in run.alignment.figures.items():
            rows.append(("aligned", f"{url} with {run.alignment.where}, from a sample"))
            rows += [("", f"{name}: {text}" if name else text) for name, text in figures.lines()]
    heldout = [s.num_sequences for s in run.evaluation.streams.values()]
    if heldout:
        rows.append(("held out", f"{sum(heldout):,} sequences"))
    if isinstance(run.evaluation.generation, Generation):
        rows.append(("prompts", f"{len(run.evaluation.generation.records):,}"))
    return rows


def _loss_rows(config: TrainConfig, run: Run) -> list[tuple[str, str]]:
    """The loss of each cache of a mixture, where they differ."""
    terms = config.terms(run.first_step, run.steps)
    if isinstance(terms, LossTerms):
        return []
    names = names_of([share.cache for share in config.mixture])
    return [
        ("loss" if i == 0 else "", f"{name}: {one.text()}")
        for i, (name, one) in enumerate(zip(names, terms, strict=True))
    ]


def _first_step(
    config: TrainConfig, accelerator: Accelerator, run: Run
) -> tuple[StepData | None, float]:
    """Take the first step and time it; None if its data is not there."""
    stream = run.stream
    through = stream.consumed + stream.sequences_per_step * config.gradient_accumulation
    deadline = time.monotonic() + WAIT_SECONDS
    while not stream.await_data(through, accelerator):
        if accelerator.num_processes > 1 or time.monotonic() > deadline:
            return None, 0.0
    loader: Any = steps_of(
        stream, num_microbatches=config.gradient_accumulation, packing=config.packing
    )
    with contextlib.closing(loader) as steps:
        data = next(steps)
    started = time.monotonic()
    _step(config, accelerator, run, data.microbatches)
    if accelerator.device.type == "cuda":
        torch.cuda.synchronize()
    return data, time.monotonic() - started


def _heaviest(config: TrainConfig, accelerator: Accelerator, run: Run) -> None:
    """The step that needs the most memory, now that the optimizer has its state, and evaluation.

    Several times over, as allocators take more before they find all places for what comes and goes.
    """
    step = heaviest_step(run.stream, config.gradient_accumulation, config.packing, run.steps)
    streams = run.evaluation.streams.values()
    heldout = [
        (batch, of_source(run.evaluation.terms, source))
        for source, stream in enumerate(streams)
        if (batch := heaviest_heldout(stream))
    ]
    for _ in range(ROUNDS):
        _step(config, accelerator, run, step[: 2 if config.gradient_accumulation > 1 else 1])
        run.model.eval()
        for batch, terms in heldout:
            with torch.no_grad():
                accelerator.unwrap_model(run.model).measure(batch.to(accelerator.device), terms)


def _step(
    config: TrainConfig, accelerator: Accelerator, run: Run, microbatches: list[Batch]
) -> None:
    """A step as a training takes it. Weights move, in memory alone."""
    run.model.train()
    kept = config.selection.kept_of(batch.num_targets for batch in microbatches)
    num_targets = sum_over_processes(accelerator, kept)
    terms = config.terms(run.first_step, run.steps)
    for i, batch in enumerate(microbatches):
        with microbatch(accelerator, run.model, is_last=i == len(microbatches) - 1):
            backward(accelerator, run.model(batch.to(accelerator.device), num_targets, terms).loss)
    if config.optimizer.max_grad_norm:
        accelerator.clip_grad_norm_(run.model.parameters(), config.optimizer.max_grad_norm)
    run.optimizer.step()
    run.optimizer.zero_grad()


def _there(path: Path) -> Path:
    """The path, or the first folder above it that exists."""
    return next(folder for folder in (path, *path.resolve().parents) if folder.exists())


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.2f} MB"


def _bytes(tensor: Tensor) -> int:
    """Of the part that this process holds, if the tensor is sharded."""
    local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return local.numel() * local.element_size()
