"""The load-balancing loss of a mixture of experts, as the student's own class computes it."""

import dataclasses
import logging
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from decant.student_train.model.head import probing

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Routers:
    """What keeps a student's routers from sending every token to the same experts."""

    weight: float
    balance: Callable[..., Tensor]
    """transformers' function of router logits, number of experts, experts per token and mask."""
    num_experts: int
    num_chosen: int

    def loss(self, router_logits: Any, mask: Tensor | None) -> Tensor:
        """[] the auxiliary loss of one batch, without its weight; `mask` [R, L] leaves out padding.

        1 per chosen expert if all experts are used alike, up to `num_experts` if only one is.
        """
        return self.balance(router_logits, self.num_experts, self.num_chosen, mask)


def routers_of(student: PreTrainedModel, weight: float | None) -> Routers | None:
    """The student's routers, if it has any that its class balances by a loss of their own.

    `weight` None takes the config's `router_aux_loss_coef`. Raises ValueError for a weight that
    would have no effect. What is computed here is compared with what the student itself gives.
    """
    name = type(student).__name__
    balance = vars(sys.modules[type(student).__module__]).get("load_balancing_loss_func")
    num_experts, num_chosen = (
        getattr(student, key, None) for key in ("num_experts", "num_experts_per_tok")
    )
    settings = student.config.get_text_config()
    coefficient = getattr(settings, "router_aux_loss_coef", None)
    if balance is None or num_experts is None or num_chosen is None:
        if weight:
            raise ValueError(f"loss.router_weight {weight}: {name} has no loss of its routers")
        if coefficient:
            log.warning("student %s: the loss of its routers cannot be had and is left out", name)
        return None
    if weight is None:
        weight = coefficient
    if not weight:
        return None
    routers = Routers(
        weight=float(weight), balance=balance, num_experts=num_experts, num_chosen=num_chosen
    )
    tokens = torch.arange(1, 9, device=student.get_input_embeddings().weight.device).unsqueeze(0)
    asked: dict[str, Any] = {"input_ids": tokens % settings.vocab_size, "use_cache": False}
    asked["output_router_logits"] = True
    with probing(student), torch.no_grad():
        expected = student(**asked).aux_loss
        found = routers.loss(student.base_model(**asked).router_logits, None)
    if not torch.allclose(found.float(), expected.float(), rtol=1e-3):
        raise ValueError(
            f"student {name}: the loss of its routers is {float(found):.4f} as decant computes it, "
            f"{float(expected):.4f} in its own forward. Set loss.router_weight: 0 to train without"
        )
    log.info("student %s: the loss of its routers counts with weight %g", name, weight)
    return routers
