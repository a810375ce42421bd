"""Models and tokenizers, by hub id or local folder.

Weights come from safetensors only: pickles run code when they are read. They are held in float32 unless the user says
otherwise, and bfloat16 is left to mixed precision: at DPO's learning rates most updates of a bfloat16 weight would be
rounded away.
"""

from __future__ import annotations

import logging
import os
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftConfig, PeftModel
from safetensors import SafetensorError
from torch import nn
from transformers import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
)
from transformers.trainer_utils import number_of_arguments

from ..registry import did_you_mean
from ..storage.folders import listing
from ..storage.hub import brief_without_network
from ..versions import raise_conflict_behind
from .adapters import compute_as_in_training, prepare_base
from .names import fetch, local_folder, where
from .resized import fit_embeddings
from .soft_caps import keep_soft_caps
from .unwrap import base_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

logger = logging.getLogger(__name__)

DTYPES = ("float32", "bfloat16", "float16", "auto")
PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")
PICKLES = {".bin", ".pt", ".pth", ".ckpt"}
TO_SAFETENSORS = (
    'python -c "from transformers import AutoModelForCausalLM as M; '
    "M.from_pretrained('{name}', use_safetensors=False).save_pretrained('{name}-safetensors')\""
)
NOT_IN_MODEL_INIT_KWARGS = {
    "trust_remote_code": "use --trust_remote_code",
    "quantization_config": "use --load_in_4bit or --load_in_8bit, or the trainer's quantization_config",
    "use_safetensors": "only safetensors are read",
}


def load_model(
    name_or_path: str,
    *,
    model_init_kwargs: dict[str, Any] | None = None,
    trust_remote_code: bool = False,
    quantization_config: Any = None,
) -> PreTrainedModel | PeftModel:
    """A causal language model, which may see images too, by hub id or local folder; a PEFT adapter comes with its base and
    stays trainable."""
    kwargs = _checked_init_kwargs(model_init_kwargs)
    own = {"trust_remote_code": trust_remote_code, "quantization_config": quantization_config}
    revision = kwargs.get("revision")
    adapter = _find_adapter(name_or_path, revision)
    if adapter is None:
        return _load_full_model(name_or_path, kwargs | own)

    if not adapter.base_model_name_or_path:
        raise ValueError(
            f"The adapter {name_or_path!r} does not say which model it belongs to: load that model yourself and give "
            "the trainer PeftModel.from_pretrained(model, adapter, is_trainable=True)."
        )
    try:
        # The revision that the user named is the adapter's; the adapter knows the one of its base.
        base = load_model(
            adapter.base_model_name_or_path,
            model_init_kwargs=kwargs | {"revision": adapter.revision or "main"},
            **own,
        )
    except ValueError as error:
        raise ValueError(f"The base model of the adapter {name_or_path!r} did not load: {error}") from error
    prepare_base(base, quantized=bool(getattr(base, "is_quantized", False)), gradient_checkpointing=True)
    fit_embeddings(base, Path(str(fetch(name_or_path, "adapter_model.safetensors", revision))))
    try:
        with brief_without_network(name_or_path):
            return PeftModel.from_pretrained(base, where(name_or_path), is_trainable=True, revision=revision)
    except RuntimeError as error:  # what load_state_dict raises: a line for each weight
        first = " ".join(line.strip() for line in str(error).splitlines()[:2])
        raise ValueError(
            f"The adapter {name_or_path!r} does not fit its base {adapter.base_model_name_or_path!r} ({first}). Name the base that it "
            "was trained on as base_model_name_or_path in its adapter_config.json."
        ) from error


def load_tokenizer(
    name_or_path: str, *, trust_remote_code: bool = False, revision: str | None = None
) -> PreTrainedTokenizerBase:
    """The tokenizer of a hub id or local folder; an adapter saved without one takes that of its base."""
    folder = local_folder(name_or_path)
    if folder and not _tokenizer_files(folder):
        base = _base_of_adapter(folder)
        if base:
            logger.info("The adapter %s has no tokenizer: taking that of its base model, %s.", folder, base)
            return load_tokenizer(base, trust_remote_code=trust_remote_code)
    if folder and not _tokenizer_files(folder):
        raise ValueError(
            f"The folder {str(folder)!r} has no tokenizer ({listing(folder)}): save one there with "
            "tokenizer.save_pretrained, or pass it to the trainer as processing_class."
        )
    how: dict[str, Any] = {"trust_remote_code": trust_remote_code, "revision": revision or "main"}
    if find_spec("mistral_common") and fetch(name_or_path, "tokenizer.json", revision):
        how["mistral_format"] = False  # the one with the chat template, as where mistral-common is not installed
    try:
        with brief_without_network(name_or_path):
            return AutoTokenizer.from_pretrained(where(name_or_path), **how)
    except (OSError, ImportError) as error:
        raise ValueError(f"The tokenizer of {name_or_path!r} did not load: {str(error).strip()}") from error


def load_processing_class(
    name_or_path: str, *, trust_remote_code: bool = False, revision: str | None = None
) -> PreTrainedTokenizerBase | ProcessorMixin:
    """What makes inputs for a model: the processor of one that sees, the tokenizer of any other."""
    how = {"trust_remote_code": trust_remote_code, "revision": revision}
    folder = local_folder(name_or_path)
    if not any(fetch(name_or_path, file, revision) for file in PROCESSOR_FILES):
        base = _base_of_adapter(folder)
        if base and not _tokenizer_files(folder):  # type: ignore[arg-type]
            return load_processing_class(base, trust_remote_code=trust_remote_code)
        return load_tokenizer(name_or_path, **how)  # type: ignore[arg-type]
    try:
        with brief_without_network(name_or_path):
            return AutoProcessor.from_pretrained(where(name_or_path), **(how | {"revision": revision or "main"}))
    except (OSError, ImportError, RuntimeError) as error:
        raise_conflict_behind(error, f"The processor of {name_or_path!r} did not load")
        if isinstance(error, RuntimeError):
            raise
        raise ValueError(f"The processor of {name_or_path!r} did not load: {str(error).strip()}") from error


def _tokenizer_files(folder: Path) -> list[Path]:
    """Of any kind: `tekken.json` is mistral-common's."""
    return [path for kind in ("token*", "*.model", "tekken.json") for path in folder.glob(kind)]


def _base_of_adapter(folder: Path | None) -> str | None:
    if folder is None or not (folder / "adapter_config.json").is_file():
        return None
    return PeftConfig.from_pretrained(str(folder)).base_model_name_or_path


def _checked_init_kwargs(init_kwargs: dict[str, Any] | None) -> dict[str, Any]:
    """`model_init_kwargs` with float32 as the default dtype, free of what would be ignored or do harm."""
    if isinstance(init_kwargs, str):
        raise ValueError(
            f'--model_init_kwargs must be a JSON object such as \'{{"dtype": "bfloat16"}}\', got {init_kwargs!r}.'
        )
    kwargs = dict(init_kwargs or {})
    for name, instead in NOT_IN_MODEL_INIT_KWARGS.items():
        if name in kwargs:
            raise ValueError(f"--model_init_kwargs cannot hold {name!r}: {instead}.")
    if "torch_dtype" in kwargs:
        kwargs.setdefault("dtype", kwargs.pop("torch_dtype"))
    kwargs.setdefault("dtype", torch.float32)
    dtype = kwargs["dtype"]
    if not isinstance(dtype, torch.dtype) and dtype not in DTYPES:
        raise ValueError(f"--dtype {dtype!r} is not one of {', '.join(DTYPES)}.{did_you_mean(str(dtype), DTYPES)}")
    if kwargs.get("device_map") is not None and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(
            f"device_map={kwargs['device_map']!r} in --model_init_kwargs would put the model of every one of the "
            f"{os.environ['WORLD_SIZE']} processes on the same devices: leave it out, the launcher places the models."
        )
    return kwargs


def _load_full_model(name_or_path: str, kwargs: dict[str, Any]) -> PreTrainedModel:
    folder = local_folder(name_or_path)
    if folder:
        _check_model_folder(folder)
    try:
        with brief_without_network(name_or_path):
            kind = _auto_class(name_or_path, kwargs)
            model = kind.from_pretrained(where(name_or_path), use_safetensors=True, **kwargs)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"The model {name_or_path!r} did not load (only safetensors are read): {error}") from error
    except TypeError as error:
        raise ValueError(f"--model_init_kwargs {kwargs} does not suit {name_or_path!r}: {error}") from error
    except ValueError as error:
        raise_conflict_behind(error, f"The model {name_or_path!r} did not load")
        if "Unrecognized configuration class" not in str(error):
            raise
        raise ValueError(f"{name_or_path!r} is not a causal language model. {str(error).splitlines()[0]}") from error
    compute_as_in_training(model)
    keep_soft_caps(model)
    return model


def _auto_class(name_or_path: str, kwargs: dict[str, Any]) -> Any:
    """Of models that read images and text, or text alone: what the config says."""
    how = {name: kwargs[name] for name in ("trust_remote_code", "revision") if kwargs.get(name) is not None}
    config = AutoConfig.from_pretrained(where(name_or_path), **how)
    sees = type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    return AutoModelForImageTextToText if sees else AutoModelForCausalLM


def _check_model_folder(folder: Path) -> None:
    if not (folder / "config.json").is_file():
        inside = [
            path.parent.name for name in ("config.json", "adapter_config.json") for path in folder.glob(f"*/{name}")
        ]
        hint = f" Did you mean its subfolder {max(inside)!r}?" if inside else ""
        raise ValueError(
            f"The folder {str(folder)!r} holds no model: neither config.json nor adapter_config.json is in it "
            f"({listing(folder)}).{hint}"
        )
    _check_weights(folder)


def _check_weights(folder: Path) -> None:
    """Refuse a folder whose weights are pickles, or that has none."""
    if list(folder.glob("*.safetensors")):
        return
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES and "model" in path.name)
    if pickles:
        raise ValueError(
            f"The folder {str(folder)!r} has its weights as a pickle alone ({pickles[0]}), which can run any code when "
            f"it is read: refused. If you trust it, convert it: {TO_SAFETENSORS.format(name=folder)}"
        )
    raise ValueError(f"The folder {str(folder)!r} has no weights: no .safetensors file is in it ({listing(folder)}).")


def _find_adapter(name_or_path: str, revision: str | None) -> PeftConfig | None:
    """The adapter's config if the name leads to a PEFT adapter, None if it leads to a full model."""
    config = fetch(name_or_path, "adapter_config.json", revision)
    if config is None:
        return None
    if fetch(name_or_path, "adapter_model.safetensors", revision) is None:
        raise ValueError(
            f"The adapter {name_or_path!r} has no adapter_model.safetensors, and pickled weights (.bin) are refused: "
            "they can run any code when they are read. If you trust it, load it with PeftModel.from_pretrained and "
            "save it with save_pretrained, which writes safetensors."
        )
    return PeftConfig.from_pretrained(str(Path(config).parent))


def name_of(model: str | nn.Module) -> str:
    """The hub id or folder that a model was loaded from."""
    return model if isinstance(model, str) else base_model(model).config._name_or_path


def made_by(model_init: Any, trial: Any = None) -> nn.Module:
    """The model that `model_init()` or `model_init(trial)` returns."""
    takes = number_of_arguments(model_init)
    if takes > 1:
        raise ValueError(f"model_init takes {takes} arguments: it is called with the trial of a search, or with none.")
    model = model_init(trial) if takes else model_init()
    if not isinstance(model, nn.Module):
        raise ValueError(f"model_init returned {type(model).__name__}, not a model.")
    return model
