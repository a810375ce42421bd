"""The vision side of a model: whether it has one, what its batches must say about images, what of it trains."""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Callable
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils import logging

from ..types import ModelSight
from .unwrap import base_model

logger = logging.get_logger(__name__)

# Image tokens that see each other both ways, or the whole prompt does. What is not listed here and differs is found by the check
# on the first batch, and trains with padded rows.
MUTUAL = {"gemma3": "images", "paligemma": "prompt"}
TYPES = ("mm_token_type_ids", "token_type_ids")


def vision_tower(model: nn.Module) -> nn.Module | None:
    """What turns pixels into features; None for a model that reads text alone."""
    base = base_model(model)
    found = base.get_encoder(modality="image")
    return None if found in (base, base.base_model) else found


def sight_of(model: nn.Module) -> ModelSight:
    """How a model treats the tokens of images. Holds none of its weights."""
    base = base_model(model)
    takes = inspect.signature(base.forward).parameters
    return ModelSight(
        types=next((name for name in TYPES if name in takes), None),
        mutual=MUTUAL.get(base.config.model_type),
        positions=_position_helper(base),
    )


def refuse_without_processor(model: nn.Module) -> None:
    """ValueError for a model that must be told which tokens are a prompt, where no processor tells it: its own attention
    lets the words of an answer see those that come after them."""
    base = base_model(model)
    if MUTUAL.get(base.config.model_type) == "prompt":
        raise ValueError(
            f"{type(base).__name__} reads prompts both ways and must be told where they end, which its processor does: pass that as "
            "processing_class instead of the tokenizer, for rows without images too."
        )


def _position_helper(base: PreTrainedModel) -> Callable[..., tuple[Any, Any]] | None:
    """`get_rope_index` of a model that has the model's config and nothing else: loader workers call it."""
    owner = next((module for module in (base, base.base_model) if hasattr(module, "get_rope_index")), None)
    if owner is None:
        return None
    skeleton: Any = object.__new__(type(owner))
    nn.Module.__init__(skeleton)
    skeleton.config = owner.config
    return skeleton.get_rope_index


def settle_vision_tower(model: nn.Module, *, freeze: bool | None) -> None:
    """Freeze what turns pixels into features, in place. None: where an adapter trains, and not otherwise.

    Raises:
        ValueError: for a model without one, where the option is given.
    """
    tower = vision_tower(model)
    if tower is None:
        if freeze is not None:
            raise ValueError(
                f"--freeze_vision_tower is about a vision-language model, and {type(base_model(model)).__name__} has no vision "
                "tower: leave it out."
            )
        return
    if freeze is None:
        freeze = isinstance(model, PeftModel)
    if freeze:
        tower.requires_grad_(False)
    for idle in _behind_features(base_model(model).config, tower):
        idle.requires_grad_(False)
    trained = sum(p.numel() for p in tower.parameters() if p.requires_grad)
    if trained and isinstance(model, PeftModel):
        tower.register_forward_pre_hook(_asking_for_gradients, with_kwargs=True)
    logger.warning(
        f"The vision tower ({type(tower).__name__}) {f'trains {trained:,} weights' if trained else 'is frozen'}."
    )


def _behind_features(config: PretrainedConfig, tower: nn.Module) -> list[nn.Parameter]:
    """Weights of a tower whose last layer is not the one that gives the features (LLaVA's is the last but one): no loss depends
    on them, and several ranks would wait for their gradients."""
    of = getattr(config, "vision_feature_layer", None)
    layers = next((module for module in tower.modules() if isinstance(module, nn.ModuleList)), None)
    if of is None or layers is None:
        return []
    used = max(n if n >= 0 else len(layers) + 1 + n for n in ([of] if isinstance(of, int) else of))
    if not 0 < used < len(layers):
        return []
    weights = list(tower.parameters())  # in the order that they work in
    last = max(number for number, p in enumerate(weights) if any(p is own for own in layers[used - 1].parameters()))
    return weights[last + 1 :]


def _asking_for_gradients(tower: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Pixels that do: reentrant checkpoints cut adapters off where nothing that enters a layer asks for a gradient.
    transformers sees to that at embeddings, and Qwen3-VL's vision tower does not say which are its own."""

    def asking(value: Any) -> Any:
        is_pixels = isinstance(value, Tensor) and value.is_floating_point() and torch.is_grad_enabled()
        return value.detach().requires_grad_() if is_pixels else value

    return tuple(map(asking, args)), {name: asking(value) for name, value in kwargs.items()}


def on_language_alone(settings: PeftConfig, model: nn.Module) -> PeftConfig:
    """Settings of an adapter that leaves everything but the language model of a vision-language model as it is, unless they say
    themselves what to leave out."""
    base = base_model(model)
    if vision_tower(model) is None or getattr(settings, "exclude_modules", "") is not None:
        return settings
    decoder = next(name for name, module in base.named_modules() if module is base.get_decoder())
    settings = copy.copy(settings)
    settings.exclude_modules = rf"(?!{re.escape(decoder)}\.).*"
    return settings


def trains_vision(model: nn.Module) -> bool:
    """Whether any weight trains that only images reach: of the tower, or between it and the language model."""
    base = base_model(model)
    if vision_tower(model) is None:
        return False
    language = {
        id(p) for module in (base.get_decoder(), base.get_output_embeddings()) if module for p in module.parameters()
    }
    return any(p.requires_grad and id(p) not in language for p in base.parameters())
