"""Build a whole run, take one step, say what it will need; write nothing."""

import contextlib
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor

from decant.student_train.config.run import TrainConfig
from decant.student_train.data.steps import StepData, steps_of
from decant.student_train.evaluation.answers import Generation
from decant.student_train.outputs.hub import check_hub
from decant.student_train.outputs.metrics import peak_memory_bytes
from decant.student_train.prepare import Run, check_output, finished, prepare
from decant.student_train.prepare_data import overrides
from decant.student_train.runtime.distributed import (
    backward,
    microbatch,
    start_accelerator,
    sum_over_processes,
)

WAIT_SECONDS = 10.0


def dry_run(config: TrainConfig) -> str:
    """A report for people; raises what `train` would raise before its first step."""
    check_output(config)
    accelerator = start_accelerator(config)
    set_seed(config.seed)
    output = Path(config.output)
    if finished(output, config, accelerator.num_processes) is not None:
        return f"{output} is complete already: the run would do nothing"
    if config.push_to_hub and accelerator.is_main_process:
        check_hub(config.push_to_hub)
    run = prepare(config, accelerator)
    before = peak_memory_bytes()
    rows: list[tuple[str, str]] = _data_rows(config, accelerator, run)
    data, seconds = _one_step(config, accelerator, run)
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
        ("peak memory", f"{_size(peak_memory_bytes())} of the {where} in one step"),
        ("", f"{_size(before)} of it before the step"),
    ]
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


def _one_step(
    config: TrainConfig, accelerator: Accelerator, run: Run
) -> tuple[StepData | None, float]:
    """Take the first step; None if its data is not there. Weights move, in memory alone."""
    stream, model = run.stream, run.model
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
    model.train()
    started = time.monotonic()
    kept = config.selection.kept_of(batch.num_targets for batch in data.microbatches)
    num_targets = sum_over_processes(accelerator, kept)
    terms = config.loss.at(run.first_step, run.steps, overrides(config))
    for i, batch in enumerate(data.microbatches):
        with microbatch(accelerator, model, is_last=i == len(data.microbatches) - 1):
            backward(accelerator, model(batch.to(accelerator.device), num_targets, terms).loss)
    run.optimizer.step()
    if accelerator.device.type == "cuda":
        torch.cuda.synchronize()
    return data, time.monotonic() - started


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.2f} MB"


def _bytes(tensor: Tensor) -> int:
    """Of the part that this process holds, if the tensor is sharded."""
    local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return local.numel() * local.element_size()
