"""What the options of a run and the config of its model say about layout and memory, before a weight is loaded."""

from __future__ import annotations

import math

from ..cli import ModelArguments, make_peft_config
from ..config import DPOConfig
from ..losses import Objective
from .estimate import Memory, Run, estimate_memory
from .measure import BatchTokens
from .shape import ModelShape, load_config, shape_of


def model_shape(model: ModelArguments, config: DPOConfig) -> tuple[ModelShape | None, str | None]:
    """The sizes of the model, or why they are not known."""
    assert model.model_name_or_path is not None
    peft_config = make_peft_config(model)
    try:
        sizes, adapter = load_config(
            model.model_name_or_path, revision=model.model_revision, trust_remote_code=config.trust_remote_code
        )
        return (
            shape_of(
                sizes,
                dtype=model.dtype,
                peft_config=peft_config or adapter,
                bits=4 if model.load_in_4bit else 8 if model.load_in_8bit else None,
                trust_remote_code=config.trust_remote_code,
            ),
            None,
        )
    except Exception as error:  # no model there, or one whose own code raises; an estimate is no reason to stop
        return None, str(error)


def layout_of(config: DPOConfig, shape: ModelShape | None) -> str:
    if config.layout != "auto":
        return config.layout
    return "padded" if shape is not None and shape.why_not_flat else "flat"


def memory_of(
    shape: ModelShape, batches: BatchTokens, layout: str, model: ModelArguments, config: DPOConfig
) -> Memory:
    adapter = shape.trainable < shape.parameters
    needs_reference = Objective.from_config(config).needs_reference and not config.precompute_ref_log_probs
    budget = config.max_tokens_per_micro_batch or math.inf
    tokens = batches.largest_flat if layout == "flat" else batches.largest_padded
    run = Run(
        tokens=int(min(tokens, budget)),
        scored=int(min(batches.largest_scored, budget)),
        mixed_precision=bool(config.bf16 or config.fp16) and shape.compute_size == 4,
        gradient_checkpointing=bool(config.gradient_checkpointing),
        reference_copy=needs_reference and (not adapter or model.ref_model_name_or_path is not None),
        optimizer_bytes=_optimizer_bytes(str(config.optim), shape.trainable_size),
    )
    return estimate_memory(shape, run)


def _optimizer_bytes(name: str, size: int) -> float:
    """Per trained weight of `size` bytes: two numbers for Adam, one for Lion, of one byte each in the 8-bit versions."""
    if "sgd" in name or "adafactor" in name:
        return 0.0
    numbers = 1 if "lion" in name else 2
    return float(numbers * (1 if "8bit" in name else size))
