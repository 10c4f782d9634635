"""Running code of ours inside the wrapped forward of a model."""

import dataclasses
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn


class Sealed:
    """Keeps a batch or a loss in float32.

    FSDP2's mixed precision casts the float tensors of every argument and result that it can look
    into, dataclasses too: a teacher's log probs would be rounded to 16 bits on their way in.
    """

    def __init__(self, content: Any) -> None:
        self.content = content


def opened(out: tuple[Tensor | None, Sealed]) -> Any:
    """What is behind a module's hooks: ZeRO-3 gathers in the backward of the loss it hands out."""
    loss, content = out[0], out[1].content
    if loss is None:
        return content
    is_cast = loss.dtype != content.loss.dtype
    return content if is_cast else dataclasses.replace(content, loss=loss)


def call_as(
    module: nn.Module, forward: Callable[..., Any], *args: Any, wrapped: nn.Module | None = None
) -> Any:
    """Return `module(*args)`, or what wraps it of `args`, with `forward` in place of its own.

    So the module's hooks run around it: FSDP2 gathers a module's parameters before its forward and
    frees them after, wherever the module was sharded; DDP, in `wrapped`, exchanges gradients. What
    `forward` gives has a `loss`, which hooks see, unless there is nothing to learn from it.
    """

    def sealed(*args: Any) -> tuple[Tensor | None, Sealed]:
        out = forward(*args)
        return getattr(out, "loss", None), Sealed(out)

    own = module.__dict__.get("forward")
    module.forward = sealed
    try:
        return opened((wrapped or module)(*args))
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own
