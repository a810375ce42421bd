"""The transformers model inside its wrappers, and what every reader of a model does with it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from accelerate.utils import extract_model_from_parallel
from torch import nn
from transformers import PreTrainedModel


def base_model(model: Any) -> PreTrainedModel:
    """The transformers model under DDP, DeepSpeed and PEFT."""
    # Most steps have nothing to unwrap, and looking for it reads the metadata of packages each time.
    if isinstance(model, PreTrainedModel):
        return model
    model = extract_model_from_parallel(model)
    return model.get_base_model() if hasattr(model, "get_base_model") else model


@contextlib.contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """No dropout, no checkpointing, no random numbers drawn; every module in its own mode again afterwards."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
