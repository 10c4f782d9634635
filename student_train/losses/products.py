"""Matrix products of 16-bit inputs whose results and sums stay in float32.

Owns the choice between a device that can write a wide result (CUDA) and one that cannot.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor


def product_dtype(a: Tensor, b: Tensor) -> torch.dtype:
    """Return the dtype to multiply in: autocast's where it is on, else the one both share."""
    device_type = a.device.type
    if torch.is_autocast_enabled(device_type) and a.dtype != torch.float64:
        return torch.get_autocast_dtype(device_type)
    if a.dtype != b.dtype:
        raise ValueError(f"hidden is {a.dtype} but weight {b.dtype}, outside autocast")
    return a.dtype


def product_into(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """Return out = a b, in out's dtype from the accumulator on where the device can."""
    if a.dtype == out.dtype:
        return torch.mm(a, b, out=out)
    if _has_wide_output(a.device, a.dtype, out.dtype):
        return torch.mm(a, b, out_dtype=out.dtype, out=out)
    return out.copy_(a @ b)


def wide_linear(
    hidden_NH: Tensor, weight_VH: Tensor, bias_V: Tensor | None
) -> Callable[[slice], Tensor]:
    """Return a function that gives float32 logits [R, V] of some rows, without a gradient."""
    narrow = product_dtype(hidden_NH, weight_VH)
    wide = torch.promote_types(hidden_NH.dtype, torch.float32)
    head_HV = weight_VH.detach().to(narrow).T

    def logits_of(rows: slice) -> Tensor:
        hidden_RH = hidden_NH[rows].detach().to(narrow)
        out = hidden_RH.new_empty(len(hidden_RH), head_HV.shape[1], dtype=wide)
        with torch.autocast(hidden_RH.device.type, enabled=False):
            product_into(hidden_RH, head_HV, out)
        return out if bias_V is None else out.add_(bias_V.detach())

    return logits_of


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add aᵀ b to `total` in total's dtype; `a` is in it too, `b` may be narrower."""
    if b.dtype != total.dtype and _has_wide_output(b.device, b.dtype, total.dtype):
        torch.addmm(total, a.to(b.dtype).T, b, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(a.T, b.to(total.dtype))


@functools.cache
def _has_wide_output(device: torch.device, narrow: torch.dtype, wide: torch.dtype) -> bool:
    """Return whether the device multiplies `narrow` matrices into a `wide` result, by trying."""
    ones = torch.ones(16, 16, dtype=narrow, device=device)
    total = torch.ones(16, 16, dtype=wide, device=device)
    try:
        torch.addmm(total, ones.T, ones, out_dtype=wide, out=total)
        torch.mm(ones, ones, out_dtype=wide, out=ones.to(wide))
    except (RuntimeError, TypeError):
        return False
    return bool((total == 17).all())
