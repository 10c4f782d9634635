"""python hf_trainer.py CACHE STUDENT OUTPUT, or with torchrun --nproc_per_node N."""

import sys

from transformers import AutoModelForCausalLM, TrainingArguments

from decant.student_train import LossConfig
from decant.student_train.trainers import CacheDataset, DistillationTrainer

cache, path, output = sys.argv[1:]
train, heldout = (
    CacheDataset(cache, part=part, heldout_fraction=0.2) for part in ("train", "heldout")
)
trainer = DistillationTrainer(
    AutoModelForCausalLM.from_pretrained(path),
    TrainingArguments(
        output,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        num_train_epochs=2,
        learning_rate=1e-2,
        eval_strategy="epoch",
    ),
    train_dataset=train,
    eval_dataset=heldout,
    loss=LossConfig(kind="fkl", ce_weight=0.3),
)
trainer.train()
trainer.save_model()
