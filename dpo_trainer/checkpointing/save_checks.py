"""What would keep the trained model from being saved, or from being loaded afterwards: found before training.

Everything that a save writes besides the weights is written once, into a folder that is removed again.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn
from transformers import AutoConfig, PreTrainedModel, modeling_utils
from transformers.utils import logging

from ..distributed.sharding import is_sharded
from ..models.unwrap import base_model
from . import DRY_RUN, savable_generation_config

logger = logging.get_logger(__name__)

WRAPPERS = {
    "OptimizedModule": "torch.compile: every batch has its own segments and would be compiled anew, and saved weights would get "
    "names that no model loads (_orig_mod.). Pass the model as it was before (model._orig_mod)",
    "DataParallel": "DataParallel, which would split the flat row between devices. Pass model.module",
    "DistributedDataParallel": "DistributedDataParallel, and the trainer wraps the model itself. Pass model.module",
}
"""By the name of the class: what torch.compile makes of a model is slow to import."""


def check_wrapping(model: nn.Module) -> None:
    """Refuse a model that is wrapped, or has a module that is: its weights would be saved under other names.

    Raises:
        ValueError: names the wrapped module and how to get the model without it.
    """
    for name, module in model.named_modules():
        if why := WRAPPERS.get(type(module).__name__):
            what = f"The module {name!r} of the model" if name else "The model"
            raise ValueError(f"{what} is wrapped by {why}.")


def check_saving(model: nn.Module, processing_class: Any, output_dir: str) -> None:
    """Save all but the weights into a folder of `output_dir`, which is removed. For processes that save.

    Raises:
        ValueError: `output_dir` cannot be written to, holds a model of another kind, or the model cannot be saved.
    """
    folder = Path(output_dir)
    _refuse_other_kind(model, folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=DRY_RUN, dir=folder) as dry:
            _save_all_but_weights(model, processing_class, dry)
    except OSError as error:
        raise ValueError(
            f"Nothing can be saved in --output_dir {output_dir} ({error}): mend that, or give another --output_dir."
        ) from error
    _refuse_unknown_ties(model)
    if isinstance(model, PeftModel):
        _refuse_lost_head(model)
    _warn_if_small(model, folder)


def _refuse_other_kind(model: nn.Module, folder: Path) -> None:
    if found := files_of_another_kind(model, folder):
        raise ValueError(
            f"--output_dir {folder} holds {' and '.join(found)} of another run, and this run saves {_kind(model)}: the folder would "
            "load as a mix of the two. Give another --output_dir, or move these files away."
        )


def warn_of_another_kind(model: nn.Module, folder: Path) -> None:
    """After a save: say so, where the folder loads as a mix of what is new and what was there."""
    if found := files_of_another_kind(model, folder):
        logger.warning(
            f"{folder} holds {_kind(model)} now, and {' and '.join(found)} of another run: it would load as a mix of the two. Move "
            "these files away."
        )


def files_of_another_kind(model: nn.Module, folder: Path) -> list[str]:
    """Names of files that an earlier run left, and that would be loaded together with, or instead of, what this one saves."""
    full_model, adapter = (
        ("model.safetensors", "model.safetensors.index.json"),
        ("adapter_config.json", "adapter_model.safetensors"),
    )
    return [name for name in (full_model if isinstance(model, PeftModel) else adapter) if (folder / name).is_file()]


def _kind(model: nn.Module) -> str:
    return "an adapter" if isinstance(model, PeftModel) else "a full model"


def _save_all_but_weights(model: nn.Module, processing_class: Any, dry: str) -> None:
    try:
        if isinstance(model, PeftModel):
            for config in model.peft_config.values():
                config.save_pretrained(dry)
        elif isinstance(model, PreTrainedModel):
            model.config.save_pretrained(dry)
            _save_generation_config(model, dry)
        if processing_class is not None:
            processing_class.save_pretrained(dry)
    except OSError:
        raise
    except Exception as error:  # whatever a config, a tokenizer or a processor refuses
        raise ValueError(
            f"The model could not be saved after training ({type(error).__name__}: {error}). Correct that before training."
        ) from error


def _save_generation_config(model: PreTrainedModel, dry: str) -> None:
    if not model.can_generate():
        return
    model.generation_config.validate()  # not strict: what is ignored when generating may stay
    with savable_generation_config(model):
        model.generation_config.save_pretrained(dry)


def _refuse_unknown_ties(model: nn.Module) -> None:
    """Two weights in one memory that the config does not tie: transformers does not save them."""
    remove = getattr(modeling_utils, "remove_tied_weights_from_state_dict", None)
    if remove is None or not isinstance(model, PreTrainedModel) or any(map(is_sharded, model.parameters())):
        return
    try:
        remove(model.state_dict(), model)
    except RuntimeError as error:
        raise ValueError(
            f"The model could not be saved after training: {str(error).splitlines()[0]} Tie weights by the config "
            "(tie_word_embeddings), or give each its own memory (clone)."
        ) from error


def _refuse_lost_head(model: PeftModel) -> None:
    """peft (0.21) saves embeddings and head of a base that was resized, but with LoRA on the embeddings it leaves out the head."""
    base = base_model(model)
    embeddings, head = base.get_input_embeddings(), base.get_output_embeddings()
    kept = head is None or isinstance(head, AuxiliaryTrainingWrapper | BaseTunerLayer) or _tied(embeddings, head)
    if kept or not isinstance(embeddings, BaseTunerLayer):
        return
    try:
        published = AutoConfig.from_pretrained(base.config._name_or_path, local_files_only=True)
    except (OSError, ValueError):  # a base that is in memory alone, or of code that is not loaded here
        return
    sizes = [config.get_text_config().vocab_size for config in (published, base.config)]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"The base was resized from {sizes[0]} to {sizes[1]} tokens, and the adapter has LoRA on its embeddings: peft would not save "
            "the new rows of the head. Put the head into modules_to_save (--lora_modules_to_save lm_head), or leave the embeddings "
            "out of target_modules."
        )


def _tied(embeddings: nn.Module, head: nn.Module) -> bool:
    inner = embeddings.get_base_layer() if isinstance(embeddings, BaseTunerLayer) else embeddings
    return inner.weight is head.weight


def _warn_if_small(model: nn.Module, folder: Path) -> None:
    trained_only = isinstance(model, PeftModel)
    sizes = (p.numel() * p.element_size() for p in model.parameters() if p.requires_grad or not trained_only)
    need, free = sum(sizes), shutil.disk_usage(folder).free
    if need > free:
        logger.warning(
            f"The weights that this run saves take {need / 1e9:.2f} GB, and the disk of --output_dir {folder} has {free / 1e9:.2f} "
            "GB free: free space before training ends, or give another --output_dir."
        )
