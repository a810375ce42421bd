"""The last save of a run fails, and the weights are saved all the same."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peft import PeftModel
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.utils import logging

from .saving import CheckpointError, refused_by_disk, what_is_left

logger = logging.get_logger(__name__)

WEIGHTS = "rescued_weights.safetensors"


@contextmanager
def rescuing(
    folder: Path, model: nn.Module, state_dict: Mapping[str, Any] | None, save: Callable[[Path], None]
) -> Iterator[None]:
    """Around a save into `folder`: where it fails, the model is saved in another way, and the error says where it is.

    Where the disk refused, `save` is called with a folder for temporary files. Otherwise the weights alone are written into
    `folder`: all of `state_dict` (None: of the model), or of a model with an adapter those that trained.

    Raises:
        CheckpointError: the save failed. The model in memory is as it was.
    """
    try:
        yield
    except Exception as error:
        cause = refused_by_disk(error)
        if cause is None:
            cause, place = f"{type(error).__name__}: {error}.", _weights_alone(folder, model, state_dict)
        else:
            cause, place = f"{cause} {what_is_left(folder)}", _elsewhere(save)
        raise CheckpointError(f"The model could not be saved in {folder}: {cause} {place}") from error


def _weights_alone(folder: Path, model: nn.Module, state_dict: Mapping[str, Any] | None) -> str:
    weights = _trained(model) if state_dict is None else state_dict
    path = folder / WEIGHTS
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Copies, for safetensors takes neither weights that share memory nor views.
        save_file(
            {n: w.detach().cpu().clone().contiguous() for n, w in weights.items() if isinstance(w, Tensor)}, path
        )
    except Exception as error:
        return _in_memory(error)
    return (
        f"Its weights are in {path}: load them into the model that training began with by "
        "model.load_state_dict(safetensors.torch.load_file(path), strict=False)."
    )


def _trained(model: nn.Module) -> dict[str, Tensor]:
    if isinstance(model, PeftModel):
        return {name: p for name, p in model.named_parameters() if p.requires_grad}
    return model.state_dict()


def _elsewhere(save: Callable[[Path], None]) -> str:
    try:
        folder = Path(tempfile.mkdtemp(prefix="dpo_trainer_model_"))
        save(folder)
    except Exception as error:
        return _in_memory(error)
    return f"It was saved in {folder} instead: move it to where it shall stay."


def _in_memory(error: Exception) -> str:
    return (
        f"A second try failed as well ({type(error).__name__}: {error}). The model is still in memory: while this process lives, "
        "trainer.save_model(another_folder) saves it."
    )
