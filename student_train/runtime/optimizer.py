"""AdamW and the learning rate of each step."""

import math

import torch

from decant.student_train.config.run import OptimizerConfig

FUSED_ON = ("cpu", "cuda", "xpu", "mps")
"""Devices on which torch takes the whole step in one kernel, without tensors in between."""


def adamw(model: torch.nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW over what is trainable; biases and norms without weight decay."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    fused = all(p.device.type in FUSED_ON for p in parameters)
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    betas = (config.betas[0], config.betas[1])
    return torch.optim.AdamW(groups, lr=config.lr, betas=betas, fused=fused or None)


def learning_rate(config: OptimizerConfig, step: int, steps: int) -> float:
    """The rate of a step (0-based), a pure function, so that nothing needs to be saved.

    The last step of the warmup and the one after it have `lr`; the last step of the run has
    `min_lr_ratio` of it. A ratio of 0 is that of the step after it, as a step of rate 0 teaches
    nothing.
    """
    warmup = config.warmup_steps or math.ceil(config.warmup_ratio * steps)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    if config.schedule == "constant":
        return config.lr
    end = steps - 1 if config.min_lr_ratio else steps
    progress = min(1.0, (step - warmup) / max(1, end - warmup))
    shape = 1 - progress if config.schedule == "linear" else (1 + math.cos(math.pi * progress)) / 2
    return config.lr * (config.min_lr_ratio + (1 - config.min_lr_ratio) * shape)
