"""A device "cuda" without a GPU: tensors have a shape, a dtype, strides and a device, and no numbers (FakeTensorMode).

The fixture `on_cuda` calls a function among them, in a process of its own (guarded.py), and a `Watch` sees what it does:

    batch = fake_batch(pairs, "flat")
    with Watch() as watch:
        loss = step(model, batch)
        loss.backward()
    watch.kernels, watch.waits, watch.casts, watch.kept

An operation on tensors of two devices raises by itself. So does one whose result would have a shape that depends on numbers.
Numbers that the host asks for are all 1, and each is listed as a wait.
"""

from __future__ import annotations

import math
import os
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.nn.attention import bias
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

CAPABILITY = (9, 0)
HALF = (torch.float16, torch.bfloat16)


# --- the process ---


def find_a_gpu() -> None:
    """Let the modules of this process find one GPU, for good. The guard is loaded (guarded.py)."""
    torch.set_num_threads(1)
    import peft  # noqa: F401  before a GPU is found: it would look for kernels of one

    FakeTensorMode.avoid_device_init = property(lambda self: True)  # type: ignore[assignment, method-assign]
    torch.cuda.is_available = torch.cuda.is_bf16_supported = lambda *_, **__: True
    torch.cuda.current_device, torch.cuda.device_count = (lambda: 0), (lambda: 1)
    torch.cuda.set_device = lambda device: None
    torch.cuda.get_device_capability = lambda *_: CAPABILITY
    torch.backends.cuda.is_flash_attention_available = lambda: True
    for drawing in ("uniform_", "normal_"):  # there is no generator on the device, and no number to change
        setattr(torch.Tensor, drawing, lambda self, *_, **__: self)
    torch.nn.Module._apply = _move  # type: ignore[assignment]
    F.scaled_dot_product_attention = _sdpa
    bias.can_use_flash_attention = lambda p: _flash_can(p.query, p.key, p.value, p.attn_mask)  # type: ignore[assignment]
    bias.can_use_efficient_attention = lambda p: _efficient_can(p.query, p.key)  # type: ignore[assignment]
    _prepare_package()


def _move(self: torch.nn.Module, move: Callable[[Tensor], Tensor], recurse: bool = True) -> torch.nn.Module:
    """`Module.to` exchanges the insides of tensors, which those without data do not allow: here it exchanges parameters."""
    for module in self.modules() if recurse else (self,):
        for name, parameter in module._parameters.items():
            if parameter is not None and (moved := move(parameter)) is not parameter:
                module._parameters[name] = torch.nn.Parameter(moved.detach(), parameter.requires_grad)
        for name, buffer in module._buffers.items():
            module._buffers[name] = buffer if buffer is None else move(buffer)
    return self


def fake_batch(pairs: Sequence[Any], layout: str) -> Any:
    """A PairBatch of TokenizedPairs, collated on the host and moved to the device."""
    from dpo_trainer.data.batches.collate import inputs_of
    from dpo_trainer.types import PairBatch

    with unset_fake_temporarily():
        host = inputs_of(pairs, layout, 0)
    return PairBatch.from_inputs(to_device(host))


def to_device(value: Any) -> Any:
    """Tensors of the host in dicts and lists -> the same on the device; everything else as it is."""
    if isinstance(value, dict):
        return {name: to_device(item) for name, item in value.items()}
    if isinstance(value, list):
        return [to_device(item) for item in value]
    if not isinstance(value, Tensor):
        return value
    mode = torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE)
    return mode.from_tensor(value).to("cuda")


# --- what a step does ---


@dataclass(frozen=True)
class Kernel:
    """One call of an attention kernel, as it arrives at its door."""

    name: str  # varlen, flash, efficient, math; with " backward"
    dtypes: tuple[torch.dtype, ...]  # query, key, value
    shapes: tuple[tuple[int, ...], ...]
    strides: tuple[tuple[int, ...], ...]
    devices: tuple[str, ...]  # of all tensors
    arguments: tuple[Any, ...]  # whatever is no tensor
    masked: bool = False


KERNELS = {
    "torch_attn::_varlen_attn": ("varlen", 0),
    "torch_attn::_varlen_attn_backward": ("varlen backward", 1),
    "aten::_scaled_dot_product_flash_attention": ("flash", 0),
    "aten::_scaled_dot_product_flash_attention_backward": ("flash backward", 1),
    "aten::_scaled_dot_product_efficient_attention": ("efficient", 0),
    "aten::_scaled_dot_product_efficient_attention_backward": ("efficient backward", 1),
    "aten::_efficient_attention_forward": ("efficient", 0),
    "aten::_efficient_attention_backward": ("efficient backward", 1),
}


@dataclass
class Kept:
    """Bytes of tensors that a forward keeps for its backward, parameters left out."""

    storages: dict[int, Any] = field(default_factory=dict)  # kept alive, so that no address comes twice

    def add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        self.storages[storage._cdata] = storage

    @property
    def bytes(self) -> int:
        return sum(storage.nbytes() for storage in self.storages.values())


class Watch(TorchDispatchMode):
    """Lists what happens on the device while it is entered."""

    current: Watch | None = None

    def __init__(self) -> None:
        super().__init__()
        self.kernels: list[Kernel] = []
        self.waits: list[str] = []  # the operation, and the line that asked for it
        self.casts: Counter[str] = Counter()  # of "attention" and "elsewhere"
        self.kept, self.kept_in_attention = Kept(), Kept()
        self.in_attention = False
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)

    def count(self, name: str) -> int:
        return sum(kernel.name == name for kernel in self.kernels)

    def __enter__(self) -> Watch:
        Watch.current = self
        self._hooks.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._hooks.__exit__(*error)
        Watch.current = None

    def _pack(self, tensor: Tensor) -> Tensor:
        base = tensor if tensor._base is None else tensor._base
        if not isinstance(base, torch.nn.Parameter):
            self.kept.add(tensor)
            if self.in_attention:
                self.kept_in_attention.add(tensor)
        return tensor

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs, name = kwargs or {}, func._schema.name
        if name == "aten::_local_scalar_dense" and args[0].device.type == "cuda":
            self._wait(name)
            dtype = args[0].dtype
            return 1.0 if dtype.is_floating_point else dtype is torch.bool or 1
        if (
            name == "aten::_efficient_attention_backward"
        ):  # torch 2.13's function for fake tensors leaves an argument out
            out = (*(torch.empty_like(x) for x in args[1:4]), torch.empty_like(args[1]))
        else:
            out = func(*args, **kwargs)
        if name in KERNELS:
            kind, first = KERNELS[name]
            if name == "aten::_efficient_attention_forward":  # the only one with tokens before heads
                args = (*(x.transpose(1, 2) for x in args[:3]), *args[3:])
            self.kernels.append(_kernel(kind, args[first:], kwargs))
        elif name in ("aten::_to_copy", "aten::copy_"):
            source, target = (args[0], out) if name == "aten::_to_copy" else (args[1], args[0])
            self._copied(source, target, kwargs.get("non_blocking") or (name == "aten::copy_" and args[2:] == (True,)))
        return out

    def _copied(self, source: Tensor, target: Tensor, non_blocking: bool) -> None:
        if source.device.type != target.device.type and not non_blocking:
            self._wait(f"{source.device.type} to {target.device.type}")
        elif source.dtype != target.dtype:
            self.casts["attention" if self.in_attention else "elsewhere"] += 1

    def _wait(self, what: str) -> None:
        ours = [
            f for f in traceback.extract_stack() if "dpo_trainer" in f.filename and "cuda_traced" not in f.filename
        ]
        self.waits.append(f"{what} in {os.path.basename(ours[-1].filename)}, {ours[-1].name}" if ours else what)


def _kernel(name: str, args: Sequence[Any], kwargs: dict[str, Any], *, masked: bool = False) -> Kernel:
    every = [x for x in [*args, *kwargs.values()] if isinstance(x, Tensor)]
    qkv = every[:3]
    return Kernel(
        name=name,
        dtypes=tuple(x.dtype for x in qkv),
        shapes=tuple(tuple(x.shape) for x in qkv),
        strides=tuple(x.stride() for x in qkv),
        devices=tuple(x.device.type for x in every),
        arguments=tuple(x for x in args if not isinstance(x, Tensor)),
        masked=masked or (name == "efficient" and args[3] is not None),
    )


def _prepare_package() -> None:
    """Tell the watch when the attention of flat rows runs; and torch cannot make this bias in a dispatch mode."""
    from transformers import AttentionInterface

    from dpo_trainer.scoring import attention

    def watched(*args: Any, **kwargs: Any) -> Any:
        watch = Watch.current
        if watch is None:
            return attention.shared_prompt_attention(*args, **kwargs)
        watch.in_attention = True
        try:
            return attention.shared_prompt_attention(*args, **kwargs)
        finally:
            watch.in_attention = False

    def lower_right(*size: int) -> Tensor:
        with _disable_current_modes():
            return bias.causal_lower_right(*size)

    AttentionInterface.register(attention.NAME, watched)
    attention.causal_lower_right = lower_right


# --- which kernel torch takes on a GPU (aten/src/ATen/native/transformers/cuda/sdp_utils.cpp), by its order ---


def _flash_can(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> bool:
    return mask is None and query.dtype in HALF and query.shape[-1] == key.shape[-1] == value.shape[-1] <= 256


def _efficient_can(query: Tensor, key: Tensor) -> bool:
    """It takes a mask and any dtype, and no fewer heads of keys than of queries."""
    return query.shape[1] == key.shape[1]


_math_sdpa = F.scaled_dot_product_attention


def _sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if isinstance(attn_mask, bias.CausalBias):
        return bias.CausalBias._dispatch(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    device = query.device.type
    if torch.is_autocast_enabled(device):  # casts what comes in, and is off below
        dtype = torch.get_autocast_dtype(device)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
        if attn_mask is not None and attn_mask.is_floating_point():
            attn_mask = attn_mask.to(dtype)
        with torch.autocast(device, enabled=False):
            return _sdpa(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    if not query.is_cuda:
        return _math_sdpa(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    if _flash_can(query, key, value, attn_mask):
        more = -query.shape[-1] % 8
        rows = [F.pad(x, (0, more)) for x in (query, key, value)] if more else (query, key, value)
        out = torch.ops.aten._scaled_dot_product_flash_attention(*rows, dropout_p, is_causal, False, scale=scale)[0]
        return out[..., : out.shape[-1] - more]
    if _efficient_can(query, key):
        if attn_mask is not None:
            if attn_mask.dtype == torch.bool:
                attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill(~attn_mask, -math.inf)
            if attn_mask.stride(-2) % 16:  # a copy with rows of another length
                attn_mask = F.pad(attn_mask, (0, -key.shape[2] % 16))[..., : key.shape[2]]
            attn_mask = attn_mask.expand(*query.shape[:3], key.shape[2])
        grads = torch.is_grad_enabled()
        return torch.ops.aten._scaled_dot_product_efficient_attention(
            query, key, value, attn_mask, grads, dropout_p, is_causal, scale=scale
        )[0]
    if Watch.current is not None:
        Watch.current.kernels.append(_kernel("math", (query, key, value), {}, masked=attn_mask is not None))
    return torch.ops.aten._scaled_dot_product_attention_math(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )[0]
