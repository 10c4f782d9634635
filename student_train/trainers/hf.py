"""`transformers.Trainer`, distilling from a cache."""

from typing import Any

from transformers import Trainer, TrainingArguments

from decant.student_train.config.loss import LossConfig
from decant.student_train.trainers.dataset import CacheDataset
from decant.student_train.trainers.distilling import Distilling, collator_for, tokenizer_for


class DistillationTrainer(Distilling, Trainer):
    """A `Trainer` whose data is a cache and whose loss is the distillation loss, head fused."""

    def __init__(
        self,
        model: Any,
        args: TrainingArguments | None = None,
        *,
        train_dataset: CacheDataset,
        eval_dataset: CacheDataset | dict[str, CacheDataset] | None = None,
        loss: LossConfig | None = None,
        packing: str = "none",
        processing_class: Any | None = None,
        **options: Any,
    ) -> None:
        """`model` is a causal language model, or peft's adapter around one.

        `loss` and `packing` are as in `TrainConfig`; `processing_class` is the student's tokenizer,
        by default where the model came from, and is compared with the cache's. `options` are those
        of `Trainer`.

        Raises FormatError if the tokenizer is another one, ValueError if something does not fit.
        """
        options.setdefault("data_collator", collator_for(train_dataset, packing))
        super().__init__(
            model,
            args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=tokenizer_for(train_dataset, model, processing_class),
            **options,
        )
        self.distil(train_dataset, eval_dataset, loss, packing)
