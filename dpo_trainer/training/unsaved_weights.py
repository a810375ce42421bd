"""Trained weights that PEFT leaves out of an adapter's file: a checkpoint has them in the state of the run."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..distributed.sharding import gathered, kept
from ..models.adapters import weights_beside_adapter, weights_of_soft_prompt

BESIDE = "beside the adapter/"


def unsaved_weights(model: nn.Module) -> dict[str, Tensor]:
    """Copies, by their names in a checkpoint. On all ranks."""
    return kept({f"{BESIDE}{name}": p for name, p in _parameters(model).items()})


def load_unsaved_weights(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Take what `unsaved_weights` returned out of `tensors`, into the model."""
    for name, parameter in _parameters(model).items():
        if name.startswith("prompt_encoder.") and BESIDE + name not in tensors:
            continue  # an older checkpoint: PEFT has loaded what there is
        with torch.no_grad(), gathered(parameter, write=True) as own:
            own.copy_(tensors.pop(BESIDE + name))


def _parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    return weights_beside_adapter(model) | weights_of_soft_prompt(model)
