"""Weights that an engine cuts between ranks (FSDP2, DeepSpeed ZeRO-3): to read, change and copy them.

Whatever is collective says so: every rank must call it, in the same order.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor


def is_cut(weight: Tensor) -> bool:
    """Whether this rank holds a part of it alone."""
    return isinstance(weight, DTensor) or hasattr(weight, "ds_id")


def shape_of(weight: Tensor) -> tuple[int, ...]:
    """The whole shape, also of a weight that ZeRO-3 has cut."""
    return tuple(getattr(weight, "ds_shape", weight.shape))


def class_of(model: nn.Module) -> type[nn.Module]:
    """The model's class, not the one that FSDP2 makes of it."""
    return type(model).__bases__[1] if isinstance(model, FSDPModule) else type(model)


def own_part(value: Any) -> Any:
    """What this rank holds of a tensor that FSDP2 spread over all; anything else as it is."""
    return value.to_local() if isinstance(value, DTensor) else value


@contextlib.contextmanager
def whole(weight: Tensor, *, write: bool = False) -> Iterator[Tensor]:
    """The weight itself where it is not cut, else all of it, for as long as the block lasts. Collective.

    `write`: what the block makes of it is kept; all ranks must make the same.
    """
    if isinstance(weight, DTensor):
        # Weights that FSDP keeps on the host travel between devices.
        there: DTensor = weight.detach().to(weight.device_mesh.device_type)  # type: ignore[assignment]
        full = there.full_tensor()
        yield full
        if write:
            weight.detach().copy_(distribute_tensor(full, weight.device_mesh, weight.placements, src_data_rank=None))
    elif hasattr(weight, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([weight], modifier_rank=0 if write else None):
            yield weight
    else:
        yield weight


def kept(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Whole weights on the host, as safetensors takes them: on the rank that writes; nothing on the others. Collective."""
    copies = {}
    for name, weight in weights.items():
        with whole(weight) as full:
            if not dist.is_initialized() or dist.get_rank() == 0:
                copies[name] = _on_host(full)
    return copies


def _on_host(weight: Tensor) -> Tensor:
    return weight.detach().cpu().clone(memory_format=torch.contiguous_format)


def copy_of(model: nn.Module) -> nn.Module:
    """A deep copy with whole weights, on the host where the model is cut. Collective."""
    copied = copy.deepcopy(model)  # of a weight that ZeRO-3 has cut, an empty one
    for own, weight in zip(copied.parameters(), model.parameters(), strict=True):
        if hasattr(weight, "ds_id"):
            with whole(weight) as full:
                own.data = _on_host(full)
    return copied
