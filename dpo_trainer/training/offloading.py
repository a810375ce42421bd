"""Activations that wait for backward in the memory of the host: `--activation_offloading`.

torch's `save_on_cpu` moves whatever an operation keeps: weights too, which stay on the device anyway, and the activations
that checkpointing computes again during backward, which are used at once. Both are left where they are here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from ..distributed.sharding import is_sharded

SMALLEST = 64 * 1024
"""Bytes: what is smaller gains less memory than its copies take time."""


class ActivationsOnHost(saved_tensors_hooks):
    """Around forward and backward: what the forward keeps goes to pinned memory of the host, and comes back when backward
    needs it. Neither copy is waited for: both stand in the stream of the computation.

    Args:
        model: its weights stay. So do copies of them in another dtype (autocast) or gathered from shards, known by their shape.
        tokens: of the batch: a tensor with as many rows as that is never taken for a weight.
    """

    def __init__(self, model: nn.Module, tokens: int):
        held = [tensor for tensor in (*model.parameters(), *model.buffers()) if not tensor.is_meta]
        self.storages = {tensor.untyped_storage()._cdata for tensor in held if not is_sharded(tensor)}
        matrices = {tuple(tensor.shape) for tensor in held if tensor.dim() > 1}
        self.shapes = {shape for shape in matrices | {m[::-1] for m in matrices} if tokens not in shape}
        super().__init__(self._to_host, self._back)

    def _to_host(self, tensor: Tensor) -> tuple[torch.device, Tensor]:
        device = tensor.device
        if self._stays(tensor):
            return device, tensor
        packed = torch.empty(tensor.size(), dtype=tensor.dtype, pin_memory=torch.cuda.is_available())
        return device, packed.copy_(tensor, non_blocking=True)

    def _stays(self, tensor: Tensor) -> bool:
        if torch._C._current_graph_task_id() != -1:  # in backward: computed again, and used at once
            return True
        if is_on_host(tensor) or not tensor.is_floating_point() or tensor.layout is not torch.strided:
            return True
        small = tensor.numel() * tensor.element_size() < SMALLEST
        return small or tuple(tensor.shape) in self.shapes or tensor.untyped_storage()._cdata in self.storages

    @staticmethod
    def _back(packed: tuple[torch.device, Tensor]) -> Any:
        device, tensor = packed
        return tensor.to(device, non_blocking=True)


def is_on_host(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu"
