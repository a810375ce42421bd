"""An adapter that was trained on a base with another number of embeddings than its base is published with."""

from __future__ import annotations

from pathlib import Path

from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

logger = logging.get_logger(__name__)


def fit_embeddings(base: PreTrainedModel, adapter_weights: Path) -> None:
    """Give the base as many embeddings as the adapter was saved with, in place.

    peft saves the embeddings of a base that was resized with the adapter, and loads them into a base of the same size alone. Its
    AutoPeftModel takes the size from the tokenizer in the folder; here it is that of the saved weights, which may be padded.

    Raises:
        ValueError: the adapter has the embeddings, and lacks the head that was resized with them.
    """
    saved = rows_saved(adapter_weights, name_of(base, base.get_input_embeddings()))
    has = getattr(base.get_input_embeddings(), "num_embeddings", None)
    if None in (saved, has) or saved == has:
        return
    head = base.get_output_embeddings()
    tied = head is None or head.weight is base.get_input_embeddings().weight
    # peft (0.21) leaves the head out where the adapter has LoRA on the embeddings.
    if not tied and rows_saved(adapter_weights, name_of(base, head)) is None:
        raise ValueError(
            f"The adapter {adapter_weights.parent} has {saved} embeddings, its base has {has}, and the head {name_of(base, head)!r} "
            "that was resized with them is not in the adapter: load the base that it was trained on yourself and give "
            "PeftModel.from_pretrained(base, adapter, is_trainable=True). An adapter with the head in modules_to_save has it."
        )
    logger.warning(
        f"The adapter was saved with {saved} embeddings, and its base has {has}: the base is resized to {saved}."
    )
    base.resize_token_embeddings(saved, mean_resizing=False)  # the adapter brings the numbers


def name_of(model: nn.Module, layer: nn.Module) -> str:
    return next(name for name, module in model.named_modules() if module is layer)


def rows_saved(adapter_weights: Path, name: str) -> int | None:
    """How many rows an adapter file has for the embeddings or the head called `name`; None where it has none."""
    suffixes = (f".{name}.weight", f".{name}.base_layer.weight")
    with safe_open(adapter_weights, "pt") as opened:
        found = [key for key in opened.keys() if key.endswith(suffixes)]  # noqa: SIM118  # not a dict
        return opened.get_slice(found[0]).get_shape()[0] if found else None
