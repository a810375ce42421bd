"""Weights of a checkpoint whose names are not those of the model in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel


def load_renamed(model: nn.Module, checkpoint: str | Path) -> None:
    """The weights in `checkpoint`, where `save_pretrained` wrote them under other names than the model holds them.

    Many vision-language models and mixtures of experts are kept in the form that they were published in. `Trainer` loads what it
    finds by name and leaves everything else as it began.

    Raises:
        ValueError: where the checkpoint lacks weights of the model.
    """
    if not isinstance(model, PreTrainedModel):  # an adapter, which PEFT loads
        return
    files = sorted(Path(checkpoint).glob("model*.safetensors"))
    written = {name for file in files for name in _names(file)}
    missing = model.state_dict().keys() - written - set(model.all_tied_weights_keys)
    if not files or not missing:
        return
    kind: Any = type(model)
    how = {"dtype": model.dtype, "use_safetensors": True, "output_loading_info": True}
    whole, info = kind.from_pretrained(str(checkpoint), **how)
    if info["missing_keys"]:
        names = ", ".join(sorted(info["missing_keys"])[:3])
        raise ValueError(
            f"The checkpoint {checkpoint} lacks {len(info['missing_keys'])} weights of the model ({names} ...): it is of another "
            "model, or damaged. Take an earlier one."
        )
    model.load_state_dict(whole.state_dict())


def _names(file: Path) -> list[str]:
    with safe_open(file, "pt") as opened:
        return list(opened.keys())
