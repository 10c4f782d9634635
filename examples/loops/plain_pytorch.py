"""python plain_pytorch.py CACHE STUDENT OUTPUT, or with torchrun --nproc_per_node N."""

import os
import sys

import torch
from torch import distributed
from transformers import AutoModelForCausalLM

from decant.student_train import CacheStream, Distiller, LossConfig

rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
stream = CacheStream(sys.argv[1], batch_size=4, rank=rank, world_size=world_size)
student = AutoModelForCausalLM.from_pretrained(sys.argv[2]).train()
model = Distiller(student, LossConfig(kind="fkl", ce_weight=0.3), stream.vocab_size)
if world_size > 1:
    distributed.init_process_group()
    model = torch.nn.parallel.DistributedDataParallel(model)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
for _ in range(2):  # epochs
    for microbatches in stream.epoch_steps(2):
        num_targets = torch.tensor(float(sum(batch.num_targets for batch in microbatches)))
        if world_size > 1:
            distributed.all_reduce(num_targets)
        for batch in microbatches:  # DDP takes the mean over processes
            (model(batch, num_targets.item()).loss * world_size).backward()
        optimizer.step()
        optimizer.zero_grad()
if rank == 0:
    student.save_pretrained(sys.argv[3])
