"""What the models of a run are, so that a checkpoint is resumed by the run that wrote it and by no other."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from typing import Any

from peft import PeftModel
from torch import nn

from ..distributed.sharding import class_of, shape_of
from ..models.unwrap import base_model
from ..reference import Identity, Reference, WeightsElsewhere, identify

logger = logging.getLogger(__name__)

SCALING = ("peft_type", "r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern")


def model_identity(model: nn.Module, reference: Reference, precision: str) -> dict[str, Any]:
    """By the names of `run_state.WORDS`, as JSON; None where there is nothing to know. Asked before anything trains.

    Reads every weight once that training does not change.
    """
    trained = sorted((name, list(shape_of(p))) for name, p in model.named_parameters() if p.requires_grad)
    of_reference = _digest(lambda: reference.identity(model, precision))
    below = None
    if isinstance(model, PeftModel) and not reference.lasting:  # otherwise the base is in the reference
        below = _digest(lambda: identify(model, precision=precision))
    return {
        "model": [
            class_of(base_model(model)).__name__,
            hashlib.blake2b(repr(trained).encode(), digest_size=16).hexdigest(),
        ],
        "adapter": _adapter_settings(model) if isinstance(model, PeftModel) else None,
        "base": below,
        "reference": of_reference,
    }


def _digest(ask: Callable[[], Identity | None]) -> str | None:
    """None where there is none, and where no process has the whole model."""
    try:
        found = ask()
    except WeightsElsewhere as error:
        logger.info(f"{error} A resumed run is not compared by it.")
        return None
    return None if found is None else found.digest


def _adapter_settings(model: PeftModel) -> dict[str, str]:
    """Those that decide what the weights of the trained adapter compute, beside their shapes."""
    config = model.peft_config[model.active_adapter].to_dict()
    return {name: str(config[name]) for name in SCALING if name in config}
