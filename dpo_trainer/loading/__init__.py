"""What exists before the trainer does: model, tokenizer, adapters, quantisation, datasets; and dropout switched off."""

from .adapter_kinds import refuse_adapter_kind
from .adapters import (
    apply_peft,
    compute_as_in_training,
    let_gradients_through,
    make_quantization_config,
    refuse_untrainable,
    weights_beside_adapter,
    weights_of_soft_prompt,
)
from .continued_adapter import continue_adapter
from .datasets import load_dataset_splits
from .dropout import disable_dropout
from .mixture import load_mixture
from .models import load_model, load_processing_class, load_tokenizer

__all__ = [
    "apply_peft",
    "compute_as_in_training",
    "continue_adapter",
    "disable_dropout",
    "let_gradients_through",
    "load_dataset_splits",
    "load_mixture",
    "load_model",
    "load_processing_class",
    "load_tokenizer",
    "make_quantization_config",
    "refuse_adapter_kind",
    "refuse_untrainable",
    "weights_beside_adapter",
    "weights_of_soft_prompt",
]
