"""Cases that run among fake tensors (fake_cuda.py): models of many kinds, and one step of each."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from typing import Any

import torch
from fake_cuda import Kernel, Watch, fake_batch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from dpo_trainer.batch import TokenizedPair
from dpo_trainer.logprobs import METRIC_STATS, Scorer

LAYERS = 2
SIZES: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
LENGTHS = [(40, 30, 50), (1, 1, 1), (3, 70, 64)]


def pairs(lengths: list[tuple[int, int, int]] = LENGTHS) -> list[TokenizedPair]:
    """Of prompts, chosen and rejected completions of these lengths."""
    return [
        TokenizedPair(example_id=i, prompt_ids=[3] * p, chosen_ids=[4] * c, rejected_ids=[5] * r)
        for i, (p, c, r) in enumerate(lengths)
    ]


def model_of(kind: str, dtype: torch.dtype, **config: Any) -> nn.Module:
    """A causal model in training mode, its parameters of `dtype`, on the device."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("cuda"):
            return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**SIZES, **config})).train()
    finally:
        torch.set_default_dtype(before)


@dataclass(frozen=True)
class Trace:
    """What a `Watch` saw, as plain data."""

    kernels: list[Kernel] = field(repr=False)
    waits: list[str]
    casts: dict[str, int]
    kept: int  # bytes
    kept_in_attention: int  # bytes

    @classmethod
    def of(cls, watch: Watch) -> Trace:
        return cls(watch.kernels, watch.waits, dict(watch.casts), watch.kept.bytes, watch.kept_in_attention.bytes)

    def count(self, name: str) -> int:
        return sum(kernel.name == name for kernel in self.kernels)


def step(
    kind: str = "qwen2",
    dtype: str = "float32",
    autocast: str | None = "bfloat16",
    checkpointing: bool | None = None,
    layout: str = "flat",
    lengths: list[tuple[int, int, int]] = LENGTHS,
    config: dict[str, Any] | None = None,
) -> Trace:
    """Forward and backward of one batch. `checkpointing`: None off, else whether it is the reentrant one."""
    model: Any = model_of(kind, getattr(torch, dtype), **(config or {}))
    if checkpointing is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": checkpointing})
    batch = fake_batch(pairs(lengths), layout)
    scorer = Scorer(model, stats=METRIC_STATS)
    mixed = torch.autocast("cuda", getattr(torch, autocast)) if autocast else contextlib.nullcontext()
    with Watch() as watch, scorer.step():
        with mixed:
            logps = scorer(model, batch)
        logps.margin().sum().backward()
    return Trace.of(watch)
