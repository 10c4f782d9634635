"""The training loop: data, forward, backward, step; evaluate, checkpoint, save.

Distribution, mixed precision and tracking are accelerate's. The loop reads from top to bottom:
`prepare` sets up what it works with, `steps_of` gives the data of a step, `progress` tells what
happens, `checkpoint` and `save` write what stays.
"""

import contextlib
import dataclasses
import logging
import math
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, set_seed

from decant.student_train.config.loss import shown
from decant.student_train.config.run import TrainConfig
from decant.student_train.data.steps import StepData, steps_of
from decant.student_train.losses.divergences import OUTSIDE, outside_means
from decant.student_train.outputs.best import Best
from decant.student_train.outputs.hub import check_hub, push
from decant.student_train.outputs.metrics import Metrics, Recent, by_cache, peak_memory_bytes
from decant.student_train.outputs.model_card import model_card
from decant.student_train.outputs.plots import PLOT, draw
from decant.student_train.outputs.progress import Progress
from decant.student_train.outputs.resuming import batch_record, config_record, leaves
from decant.student_train.outputs.save import STUDENT, save_student, save_summary
from decant.student_train.prepare import (
    Run,
    check_output,
    finished,
    held,
    prepare,
    refuse_disagreement,
)
from decant.student_train.prepare_data import names_of
from decant.student_train.runtime.distributed import (
    backward,
    microbatch,
    of_first_process,
    start_accelerator,
    sum_over_processes,
)
from decant.student_train.runtime.interrupt import Interrupt
from decant.student_train.runtime.optimizer import learning_rate

log = logging.getLogger(__name__)


class NotFinite(RuntimeError):
    """The loss or its gradient became NaN or infinite."""


def train(config: TrainConfig) -> dict[str, Any]:
    """Train a student from a cache; returns the summary that is also in `summary.json`.

    A rerun with the same config resumes from the last checkpoint. Raises ValueError if the user
    must change something, Busy if another run is writing to the output, NotFinite (naming the
    samples) if the loss stops being a number, NotWritten if a checkpoint or the student cannot be
    saved.
    """
    check_output(config)
    accelerator = start_accelerator(config)
    set_seed(config.seed)
    refuse_disagreement(config, accelerator)
    output = Path(config.output)
    with held(output, accelerator):
        summary = finished(output, config, accelerator.num_processes)
        if config.push_to_hub and accelerator.is_main_process:
            check_hub(config.push_to_hub)
        if summary is None:
            summary = _train(config, accelerator, output)
        if config.push_to_hub and accelerator.is_main_process:
            log.info(push(output / STUDENT, config.push_to_hub, private=config.hub_private))
    return summary


def _train(config: TrainConfig, accelerator: Accelerator, output: Path) -> dict[str, Any]:
    """From what is prepared to what is saved; the summary."""
    started = time.monotonic()
    run = prepare(config, accelerator)
    is_trained = run.first_step == run.steps
    metrics = Metrics(output, accelerator, resumed_at=run.first_step, is_trained=is_trained)
    best = None
    if config.eval.keep_best:
        best = Best(
            config.eval.keep_best,
            config.eval.patience,
            output,
            accelerator,
            resumed_at=run.first_step,
        )
    if config.trackers:  # which take numbers and texts by name
        options = leaves(dataclasses.asdict(config))
        shown = {k: v if isinstance(v, int | float | str) else str(v) for k, v in options.items()}
        accelerator.init_trackers("decant", config=shown)
    before: dict[str, float] = {}
    try:
        with Progress(run.steps, run.first_step, accelerator) as progress:
            if run.evaluation and run.first_step == 0:
                before = run.evaluation.metrics(run.model, accelerator)
                metrics.write({"step": 0, **before})
                progress.evaluated(0, before, "before training")
            elif run.evaluation:
                before = of_first_process(metrics.of_step(0))
            summary = _loop(config, accelerator, run, metrics, best, progress)
            if run.evaluation:
                found = run.evaluation.metrics(run.model, accelerator, output)
                if not (best and best.should_stop):
                    metrics.write({**summary, "step": summary["steps"], **found})
                    if best:
                        best.update(summary["steps"], found, run.model)
                    progress.evaluated(summary["steps"], found)
                if best and best.step not in (0, summary["steps"]):
                    best.load(run.model)
                    found = run.evaluation.metrics(run.model, accelerator, output)
                    progress.evaluated(best.step, found, f"the best {best.metric}, which is saved")
                summary |= {**found, "before": before}
    finally:
        if config.plots and accelerator.is_main_process and metrics.path.exists():
            try:
                draw(metrics.path, output / PLOT)
            except OSError as error:  # a full disk: the student is what matters
                log.warning("no %s: %s", output / PLOT, error)
    if best:
        summary["best_step"] = best.step
    if config.student.qat.scheme:
        summary["quantised"] = config.student.qat.scheme
    summary |= {
        "peak_memory_mb": round(peak_memory_bytes() / 1e6, 1),
        "wall_s": round(time.monotonic() - started, 1),
        "resumed_at": run.first_step,
    }
    run.optimizer.zero_grad()  # makes room: the student is read back beside the trained one
    save_student(
        accelerator,
        run.model,
        run.tokenizer,
        output,
        card=model_card(config, run.manifests, summary),
        adapter=run.adapter,
        load_base=run.load_base if config.adapter.merge else None,
        qat=config.student.qat if config.student.qat.scheme else None,
        trust_remote_code=config.student.trust_remote_code,
    )
    if accelerator.is_main_process:
        records = {
            "config": config_record(config),
            "batches": batch_record(config, accelerator.num_processes),
        }
        save_summary({**summary, **records}, output)
        if not config.save_every_steps:
            run.checkpoints.remove(summary["steps"])
    if best:
        best.remove()
    accelerator.end_training()
    return summary


def _loop(
    config: TrainConfig,
    accelerator: Accelerator,
    run: Run,
    metrics: Metrics,
    best: Best | None,
    progress: Progress,
) -> dict[str, Any]:
    """Train to the last step. Raises KeyboardInterrupt, checkpointed, if asked to stop."""
    model, optimizer = run.model, run.optimizer
    step, epoch, recent = run.first_step, run.stream.epoch, Recent()
    data: StepData | None = None
    caches = names_of([share.cache for share in config.mixture])
    consumed = run.stream.consumed
    sequences_per_step = run.stream.sequences_per_step * config.gradient_accumulation

    def save(step: int, data: StepData) -> None:
        run.checkpoints.save(step, data.state, keep=config.keep_checkpoints)
        progress.say(step, f"checkpoint {run.checkpoints.path(step)}")

    if best and best.should_stop:  # it did, before it was interrupted
        return {"steps": step, "epochs": round(epoch, 4)}
    with (
        Interrupt() as interrupted,
        contextlib.closing(
            steps_of(
                run.stream,
                num_microbatches=config.gradient_accumulation,
                packing=config.packing,
                pin_memory=accelerator.device.type == "cuda",
            )
        ) as steps,
    ):
        model.train()
        while step < run.steps and not interrupted.anywhere(accelerator):
            if not run.stream.await_data(consumed + sequences_per_step, accelerator):
                continue
            started = time.monotonic()
            data = next(steps)
            consumed = data.state["consumed"]
            waited_s = time.monotonic() - started

            # The mean is over the targets of the whole step, on all processes.
            kept = config.selection.kept_of(batch.num_targets for batch in data.microbatches)
            num_targets = sum_over_processes(accelerator, kept)
            lr = learning_rate(config.optimizer, step, run.steps)
            for group in optimizer.param_groups:
                group["lr"] = lr
            terms = config.terms(step, run.steps)

            parts = []
            for i, batch in enumerate(data.microbatches):
                is_last = i == len(data.microbatches) - 1
                with microbatch(accelerator, model, is_last=is_last):
                    out = model(batch.to(accelerator.device), num_targets, terms)
                    backward(accelerator, out.loss)
                parts.append(out.as_one())
            loss, kd, ce, *rest = accelerator.reduce(sum(parts), reduction="sum").tolist()
            outside, rest = rest[: len(OUTSIDE)], rest[len(OUTSIDE) :]
            router, of_caches = rest[: len(rest) % 3], rest[len(rest) % 3 :]
            if not math.isfinite(loss):
                raise _not_finite(f"loss is {loss} (kd {kd}, ce {ce})", step, data, parts)

            grad_norm = 0.0
            if config.optimizer.max_grad_norm:
                grad_norm = float(
                    accelerator.clip_grad_norm_(model.parameters(), config.optimizer.max_grad_norm)
                )
                if not math.isfinite(grad_norm) and config.mixed_precision != "fp16":
                    raise _not_finite(f"the norm of the gradient is {grad_norm}", step, data, parts)
            optimizer.step()
            optimizer.zero_grad()
            step, epoch = step + 1, data.epoch

            num_tokens = data.num_tokens * accelerator.num_processes  # shares are about equal
            took_s = time.monotonic() - started
            recent.add(num_targets, num_tokens, waited_s, took_s)
            progress.stepped(loss, recent, took_s)
            if step % config.log_every_steps == 0 or step == run.steps:
                values = {"step": step, "epoch": round(epoch, 4), "loss": loss, "kd": kd, "ce": ce}
                values |= {"router": router[0]} if router else {}
                values |= by_cache(of_caches, caches)
                values |= outside_means(outside)
                numbers = shown(terms, config.scheduled, caches)
                values |= {"lr": lr, "grad_norm": grad_norm, **numbers}
                metrics.write({**values, **recent.summary()})
                progress.logged(step, values, recent)
                recent = Recent()
            if run.evaluation and _due(config.eval.every_steps, step) and step < run.steps:
                found = run.evaluation.metrics(model, accelerator)
                metrics.write({"step": step, **found})
                if best:
                    best.update(step, found, model)
                progress.evaluated(step, found, f"best at step {best.step}" if best else "")
                if best and best.should_stop:
                    progress.say(step, f"stops, {best.metric} was best at step {best.step}")
                    break
            if _due(config.save_every_steps, step) and step < run.steps:
                save(step, data)
        stopped = interrupted.anywhere(accelerator)
        if data:  # evaluating and saving the student take their time, and may fail
            save(step, data)
    if stopped:
        raise KeyboardInterrupt(f"after step {step}; the same command goes on from there")
    return {"steps": step, "epochs": round(epoch, 4)}


def _due(every: int, step: int) -> bool:
    return every > 0 and step % every == 0


def _not_finite(what: str, step: int, data: StepData, parts: list[torch.Tensor]) -> NotFinite:
    """Names the samples of the microbatches that are to blame, on all processes."""
    blamed = [
        sample
        for batch, values in zip(data.microbatches, parts, strict=True)
        if not values.isfinite().all()
        for sample in batch.sample_ids
    ]
    ids = gather_object(blamed) or gather_object(
        [sample for batch in data.microbatches for sample in batch.sample_ids]
    )
    named = ", ".join(ids[:32]) + (f" and {len(ids) - 32} more" if len(ids) > 32 else "")
    return NotFinite(f"{what} at step {step + 1}; samples: {named}. No checkpoint was touched")
