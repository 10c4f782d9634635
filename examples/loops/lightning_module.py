"""python lightning_module.py CACHE STUDENT OUTPUT."""

import sys

import pytorch_lightning as pl
import torch
from transformers import AutoModelForCausalLM

from decant.student_train import CacheStream, Distiller, LossConfig


class Training(pl.LightningModule):
    def __init__(self, model: Distiller) -> None:
        super().__init__()
        self.model, self.automatic_optimization = model, False

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.model.parameters(), lr=1e-2)

    def training_step(self, microbatches: list, _: int) -> None:
        num_targets = sum(batch.num_targets for batch in microbatches)
        for batch in microbatches:
            self.manual_backward(self.model(batch, num_targets).loss)
        self.optimizers().step()
        self.optimizers().zero_grad()


stream = CacheStream(sys.argv[1], batch_size=4)
student = AutoModelForCausalLM.from_pretrained(sys.argv[2]).train()
model = Distiller(student, LossConfig(kind="fkl", ce_weight=0.3), stream.vocab_size)
pl.Trainer(max_epochs=2, logger=False).fit(Training(model), stream.epoch_steps(2))
student.save_pretrained(sys.argv[3])
