"""A frozen copy of an adapter, beside it on the same model: made, and compared with its source weight by weight."""

from __future__ import annotations

import copy

import torch
from peft import PeftConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ..distributed.sharding import gathered
from ..models.unwrap import base_model, evaluation_mode
from .beside_adapter import trained_in_base


def twins(model: nn.Module, adapter: str, copied: str) -> dict[str, str]:
    """{name of a parameter of the adapter `copied`: name of the same parameter of `adapter`}.

    peft puts the adapter's name somewhere among the dotted parts (`lora_A.NAME.weight`, `trainable_tokens_delta.NAME`),
    and a user may call an adapter like another part ("model"): a twin is a name that exists.
    """
    names = {name for name, _ in model.named_parameters()}
    found = {}
    for name in sorted(names):
        parts = name.split(".")
        for place, part in enumerate(parts):
            own = ".".join([*parts[:place], copied, *parts[place + 1 :]])
            if part == adapter and own in names:
                found[own] = name
    return found


def copy_adapter(model: PeftModel, source: str, target: str) -> None:
    """Add a frozen adapter with the weights of another, whatever its kind and name.

    Raises:
        ValueError: the name is taken, or the copy is not what its source is.
    """
    if target in model.peft_config:
        raise ValueError(
            f"The model already has an adapter {target!r}, the name that a frozen copy of {source!r} would get: say "
            f"--ref_adapter_name {target} if it is the reference, or rename it."
        )
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    model.add_adapter(target, _config_of_copy(model, source))
    weights = {name: w.clone() for name, w in _saved(model, source).items()}
    set_peft_model_state_dict(model, weights, adapter_name=target)
    _copy_parameters(model, source, target)
    model.set_adapter(source)
    for name, parameter in model.named_parameters():  # PEFT makes all of the active adapter trainable
        parameter.requires_grad_(name in trained)
    freeze(model, target)
    _compare(model, source, target)


def freeze(model: PeftModel, adapter: str) -> None:
    if model.peft_config[adapter].is_prompt_learning:
        model.prompt_encoder[adapter].requires_grad_(False)
    else:
        model.set_requires_grad(adapter, requires_grad=False)


def _config_of_copy(model: PeftModel, source: str) -> PeftConfig:
    """Settings that make an adapter of the same shapes."""
    config = copy.deepcopy(model.peft_config[source])
    if hasattr(config, "init_lora_weights"):
        # The first weights are overwritten anyway, and PiSSA and its like would change the base a second time.
        config.init_lora_weights = True
    if getattr(config, "ensure_weight_tying", False):
        # PEFT finds tied layers only as long as they carry no adapter: they are named instead.
        config.ensure_weight_tying = False
        config.target_modules = [
            name
            for name, module in base_model(model).named_modules()
            if isinstance(module, BaseTunerLayer)
            and any(source in getattr(module, weights) for weights in module.adapter_layer_names)
        ]
    if hasattr(config, "bias"):
        config.bias = "none"  # the base's biases are not the copy's: see `StartingWeights`
    return config


def _saved(model: PeftModel, adapter: str) -> dict[str, Tensor]:
    # A prompt encoder is run for its weights: without dropout.
    with torch.no_grad(), evaluation_mode(model):
        return get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)


@torch.no_grad()
def _copy_parameters(model: PeftModel, source: str, target: str) -> None:
    """What PEFT saves of an adapter need not be all of it: of p-tuning, what its encoder makes, and not the encoder."""
    parameters = dict(model.named_parameters())
    for own, live in twins(model, source, target).items():
        if not parameters[own].is_meta:
            with gathered(parameters[live]) as wanted, gathered(parameters[own], write=True) as weight:
                weight.copy_(wanted)


def _compare(model: PeftModel, source: str, target: str) -> None:
    """All that is trained has its twin in the copy, or is kept in another way; and all that is saved is the same."""
    kept = {p.data_ptr() for p in trained_in_base(model).values()}
    paired = set(twins(model, source, target).values())
    alone = [
        n for n, p in model.named_parameters() if p.requires_grad and n not in paired and p.data_ptr() not in kept
    ]
    own = {name: weight for name, weight in _saved(model, source).items() if weight.data_ptr() not in kept}
    copied = _saved(model, target)
    # The copy may come with more: PEFT tells adapters apart by names that others may have too ("model").
    different = [*alone, *(n for n in own if n not in copied or _differ(own[n], copied[n]))]
    if different:
        raise ValueError(
            f"The frozen copy of the adapter {source!r} would not be what the adapter is: {different[0]} is missing in it or "
            "differs. Use another reference: the model below the adapter (--use_separate_reference_adapter false), a "
            "ref_model, or an adapter loaded a second time (--ref_adapter_name)."
        )


def _differ(one: Tensor, other: Tensor) -> bool:
    if one.is_meta or other.is_meta:
        return False
    with gathered(one) as a, gathered(other) as b:
        return not torch.equal(a, b.to(a.device))
