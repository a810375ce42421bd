"""Whether gradients pass quantised layers: one vector each way through every layer, with the first batch.

Kernels for inference compute a layer well and differentiate it wrongly, or not at all, without an error: the loss looks healthy.
A linear layer y = W x + b knows no such difference. For any v and g,

    <g, W v> = <W^T g, v>        forward on the left, backward on the right

With g = W v both sides are |W v|^2, so that nothing cancels. Nothing is dequantised, and no backend is named.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..distributed.sharding import is_sharded

TOLERANCE = {torch.float32: 1e-2, torch.float64: 1e-2, torch.bfloat16: 0.1, torch.float16: 0.1}
"""Relative. Of a backend that rounds its inputs to 8 bits, 4e-3; wrong gradients seen were off by 0.3 and more."""


def wrong_gradients(model: nn.Module, dtype: torch.dtype) -> tuple[str, float] | None:
    """The first quantised layer whose gradient is not that of what it computes, and how far it is off (relative).

    Args:
        dtype: what the layers receive in training.
    """
    for name, layer in model.named_modules():
        if _is_quantised(layer):
            off = _difference(layer, dtype)
            if not off <= TOLERANCE[dtype]:  # NaN is wrong as well
                return name, off
    return None


def _is_quantised(layer: nn.Module) -> bool:
    """A layer with the sizes of a linear one, and without a plain weight; whose numbers are here."""
    sized = all(isinstance(getattr(layer, size, None), int) for size in ("in_features", "out_features"))
    weight = getattr(layer, "weight", None)
    plain = type(weight) is nn.Parameter and type(weight.data) is Tensor and weight.is_floating_point()
    held = [*layer.parameters(recurse=False), *layer.buffers(recurse=False)]
    is_local = bool(held) and not any(is_sharded(t) or t.is_meta for t in held)
    return sized and not plain and is_local and not any(layer.children())


def _difference(layer: Any, dtype: torch.dtype) -> float:
    device = next(iter([*layer.parameters(recurse=False), *layer.buffers(recurse=False)])).device
    numbers = torch.randn(1, layer.in_features, generator=torch.Generator().manual_seed(0))
    vector = numbers.to(device, dtype).requires_grad_()
    bias = getattr(layer, "bias", None)
    with torch.enable_grad():
        product = layer(vector).float()
        if isinstance(bias, Tensor):
            product = product - bias.detach().float()
        if not product.requires_grad:
            return 1.0
        (gradient,) = torch.autograd.grad(product, vector, product.detach(), allow_unused=True)
    if gradient is None:
        return 1.0
    forward = product.detach().square().sum()
    backward = (gradient.float() * vector.detach().float()).sum()
    return ((forward - backward).abs() / forward.clamp_min(1e-30)).item()
