"""Dropout switched off: the policy and the reference must see the same network."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.nn.modules.dropout import _DropoutNd
from transformers import PreTrainedConfig

DROPOUT_NAME = re.compile(r"dropout|pdrop|layerdrop|drop_path")


def disable_dropout(model: nn.Module, *, lora: bool) -> None:
    """Switch off every dropout of the model, in place; that of its adapters (LoRA dropout) only with `lora`.

    Covers dropout modules, and the rates that modules and configs keep as numbers (`attention_dropout`, `layerdrop`),
    which attention functions read at each call.
    """
    spared = (
        set() if lora else {id(module_) for layer in _adapter_layers(model) for module_ in _adapter_modules(layer)}
    )
    for module in model.modules():
        if id(module) in spared:
            continue
        if isinstance(module, _DropoutNd):
            module.p = 0.0
        _zero_rates(vars(module))
        if isinstance(getattr(module, "config", None), PreTrainedConfig):
            _zero_config(module.config)
    if lora:
        for layer in _adapter_layers(model):
            for name, rates in vars(layer).items():  # LoHa and LoKr keep {adapter: rate}
                if DROPOUT_NAME.search(name) and isinstance(rates, dict):
                    rates.update(dict.fromkeys(rates, 0.0))


def _adapter_layers(model: nn.Module) -> Iterator[BaseTunerLayer]:
    return (module for module in model.modules() if isinstance(module, BaseTunerLayer))


def _adapter_modules(layer: BaseTunerLayer) -> Iterator[nn.Module]:
    """What PEFT put into a layer, without the model's own layer that it wraps."""
    for name, child in layer.named_children():
        if name != "base_layer":
            yield from child.modules()


def _zero_rates(attributes: dict[str, Any]) -> None:
    for name, value in attributes.items():
        if DROPOUT_NAME.search(name) and isinstance(value, float):
            attributes[name] = 0.0


def _zero_config(config: PreTrainedConfig) -> None:
    _zero_rates(vars(config))
    for module_ in vars(config).values():
        if isinstance(module_, PreTrainedConfig):
            _zero_config(module_)
