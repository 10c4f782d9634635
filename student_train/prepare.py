"""From a config to what the loop works with: data, student, optimizer, checkpoints."""

import contextlib
import dataclasses
import json
import logging
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from transformers import PreTrainedModel

from decant.schemas import Manifest
from decant.storage import CacheReader, Store
from decant.storage.cache import paths
from decant.student_train.config.evaluation import OF_ENTRIES
from decant.student_train.config.run import TrainConfig
from decant.student_train.data.generations import generations_of
from decant.student_train.data.served import refuse_unserved, warn_of_prefixes
from decant.student_train.data.stream import SequenceStream
from decant.student_train.evaluation.answers import Generation
from decant.student_train.evaluation.chat_prompts import chat_prompts
from decant.student_train.evaluation.evaluate import Evaluation
from decant.student_train.model.adapters import attach, checkpoint_adapter_only, load_options
from decant.student_train.model.alignment import Alignment, label_bytes
from decant.student_train.model.distiller import Distiller
from decant.student_train.model.fake_quantise import fake_quantise
from decant.student_train.model.probes import freeze_unused, packing_refused
from decant.student_train.model.student import (
    check_savable,
    compile_layers,
    fingerprint,
    load_student,
    student_vocab_size,
)
from decant.student_train.outputs.best import BEST
from decant.student_train.outputs.checkpoint import CHECKPOINTS, Checkpoints, step_name
from decant.student_train.outputs.metrics import METRICS
from decant.student_train.outputs.resuming import (
    batch_record,
    changes,
    config_record,
    leaves,
    refuse_other_batches,
    refuse_other_config,
)
from decant.student_train.outputs.save import STUDENT, SUMMARY
from decant.student_train.prepare_data import (
    heldout_streams,
    refuse_unknown_entropy,
    training_stream,
)
from decant.student_train.runtime.distributed import (
    is_deepspeed,
    of_first_process,
    refuse_differing,
    refuse_unshared,
    shards_weights,
)
from decant.student_train.runtime.optimizer import adamw

log = logging.getLogger(__name__)

PATHS = ("output", "cache", "path")
"""Last parts of the names of options whose values may be spelt differently on each machine."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Run:
    """What the loop works with."""

    stream: SequenceStream
    """This process's share of the training data, at the place where the run goes on."""
    manifests: list[Manifest]
    """Those of the caches that are trained on."""
    evaluation: Evaluation
    """What to evaluate on; false if nothing."""
    model: Any
    """The `Distiller`, wrapped by accelerate."""
    optimizer: Any
    """AdamW, wrapped by accelerate."""
    tokenizer: Any | None
    """The tokenizer to save with the student."""
    adapter: Any | None
    """peft's model around the student, if an adapter is trained."""
    load_base: Callable[[], PreTrainedModel]
    """Loads the student anew, as it was before training."""
    checkpoints: Checkpoints
    """Where the run's state goes."""
    first_step: int
    """Steps that were done before."""
    steps: int
    """Steps when the run is complete."""
    alignment: Alignment | None
    """What the caches of another tokenizer than the student's are aligned by."""


@contextlib.contextmanager
def held(output: Path, accelerator: Accelerator) -> Iterator[None]:
    """Keep other runs out of the output folder.

    Raises Busy if one is in it, ValueError if not all processes see the folder.
    """
    with contextlib.ExitStack() as stack:
        if accelerator.is_main_process:
            stack.enter_context(Store(output).lock())
        refuse_unshared(output, accelerator)
        yield


def refuse_disagreement(config: TrainConfig, accelerator: Accelerator) -> None:
    """Raise ValueError if processes were started with different configs, or see different files.

    Without it they would train on together, each from a state of its own, or wait for ever.
    """
    if accelerator.num_processes == 1:
        return
    output = Path(config.output)
    options = leaves(dataclasses.asdict(config))
    urls = [share.cache for share in config.mixture] or [config.cache] * (not config.follow)
    if config.eval.cache:
        urls.append(config.eval.cache)
    readers = [CacheReader(url) for url in urls]
    refuse_differing(
        {
            **{name: value for name, value in options.items() if not name.endswith(PATHS)},
            "the caches' ids": [reader.manifest.cache_id for reader in readers],
            "the caches' generations": generations_of(readers),
            "checkpoints in output": [p.name for p in sorted(output.glob(f"{CHECKPOINTS}/step-*"))],
            "summary.json in output": (output / SUMMARY).exists(),
        }
    )


def check_output(config: TrainConfig) -> None:
    """Raise ValueError if the output is not a folder, or holds what somebody else wrote."""
    output = Path(config.output)
    if output.exists() and not output.is_dir():
        raise ValueError(f"output {output} is not a directory: choose another")
    for folder in (output, *output.resolve().parents):
        if (folder / paths.MANIFEST).is_file() and (folder / paths.SHARDS).is_dir():
            raise ValueError(
                f"output {output} is in the cache {folder}, which holds nothing but itself: choose "
                "another"
            )
    student = output / STUDENT
    if config.student.path and Path(config.student.path).resolve() == student.resolve():
        raise ValueError(
            f"output {output} would replace student.path {config.student.path}: choose another"
        )
    ours = any((output / name).exists() for name in (METRICS, SUMMARY, CHECKPOINTS))
    if student.exists() and not ours:
        raise ValueError(
            f"{student} was not written by a training, and would be replaced: choose another output"
        )


def finished(output: Path, config: TrainConfig, num_processes: int) -> dict[str, Any] | None:
    """The summary of a run that is complete already, else None.

    It is not complete if the config asks for more steps by now. Raises ValueError if it was of
    another config, or if it left no checkpoint to go on from.
    """
    if not (output / SUMMARY).exists():
        return None
    record = json.loads((output / SUMMARY).read_text())
    theirs, ours = record.pop("config"), config_record(config)
    refuse_other_config(theirs, ours, str(output))
    if found := changes(theirs, ours):
        if config.steps <= theirs["steps"] and config.epochs <= theirs["epochs"]:
            said = ", ".join(
                f"{name} was {was!r}, is {now!r}" for name, (was, now) in found.items()
            )
            raise ValueError(
                f"{output} is complete after {record['steps']} steps, and {said}: give more "
                "steps to train on, or another output"
            )
        if config.eval.keep_best or not any((output / CHECKPOINTS).glob("step-*")):
            raise ValueError(
                f"{output} is complete after {record['steps']} steps, of which no checkpoint is "
                "left to go on from (one is with save_every_steps and without eval.keep_best). "
                f"Train its student on, with student.path: {output / STUDENT} and another output"
            )
        return None
    refuse_other_batches(record.pop("batches"), batch_record(config, num_processes), str(output))
    # A run that is killed after its last word leaves what it would have removed then.
    if not config.save_every_steps:
        shutil.rmtree(output / CHECKPOINTS / step_name(record["steps"]), ignore_errors=True)
    shutil.rmtree(output / BEST, ignore_errors=True)
    log.info(
        "%s is complete already: nothing is trained. To train again, choose another output", output
    )
    return record


def prepare(config: TrainConfig, accelerator: Accelerator) -> Run:
    """Open the data, build or load the student, resume. Raises ValueError if they do not fit."""
    alignment = None
    if config.tokenizer_mismatch == "align":
        alignment = Alignment(config.student, config.align)
    as_events = alignment.stream_options if alignment else {}
    stream = training_stream(config, accelerator, as_events)
    reader = stream.reader
    refuse_unknown_entropy(config, stream.readers)
    for i, (loss, of_cache) in enumerate(zip(config.losses, stream.readers, strict=True)):
        refuse_unserved(loss, of_cache, aligned=stream.is_aligned(i))
    for share, of_cache in zip(config.mixture, stream.readers, strict=False):
        warn_of_prefixes(share.prefixes, of_cache)
    if config.selection.by and stream.has_events:
        raise ValueError(
            f"selection.by {config.selection.by}: the targets are chunks of tokens, or labels "
            "alone, and a loss is taken on whole chunks: leave it out"
        )
    heldout = heldout_streams(config, reader, accelerator, as_events)
    held_as = load_options(config.adapter, getattr(torch, config.student.dtype), accelerator.device)
    if alignment and alignment.any:
        held_as["aligned"] = (alignment.tokenizer, stream.vocab_size)
    student, tokenizer = load_student(config.student, reader, config.seed, **held_as)
    check_savable(student, tokenizer)
    is_quantised = bool(getattr(student, "is_quantized", False))
    if is_quantised and not config.adapter.r:
        raise ValueError(
            f"student.path {config.student.path} holds quantised weights, which cannot be trained "
            "themselves: train an adapter (adapter.r), or give the weights before quantisation"
        )
    if config.student.dtype == "bfloat16" and not config.adapter.r:
        log.warning(
            "student.dtype bfloat16 rounds away most of AdamW's small steps: float32 with "
            "mixed_precision bf16 learns more, for 4 more bytes per parameter"
        )
    generation = None
    if config.eval.generation.path:
        if shards_weights(accelerator):
            raise ValueError("eval.generation needs the whole student on every device")
        add_bos = bool(reader.manifest.sequences.get("add_bos"))
        chat = chat_prompts(
            config.eval.generation,
            tokenizer,
            reader.manifest,
            is_aligned=bool(alignment and alignment.any),
        )
        generation = Generation(
            config.eval.generation, tokenizer, add_bos=add_bos, seed=config.seed, chat=chat
        )
    metric, _, one = config.eval.keep_best.partition("/")
    if one and (len(heldout) < 2 or one not in heldout):
        raise ValueError(
            f"eval.keep_best {metric}/{one}: the held-out parts are {', '.join(heldout) or 'none'}"
        )
    compared = [r for stream in heldout.values() for r in stream.readers]
    has_entries = any(r.manifest.truncation.rule.has_entries for r in compared)
    if metric in OF_ENTRIES and not has_entries:
        raise ValueError(
            f"eval.keep_best {metric} needs the teacher's entries, and {compared[0].url} holds "
            f"{compared[0].manifest.truncation.text()}: take heldout_ce, top1_accuracy or another"
        )
    if config.eval.keep_best and is_deepspeed(accelerator):
        raise ValueError("eval.keep_best cannot be had with DeepSpeed: use DDP or FSDP2")
    if not shards_weights(accelerator) and not is_quantised:
        student.to(accelerator.device)
    if config.student.qat.scheme:
        fake_quantise(student, config.student.qat)
    if config.gradient_checkpointing:
        student.gradient_checkpointing_enable()
    # As read on the first process, the only one to have the weights under FSDP's lean loading.
    is_first = accelerator.is_main_process
    base = of_first_process(fingerprint(student) if config.adapter.r and is_first else "")
    adapter = attach(student, config.adapter) if config.adapter.r else None
    if adapter and not (shards_weights(accelerator) or is_deepspeed(accelerator)):
        checkpoint_adapter_only(accelerator)
    with accelerator.autocast():  # as in training: flash attention takes 16 bits alone
        freeze_unused(student)
        vocab_size = stream.vocab_size
        if not (alignment and alignment.any):
            vocab_size = student_vocab_size(student, tokenizer, reader, config.loss.tail)
        measured = label_bytes(tokenizer, vocab_size) if heldout else None
        model = Distiller(student, config.loss, vocab_size, config.selection, measured)
        refusal = packing_refused(student, config.packing)
    # FSDP may load the weights on the first process alone: what others find out counts for nothing.
    model.head = of_first_process(model.head)
    if refusal := of_first_process(refusal):
        raise refusal
    if config.compile:
        compile_layers(student)
    num_parameters = sum(p.numel() for p in model.parameters())
    num_trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    model, optimizer = accelerator.prepare(model, adamw(model, config.optimizer))

    checkpoints = Checkpoints(
        Path(config.output) / CHECKPOINTS,
        config_record(config),
        batch_record(config, accelerator.num_processes),
        accelerator,
        base=base,
    )
    first_step = checkpoints.resume(stream)
    sequences_per_step = (
        config.batch_size * config.gradient_accumulation * accelerator.num_processes
    )
    to_come = (config.epochs - stream.epoch) * stream.num_sequences
    steps = config.steps or first_step + max(0, math.ceil(to_come / sequences_per_step - 1e-9))
    config.refuse_long_warmup(steps)
    if steps < first_step:
        raise ValueError(
            f"{config.output}: {first_step:,} steps are done, and this config has {steps:,}: give "
            "as many or more, or another output"
        )
    log.info(
        "trains %s of %s parameters in steps %s to %s of %s sequences each, epoch %.2f to %.2f, "
        "on %d %s",
        f"{num_trainable:,}",
        f"{num_parameters:,}",
        f"{min(first_step + 1, steps):,}",
        f"{steps:,}",
        f"{sequences_per_step:,}",
        stream.epoch,
        stream.epoch + (steps - first_step) * sequences_per_step / stream.num_sequences,
        accelerator.num_processes,
        "process" if accelerator.num_processes == 1 else "processes",
    )
    return Run(
        stream=stream,
        manifests=[reader.manifest for reader in stream.readers],
        evaluation=Evaluation(
            streams=heldout,
            generation=generation,
            # What is evaluated on beside the caches is measured by what they have in common.
            terms=config.loss.at(steps - 1, steps)
            if config.eval.cache
            else config.terms(steps - 1, steps),
        ),
        model=model,
        optimizer=optimizer,
        tokenizer=tokenizer,
        adapter=adapter,
        load_base=lambda: load_student(config.student, reader, config.seed, **held_as)[0],
        checkpoints=checkpoints,
        first_step=first_step,
        steps=steps,
        alignment=alignment,
    )
