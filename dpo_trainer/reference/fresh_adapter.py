"""Whether a fresh adapter leaves the model below it as it was: asked of its layers, for their settings say it in many ways."""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ..distributed.sharding import is_sharded
from ..models.unwrap import base_model, evaluation_mode

ROUNDING = 1e-5
"""Relative. Some kinds take a weight apart and put it together again; in float32, worst seen 1e-6."""


def begins_at_zero(model: PeftModel, adapter: str) -> bool:
    """Whether the layers of `adapter`, which is active, compute what their base layers do.

    Some ways to initialise LoRA (PiSSA, OLoRA) take out of the base weight what they put into the adapter: the base alone
    is then not a trained model. Other kinds begin at random numbers, as soft prompts do.
    """
    config = model.peft_config[adapter]
    if config.is_prompt_learning:
        return False
    layers: dict[tuple[type, str], Any] = {}  # of each kind and place in a block one: they are initialised alike
    for name, module in base_model(model).named_modules():
        if isinstance(module, BaseTunerLayer):
            layers.setdefault((type(module), name.rpartition(".")[2]), module)
    return all(_same_as_base(layer, config) for layer in layers.values())


def _same_as_base(layer: Any, config: Any) -> bool:
    below = layer.get_base_layer()
    inputs = _inputs(below)
    if inputs is None or any(p.is_meta or is_sharded(p) for p in layer.parameters()):
        return getattr(config, "init_lora_weights", True) in (True, "gaussian")
    with torch.no_grad(), evaluation_mode(layer):
        try:
            with_adapter, without = layer(inputs).float(), below(inputs).float()
        except (
            TypeError,
            ValueError,
            RuntimeError,
            AttributeError,
            KeyError,
        ):  # a layer that is called in another way
            return getattr(config, "init_lora_weights", True) in (True, "gaussian")
    return bool((with_adapter - without).norm() <= ROUNDING * without.norm())


def _inputs(below: nn.Module) -> Tensor | None:
    """Something to put into a layer, drawn from numbers of its own. None where its kind is not known."""
    if isinstance(below, nn.Embedding):
        return torch.arange(below.num_embeddings, device=below.weight.device)
    weight = getattr(below, "weight", None)
    if not isinstance(weight, Tensor):
        return None
    size = getattr(below, "in_features", weight.shape[-1])
    dtype = weight.dtype if weight.is_floating_point() and type(weight) is nn.Parameter else torch.float32
    numbers = torch.randn(2, size, generator=torch.Generator().manual_seed(0))
    return numbers.to(weight.device, dtype)
