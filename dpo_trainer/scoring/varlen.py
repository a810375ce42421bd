"""The variable-length attention kernels of GPUs: one call for a flat row. Which of them serves, and its arguments.

H query heads   K key/value heads   T tokens of the row   G gathered keys   d head size
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..types import Segments

LARGEST_HEAD = 256
OLDEST_CAPABILITY = (8, 0)
"""Compute capability of Ampere: flash attention does not run on earlier cards."""


class Kernel(NamedTuple):
    """A variable-length attention function."""

    name: str
    function: Callable[..., Any]
    arguments: Callable[[float, int, float | None, bool], dict[str, Any]]
    """(scale, keys to the left that a query sees or -1, soft cap, whether there are fewer heads of keys) -> its options."""

    @functools.cache  # noqa: B019  (there are two, and each layer asks)
    def takes(self, softcap: float | None) -> bool:
        """Whether this release has every option that is needed: `varlen_attn` of torch 2.10 and 2.11 lacks some."""
        try:
            inspect.signature(self.function).bind(*range(7), **self.arguments(1.0, -1, softcap, True))
        except TypeError:
            return False
        return True


def torch_arguments(scale: float, left: int, softcap: float | None, grouped: bool) -> dict[str, Any]:
    options: dict[str, Any] = {"scale": scale, "window_size": (left, 0), "enable_gqa": grouped}
    return options if softcap is None else {**options, "softcap": softcap}


def flash_attn_arguments(scale: float, left: int, softcap: float | None, grouped: bool) -> dict[str, Any]:
    same = torch.are_deterministic_algorithms_enabled()
    options: dict[str, Any] = {"softmax_scale": scale, "causal": True, "window_size": (left, 0), "deterministic": same}
    return options if softcap is None else {**options, "softcap": softcap}


@functools.cache
def kernels() -> list[Kernel]:
    """Those that are installed, the preferred one first."""
    found = []
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:  # torch < 2.10
        pass
    else:
        found.append(Kernel(f"varlen_attn of torch {torch.__version__}", varlen_attn, torch_arguments))
    try:
        import flash_attn
    except ImportError:
        pass
    else:
        name = f"flash_attn_varlen_func of flash-attn {flash_attn.__version__}"
        found.append(Kernel(name, flash_attn.flash_attn_varlen_func, flash_attn_arguments))
    return found


@functools.cache
def why_no_flash(device: torch.device) -> str | None:
    """Why flash attention does not run on this card; None where it does."""
    capability = torch.cuda.get_device_capability(device)
    if capability < OLDEST_CAPABILITY:
        return f"needs compute capability 8.0 (Ampere), this GPU has {'.'.join(map(str, capability))}"
    return None if torch.backends.cuda.is_flash_attention_available() else "is not part of this build of torch"


def flash_serves(query: Tensor, value: Tensor) -> bool:
    """Whether torch's attention without a mask takes its flash kernel, the one that knows heads of keys in groups."""
    same_size = query.shape[-1] == value.shape[-1] <= LARGEST_HEAD
    half = query.dtype in (torch.float16, torch.bfloat16)
    return query.is_cuda and half and same_size and why_no_flash(query.device) is None


def choose(
    query: Tensor, value: Tensor, dropout: float, softcap: float | None, s_aux: Tensor | None
) -> tuple[Kernel | None, str]:
    """The kernel for tensors on a GPU like these, or None; and why, in words that end a log line."""
    if query.dtype not in (torch.float16, torch.bfloat16):
        return None, f"{str(query.dtype).removeprefix('torch.')} has no variable-length kernel"
    if not query.shape[-1] == value.shape[-1] <= LARGEST_HEAD or query.shape[-1] % 8:
        return None, f"no variable-length kernel for heads of size {query.shape[-1]} with values of {value.shape[-1]}"
    if dropout or s_aux is not None:
        return None, f"no variable-length kernel with {'dropout' if dropout else 'attention sinks'}"
    if reason := why_no_flash(query.device):
        return None, f"flash attention {reason}"
    for kernel in kernels():
        if kernel.takes(softcap):
            return kernel, f"{kernel.name}, one call per layer"
    versions = f"torch {torch.__version__} nor an installed flash-attn"
    return None, f"neither {versions} has the variable-length kernel that is needed"


def varlen_attention(
    kernel: Kernel,
    query: Tensor,  # [1, H, T, d]
    key: Tensor,  # [1, K, T, d]
    value: Tensor,  # [1, K, T, d]
    segments: Segments,
    scaling: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """[1, T, H, d]. Its causal mask is aligned at the ends, which is what a prefix before the keys needs."""
    index = segments.varlen(query.device)
    row = [x[0].transpose(0, 1) for x in (query, key, value)]  # [T, heads, d]
    left = -1 if window is None else window - 1
    out = kernel.function(
        row[0],
        row[1][index.keys_at],  # [G, K, d]
        row[2][index.keys_at],
        index.cu_queries,
        index.cu_keys,
        index.max_queries,
        index.max_keys,
        **kernel.arguments(scaling, left, softcap, query.shape[1] != key.shape[1]),
    )
    return out[None]
