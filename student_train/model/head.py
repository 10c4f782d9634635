"""What turns a student's last hidden states into its logits, found out by asking it.

The fused loss needs the head as a linear map, scaled and capped. Architectures differ in where they
scale and cap, so what their configs say is confirmed on the model, never assumed.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


class UnusualHead(Exception):
    """The student's logits are not a linear map of its last hidden state, scaled and capped."""


@torch.no_grad()
def linear_head(student: PreTrainedModel) -> dict[str, Any]:
    """`logit_scale` and `softcap` that turn what the head puts out into the model's logits.

    Found in the config and confirmed by a forward over a few tokens, in which the head's output is
    replaced by numbers wide enough that scales and caps show. Raises UnusualHead with the reason.
    """
    head = student.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise UnusualHead(f"its head is a {type(head).__name__}")
    settings = student.config.get_text_config()
    tokens = torch.arange(1, 9, device=head.weight.device).unsqueeze(0) % settings.vocab_size
    calls: list[tuple[Tensor, Tensor, Tensor]] = []

    def replace(_: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
        spread = torch.linspace(-100, 100, output.shape[-1], device=output.device)
        calls.append((args[0], output, spread.to(output.dtype).expand_as(output)))
        return calls[-1][-1]

    hook = head.register_forward_hook(replace)
    try:
        with probing(student):
            logits = student(input_ids=tokens, use_cache=False).logits
            hidden = student.base_model(input_ids=tokens, use_cache=False).last_hidden_state
    except (AttributeError, TypeError, RuntimeError, ValueError) as error:
        raise UnusualHead(f"the head cannot be applied apart: {error}") from error
    finally:
        hook.remove()
    if len(calls) != 1:
        raise UnusualHead(f"its forward calls the head {len(calls)} times")
    its_input, output, replaced = calls[0]
    if not _close(its_input, hidden):
        raise UnusualHead("its head does not read the last hidden state")
    if not _close(output, nn.functional.linear(its_input, head.weight, head.bias)):
        raise UnusualHead("its head is not the product with its weight")
    softcap = getattr(settings, "final_logit_softcapping", None)
    for scale in _possible_scales(settings):
        ours = scale * replaced.float()
        if softcap:
            ours = softcap * torch.tanh(ours / softcap)
        if _close(logits, ours):
            return {"logit_scale": scale, "softcap": softcap}
    raise UnusualHead("its logits are no scaled and capped output of its head that its config says")


@contextlib.contextmanager
def probing(student: PreTrainedModel) -> Iterator[None]:
    """Evaluation mode, and an attention that runs where the student is.

    Flash attention needs a GPU, where a student that is to be sharded is not yet: sdpa stands for
    it there, whose masks come from the same position ids.
    """
    was_training = student.training
    attention = attention_of(student)
    on_cpu = student.get_input_embeddings().weight.device.type == "cpu"
    student.eval()
    try:
        if "flash" in attention and on_cpu:
            student.set_attn_implementation("sdpa")
        yield
    finally:
        student.train(was_training)
        if "flash" in attention and on_cpu:
            student.set_attn_implementation(attention)


def attention_of(student: PreTrainedModel) -> str:
    """The attention implementation that transformers chose for a model."""
    return getattr(student.config, "_attn_implementation", None) or ""


def _possible_scales(settings: Any) -> list[float]:
    """What model families multiply the head's output by, as their configs call it; always 1."""
    scales = [1.0]
    for name in ("logit_scale", "lm_head_multiplier", "output_multiplier", "logits_scaling"):
        if value := getattr(settings, name, None):
            # Granite divides by logits_scaling, HyperCLOVA X multiplies.
            scales += [float(value), 1 / float(value)]
    return scales


def _close(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors agree to 16-bit rounding; a broken student is for the loss to find."""
    if a.shape != b.shape:
        return False
    a, b = a.float(), b.float()
    rounding = 1e-2 * float(b.nan_to_num().abs().mean())
    return torch.allclose(a, b, rtol=1e-2, atol=rounding, equal_nan=True)
