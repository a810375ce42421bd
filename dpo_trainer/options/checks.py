"""What `DPOConfig` refuses, and what it fills in where nothing was said. The objective's own are in losses/check.py."""

from __future__ import annotations

import json
import math
import os
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers.trainer_utils import has_length
from transformers.utils import is_liger_kernel_available

from ..data.options import DataOptions
from ..data.tokens.dates import checked_date
from ..printable import printable
from ..registry import did_you_mean

if TYPE_CHECKING:
    from ..config import DPOConfig

# Smallest value of options that are an integer or None.
LEAST = {
    "max_length": 2,
    "max_prompt_length": 1,
    "max_completion_length": 1,
    "max_pairs_per_prompt": 1,
    "dataset_num_proc": 1,
    "pad_to_multiple_of": 1,
    "ref_model_sync_steps": 1,
    "ref_model_sync_epochs": 1,
    "precompute_ref_max_tokens": 1,
    "max_tokens_per_micro_batch": 1,
}


def check_choices(config: DPOConfig) -> None:
    for option in fields(config):
        allowed, value = option.metadata.get("choices"), getattr(config, option.name)
        unset = value is None and option.default is None
        if allowed and not unset and value not in allowed:
            raise ValueError(
                f"--{option.name} {value!r} is not one of {', '.join(allowed)}.{did_you_mean(str(value), allowed)}"
            )


def check_output_dir(config: DPOConfig) -> None:
    """A name that no folder can have, or that something else has."""
    given = config.output_dir
    if given is None:
        return
    shown = f"--output_dir {printable(given)!r}"
    if not given.strip():
        raise ValueError(f"{shown} is empty: name a folder, such as out.")
    if "\0" in given or not _is_utf8(given):
        raise ValueError(
            f"{shown} is not UTF-8, or holds a NUL: files with weights cannot have such a name. Give another."
        )
    folder = Path(given).expanduser()
    there = next((path for path in (folder, *folder.parents) if os.path.lexists(path)), folder)
    if there.is_symlink() and not there.exists():
        raise ValueError(
            f"{shown}: {there} is a link to {there.readlink()}, which is not there. Make that folder, or give another."
        )
    if there.exists() and not there.is_dir():
        raise ValueError(f"{shown}: {there} is a file. Give a folder.")


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def check_bounds(config: DPOConfig) -> None:
    for name, least in LEAST.items():
        value = getattr(config, name)
        if value is not None and (type(value) is not int or value < least):
            raise ValueError(f"--{name} must be an integer of at least {least}, or None, got {value!r}.")
    coef = config.router_aux_loss_coef
    if coef is not None and not (isinstance(coef, int | float) and 0 <= coef < math.inf):
        raise ValueError(f"--router_aux_loss_coef must be a number of at least 0, got {coef!r}.")
    quota = config.ref_cache_quota
    if not (isinstance(quota, int | float) and 0 < quota < math.inf):
        raise ValueError(f"--ref_cache_quota must be a number of gigabytes above 0, got {quota!r}.")


def check_images(config: DPOConfig) -> None:
    DataOptions.from_config(config)  # which refuses addresses of private servers where no address is fetched


def check_lengths(config: DPOConfig) -> None:
    if config.max_length is not None and (config.max_prompt_length or 0) >= config.max_length:
        raise ValueError(
            f"--max_prompt_length {config.max_prompt_length} leaves no room for a completion in --max_length "
            f"{config.max_length}: raise --max_length or lower --max_prompt_length."
        )


def check_template_date(config: DPOConfig) -> None:
    if config.template_date is not None and checked_date(config.template_date) is None:
        raise ValueError(
            f"--template_date must be a day as YYYY-MM-DD, such as 2026-11-30, got {config.template_date!r}."
        )


def check_nonfinite(config: DPOConfig) -> None:
    if config.nonfinite == "skip" and config.deepspeed:
        raise ValueError("--nonfinite skip cannot keep DeepSpeed from its optimizer step: use --nonfinite stop.")
    most, default = config.max_skipped_steps, type(config).max_skipped_steps
    if config.nonfinite != "skip" and most != default:
        raise ValueError(
            f"--max_skipped_steps {most} would be ignored: steps are left out with --nonfinite skip alone. Add it, or leave this out."
        )


def check_cache(config: DPOConfig) -> None:
    if config.precompute_ref_log_probs:
        return
    for option in fields(config):
        name, value = option.name, getattr(config, option.name)
        of_cache = name.startswith("ref_cache_") or name == "precompute_ref_max_tokens"
        if of_cache and value != option.default:
            raise ValueError(
                f"--{name} {value} would be ignored: there is a cache with --precompute_ref_log_probs alone. Add it, or "
                "leave this out."
            )


def check_moving_reference(config: DPOConfig) -> None:
    """Refuse what contradicts a moving reference. The model has a say in `reference/`."""
    how = ("ref_model_mixup_alpha", "ref_model_sync_steps", "ref_model_sync_epochs")
    given = [name for name in how if getattr(config, name) is not None]
    if not config.sync_ref_model:
        if given:
            raise ValueError(
                f"--{given[0]} {getattr(config, given[0])} would be ignored: the reference moves with --sync_ref_model "
                "alone. Add it, or leave this out."
            )
        return
    if config.ref_model_sync_steps is not None and config.ref_model_sync_epochs is not None:
        raise ValueError(
            f"--ref_model_sync_steps {config.ref_model_sync_steps} and --ref_model_sync_epochs "
            f"{config.ref_model_sync_epochs} both say when the reference moves: give one of them."
        )
    alpha = config.ref_model_mixup_alpha
    if alpha is not None and not (isinstance(alpha, int | float) and 0 < alpha <= 1):
        raise ValueError(
            f"--ref_model_mixup_alpha must be a number above 0 and at most 1, got {alpha!r}: the share of the policy, "
            "0.6 where nothing is said; 1 replaces the reference. For one that stays, leave --sync_ref_model off."
        )
    for name, why in {
        "precompute_ref_log_probs": "its cache holds the numbers of a reference that stays",
        "ref_adapter_name": "mixing would overwrite that adapter. Without it a copy of the trained adapter moves",
    }.items():
        if getattr(config, name):
            raise ValueError(f"--sync_ref_model excludes --{name}: {why}. Leave one of the two out.")
    if config.use_separate_reference_adapter is False:
        raise ValueError(
            "--sync_ref_model excludes --use_separate_reference_adapter false: the model below the adapter is the "
            "policy's as well, and cannot move. Leave one of the two out."
        )


def resolve_moving_reference(config: DPOConfig) -> None:
    if not config.sync_ref_model:
        return
    if config.ref_model_mixup_alpha is None:
        config.ref_model_mixup_alpha = 0.6  # as in the paper's best runs, and in TRL
    if config.ref_model_sync_steps is None and config.ref_model_sync_epochs is None:
        config.ref_model_sync_steps = 512


def resolve_checkpointing(config: DPOConfig) -> None:
    """`gradient_checkpointing`, the name that users know, steers whatever name this transformers has for it."""
    name = "activation_checkpointing" if hasattr(config, "activation_checkpointing") else "gradient_checkpointing"
    if getattr(config, name) is None:
        setattr(config, name, config.gradient_checkpointing is not False)
    if getattr(config, f"{name}_kwargs") is None:
        setattr(config, f"{name}_kwargs", config.gradient_checkpointing_kwargs)


def resolve_precision(config: DPOConfig) -> None:
    on_cpu = config.use_cpu or not torch.accelerator.is_available()
    if config.bf16 is None:
        config.bf16 = not config.fp16 and _computes_in_bfloat16(on_cpu)
    # transformers takes bfloat16 on a CPU only where it was told that the CPU is meant.
    config.use_cpu = config.use_cpu or (on_cpu and config.bf16)


def check_against_trainer(config: DPOConfig) -> None:
    """Options of `TrainingArguments` that would be ignored, or would falsify what is logged."""
    if config.logging_nan_inf_filter:
        raise ValueError(
            "--logging_nan_inf_filter hides non-finite losses behind an average: leave it off. "
            "A non-finite loss stops the run and names its pairs."
        )
    if config.label_smoothing_factor:
        raise ValueError(
            f"--label_smoothing_factor {config.label_smoothing_factor} smooths a cross-entropy that DPO does not have: "
            "use --label_smoothing."
        )
    on_gpu = config.device.type != "cpu"
    if config.fp16 and not on_gpu:
        raise ValueError(
            "--fp16 true needs a GPU: on a CPU the run would compute in float32 and say float16. Leave it off, or take --bf16 true."
        )
    for name in ("activation_offloading", "use_liger_kernel"):
        if getattr(config, name) and not on_gpu:
            raise ValueError(f"--{name} needs a GPU, and this run is on {config.device.type}: leave it off.")
    if config.use_liger_kernel and not is_liger_kernel_available():
        raise ValueError("--use_liger_kernel needs liger-kernel: `pip install liger-kernel`, or leave it off.")
    if config.n_gpu > 1:
        raise ValueError(
            f"{config.n_gpu} GPUs are visible to one process, which would split the flat row between them: start with "
            "`accelerate launch`, or make one GPU visible with CUDA_VISIBLE_DEVICES=0."
        )
    if config.torch_compile:
        raise ValueError(
            "--torch_compile is not available in this version: every batch has its own segments, and would be compiled "
            "anew. Leave it off."
        )
    if config.enable_jit_checkpoint:
        raise ValueError(
            "--enable_jit_checkpoint is not needed: at SIGTERM every run finishes its step, saves and stops. Leave it off."
        )
    if config.length_column_name != "length":
        raise ValueError(
            f"--length_column_name {config.length_column_name}: prepared rows have their tokens in the column 'length', whatever "
            "the data calls it. Leave it off."
        )
    if config.eval_use_gather_object:
        raise ValueError(
            "--eval_use_gather_object does nothing here: pairs are gathered by their number. Leave it off."
        )
    for name in ("bf16_full_eval", "fp16_full_eval"):
        if getattr(config, name):
            raise ValueError(
                f"--{name} rounds the weights of the model for good at an evaluate() before or after training, and does nothing while "
                "it trains: leave it off. --bf16 true evaluates in bfloat16 too."
            )
    if config.label_names:
        raise ValueError(
            f"--label_names {config.label_names} would be ignored: pairs have no labels, and compute_metrics receives example ids in "
            "their place. Leave it out."
        )
    for name in ("dispatch_batches", "split_batches"):
        if getattr(config.accelerator_config, name):
            raise ValueError(
                f"--accelerator_config {name}=True cuts every tensor of a batch to one length, and scored tokens "
                "with it: leave it off, so that every process reads its own batches."
            )


def check_micro_batches(config: DPOConfig) -> None:
    if config.max_tokens_per_micro_batch is not None and "inputs" in config.include_for_metrics:
        raise ValueError(
            f"--max_tokens_per_micro_batch {config.max_tokens_per_micro_batch} computes a batch in parts, which have no one "
            "input to hand to metrics: leave it out, or 'inputs' out of --include_for_metrics."
        )


def check_sampling(config: DPOConfig, train_dataset: Any) -> None:
    """Once the data is there: transformers would say in its log that it ignores this."""
    if config.train_sampling_strategy in ("group_by_length", "batch_rebalance") and not has_length(train_dataset):
        raise ValueError(
            f"--train_sampling_strategy {config.train_sampling_strategy} orders rows by their length, and nobody knows those of a "
            "stream before they are read: leave it out, or load the data without --streaming."
        )


def resolve_dispatch(config: DPOConfig) -> None:
    """Every process reads its own batches, those of a stream too: accelerate would cut and send around one process's."""
    config.accelerator_config.dispatch_batches = False


def resolve_transfers(config: DPOConfig) -> None:
    """Batches go to a GPU from pinned memory without being waited for, unless `accelerator_config` says how they go."""
    given: Any = config.accelerator_config
    if isinstance(given, str) and given.startswith("{"):
        given = json.loads(given)
    pinned = config.dataloader_pin_memory and torch.cuda.is_available() and not config.use_cpu
    if pinned and (given is None or isinstance(given, dict)):
        config.accelerator_config = {"non_blocking": True, **(given or {})}


def _computes_in_bfloat16(on_cpu: bool) -> bool:
    """Whether the device of this run has bfloat16 instructions (elsewhere bfloat16 is emulated, and slow)."""
    if on_cpu:
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
