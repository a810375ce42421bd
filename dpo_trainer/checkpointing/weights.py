"""Weights of a checkpoint that `Trainer` does not find."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import transformers
from packaging.version import Version
from peft import PeftModel
from peft.utils import SAFETENSORS_WEIGHTS_NAME
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
    loaded, info = kind.from_pretrained(str(checkpoint), **how)
    if info["missing_keys"]:
        names = ", ".join(sorted(info["missing_keys"])[:3])
        raise ValueError(
            f"The checkpoint {checkpoint} lacks {len(info['missing_keys'])} weights of the model ({names} ...): it is of another "
            "model, or damaged. Take an earlier one."
        )
    model.load_state_dict(loaded.state_dict())


def load_default_adapter(model: nn.Module, checkpoint: str | Path) -> None:
    """The adapter "default" of a checkpoint that has several, in place.

    PEFT keeps that one in the checkpoint itself and the others in folders, and `Trainer` of transformers before 5.23 then loads the
    folders alone: the trained adapter would be as it began.
    """
    if Version(transformers.__version__) >= Version("5.23") or not isinstance(model, PeftModel):
        return
    if len(model.peft_config) > 1 and Path(checkpoint, SAFETENSORS_WEIGHTS_NAME).is_file():
        active = model.active_adapter
        model.load_adapter(str(checkpoint), "default", is_trainable=active == "default")
        model.set_adapter(active)


def _names(file: Path) -> list[str]:
    with safe_open(file, "pt") as opened:
        return list(opened.keys())
