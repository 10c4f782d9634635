"""The training loop: stream, forward, backward, step; evaluate, checkpoint, resume, save.

Distribution, mixed precision and tracking are accelerate's. The loop reads from top to bottom.
"""

import contextlib
import dataclasses
import json
import logging
import math
import os
import resource
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from tqdm import tqdm

from storage import CacheReader
from student_train.checkpoint import (
    Checkpoints,
    config_record,
    refuse_other_config,
    truncate_metrics,
)
from student_train.config import OptimizerConfig, TrainConfig
from student_train.distiller import Distiller
from student_train.evaluate import evaluate
from student_train.stream import CacheStream
from student_train.student import load_student

log = logging.getLogger(__name__)

METRICS = "metrics.jsonl"
STUDENT = "student"
SUMMARY = "summary.json"


class NotFinite(RuntimeError):
    """The loss became NaN or infinite."""


def train(config: TrainConfig) -> dict[str, Any]:
    """Train a student from a cache; returns the summary that also stands in `summary.json`.

    A rerun with the same config resumes from the last checkpoint. Raises ValueError if the user
    must change something, NotFinite (naming the samples) if the loss stops being a number.
    """
    accelerator = Accelerator(
        mixed_precision=config.mixed_precision,
        log_with=config.trackers or None,
        project_dir=config.output,
    )
    available = {getattr(tracker, "value", tracker) for tracker in accelerator.log_with}
    if absent := sorted(set(config.trackers) - available):
        raise ValueError(f"trackers {absent} are unknown or not installed; pip install them")
    set_seed(config.seed)
    output = Path(config.output)
    if (output / SUMMARY).exists():
        return _finished(output, config)
    reader = CacheReader(config.cache)
    stream = CacheStream(
        config.cache,
        batch_size=config.batch_size,
        temperature=config.loss.temperature,
        seed=config.seed,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        part="train" if config.eval.heldout_fraction else "all",
        heldout_fraction=config.eval.heldout_fraction,
        pin_memory=accelerator.device.type == "cuda",
    )
    heldout = _heldout(config, reader, accelerator)
    student, tokenizer = load_student(config.student, reader, config.seed)
    if config.gradient_checkpointing:
        student.gradient_checkpointing_enable()
    model = Distiller(student, config.loss, reader.manifest.shared_vocab_size)
    optimizer = _adamw(model, config.optimizer)
    model, optimizer = accelerator.prepare(model, optimizer)

    sequences_per_step = (
        config.batch_size * config.gradient_accumulation * accelerator.num_processes
    )
    steps = config.steps or math.ceil(config.epochs * stream.num_sequences / sequences_per_step)
    checkpoints = Checkpoints(output / "checkpoints", config_record(config), accelerator)
    step = checkpoints.resume(stream)
    if accelerator.is_main_process:
        truncate_metrics(output / METRICS, step)
    if config.trackers:
        accelerator.init_trackers("decant", config=config_record(config))
    log.info(
        "%s parameters, world size %d, %d steps of %d sequences, %.2f epochs of %d sequences",
        f"{sum(p.numel() for p in student.parameters()):,}",
        accelerator.num_processes,
        steps,
        sequences_per_step,
        steps * sequences_per_step / stream.num_sequences,
        stream.num_sequences,
    )

    interrupted = _Interrupt()
    batches = iter(stream)
    model.train()
    window = _Window()
    bar = tqdm(
        total=steps,
        initial=step,
        desc="train",
        unit=" steps",
        disable=not accelerator.is_main_process or None,
    )
    while step < steps and not interrupted.anywhere(accelerator):
        started = time.monotonic()
        # The mean is over the targets of the whole step, so count before the first backward.
        microbatches = [next(batches) for _ in range(config.gradient_accumulation)]
        waited = time.monotonic() - started
        local_targets = sum(batch.num_targets for batch in microbatches)
        num_targets = accelerator.reduce(
            torch.tensor(float(local_targets), device=accelerator.device), reduction="sum"
        ).item()
        lr = learning_rate(config.optimizer, step, steps)
        for group in optimizer.param_groups:
            group["lr"] = lr
        parts = torch.zeros(3, device=accelerator.device)
        for i, batch in enumerate(microbatches):
            last = i == len(microbatches) - 1
            with _no_sync(accelerator, model, unless=last):
                out = model(batch.to(accelerator.device), num_targets)
                # DDP averages gradients over ranks; the loss is already divided by all targets.
                accelerator.backward(out.loss * accelerator.num_processes)
            parts += torch.stack([out.loss.detach(), out.kd, out.ce])
        loss, kd, ce = accelerator.reduce(parts, reduction="sum").tolist()
        if not math.isfinite(loss):
            ids = [sample for batch in microbatches for sample in batch.sample_ids]
            raise NotFinite(
                f"loss is {loss} at step {step + 1} (kd {kd}, ce {ce}); samples of this process: "
                f"{', '.join(ids[:32])}. The last checkpoint is untouched"
            )
        grad_norm = 0.0
        if config.optimizer.max_grad_norm:
            grad_norm = float(
                accelerator.clip_grad_norm_(model.parameters(), config.optimizer.max_grad_norm)
            )
        optimizer.step()
        optimizer.zero_grad()
        step += 1

        window.add(num_targets, waited, time.monotonic() - started)
        bar.update()
        bar.set_postfix_str(f"loss {loss:.3f}, {window.targets_per_s:.0f} targets/s", refresh=False)
        if step % config.log_every_steps == 0 or step == steps:
            _log(
                accelerator,
                output,
                {
                    "step": step,
                    "epoch": round(stream.epoch, 4),
                    "loss": loss,
                    "kd": kd,
                    "ce": ce,
                    "lr": lr,
                    "grad_norm": grad_norm,
                    "targets_per_s": round(window.targets_per_s, 1),
                    "data_wait_share": round(window.wait_share, 4),
                },
            )
            window = _Window()
        if heldout and _due(config.eval.every_steps, step) and step < steps:
            _log(accelerator, output, {"step": step, **evaluate(model, heldout, accelerator)})
        if _due(config.save_every_steps, step) and step < steps:
            checkpoints.save(step, stream, keep=config.keep_checkpoints)
    bar.close()
    batches.close()
    interrupted.restore()
    if step < steps:
        checkpoints.save(step, stream, keep=config.keep_checkpoints)
        raise KeyboardInterrupt

    summary: dict[str, Any] = {"steps": step, "epochs": round(stream.epoch, 4)}
    if heldout:
        summary |= evaluate(model, heldout, accelerator)
        _log(accelerator, output, {"step": step, **summary})
    summary["peak_memory_mb"] = round(peak_memory_bytes() / 1e6, 1)
    if accelerator.is_main_process:
        _save(accelerator.unwrap_model(model).student, tokenizer, output)
        record = {**summary, "config": config_record(config)}
        temporary = output / f".{SUMMARY}.tmp"
        temporary.write_text(json.dumps(record, indent=2) + "\n")
        os.replace(temporary, output / SUMMARY)
    accelerator.end_training()
    return summary


def _due(every: int, step: int) -> bool:
    return every > 0 and step % every == 0


def _finished(output: Path, config: TrainConfig) -> dict[str, Any]:
    """The summary of a run that is complete already. Raises ValueError if its config differs."""
    record = json.loads((output / SUMMARY).read_text())
    refuse_other_config(record.pop("config"), config_record(config), str(output))
    log.info("%s is complete already", output)
    return record


def learning_rate(config: OptimizerConfig, step: int, steps: int) -> float:
    """The rate of a step (0-based), a pure function, so that nothing needs to be saved."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    progress = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
    shape = 1 - progress if config.schedule == "linear" else (1 + math.cos(math.pi * progress)) / 2
    return config.lr * (config.min_lr_ratio + (1 - config.min_lr_ratio) * shape)


def peak_memory_bytes() -> int:
    """Peak memory of this process: of the GPU if there is one, else resident memory."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


def _heldout(
    config: TrainConfig, reader: CacheReader, accelerator: Accelerator
) -> CacheStream | None:
    if not (config.eval.cache or config.eval.heldout_fraction):
        return None
    if config.eval.cache:
        theirs = CacheReader(config.eval.cache).manifest
        ours = reader.manifest
        if theirs.tokenizer.fingerprint != ours.tokenizer.fingerprint:
            raise ValueError(
                f"{config.eval.cache} has another tokenizer ({theirs.tokenizer.fingerprint}) than "
                f"{config.cache} ({ours.tokenizer.fingerprint})"
            )
        if theirs.shared_vocab_size != ours.shared_vocab_size:
            raise ValueError(
                f"{config.eval.cache} has {theirs.shared_vocab_size} ids, {config.cache} "
                f"{ours.shared_vocab_size}"
            )
    return CacheStream(
        config.eval.cache or config.cache,
        batch_size=config.eval.batch_size,
        temperature=config.loss.temperature,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        part="heldout" if config.eval.heldout_fraction else "all",
        heldout_fraction=config.eval.heldout_fraction,
    )


def _adamw(model: torch.nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(config.betas[0], config.betas[1]))


def _no_sync(accelerator: Accelerator, model: torch.nn.Module, unless: bool) -> Any:
    return contextlib.nullcontext() if unless else accelerator.no_sync(model)


def _log(accelerator: Accelerator, output: Path, values: dict[str, Any]) -> None:
    if accelerator.is_main_process:
        output.mkdir(parents=True, exist_ok=True)
        with (output / METRICS).open("a") as file:
            file.write(json.dumps(values) + "\n")
    accelerator.log({k: v for k, v in values.items() if k != "step"}, step=values.get("step"))


def _save(student: Any, tokenizer: Any, output: Path) -> None:
    """Publish the student's directory whole: it is complete or absent."""
    temporary, target = output / f".{STUDENT}.tmp", output / STUDENT
    shutil.rmtree(temporary, ignore_errors=True)
    student.save_pretrained(temporary)
    if tokenizer is not None:
        tokenizer.save_pretrained(temporary)
    shutil.rmtree(target, ignore_errors=True)
    os.replace(temporary, target)


@dataclasses.dataclass
class _Window:
    """Throughput since the last logged line."""

    targets: float = 0.0
    waited: float = 0.0
    seconds: float = 0.0

    def add(self, targets: float, waited: float, seconds: float) -> None:
        self.targets += targets
        self.waited += waited
        self.seconds += seconds

    @property
    def targets_per_s(self) -> float:
        return self.targets / max(self.seconds, 1e-9)

    @property
    def wait_share(self) -> float:
        return self.waited / max(self.seconds, 1e-9)


class _Interrupt:
    """Ctrl-C and SIGTERM end the loop between two steps, on all ranks at the same one."""

    def __init__(self) -> None:
        self.asked = False
        self._previous: dict[int, Any] = {}
        try:
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._ask)
        except ValueError:  # not the main thread: whoever runs us handles signals
            pass

    def _ask(self, *_: object) -> None:
        self.asked = True

    def anywhere(self, accelerator: Accelerator) -> bool:
        if accelerator.num_processes == 1:
            return self.asked
        flag = torch.tensor(float(self.asked), device=accelerator.device)
        return bool(accelerator.reduce(flag, reduction="sum").item())

    def restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
