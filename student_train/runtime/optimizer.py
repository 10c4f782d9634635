"""AdamW and the learning rate of each step."""

import math

import torch

from decant.student_train.config.run import OptimizerConfig


def adamw(model: torch.nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW over what is trainable; biases and norms without weight decay."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(config.betas[0], config.betas[1]))


def learning_rate(config: OptimizerConfig, step: int, steps: int) -> float:
    """The rate of a step (0-based), a pure function, so that nothing needs to be saved."""
    warmup = config.warmup_steps or math.ceil(config.warmup_ratio * steps)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    if config.schedule == "constant":
        return config.lr
    progress = (step - warmup) / max(1, steps - warmup)
    shape = 1 - progress if config.schedule == "linear" else (1 + math.cos(math.pi * progress)) / 2
    return config.lr * (config.min_lr_ratio + (1 - config.min_lr_ratio) * shape)
