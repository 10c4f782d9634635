"""TRL's `SFTTrainer`, distilling from a cache. TRL is imported here alone.

By TRL's own points of extension: a dataset that is not to be prepared, and a subclass with a loss
of its own.
"""

from typing import Any

from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from decant.student_train.config.loss import LossConfig
from decant.student_train.trainers.dataset import CacheDataset
from decant.student_train.trainers.distilling import Distilling, collator_for, tokenizer_for

WITHOUT_EFFECT: dict[str, Any] = {
    "packing": False,
    "padding_free": False,
    "loss_type": "nll",
    "completion_only_loss": None,
    "assistant_only_loss": False,
}
"""Settings of TRL for data and loss, which are the cache's and ours, and what says nothing."""


class DistillationSFTTrainer(Distilling, SFTTrainer):
    """An `SFTTrainer` whose data is a cache and whose loss is the distillation loss, head fused."""

    def __init__(
        self,
        model: Any,
        args: SFTConfig,
        *,
        train_dataset: CacheDataset,
        eval_dataset: CacheDataset | dict[str, CacheDataset] | None = None,
        loss: LossConfig | None = None,
        packing: str = "none",
        processing_class: Any | None = None,
        **options: Any,
    ) -> None:
        """`model` is a causal language model or its path; `options` are those of `SFTTrainer`.

        `peft_config` among them makes an adapter as TRL does. `loss` and `packing` are as in
        `TrainConfig`; lengths and masks are the cache's. Raises as `DistillationTrainer`.
        """
        if not isinstance(args, SFTConfig):
            raise ValueError(f"args must be an SFTConfig, found {type(args).__name__}")
        for name, silent in WITHOUT_EFFECT.items():
            if getattr(args, name) != silent:
                hint = "give the trainer packing='rows'" if name == "packing" else "leave it out"
                raise ValueError(f"SFTConfig.{name}={getattr(args, name)!r} has no effect: {hint}")
        args.dataset_kwargs = {**(args.dataset_kwargs or {}), "skip_prepare_dataset": True}
        options.setdefault("data_collator", collator_for(train_dataset, packing))
        held = eval_dataset if isinstance(eval_dataset, dict) else {"": eval_dataset}
        stood_for = {name: _stand_in(dataset) for name, dataset in held.items() if dataset}
        super().__init__(
            model,
            args,
            train_dataset=_stand_in(train_dataset),
            eval_dataset=stood_for if isinstance(eval_dataset, dict) else stood_for.get(""),
            processing_class=tokenizer_for(train_dataset, model, processing_class),
            **options,
        )
        self.distil(train_dataset, eval_dataset, loss, packing)


def _stand_in(dataset: CacheDataset) -> Dataset:
    """What TRL looks at in place of a cache: as many rows, of the columns of prepared data."""
    return Dataset.from_dict({"input_ids": [[]] * len(dataset), "labels": [[]] * len(dataset)})
