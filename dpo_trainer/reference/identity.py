"""What determines the numbers of a reference, as a hash: the key under which its log-probs are kept.

Everything counts but what is known not to matter. A difference too many costs one more computation; one too few would
give the log-probs of another model.

Left out, because they change last digits at most: the device, the attention implementation, the versions of libraries.
Left out, because they follow from the config: buffers that are not saved (the frequencies of rotary embeddings).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import xxhash
from accelerate.utils import extract_model_from_parallel
from peft import PeftModel, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.modules.dropout import _DropoutNd
from transformers import PreTrainedModel

from ..distributed.sharding import class_of, shape_of
from ..models.unwrap import base_model, evaluation_mode
from ..versions import note_on
from .hashing import DROPOUT, WeightsElsewhere, digests, not_here, plain

FORMAT = 1
"""To be raised when the same model shall get another digest."""

PRECISIONS = ("float32", "bfloat16", "float16")

# Fields of a model's config, and of the configs within it.
ORIGIN = "_name_or_path _commit_hash transformers_version architectures auto_map"
OUTPUT = "use_cache return_dict output_attentions output_hidden_states output_router_logits router_aux_loss_coef"
SPECIAL_TOKENS = "pad_token_id bos_token_id eos_token_id sep_token_id decoder_start_token_id"  # the trainer sets them
CLASSIFICATION = "id2label label2id problem_type"
# Every tensor and every layer says its own dtype; attention and experts may be computed in any of several ways.
COMPUTED_AS = "dtype torch_dtype _attn_implementation _experts_implementation gradient_checkpointing"
OF_NO_MATTER = frozenset(
    " ".join([ORIGIN, OUTPUT, SPECIAL_TOKENS, CLASSIFICATION, COMPUTED_AS, "initializer_range"]).split()
)

# Fields of an adapter's config: where it is from, how its weights began, and where they are (their names tell).
# Not `init_lora_weights` and its like: some of their values (those of MiSS, for one) choose another forward.
ADAPTER_ORIGIN = "base_model_name_or_path revision peft_version auto_mapping task_type inference_mode"
ADAPTER_START = (
    "loftq_config eva_config corda_config lora_ga_config "
    "prompt_tuning_init prompt_tuning_init_text tokenizer_name_or_path tokenizer_kwargs"
)
ADAPTER_PLACES = "target_modules target_parameters exclude_modules modules_to_save layers_to_transform layers_pattern"
OF_NO_MATTER_IN_ADAPTER = frozenset(f"{ADAPTER_ORIGIN} {ADAPTER_START} {ADAPTER_PLACES}".split())

ADAPTER_PARTS = (BaseTunerLayer, AuxiliaryTrainingWrapper)


@dataclass(frozen=True)
class Identity:
    """A reference, recognised by what its log-probs depend on."""

    digest: str  # 32 hex digits
    about: dict[str, str]  # for people: model, source, adapter, quantization, computed in


def identify(model: nn.Module, *, adapter: str | None = None, precision: str = "float32") -> Identity:
    """The identity of a reference. Reads every weight once; changes nothing and draws no random numbers. Collective where an
    engine has cut the model between ranks.

    Args:
        model: a transformers model or a PeftModel, with all its weights in this process; wrappers do not matter.
        adapter: the PEFT adapter that is active in the reference, whichever is now. None: all adapters are off.
        precision: what the forward computes in where mixed precision is on, else "float32".

    Raises:
        ValueError: the adapter does not exist or is merged, or the weights are not here.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"The precision of a reference is one of {', '.join(PRECISIONS)}, got {precision!r}.")
    model = extract_model_from_parallel(model, keep_torch_compile=False)
    _check_adapters(model, adapter)
    _check_weights_are_here(model)
    base = base_model(model)
    names = names_without_adapters(base)
    content = {
        "format": FORMAT,
        "class": class_of(base).__name__,
        "config": plain(base.config.to_dict(), without=OF_NO_MATTER),
        "numbers": _numbers(base, names),
        "weights": digests(_weights(base, names)),
        "adapter": None if adapter is None else _adapter(model, names, adapter),
        "precision": precision,
    }
    digest = xxhash.xxh3_128_hexdigest(json.dumps(content, sort_keys=True).encode())
    return Identity(digest, _about(model, names, adapter, precision))


def _check_adapters(model: nn.Module, adapter: str | None) -> None:
    """Refuse adapters that the model lacks, and states in which the weights do not tell what it computes."""
    known = model.peft_config if isinstance(model, PeftModel) else {}
    if adapter is not None and adapter not in known:
        raise ValueError(
            f"{type(model).__name__} has no adapter {adapter!r} (it has {', '.join(known) or 'none'}): name one of them, "
            "or load it with PeftModel.from_pretrained."
        )
    for name, part in _adapter_parts(model):
        if part.merged_adapters:
            raise ValueError(
                f"The adapter {part.merged_adapters[0]!r} is merged into the weights of {name}, for as long as it is on: "
                "call unmerge_adapter(), or merge_and_unload() to make it part of the model for good."
            )
        if not isinstance(model, PeftModel) and part.active_adapters and not part.disable_adapters:
            raise ValueError(
                f"{type(model).__name__} has an active adapter in {name}, but is no PeftModel. Load the adapter with "
                "PeftModel.from_pretrained instead of model.load_adapter (get_peft_model instead of model.add_adapter), or "
                f"switch it off with disable_adapters().{note_on('peft')}"
            )


def _check_weights_are_here(model: nn.Module) -> None:
    if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
        raise WeightsElsewhere(not_here("The model", "is sharded by FSDP"))


def _adapter_parts(model: nn.Module) -> Iterator[tuple[str, Any]]:
    return ((name, m) for name, m in model.named_modules() if isinstance(m, ADAPTER_PARTS))


def names_without_adapters(base: PreTrainedModel) -> dict[str, str | None]:
    """{path of a module: its path in the model without adapters}; None for what belongs to an adapter.

    PEFT puts its layers in the place of the model's own, which it keeps inside: both get the name of the place.
    """
    names: dict[str, str | None] = {"": ""}
    modules = dict(base.named_modules(remove_duplicate=False))  # parents come before their children
    for path, module in modules.items():
        if not path:
            continue
        above, _, own = path.rpartition(".")
        outer, place = modules[above], names[above]
        if isinstance(outer, BaseTunerLayer):
            names[path] = place if own == "base_layer" else None
        elif isinstance(outer, AuxiliaryTrainingWrapper):
            is_kept = module is outer.original_module or isinstance(module, BaseTunerLayer)
            names[path] = place if is_kept else None
        else:
            names[path] = None if place is None else f"{place}.{own}".removeprefix(".")
    return names


def _weights(base: PreTrainedModel, names: dict[str, str | None]) -> dict[str, Tensor]:
    """What the model saves (parameters, buffers, the state of quantised weights), named as without adapters."""
    weights = {}
    for key, tensor in base.state_dict(keep_vars=True).items():
        owner = key.rpartition(".")[0]
        while owner not in names:  # q_proj.weight.absmax belongs to q_proj
            owner = owner.rpartition(".")[0]
        place = names[owner]
        if place is not None and not isinstance(base.get_submodule(owner), ADAPTER_PARTS):
            weights[place + key[len(owner) :]] = tensor
    return weights


def _numbers(base: PreTrainedModel, names: dict[str, str | None]) -> dict[str, float]:
    """Scales, caps and epsilons as the modules hold them: they may have been changed since the config was read."""
    return {
        f"{names[path]}.{attribute}": value
        for path, module in base.named_modules()
        if names[path] is not None and not isinstance(module, (*ADAPTER_PARTS, _DropoutNd))
        for attribute, value in vars(module).items()
        if isinstance(value, float) and not DROPOUT.search(attribute)
    }


def _adapter(model: PeftModel, names: dict[str, str | None], adapter: str) -> dict[str, Any]:
    """Weights, config and numbers of one adapter, without its name."""
    # The embeddings that it may save along are the model's, and asking for them may ask the hub. A prompt encoder is
    # run for its weights: without dropout.
    with torch.no_grad(), evaluation_mode(model):
        weights = get_peft_model_state_dict(
            model, model.state_dict(keep_vars=True), adapter, save_embedding_layers=False
        )
    numbers: dict[str, list[Any]] = {}
    for path, layer in _adapter_parts(base_model(model)):
        if not isinstance(layer, BaseTunerLayer):
            continue
        for attribute in layer.other_param_names:  # scaling, which can be set at run time, and its like
            held = getattr(layer, attribute)
            if isinstance(held, dict) and isinstance(held.get(adapter), float | int | str | list):
                # A list, because one layer can carry several: adapters of two parameters of the same module.
                numbers.setdefault(f"{names[path]}.{attribute}", []).append(plain(held[adapter]))
    return {
        "weights": digests(weights),
        "config": plain(model.peft_config[adapter].to_dict(), without=OF_NO_MATTER_IN_ADAPTER),
        "numbers": {name: values for name, values in numbers.items() if not DROPOUT.search(name)},
    }


def _about(
    model: PreTrainedModel | PeftModel, names: dict[str, str | None], adapter: str | None, precision: str
) -> dict[str, str]:
    base = base_model(model)
    dtype = str(base.dtype).removeprefix("torch.")
    own = [p for name, p in base.named_parameters() if names[name.rpartition(".")[0]] is not None]
    # A 4-bit tensor holds two weights in a number, and knows its shape.
    sizes = [math.prod(getattr(getattr(p, "quant_state", None), "shape", shape_of(p))) for p in own]
    return {
        "model": f"{class_of(base).__name__}, {sum(sizes):,} parameters, {dtype}",
        "source": base.config._name_or_path or "built in memory",
        "adapter": "none" if adapter is None else f"{adapter!r}, {model.peft_config[adapter].peft_type.value}",
        "quantization": _quantization(base),
        "computed in": dtype if precision == "float32" else precision,
    }


def _quantization(base: PreTrainedModel) -> str:
    config = base.config.to_dict().get("quantization_config")
    if not config:
        return "none"
    method = str(getattr(config["quant_method"], "value", config["quant_method"]))
    if config.get("load_in_4bit"):
        nested = ", nested" if config["bnb_4bit_use_double_quant"] else ""
        return f"{method}, {config['bnb_4bit_quant_type']}{nested}, computed in {config['bnb_4bit_compute_dtype']}"
    return f"{method}, 8 bits" if config.get("load_in_8bit") else method
