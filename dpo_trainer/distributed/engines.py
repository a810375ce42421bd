"""Prepare models for accelerate, FSDP2 and DeepSpeed where their defaults do not suit a run.

A reference is prepared as the policy is, an evaluation before training leaves nothing behind, and log-probs are not rounded.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator
from typing import Any

from accelerate import Accelerator
from accelerate.utils import extract_model_from_parallel, str_to_bool
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers import TrainingArguments

STAGE_OF_WEIGHTS = 3
"""The ZeRO stage that shards weights: lower stages shard only gradients and optimizer states."""


def shards_weights(args: TrainingArguments) -> bool:
    """Whether the engine of this run shards weights between ranks. Known before the engine exists."""
    zero = args.deepspeed_plugin
    launched = bool(str_to_bool(os.environ.get("ACCELERATE_USE_FSDP", "false")))
    return launched or bool(args.fsdp) or (zero is not None and zero.zero_stage == STAGE_OF_WEIGHTS)


def prepare_frozen(model: nn.Module, accelerator: Accelerator, args: TrainingArguments) -> nn.Module:
    """Prepare a frozen model like the policy: the same device, precision and sharding."""
    zero = accelerator.state.deepspeed_plugin
    if accelerator.is_fsdp2:
        return fsdp2_prepare_model(accelerator, model)
    if zero is None:
        model = accelerator.prepare_model(model.to(accelerator.device), evaluation_mode=True)
        # evaluate() before train() prepares the policy only while accelerate knows of no model yet.
        accelerator._models.remove(model)
        return model
    import deepspeed

    return deepspeed.initialize(model=model, config=_without_training(zero.deepspeed_config, args))[0]


def _without_training(config: dict[str, Any], args: TrainingArguments) -> dict[str, Any]:
    """Return the settings of the policy's engine that concern weights: sharding, storage and precision."""
    zero = {
        name: value
        for name, value in config["zero_optimization"].items()
        if value != "auto" and not name.startswith("offload_optimizer")
    }
    return {
        "train_micro_batch_size_per_gpu": 1,  # required by DeepSpeed; nothing here reads it
        "zero_optimization": zero if zero["stage"] == STAGE_OF_WEIGHTS else {"stage": 0},
        "bf16": {"enabled": bool(args.bf16)},
        "fp16": {"enabled": bool(args.fp16)},
    }


@contextlib.contextmanager
def evaluation(model: nn.Module, accelerator: Accelerator) -> Iterator[None]:
    """Around an evaluation: one before training leaves nothing behind that training would stumble over.

    accelerate marks what `Trainer` has it prepare for an evaluation, and then hands it out to training as it is: without
    DDP around it, so that every rank would train a model of its own. FSDP2 it refuses to prepare without an optimizer,
    and leaves the last gathered weights unsharded after a forward without backward: no optimizer would update those.

    Raises:
        ValueError: before training under DeepSpeed, whose engine for evaluation cannot be trained.
    """
    first = not accelerator._models
    if first and accelerator.state.deepspeed_plugin is not None:
        raise ValueError(
            "DeepSpeed cannot evaluate before train(). Set --eval_on_start true, so that train() begins with an "
            "evaluation; or evaluate under accelerate_configs/ddp.yaml or fsdp2.yaml."
        )
    if first and accelerator.is_fsdp2:
        accelerator._models.append(fsdp2_prepare_model(accelerator, model))
    try:
        yield
    finally:
        if accelerator.is_fsdp2:
            reshard(model)
        elif first:
            extract_model_from_parallel(model, keep_fp32_wrapper=False)  # takes autocast off its forward
            accelerator._models.clear()
            model._is_accelerate_prepared = False  # type: ignore[assignment]


def reshard(model: nn.Module) -> None:
    """Reshard the last weights that FSDP2 gathered for a forward pass; FSDP2 itself would wait for a backward pass."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def keep_outputs_exact(accelerator: Accelerator) -> None:
    """Stop FSDP2 from rounding model outputs to the compute dtype, as accelerate configures it: log-probs stay float32."""
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is not None and plugin.mixed_precision_policy is not None:
        plugin.mixed_precision_policy = dataclasses.replace(plugin.mixed_precision_policy, output_dtype=None)
