"""What makes a `transformers.Trainer` distil from a cache: its data, its loss, its evaluation.

Everything else stays the trainer's: optimizer, schedule, checkpoints, resuming, processes, logging.
The student is the trainer's model itself, so that what is saved loads as any other.
"""

import json
from collections.abc import Iterator, Sized
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import Sampler
from transformers import AutoTokenizer, PreTrainedModel, TrainerCallback, TrainingArguments
from transformers.trainer_utils import EvalLoopOutput, get_last_checkpoint

from decant.schemas import FormatError
from decant.student_train.config.loss import LossConfig
from decant.student_train.data.batch import Batch
from decant.student_train.data.heldout import heldout_batches
from decant.student_train.data.served import refuse_unserved
from decant.student_train.evaluation.heldout_sums import HeldoutSums
from decant.student_train.model.distiller import Distiller
from decant.student_train.model.probes import packing_refused
from decant.student_train.model.student import load_tokenizer
from decant.student_train.model.tokenizer import check_student_tokenizer
from decant.student_train.runtime.distributed import sum_over_processes
from decant.student_train.trainers.dataset import CacheDataset, Collator, RowGroupSampler

RECORD = "decant.json"
"""Beside a checkpoint: what the order of its data follows from."""
WITHOUT_EFFECT: dict[str, Any] = {
    "label_smoothing_factor": 0.0,
    "torch_compile": False,
    "train_sampling_strategy": "random",
}
"""Arguments of a trainer that would be passed over, and the value that says nothing."""


class Distilling:
    """To be mixed into a `Trainer`, before it among the bases; `distil` once it is made."""

    loss_is_scaled_for_ga: bool | None = True
    """The loss is divided by the targets of the whole step: the trainer leaves it alone."""
    accelerator: Accelerator
    args: TrainingArguments
    is_fsdp_enabled: bool
    is_deepspeed_enabled: bool
    state: Any
    model: Any
    optimizer: Any
    processing_class: Any
    train_dataset: Any
    eval_dataset: Any
    distiller: Distiller

    def distil(
        self, train: CacheDataset, heldout: Any, loss: LossConfig | None, packing: str
    ) -> None:
        """Train on a dataset, evaluate on another or on several by name.

        Raises ValueError or FormatError if student, data and arguments do not fit each other.
        """
        self.loss = loss or LossConfig()
        if self.loss.preset:
            raise ValueError(
                f"loss.preset {self.loss.preset} is of a mixture, and a dataset is one cache: "
                "`decant train` takes mixtures; here give a kind"
            )
        refuse_without_effect(self.args)
        if self.is_fsdp_enabled or self.is_deepspeed_enabled or split_models(self.accelerator):
            raise ValueError(
                "several processes train by DDP here; for FSDP2 and DeepSpeed: accelerate launch "
                "-m decant.student_train"
            )
        held = heldout if isinstance(heldout, dict) else {"": heldout} if heldout else {}
        for dataset in (train, *held.values()):
            check_dataset(dataset, self.loss)
        student = plain_student(self.model)
        with self.accelerator.autocast():
            self.distiller = Distiller(student, self.loss, train.vocab_size)
            if refusal := packing_refused(student, packing):
                raise refusal
        self.train_dataset, self.eval_dataset = train, heldout
        self.add_callback(_Record(train))  # type: ignore[attr-defined]

    def train(self, resume_from_checkpoint: str | bool | None = None, **options: Any) -> Any:
        """As the trainer's; raises ValueError if the checkpoint is of other data."""
        folder = resume_from_checkpoint
        if folder is True:
            folder = get_last_checkpoint(self.args.output_dir)
        if isinstance(folder, str) and (record := Path(folder, RECORD)).exists():
            was, now = json.loads(record.read_text()), self.train_dataset.fingerprint
            if other := [name for name in now if was.get(name) != now[name]]:
                raise ValueError(
                    f"cannot resume from {folder} on {self.train_dataset.url}: {other[0]} was "
                    f"{was.get(other[0])}, is {now[other[0]]}"
                )
        return super().train(resume_from_checkpoint, **options)  # type: ignore[misc]

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: float | None = None,
    ) -> Any:
        """The share of a batch in the loss of its step, for the mean of gradients over processes.

        Without the step's number of targets, the mean over the batch alone.
        """
        if not isinstance(inputs, Batch):
            raise ValueError(
                f"the loss needs a Batch, found {type(inputs).__name__}: leave data_collator out, "
                "or give Collator(train_dataset)"
            )
        terms = self.loss.at(self.state.global_step, max(self.state.max_steps, 1))
        with self.accelerator.autocast():
            out = self.distiller.within(model, self.model, inputs, num_items_in_batch, terms)
        loss = out.loss
        if num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes
        return (loss, out) if return_outputs else loss

    def get_batch_samples(
        self, epoch_iterator: Iterator[Batch], num_batches: int, device: torch.device
    ) -> tuple[list[Batch], float]:
        """The microbatches of a step, and the targets of all of them on all processes."""
        batches, _ = super().get_batch_samples(  # type: ignore[misc]
            epoch_iterator, num_batches, device
        )
        count = sum(batch.num_targets for batch in batches)
        return batches, sum_over_processes(self.accelerator, count)

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        return RowGroupSampler(
            dataset,
            read_ahead=self.args.dataloader_num_workers == 0,
            dealt=(
                self.args.train_batch_size,
                self.accelerator.process_index,
                self.accelerator.num_processes,
            ),
        )

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """This process's share of a held-out dataset, in stored order."""
        if isinstance(eval_dataset, str):
            eval_dataset = self.eval_dataset[eval_dataset]
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        check_dataset(dataset, self.loss)
        return HeldoutLoader(dataset, self.args.eval_batch_size, self.accelerator)

    @torch.no_grad()
    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """The means over all targets of all processes, as `student_train` evaluates.

        With the numbers of the loss at the last step. Nothing is predicted.
        """
        if not isinstance(dataloader, HeldoutLoader):
            raise ValueError("nothing is predicted here: call evaluate(a CacheDataset)")
        steps = max(self.state.max_steps, 1)
        terms = self.loss.at(steps - 1, steps)
        device = self.accelerator.device
        sums = HeldoutSums.zero(device)
        was_training = self.model.training
        self.model.eval()
        with self.accelerator.autocast():
            for batch, counts in dataloader:
                its = self.distiller.measure(batch.to(device), terms)
                if counts:
                    sums += its
        self.model.train(was_training)
        sums = sums.map(lambda flat: self.accelerator.reduce(flat, reduction="sum").cpu())
        found = {f"{metric_key_prefix}_{name}": value for name, value in sums.metrics().items()}
        found[f"{metric_key_prefix}_loss"] = found.pop(f"{metric_key_prefix}_heldout_loss")
        return EvalLoopOutput(
            predictions=(), label_ids=None, metrics=found, num_samples=len(dataloader.dataset)
        )


class HeldoutLoader(Sized):
    """The batches of a held-out dataset for one process, and whether each counts."""

    def __init__(self, dataset: CacheDataset, batch_size: int, accelerator: Accelerator) -> None:
        self.dataset = dataset
        self._stream = dataset.stream(
            batch_size=batch_size,
            rank=accelerator.process_index,
            world_size=accelerator.num_processes,
        )

    def __len__(self) -> int:
        return -(-len(self.dataset) // self._stream.sequences_per_step)

    def __iter__(self) -> Iterator[tuple[Batch, bool]]:
        return heldout_batches(self._stream)


class _Record(TrainerCallback):
    """Notes with each checkpoint which data it was trained on."""

    def __init__(self, dataset: CacheDataset) -> None:
        self._dataset = dataset

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        folder = Path(args.output_dir, f"checkpoint-{state.global_step}")
        if state.is_world_process_zero and folder.is_dir():
            (folder / RECORD).write_text(json.dumps(self._dataset.fingerprint))


def collator_for(train: Any, packing: str) -> Collator:
    """The default collator of a trainer on a dataset. Raises ValueError for another dataset."""
    if not isinstance(train, CacheDataset):
        raise ValueError(f"train_dataset must be a CacheDataset, found {type(train).__name__}")
    return Collator(train, packing)


def tokenizer_for(train: CacheDataset, model: Any, own: Any) -> Any | None:
    """The cache's tokenizer, to be saved with the student; None if the cache has none.

    Raises FormatError with the first difference if the student's, `own` or where its model came
    from, is another one, ValueError if there is none to compare with.
    """
    tokenizer = load_tokenizer(train.reader)
    path = model if isinstance(model, str) else getattr(model, "name_or_path", "")
    if tokenizer is None:
        return own
    if own is None and path:
        try:
            own = AutoTokenizer.from_pretrained(path)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"student {path} has no tokenizer to compare with the cache's: give "
                f"processing_class, its tokenizer ({error})"
            ) from error
    if own is not None:
        try:
            check_student_tokenizer(tokenizer, own, path or own.name_or_path, train.url)
        except FormatError as error:
            raise FormatError(
                f"{error} Trainers of transformers and TRL take the cache's tokenizer alone; "
                "`decant train` with tokenizer_mismatch: align trains a student of another one"
            ) from error
    return tokenizer


def plain_student(model: Any) -> PreTrainedModel:
    """The transformers model in an adapter of peft's, or itself.

    Raises ValueError for adapters that put something before a student's input.
    """
    if not hasattr(model, "peft_config"):
        return model
    if getattr(model.active_peft_config, "is_prompt_learning", False):
        kind = model.active_peft_config.peft_type
        raise ValueError(
            f"an adapter of type {kind} puts tokens of its own before the student's input, and the "
            "targets would be beside them: train LoRA, or another that adapts layers"
        )
    student: PreTrainedModel = model.get_base_model()
    return student


def check_dataset(dataset: Any, loss: LossConfig) -> None:
    """Raise ValueError unless it is a cache's, with the temperatures of the loss."""
    if not isinstance(dataset, CacheDataset):
        raise ValueError(f"a dataset must be a CacheDataset, found {type(dataset).__name__}")
    absent = [t for t in loss.temperatures if t not in (1.0, *dataset.temperatures)]
    refuse_unserved(loss, dataset.reader)
    if absent:
        raise ValueError(
            f"loss.temperature {absent[0]:g} is not among those of the dataset of {dataset.url}: "
            f"CacheDataset(..., temperature={list(loss.temperatures)})"
        )


def split_models(accelerator: Accelerator) -> bool:
    """Whether one model or one sequence is split over devices."""
    split = getattr(accelerator, "parallelism_config", None)
    return split is not None and any((split.tp_enabled, split.cp_enabled, split.sp_enabled))


def refuse_without_effect(args: TrainingArguments) -> None:
    """Raise ValueError for arguments that would be passed over, and for what shares no batch."""
    for name, silent in WITHOUT_EFFECT.items():
        if getattr(args, name, silent) != silent:
            raise ValueError(f"{name}={getattr(args, name)!r} has no effect here: leave it out")
    if args.n_gpu > 1:
        raise ValueError(
            f"one process sees {args.n_gpu} GPUs and would copy the student to each: launch with "
            "torchrun or accelerate launch, or let CUDA_VISIBLE_DEVICES name one"
        )
