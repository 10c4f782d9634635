"""python trl_sft.py CACHE STUDENT OUTPUT: an adapter by TRL; or with torchrun."""

import sys

import torch
from peft import LoraConfig
from trl import SFTConfig

from decant.student_train import LossConfig
from decant.student_train.trainers import CacheDataset, DistillationSFTTrainer

cache, path, output = sys.argv[1:]
trainer = DistillationSFTTrainer(
    path,
    SFTConfig(
        output,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        num_train_epochs=2,
        learning_rate=1e-2,
        bf16=torch.cuda.is_available(),
    ),
    train_dataset=CacheDataset(cache),
    loss=LossConfig(kind="fkl", ce_weight=0.3),
    peft_config=LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"),
)
trainer.train()
trainer.save_model()
