"""The output layer of a model and what scales it, found so that it can be applied apart.

Shapes: N rows, H hidden, V vocabulary.
"""

import logging
from collections.abc import Callable
from typing import Any

import torch
from accelerate.utils import align_module_device, has_offloaded_params
from torch import Tensor

log = logging.getLogger(__name__)

Head = Callable[[Tensor], Tensor]
"""[N, H] hidden states to [N, V] logits."""


@torch.inference_mode()
def find_head(model: Any, device: torch.device, vocab_size: int) -> Head | None:
    """The model's own head on hidden states, or None if it cannot be reproduced exactly.

    Checked by comparing with the model's logits on a few tokens, so that an architecture with
    another final step (scaling, capping) is caught rather than assumed away.
    """
    settings = model.config.get_text_config()
    linear = model.get_output_embeddings()
    if linear is None:
        log.info("the head cannot be applied apart: the model names no output layer")
        return None
    cap = getattr(settings, "final_logit_softcapping", None)
    scale = getattr(settings, "logit_scale", None) or 1 / (
        getattr(settings, "logits_scaling", None) or 1
    )

    def head(hidden_NH: Tensor) -> Tensor:
        if has_offloaded_params(linear):  # but in place now: its own hook would fetch it again
            logits = torch.nn.functional.linear(hidden_NH, linear.weight, linear.bias)
        else:
            logits = linear(hidden_NH.to(linear.weight.device))
        if scale != 1:
            logits = logits * scale
        return cap * torch.tanh(logits / cap) if cap else logits

    probe = torch.arange(1, min(9, vocab_size), device=device).unsqueeze(0)
    try:
        hidden = model.base_model(input_ids=probe, use_cache=False).last_hidden_state
        with align_module_device(linear):
            ours = head(hidden[0]).float()
    except (AttributeError, TypeError, RuntimeError) as error:
        log.info("the head cannot be applied apart: %s", error)
        return None
    theirs = model(input_ids=probe, use_cache=False).logits[0].float().to(ours.device)
    same = ours.shape == theirs.shape and torch.allclose(
        ours, theirs, rtol=1e-3, atol=1e-3, equal_nan=True
    )
    return head if same else None
