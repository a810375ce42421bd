"""The options of the model: fields of `DPOConfig`."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any


@dataclass
class ModelOptions:
    """How the policy is loaded, and what of it trains."""

    # --- the model ---
    disable_dropout: bool = field(
        default=True,
        metadata={"help": "Switch off all dropout of policy and reference, attention dropout too; LoRA's stays."},
    )
    disable_lora_dropout: bool = field(
        default=False, metadata={"help": "Switch off the dropout of LoRA layers as well."}
    )
    merge_lora_configs: bool = field(
        default=False,
        metadata={
            "help": "If --use_peft requests LoRA settings that differ from those of the model's adapter: continue that adapter "
            "with the larger rank and the modules of both. Its outputs do not change."
        },
    )
    router_aux_loss_coef: float | None = field(
        default=None,
        metadata={
            "help": "Weight of the load-balancing loss of a mixture-of-experts model; 0 switches it off. Default: the "
            "model's own, where its config has output_router_logits on."
        },
    )
    model_init_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "JSON passed to from_pretrained when the model is given by name."}
    )
    trust_remote_code: bool = field(
        default=False,
        metadata={
            "help": "Run Python code that comes with a model or a tokenizer. It can do anything: set it only for sources that you trust."
        },
    )
    freeze_vision_tower: bool | None = field(
        default=None,
        metadata={
            "help": "Freeze the vision tower; with LoRA, only the language model gets adapters. "
            "Default: true with LoRA, false without.",
            "nargs": "?",
            "const": True,
        },
    )


def check_model_options(config: ModelOptions) -> None:
    coef = config.router_aux_loss_coef
    if coef is not None and not (isinstance(coef, int | float) and 0 <= coef < math.inf):
        raise ValueError(f"--router_aux_loss_coef must be a number of at least 0, got {coef!r}.")
