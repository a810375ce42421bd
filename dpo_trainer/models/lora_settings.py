"""LoRA settings of two sides, a checkpoint's and those asked for: compared, shown side by side, and merged.

What the settings come to counts, not their words: the ranks and the scaling of the layers that PEFT makes of them.
"""

from __future__ import annotations

import copy
import re
from dataclasses import asdict, dataclass, fields, is_dataclass
from typing import Any

from peft import LoraConfig

# Every field of LoraConfig is in one of these groups, or must be unset for two configs to be merged: a field of a later
# PEFT is refused until it is handled here.
SELECTION = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
SCALE = ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern")
INIT = ("init_lora_weights", "loftq_config", "eva_config", "corda_config", "lora_ga_config", "runtime_config")
LIVE = ("lora_dropout",)
RECORDS = ("task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision")
# PEFT sets fan_in_fan_out itself, by the type of the layers, and says so. The others mean nothing alone.
DEPENDENT = ("fan_in_fan_out", "inference_mode", "megatron_core", "qalora_group_size")
SHAPING = (*SELECTION, *SCALE, *LIVE, "target_parameters", "modules_to_save")  # of these PEFT makes the layers
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


def differences(own: Adapter, asked: Adapter, wanted: LoraConfig) -> Settings:
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
    if own.layers != asked.layers and not differing:  # the user rescaled the layers by hand
        key = next(key for key in own.layers if own.layers[key] != asked.layers[key])
        differing[f"rank and scaling of {key}"] = (own.layers[key], asked.layers[key])
    return differing


def _comparable(value: Any) -> Any:
    """No order where there is none, and one way to say nothing."""
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    if isinstance(value, list | set | tuple):  # of names, or of numbers and spans, whose order may matter
        names = all(isinstance(item, str) for item in value)
        value = sorted(value) if names else [list(item) if isinstance(item, tuple) else item for item in value]
    return value if value or type(value) is int else None  # layers_to_transform=0 says something


def side_by_side(settings: Settings) -> str:
    """A table of three columns: setting, checkpoint, peft_config."""
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
    last_names = sorted({str(name).rpartition(".")[2] for name in value})
    return f"{len(value)} modules named {', '.join(last_names)}"


def merged(name: str, own: Adapter, asked: Adapter) -> LoraConfig:
    """Settings of a wider adapter that can compute what the checkpoint's adapter `name` does.

    The larger rank and the modules of both; alpha, rsLoRA, dropout and initialisation of those asked for.

    Raises:
        ValueError: under these settings none could, or a module would be trained in two ways.
    """
    _refuse_other_functions(name, own, asked)
    _refuse_double_use(name, own, asked)
    wider = copy.deepcopy(own.config)
    for field in (*INIT, *LIVE, "lora_alpha", "alpha_pattern", "use_rslora"):
        setattr(wider, field, copy.deepcopy(getattr(asked.config, field)))
    wider.inference_mode = False
    wider.task_type = own.config.task_type or "CAUSAL_LM"
    wider.lora_bias = own.config.lora_bias or asked.config.lora_bias
    wider.modules_to_save = _union(own.config.modules_to_save, asked.config.modules_to_save)
    for field, value in _selection(own, asked).items():
        setattr(wider, field, value)

    wider.r = max(own.config.r, asked.config.r)
    ranks = {
        key: max(side.layers[key][0] if key in side.layers else side.config.r for side in (own, asked))
        for key in {**own.layers, **asked.layers}
    }
    wider.rank_pattern = {key: rank for key, rank in ranks.items() if rank != wider.r}
    return wider


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
            f"{side_by_side(bad)}\n"
            f"Change them in peft_config where that helps, or {DROP}, or pass model.merge_and_unload() to start a new "
            "adapter on top of it."
        )


def _refuse_double_use(name: str, own: Adapter, asked: Adapter) -> None:
    full = _union(own.config.modules_to_save, asked.config.modules_to_save) or []
    twice = [
        key for key in {**own.layers, **asked.layers} if any(re.match(rf"(.*\.)?{item}(\.|$)", key) for item in full)
    ]
    if twice:
        raise ValueError(
            f"--merge_lora_configs: {', '.join(twice)} would be trained as a whole (modules_to_save: {', '.join(full)}) by "
            f"the one side and through LoRA by the other, and one adapter cannot do both to the checkpoint's {name!r}. Use "
            f"it in the same way in peft_config, or {DROP}."
        )


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


def _union(*lists: list[str] | set[str] | None) -> list[str] | None:
    return sorted(set().union(*(names or () for names in lists))) or None
