"""A checkpoint's LoRA adapter, continued under LoRA settings of one's own (SFT -> DPO -> DPO).

A layer with an adapter computes W x + s B A x, with A [r, in], B [out, r] and s = alpha / r, or alpha / sqrt(r) under
rsLoRA. Another rank or alpha is another s. So the old numbers go into the larger matrices with B times s_old / s_new: a
wider adapter that computes the same.
"""

from __future__ import annotations

import copy
from typing import Any

from peft import LoraConfig, PeftModel, PeftType
from peft.tuners.lora import LoraLayer, LoraModel
from peft.utils import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import Tensor, nn, no_grad

from .lora_settings import DROP, SHAPING, Adapter, differences, merged, side_by_side


def continue_adapter(model: PeftModel, wanted: LoraConfig, *, merge_lora_configs: bool) -> PeftModel:
    """The model, in place, its active adapter ready to be trained on under the settings `wanted`.

    Settings that come to the same ranks, scaling and modules leave the adapter as it is, with the dropout of `wanted`.
    Others are an error, or with `merge_lora_configs` give one adapter of the same name that computes what the old one
    did: the larger rank, all modules of both, alpha, rsLoRA, dropout and initialisation of `wanted`. Other adapters of
    the model and its base stay as they are.

    Raises:
        ValueError: the settings differ and are not to be merged, or merging them could not keep the function.
    """
    name = _active_lora(model, wanted)
    own = Adapter(model.peft_config[name], _layers(model.base_model.model, name))
    asked = _as_on_the_bare_base(model, wanted)
    differing = differences(own, asked, wanted)
    if differing and not merge_lora_configs:
        raise ValueError(
            f"The adapter {name!r} of the checkpoint and peft_config (--use_peft) have different LoRA settings:\n"
            f"{side_by_side(differing)}\n"
            f"Either {DROP}, or set --merge_lora_configs true to go on with one adapter that has the larger rank and all "
            "modules of both, and computes the same at its start."
        )
    if differing:
        _widen(model, name, own, merged(name, own, asked))
    for layer in _lora_layers(model.base_model.model, name).values():
        rate = wanted.lora_dropout
        layer.lora_dropout[name] = nn.Dropout(rate) if rate > 0 else nn.Identity()
        layer.train(layer.get_base_layer().training)  # what PEFT and these lines make is in training mode
    model.peft_config[name].lora_dropout = wanted.lora_dropout
    return model


def _active_lora(model: PeftModel, wanted: LoraConfig) -> str:
    """The name of the one active adapter."""
    if len(model.active_adapters) != 1:
        raise ValueError(
            f"The model has {len(model.active_adapters)} active adapters {model.active_adapters}, and one is continued: "
            "name it with --model_adapter_name."
        )
    name = model.active_adapters[0]
    kinds = [str(getattr(c, "peft_type", type(c).__name__)) for c in (model.peft_config[name], wanted)]
    if kinds != [str(PeftType.LORA)] * 2:
        own, asked = (kind.removeprefix("PeftType.") for kind in kinds)
        raise ValueError(
            f"The adapter {name!r} of the checkpoint is {own} and peft_config is {asked}: only LoRA is continued under other "
            f"settings, with LoRA. Either {DROP}, or pass model.merge_and_unload() to start a new one on top of it."
        )
    return name


def _lora_layers(base: nn.Module, name: str) -> dict[str, LoraLayer]:
    return {key: m for key, m in base.named_modules() if isinstance(m, LoraLayer) and name in m.scaling}


def _layers(base: nn.Module, name: str) -> dict[str, tuple[int, float]]:
    return {key: (layer.r[name], layer.scaling[name]) for key, layer in _lora_layers(base, name).items()}


def _as_on_the_bare_base(model: PeftModel, wanted: LoraConfig) -> Adapter:
    """What `wanted` comes to, found by letting PEFT build it on a copy without numbers and without adapters."""
    base = model.base_model.model
    # Quantised weights are kept, since PEFT asks them how they are quantised; no forward or backward runs here.
    memo: dict[int, Any] = {id(t): t for t in (*base.parameters(), *base.buffers())}
    plain = (p for p in base.parameters() if type(p) is nn.Parameter)
    memo.update({id(p): nn.Parameter(p.to("meta"), requires_grad=False) for p in plain})
    bare = copy.deepcopy(base, memo)
    for key, module in reversed(list(bare.named_modules())):  # wrappers may hold wrappers
        parent, _, child = key.rpartition(".")
        if isinstance(module, LoraLayer):
            setattr(bare.get_submodule(parent), child, module.get_base_layer())
        elif isinstance(module, AuxiliaryTrainingWrapper):
            setattr(bare.get_submodule(parent), child, module.original_module)
    vars(bare).pop("peft_config", None)  # the tuner would take its adapters for already built

    config = LoraConfig(task_type="CAUSAL_LM", **{field: copy.deepcopy(getattr(wanted, field)) for field in SHAPING})
    tuner = LoraModel(bare, config, "asked", low_cpu_mem_usage=True)
    resolved = copy.deepcopy(wanted)
    for field in SHAPING:
        setattr(resolved, field, getattr(tuner.peft_config["asked"], field))
    return Adapter(resolved, _layers(bare, "asked"))


def _widen(model: PeftModel, name: str, own: Adapter, wider: LoraConfig) -> None:
    """Replace the adapter by one of the settings `wider` that computes the same, in place."""
    base = model.base_model.model
    old = {key: _tensors(layer, name) for key, layer in _lora_layers(base, name).items()}
    full_modules = {
        key: module.modules_to_save[name]
        for key, module in base.named_modules()
        if isinstance(module, ModulesToSaveWrapper) and name in module.modules_to_save
    }
    others = [other for other in model.peft_config if other != name]
    if others:
        model.set_adapter(others[0])  # PEFT warns for each layer that loses its active adapter
    model.delete_adapter(name)
    if not others:
        model.base_model.active_adapter = name  # it is none now, and then PEFT cannot add modules_to_save
    model.add_adapter(name, wider)
    with no_grad():
        for key, tensors in old.items():
            layer = base.get_submodule(key)
            _copy_rescaled(tensors, _tensors(layer, name), own.layers[key][1] / layer.scaling[name])
    for key, module in full_modules.items():  # the module itself: PEFT's new copy has the dtype of the base
        base.get_submodule(key).modules_to_save[name] = module
    model.set_adapter(name)


def _tensors(layer: LoraLayer, name: str) -> dict[str, Tensor]:
    """A [r, ...], B [out, r, ...], and where the layer has them B's bias and DoRA's magnitudes."""
    if name in layer.lora_embedding_A:
        tensors = {"A": layer.lora_embedding_A[name], "B": layer.lora_embedding_B[name]}
    else:
        tensors = {"A": layer.lora_A[name].weight, "B": layer.lora_B[name].weight}
        if layer.lora_B[name].bias is not None:
            tensors["bias"] = layer.lora_B[name].bias
    if name in layer.lora_magnitude_vector:
        tensors["magnitude"] = layer.lora_magnitude_vector[name].weight
    return tensors


def _copy_rescaled(old: dict[str, Tensor], new: dict[str, Tensor], ratio: float) -> None:
    """Old directions first, B and its bias times `ratio` = s_old / s_new. The others stay fresh: their B A is zero."""
    rank = len(old["A"])
    new["A"][:rank] = old["A"]
    new["B"][:, :rank] = ratio * old["B"]
    if "bias" in old:
        new["bias"].copy_(ratio * old["bias"])
    if "magnitude" in old:
        new["magnitude"].copy_(old["magnitude"])
