"""Refuse launcher and engine settings that a run cannot use, before a model is loaded where possible.

`accelerate launch` and its files speak to a run through environment variables: those are read here, as accelerate reads them.
"""

from __future__ import annotations

import json
import os
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from accelerate import ParallelismConfig
from accelerate.utils import is_deepspeed_available, str_to_bool
from torch import nn

if TYPE_CHECKING:
    from transformers import TrainingArguments

OF_ACCELERATE = {"compute_environment", "distributed_type", "deepspeed_config", "fsdp_config", "num_machines"}
OF_DEEPSPEED = {"zero_optimization", "train_micro_batch_size_per_gpu", "train_batch_size", "zero_stage"}
OF_FSDP = {"reshard_after_forward", "auto_wrap_policy", "transformer_layer_cls_to_wrap", "cpu_ram_efficient_loading"}
"""Settings by which a file is known for what it is."""

SHARDS = "To shard weights between processes, use accelerate_configs/fsdp2.yaml or zero3.yaml"
ONE_ROW_EACH = {
    "cp": "context parallelism (ring attention) needs plain causal attention, and here completions share prompts",
    "sp": "sequence parallelism (Ulysses) splits rows between processes, and scored tokens are indexed by their position in the row",
    "tp": "tensor parallelism gives several processes the same pairs, and each process would count them",
}


# --- files and packages: before transformers reads them ---


def check_engine_files(config: TrainingArguments) -> None:
    """Refuse two engines at once, the file of another one, FSDP1, and DeepSpeed where it is not installed."""
    of_deepspeed = _settings("--deepspeed", config.deepspeed)
    of_fsdp = _settings("--fsdp_config", config.fsdp_config)
    deepspeed = f"--deepspeed {_short(config.deepspeed)}" if config.deepspeed else _launched("DEEPSPEED")
    fsdp = f"--fsdp {config.fsdp}" if config.fsdp else _launched("FSDP")
    if deepspeed and fsdp:
        raise ValueError(f"{deepspeed} and {fsdp} are two engines, but a run can use only one: leave one of them out.")
    if found := sorted(OF_FSDP & set(of_deepspeed)) or [key for key in of_deepspeed if key.startswith("fsdp_")]:
        raise ValueError(
            f"--deepspeed {_short(config.deepspeed)} has settings of FSDP ({found[0]}): give it to --fsdp_config, with --fsdp true."
        )
    if found := sorted(OF_DEEPSPEED & set(of_fsdp)):
        raise ValueError(
            f"--fsdp_config {_short(config.fsdp_config)} has settings of DeepSpeed ({found[0]}): give it to --deepspeed."
        )
    if of_fsdp and not config.fsdp:
        raise ValueError(
            f"--fsdp_config {_short(config.fsdp_config)} would be ignored: it has no effect without --fsdp true. Add --fsdp true, or "
            "leave it out."
        )
    if fsdp:
        _check_fsdp(fsdp, of_fsdp if config.fsdp else _launched_fsdp())
    if deepspeed and not is_deepspeed_available():
        raise ValueError(
            f"{deepspeed} needs DeepSpeed, which is not installed: `pip install deepspeed`, or launch with "
            "accelerate_configs/ddp.yaml or fsdp2.yaml, which need no package."
        )


def _settings(flag: str, value: Any) -> dict[str, Any]:
    """Return the settings of a flag whose value is a dict, JSON text or a JSON file."""
    if not value:
        return {}
    if isinstance(value, dict):
        return value
    in_place = str(value).lstrip().startswith("{")
    if not in_place and not os.path.isfile(value):
        raise ValueError(f"{flag} {value}: this file does not exist. Give the path of a JSON file, or JSON text.")
    text = str(value) if in_place else Path(value).read_text(encoding="utf-8")
    if _is_of_accelerate(text):
        raise ValueError(
            f"{flag} {_short(value)} is a configuration of accelerate, which names an engine and its processes: start the run with "
            f"`accelerate launch --config_file {_short(value)}` and leave {flag} out."
        )
    try:
        content = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{flag} {_short(value)} is not JSON ({error}): write the settings as JSON.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{flag} {_short(value)} is not a JSON object: write the settings as {{...}}.")
    return content


def _is_of_accelerate(text: str) -> bool:
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError:
        return False
    return isinstance(content, dict) and bool(OF_ACCELERATE & set(content))


def _short(value: Any) -> str:
    return "{...}" if isinstance(value, dict) or str(value).lstrip().startswith("{") else str(value)


def _is_set(variable: str) -> bool:
    return bool(str_to_bool(os.environ.get(variable, "false")))


def _launched(engine: str) -> str:
    """How the launcher asked for an engine, for a message; empty where it did not."""
    return f"distributed_type: {engine} of the launcher" if _is_set(f"ACCELERATE_USE_{engine}") else ""


def _launched_fsdp() -> dict[str, Any]:
    return {
        "version": os.environ.get("FSDP_VERSION", "1"),
        "cpu_ram_efficient_loading": os.environ.get("FSDP_CPU_RAM_EFFICIENT_LOADING", "false"),
    }


def _check_fsdp(asked: str, settings: dict[str, Any]) -> None:
    version = settings.get("version", settings.get("fsdp_version", 2))
    if str(version) != "2":
        raise ValueError(
            f"{asked} with fsdp_version {version} is FSDP1, which is untested here and which torch has "
            "replaced: use accelerate_configs/fsdp2.yaml, or set fsdp_version: 2."
        )
    name = "cpu_ram_efficient_loading"
    if str(settings.get(name, settings.get(f"fsdp_{name}", "false"))).lower() == "true":
        raise ValueError(
            f"{asked} with fsdp_{name}: true leaves all processes but the first with empty weights while the reference is "
            "copied and the run is recognised: set it to false, as accelerate_configs/fsdp2.yaml does (accelerate's default is true)."
        )


# --- what else the launcher says ---


def check_launcher(config: TrainingArguments) -> None:
    """Refuse launcher settings that contradict the config. Called after transformers has set up the processes."""
    if _is_set("ACCELERATE_USE_MEGATRON_LM"):
        raise ValueError(
            f"distributed_type: MEGATRON_LM of the launcher uses its own model and its own loss. {SHARDS}."
        )
    compiler = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower()
    if compiler != "no":
        raise ValueError(
            f"dynamo_backend: {compiler} of the launcher (--dynamo_backend, or dynamo_config of its file) compiles the model, which "
            "is not available in this version (as --torch_compile): leave it out."
        )
    launched, ours = os.environ.get("ACCELERATE_MIXED_PRECISION", "no"), _precision(config)
    if launched not in ("no", ours):
        raise ValueError(
            f"mixed_precision: {launched} of the launcher (--mixed_precision, or its file) differs from the precision of the run, {ours}: "
            'set it to "no" there. --bf16 and --fp16 decide.'
        )
    check_parallelism(_parallelism(config), config.world_size)


def _precision(config: TrainingArguments) -> str:
    return "fp16" if config.fp16 else "bf16" if config.bf16 else "no"


def _parallelism(config: TrainingArguments) -> ParallelismConfig | None:
    launched = ParallelismConfig() if _is_set("ACCELERATE_USE_PARALLELISM_CONFIG") else None
    return config.parallelism_config or launched


def check_parallelism(parallelism: Any, processes: int) -> None:
    """Refuse whatever gives two processes the same rows or parts of them, and sizes that do not make up `processes`."""
    for kind, why in ONE_ROW_EACH.items():
        size = getattr(parallelism, f"{kind}_size", 1)
        if size > 1:
            raise ValueError(
                f"--parallelism_config_{kind}_size {size} (parallelism_config): {why}. Leave it at 1. {SHARDS}."
            )
    sizes = {kind: getattr(parallelism, f"{kind}_size", 1) for kind in ("dp_replicate", "dp_shard")}
    if prod(sizes.values()) not in (1, processes):
        named = " x ".join(f"--parallelism_config_{kind}_size {size}" for kind, size in sizes.items())
        raise ValueError(
            f"{named} (parallelism_config) make {prod(sizes.values())} processes, and {processes} were started: choose sizes that "
            f"multiply to {processes}, or start {prod(sizes.values())} (--num_processes)."
        )


# --- the model, and what accelerate made of all this ---


def check_placement(model: nn.Module, args: TrainingArguments) -> None:
    """Refuse a model that is spread over several devices, or that is not on the device of its process."""
    if (getattr(model, "tp_size", None) or 1) > 1 or getattr(model, "is_distributed_loading_by_transformers", False):
        raise ValueError(
            "The model was sharded between processes when it was loaded (tp_plan, distributed_config, expert parallelism), which is "
            f"not available: load it unsharded. {SHARDS}."
        )
    mapped = {str(place) for place in (getattr(model, "hf_device_map", None) or {}).values()}
    devices = {
        str(p.device) for p in model.parameters() if p.device.type != "meta"
    }  # weights put off to a disk are meta
    spread = mapped if len(mapped) > 1 or "disk" in mapped else devices
    if len(spread) > 1 or "disk" in spread:
        raise ValueError(
            f"The model is spread over {', '.join(sorted(spread))} (device_map, or .to() of a part of it), and a process needs it "
            f"on one device: load it without device_map. {SHARDS}."
        )
    # A model without a map is moved by transformers.
    elsewhere = devices - {"cpu", str(args.device)} if mapped and args.world_size > 1 else set()
    if elsewhere:
        raise ValueError(
            f"The model of process {args.process_index} lies on {elsewhere.pop()} (device_map), and this process works on "
            f"{args.device}: load it without device_map, the launcher places the models."
        )


def check_engine(accelerator: Any) -> None:
    """Check the final state of accelerate: settings made before the run, and the settings of DeepSpeed."""
    check_parallelism(accelerator.parallelism_config, accelerator.num_processes)
    if accelerator.distributed_type == "FSDP":
        _check_fsdp("distributed_type: FSDP", {"version": accelerator.state.fsdp_plugin.fsdp_version})
    zero = accelerator.state.deepspeed_plugin
    autotp = zero.deepspeed_config.get("tensor_parallel", {}).get("autotp_size", 0) if zero is not None else 0
    if autotp > 1:
        raise ValueError(
            f"tensor_parallel.autotp_size {autotp} in the settings of DeepSpeed: {ONE_ROW_EACH['tp']}. Leave it out. "
            f"{SHARDS}."
        )
