"""Questions a model answers by running: does it see later tokens, does it mix packed sequences?"""

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from decant.student_train.model.head import attention_of, probing

log = logging.getLogger(__name__)

PROBED_LENGTHS = (9, 7)

POSITION_TOLERANCE = 0.1
"""Of the hidden states: 16-bit weights round, places that were not counted anew change far more."""


def packing_refused(student: PreTrainedModel, packing: str) -> ValueError | None:
    """Why packed sequences are not to the student as if they were alone; None if they are.

    Rows end in the same sequence after another one. What comes out for it must have no gradient
    at all at what comes before it, and be what comes out for it alone. The student is asked in the
    form and on the device that training will use.
    """
    if packing == "none":
        return None
    if packing == "rows" and "flash" in attention_of(student):
        return _refusal(student, packing, "flash attention takes packed sequences in one row only")
    device = student.get_input_embeddings().weight.device
    first, second = PROBED_LENGTHS
    tokens = torch.arange(1, first + second + 1, device=device)
    tokens %= student.config.get_text_config().vocab_size
    counts = torch.arange(first, device=device)
    num_rows = 2 if packing == "rows" else 1
    rows = tokens.expand(num_rows, -1)
    positions = torch.cat([counts, counts[:second]]).expand(num_rows, -1)
    try:
        with probing(student), _embedding(student) as embedded:
            packed = student.base_model(input_ids=rows, position_ids=positions, use_cache=False)[0]
            seen = packed[:, first:].float()
            ramp = torch.linspace(-1, 1, seen[0].numel(), device=device).view_as(seen[0])
            (slope,) = torch.autograd.grad((seen * ramp).sum(), embedded[-1])
            alone = student.base_model(input_ids=tokens[None, first:], use_cache=False)[0]
    except (TypeError, RuntimeError, ValueError, IndexError) as error:
        return _refusal(student, packing, f"it refuses position ids: {error}")
    if not slope[:, first:].isfinite().all():
        return None  # a broken student is for the loss to find
    if slope[:, :first].any() or not slope[:, first:].any():
        return _refusal(student, packing, "a sequence sees the one before it in its row")
    if (seen - alone.float()).norm() > POSITION_TOLERANCE * seen.norm():
        return _refusal(student, packing, "a sequence comes out otherwise than alone")
    return None


def refuse_sight_of_later_tokens(student: PreTrainedModel) -> None:
    """Raise ValueError if what comes out at a place has a gradient at a later one.

    An encoder would be trained to copy the very token it is asked for. A student that cannot be
    asked, or puts out no numbers, is for the loss to find.
    """
    device = student.get_input_embeddings().weight.device
    first, second = PROBED_LENGTHS
    tokens = torch.arange(1, first + second + 1, device=device).unsqueeze(0)
    tokens %= student.config.get_text_config().vocab_size
    try:
        with probing(student), _embedding(student) as embedded:
            seen = student.base_model(input_ids=tokens, use_cache=False)[0][:, :first].float()
            ramp = torch.linspace(-1, 1, seen.numel(), device=device).view_as(seen)
            (slope,) = torch.autograd.grad((seen * ramp).sum(), embedded[-1])
    except (TypeError, RuntimeError, ValueError, IndexError) as error:
        log.info("student %s: not asked whether it is causal: %s", type(student).__name__, error)
        return
    if slope.isfinite().all() and slope[:, first:].any():
        raise ValueError(
            f"the student sees later tokens: {type(student).__name__} is not a causal language "
            "model as configured; for BERT-like models set is_decoder: true"
        )


def freeze_unused(student: PreTrainedModel) -> int:
    """Freeze what no text reaches, and give how many weights that is.

    The vision part of a multimodal student, or a decoder's attention to an encoder that is not
    there: such weights would have no gradient, for which DDP would wait in vain. Experts are left
    alone, as other tokens than those asked may choose them.
    """
    device = student.get_input_embeddings().weight.device
    tokens = torch.arange(1, sum(PROBED_LENGTHS), device=device).unsqueeze(0)
    tokens %= student.config.get_text_config().vocab_size
    try:
        with probing(student), torch.enable_grad():
            reached = _leaves(student(input_ids=tokens, use_cache=False).logits)
    except (TypeError, RuntimeError, ValueError, IndexError) as error:
        log.info("student %s: not asked what it uses: %s", type(student).__name__, error)
        return 0
    unused = [
        (name, parameter)
        for name, parameter in student.named_parameters()
        if parameter.requires_grad and id(parameter) not in reached and "expert" not in name
    ]
    for _, parameter in unused:
        parameter.requires_grad_(False)
    if unused:
        log.info(
            "student %s: %d tensors that text does not reach stay as they are, first %s",
            type(student).__name__,
            len(unused),
            unused[0][0],
        )
    return sum(parameter.numel() for _, parameter in unused)


def _leaves(output: Tensor) -> set[int]:
    """The ids of the parameters in the graph of a tensor; no gradient is computed."""
    found: set[int] = set()
    seen = set()
    waiting = [output.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.add(id(node.variable))
        waiting += [following for following, _ in node.next_functions]
    return found


@contextlib.contextmanager
def _embedding(student: PreTrainedModel) -> Iterator[list[Tensor]]:
    """What the input embedding puts out, call by call, as leaves that take gradients."""
    embedded: list[Tensor] = []

    def keep(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        embedded.append(output.detach().requires_grad_())
        return embedded[-1]

    hook = student.get_input_embeddings().register_forward_hook(keep)
    try:
        with torch.enable_grad():
            yield embedded
    finally:
        hook.remove()


def _refusal(student: PreTrainedModel, packing: str, reason: str) -> ValueError:
    other = {
        "rows": "packing: padding_free, which flash attention needs, or packing: none",
        "padding_free": "packing: rows, or packing: none",
    }[packing]
    return ValueError(
        f"packing {packing!r} does not keep sequences apart in {type(student).__name__} with "
        f"attention {attention_of(student)!r}: {reason}. Use {other}"
    )
