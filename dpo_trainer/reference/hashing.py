"""Tensors and settings as what can be hashed: the same on every machine, in every process, and without dropout."""

from __future__ import annotations

import os
import re
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import xxhash
from torch import Tensor

from ..distributed.sharding import gathered, is_sharded, shape_of

THREADS = min(4, os.cpu_count() or 1)

DROPOUT = re.compile(r"dropout|pdrop|layerdrop|drop_path")


def digests(tensors: dict[str, Tensor]) -> dict[str, list[Any]]:
    """{name: [dtype, shape, hash of the bytes]}; tied weights are read once. Collective where an engine has cut them."""
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise ValueError(
                f"{name} is saved with the model as a {type(tensor).__name__}: only tensors can be hashed."
            )
        if tensor.is_meta:
            raise WeightsElsewhere(not_here(name, "is on the meta device (offloaded, or never loaded)"))
        if hasattr(tensor, "__tensor_flatten__") and not is_sharded(tensor):
            raise WeightsElsewhere(not_here(name, f"is a {type(tensor).__name__}, spread or packed"))
    places = {name: _place(tensor) for name, tensor in tensors.items()}
    distinct = {places[name]: tensor for name, tensor in tensors.items()}
    with ThreadPoolExecutor(THREADS) as pool:
        # Collectives come in one order, from the main thread.
        each = map if any(map(is_sharded, distinct.values())) else pool.map
        hashes = dict(zip(distinct, each(_digest, distinct.values()), strict=True))
    return {name: [str(t.dtype), list(shape_of(t)), hashes[places[name]]] for name, t in tensors.items()}


def _place(tensor: Tensor) -> Any:
    """The same for two tensors of the same numbers in memory."""
    if is_sharded(tensor):  # a rank's part may be empty, and then says nothing
        return id(tensor)
    return tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


def _digest(tensor: Tensor) -> str:
    with gathered(tensor) as full:
        numbers = full.detach().cpu().contiguous()
    row = numbers.as_strided([numbers.numel()], [1])  # with 0 or 1 numbers, "contiguous" says nothing about strides
    return xxhash.xxh3_128_hexdigest(row.view(torch.uint8).numpy().data)  # NumPy has no bfloat16


def plain(value: Any, *, without: frozenset[str] = frozenset()) -> Any:
    """A config as JSON holds it, free of dropout and of the fields in `without`, at any depth; sets in order."""
    if isinstance(value, dict):
        kept = {str(key): part for key, part in value.items() if key not in without and not DROPOUT.search(str(key))}
        return {key: plain(part, without=without) for key, part in kept.items()}
    if isinstance(value, set | frozenset):
        return sorted(str(part) for part in value)
    if isinstance(value, list | tuple):
        return [plain(part, without=without) for part in value]
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


class WeightsElsewhere(ValueError):
    """Another process, or no one yet, holds what shall be hashed."""


def not_here(name: str, why: str) -> str:
    return (
        f"{name} {why}: its values are not here to be hashed. Identify the reference before the model is sharded or "
        "offloaded, or gather its weights first."
    )
