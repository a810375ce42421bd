"""A checkpoint's LoRA adapter, continued under LoRA settings of one's own (SFT -> DPO -> DPO).

A layer with an adapter computes W x + s B A x, with A [r, in], B [out, r] and s = alpha / r, or alpha / sqrt(r) under
rsLoRA. Another rank or alpha is another s. So the old numbers go into the larger matrices with B times s_old / s_new: a
wider adapter that computes the same.
"""

from __future__ import annotations

import copy
import re
from dataclasses import asdict, dataclass, fields, is_dataclass
from typing import Any

from peft import LoraConfig, PeftModel, PeftType
from peft.tuners.lora import LoraLayer, LoraModel
from peft.utils import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import Tensor, nn, no_grad

# Every field of LoraConfig is in one of these groups, or must be unset for two configs to be merged: a field of a later
# PEFT is refused until somebody has thought about it.
SELECTION = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
SCALE = ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern")
INIT = ("init_lora_weights", "loftq_config", "eva_config", "corda_config", "lora_ga_config", "runtime_config")
LIVE = ("lora_dropout",)
RECORDS = ("task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision")
# PEFT sets fan_in_fan_out itself, by the type of the layers, and says so. The others mean nothing alone.
DEPENDENT = ("fan_in_fan_out", "inference_mode", "megatron_core", "qalora_group_size")
MERGED = (*SELECTION, *SCALE, "modules_to_save", "lora_bias", "use_dora")

HARMLESS_INIT = (True, "gaussian")  # new directions add nothing until they are trained
BASE_UNTOUCHED = (*HARMLESS_INIT, False, "eva", "orthogonal")

DROP = "leave peft_config (--use_peft) out to train the adapter with its own settings"

Settings = dict[str, tuple[Any, Any]]  # {setting: (the checkpoint's, the one asked for)}


@dataclass(frozen=True)
class Adapter:
    """Settings as PEFT resolved them, and what they came to: {full name of a module: (rank, scaling)}."""

    config: LoraConfig
    layers: dict[str, tuple[int, float]]


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
    differing = _differences(own, asked, wanted)
    if differing and not merge_lora_configs:
        raise ValueError(
            f"The adapter {name!r} of the checkpoint and peft_config (--use_peft) have different LoRA settings:\n"
            f"{_side_by_side(differing)}\n"
            f"Either {DROP}, or set --merge_lora_configs true to go on with one adapter that has the larger rank and all "
            "modules of both, and computes the same at its start."
        )
    if differing:
        _refuse_other_functions(name, own, asked)
        _refuse_double_use(name, own, asked)
        _widen(model, name, own, _merged(own, asked))
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

    shaping = (*SELECTION, *SCALE, *LIVE, "target_parameters", "modules_to_save")
    config = LoraConfig(task_type="CAUSAL_LM", **{field: copy.deepcopy(getattr(wanted, field)) for field in shaping})
    tuner = LoraModel(bare, config, "asked", low_cpu_mem_usage=True)
    resolved = copy.deepcopy(wanted)
    for field in shaping:
        setattr(resolved, field, getattr(tuner.peft_config["asked"], field))
    return Adapter(resolved, _layers(bare, "asked"))


def _differences(own: Adapter, asked: Adapter, wanted: LoraConfig) -> Settings:
    """The settings that decide shapes or function and differ; of those asked for, the words that were used."""
    silent = {*INIT, *LIVE, *RECORDS, *DEPENDENT}
    if own.layers.keys() == asked.layers.keys():
        silent.update(SELECTION)
    if own.layers == asked.layers:
        silent.update(SCALE)
    differing = {
        f.name: (getattr(own.config, f.name), getattr(wanted, f.name))
        for f in fields(LoraConfig)
        if f.name not in silent
        and _comparable(getattr(own.config, f.name)) != _comparable(getattr(asked.config, f.name))
    }
    if own.layers != asked.layers and not differing:  # somebody rescaled the layers by hand
        key = next(key for key in own.layers if own.layers[key] != asked.layers[key])
        differing[f"rank and scaling of {key}"] = (own.layers[key], asked.layers[key])
    return differing


def _comparable(value: Any) -> Any:
    """No order where there is none, and one way to say nothing."""
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    if isinstance(value, list | set | tuple):  # of names, or of numbers and spans, whose order may matter
        names = all(isinstance(part, str) for part in value)
        value = sorted(value) if names else [list(part) if isinstance(part, tuple) else part for part in value]
    return value if value or type(value) is int else None  # layers_to_transform=0 says something


def _side_by_side(settings: Settings) -> str:
    rows = [("setting", "checkpoint", "peft_config")]
    rows += [(setting, _words(own), _words(asked)) for setting, (own, asked) in settings.items()]
    first, second = (max(len(row[column]) for row in rows) for column in (0, 1))
    return "\n".join(f"  {a:<{first}}  {b:<{second}}  {c}" for a, b, c in rows)


def _words(value: Any) -> str:
    if not isinstance(value, list | set) or not value:
        return str(value)
    words = ", ".join(sorted(map(str, value)))
    if len(words) < 80:
        return words
    last_parts = sorted({str(name).rpartition(".")[2] for name in value})
    return f"{len(value)} modules named {', '.join(last_parts)}"


def _refuse_other_functions(name: str, own: Adapter, asked: Adapter) -> None:
    """Refuse settings under which a wider adapter would not compute what the old one does, or was never seen to."""
    pairs = {f.name: (getattr(own.config, f.name), getattr(asked.config, f.name)) for f in fields(LoraConfig)}
    unset, understood = LoraConfig(), {*INIT, *LIVE, *RECORDS, *DEPENDENT, *MERGED}
    bad = {
        key: pair
        for key, pair in pairs.items()
        if key not in understood and any(_comparable(v) != _comparable(getattr(unset, key)) for v in pair)
    }
    own_init, asked_init = pairs["init_lora_weights"]
    if own_init not in BASE_UNTOUCHED or asked_init not in HARMLESS_INIT:
        bad["init_lora_weights"] = (own_init, asked_init)
    if own.config.use_dora != asked.config.use_dora:
        bad["use_dora"] = pairs["use_dora"]
    if any(scaling == 0 for _, scaling in asked.layers.values()):
        bad["lora_alpha"] = pairs["lora_alpha"]
    if bad:
        raise ValueError(
            f"--merge_lora_configs true cannot keep what the adapter {name!r} computes, because of these settings:\n"
            f"{_side_by_side(bad)}\n"
            f"Change them in peft_config where that helps, or {DROP}, or pass model.merge_and_unload() to start a new "
            "adapter on top of it."
        )


def _refuse_double_use(name: str, own: Adapter, asked: Adapter) -> None:
    whole = _union(own.config.modules_to_save, asked.config.modules_to_save) or []
    twice = [
        key for key in {**own.layers, **asked.layers} if any(re.match(rf"(.*\.)?{part}(\.|$)", key) for part in whole)
    ]
    if twice:
        raise ValueError(
            f"--merge_lora_configs: {', '.join(twice)} would be trained as a whole (modules_to_save: {', '.join(whole)}) by "
            f"the one side and through LoRA by the other, and one adapter cannot do both to the checkpoint's {name!r}. Use "
            f"it in the same way in peft_config, or {DROP}."
        )


def _union(*lists: list[str] | set[str] | None) -> list[str] | None:
    return sorted(set().union(*(names or () for names in lists))) or None


def _merged(own: Adapter, asked: Adapter) -> LoraConfig:
    merged = copy.deepcopy(own.config)
    for field in (*INIT, *LIVE, "lora_alpha", "alpha_pattern", "use_rslora"):
        setattr(merged, field, copy.deepcopy(getattr(asked.config, field)))
    merged.inference_mode = False
    merged.task_type = own.config.task_type or "CAUSAL_LM"
    merged.lora_bias = own.config.lora_bias or asked.config.lora_bias
    merged.modules_to_save = _union(own.config.modules_to_save, asked.config.modules_to_save)
    for field, value in _selection(own, asked).items():
        setattr(merged, field, value)

    merged.r = max(own.config.r, asked.config.r)
    ranks = {
        key: max(side.layers[key][0] if key in side.layers else side.config.r for side in (own, asked))
        for key in {**own.layers, **asked.layers}
    }
    merged.rank_pattern = {key: rank for key, rank in ranks.items() if rank != merged.r}
    return merged


def _selection(own: Adapter, asked: Adapter) -> dict[str, Any]:
    """Settings that target all modules of both, short where that says exactly the same as their full names."""
    both = {**own.layers, **asked.layers}
    for side in (asked, own):
        if side.layers.keys() == both.keys():
            return {field: copy.deepcopy(getattr(side.config, field)) for field in SELECTION}
    targets = [
        side.config.target_modules
        for side in (own, asked)
        if not isinstance(side.config.target_modules, str)
        and all(_comparable(getattr(side.config, field)) is None for field in SELECTION[1:])
    ]
    return {**dict.fromkeys(SELECTION), "target_modules": _union(*targets) if len(targets) == 2 else sorted(both)}


def _widen(model: PeftModel, name: str, own: Adapter, merged: LoraConfig) -> None:
    """Replace the adapter by one of the settings `merged` that computes the same, in place."""
    base = model.base_model.model
    old = {key: _tensors(layer, name) for key, layer in _lora_layers(base, name).items()}
    wholes = {
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
    model.add_adapter(name, merged)
    with no_grad():
        for key, tensors in old.items():
            layer = base.get_submodule(key)
            _copy_rescaled(tensors, _tensors(layer, name), own.layers[key][1] / layer.scaling[name])
    for key, module in wholes.items():  # the module itself: PEFT's new copy has the dtype of the base
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
