"""Read, change and copy weights that an engine shards between ranks (FSDP2, DeepSpeed ZeRO-3).

A function that says "Collective" must be called by every rank, in the same order.
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


def is_sharded(weight: Tensor) -> bool:
    """Whether this rank holds only a shard of the weight."""
    return isinstance(weight, DTensor) or hasattr(weight, "ds_id")


def shape_of(weight: Tensor) -> tuple[int, ...]:
    """The full shape, also of a weight that ZeRO-3 has sharded."""
    return tuple(getattr(weight, "ds_shape", weight.shape))


def class_of(model: nn.Module) -> type[nn.Module]:
    """Return the model's class, not the subclass that FSDP2 creates."""
    return type(model).__bases__[1] if isinstance(model, FSDPModule) else type(model)


def local_shard(value: Any) -> Any:
    """Return the local shard of a DTensor; return any other value unchanged."""
    return value.to_local() if isinstance(value, DTensor) else value


@contextlib.contextmanager
def gathered(weight: Tensor, *, write: bool = False) -> Iterator[Tensor]:
    """Yield the full weight, gathered from all ranks while the block runs. Collective.

    `write`: changes made in the block are kept; all ranks must make the same changes.
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
    """Return copies of the full weights on the host, for safetensors: on rank 0; other ranks get an empty dict. Collective."""
    copies = {}
    for name, weight in weights.items():
        with gathered(weight) as full:
            if not dist.is_initialized() or dist.get_rank() == 0:
                copies[name] = _on_host(full)
    return copies


def _on_host(weight: Tensor) -> Tensor:
    return weight.detach().cpu().clone(memory_format=torch.contiguous_format)


def copy_of(model: nn.Module) -> nn.Module:
    """Return a deep copy with full weights, on the host where ZeRO-3 has sharded the model. Collective."""
    copied = copy.deepcopy(model)  # the copy of a weight that ZeRO-3 has sharded is empty
    for own, weight in zip(copied.parameters(), model.parameters(), strict=True):
        if hasattr(weight, "ds_id"):
            with gathered(weight) as full:
                own.data = _on_host(full)
    return copied
