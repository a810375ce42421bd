"""The options of the run: those of `transformers.TrainingArguments`, with other defaults where these do harm, and our own; what is refused
among them, and what is filled in."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import TrainingArguments
from transformers.trainer_utils import has_length
from transformers.utils import is_liger_kernel_available

from ..registry import check_at_least, choices
from ..storage.folders import check_folder


@dataclass
class RunOptions(TrainingArguments):
    """How a run computes, and what it does when something goes wrong."""

    # --- the batch ---
    layout: str = field(
        default="auto",
        metadata=choices(
            "auto",
            "flat",
            "padded",
            help="How a batch is laid out: all pairs in one packed row, each prompt once, no padding (flat); one padded row "
            "per completion (padded); or flat where the model allows it, verified on the first batch (auto).",
        ),
    )
    pad_to_multiple_of: int | None = field(
        default=None, metadata={"help": "Pad the rows of a batch to a multiple of this many tokens."}
    )
    max_tokens_per_micro_batch: int | None = field(
        default=None,
        metadata={
            "help": "Most tokens of one forward pass (flat: of the row; padded: rows times the longest). A batch with more is "
            "computed in parts, with the same gradients. None: whole; on a CPU in parts of about 512 or of "
            "its longest row, which are faster there."
        },
    )
    activation_offloading: bool = field(
        default=False, metadata={"help": "Keep the activations that backward needs in pinned host memory (GPU only)."}
    )
    cache_processed_images: bool = field(
        default=False,
        metadata={
            "help": "Keep processed images on disk ($DPO_TRAINER_CACHE/images, else $HF_HOME/dpo_trainer/images), for later "
            "epochs and runs. Faster where images are large, and takes more room than they do."
        },
    )

    # --- faults ---
    nonfinite: str = field(
        default="stop",
        metadata=choices(
            "stop",
            "skip",
            help="What to do at a non-finite loss or gradient: stop before the weights are touched, or leave that optimizer step "
            "out, with a count and the ids of the pairs.",
        ),
    )
    max_skipped_steps: int = field(
        default=10,
        metadata={
            "help": "With --nonfinite skip: the most steps in a row that are left out; one more stops the run, for then the weights are "
            "at fault."
        },
    )
    force_resume: bool = field(
        default=False,
        metadata={
            "help": "Resume although the checkpoint was written with another loss, other data or another reference, or cannot "
            "be verified."
        },
    )
    force_output_dir: bool = field(
        default=False,
        metadata={
            "help": "Train even if another process trains or saves in --output_dir. Checkpoints can then become a "
            "mix of both runs."
        },
    )

    # --- defaults that differ from transformers ---
    learning_rate: float = field(default=1e-6, metadata={"help": "The initial learning rate of the optimizer."})
    logging_steps: float = field(
        default=10, metadata={"help": "Steps between two log lines; below 1, a share of all."}
    )
    gradient_checkpointing: bool | None = field(
        default=None,
        metadata={
            "help": "Recompute activations in backward to save memory, at about 20%% of the speed. Default: on.",
            "nargs": "?",
            "const": True,
        },
    )
    bf16: bool | None = field(
        default=None,
        metadata={
            "help": "bfloat16 mixed precision. Default: on where the device computes in bfloat16, unless --fp16.",
            "nargs": "?",
            "const": True,
        },
    )
    use_cpu: bool = field(
        default=False,
        metadata={"help": "Compute on the CPU. Set automatically where there is no other device."},
    )
    liger_kernel_config: dict[str, bool] | None = field(
        default_factory=lambda: {"cross_entropy": False, "fused_linear_cross_entropy": False},
        metadata={"help": "JSON: which kernels of --use_liger_kernel to take. Default: those of the layers alone."},
    )
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Refused when set: a non-finite loss stops the run instead of being hidden."}
    )


def check_run_options(config: RunOptions) -> None:
    """What can be known before `TrainingArguments` has read its options."""
    for name in ("pad_to_multiple_of", "max_tokens_per_micro_batch"):
        check_at_least(1, name, getattr(config, name))
    if config.output_dir is not None:
        check_folder("--output_dir", config.output_dir)
    check_nonfinite(config)


def fill_in(config: RunOptions) -> None:
    resolve_checkpointing(config)
    resolve_precision(config)
    resolve_transfers(config)


def check_nonfinite(config: RunOptions) -> None:
    if config.nonfinite == "skip" and config.deepspeed:
        raise ValueError("--nonfinite skip cannot keep DeepSpeed from its optimizer step: use --nonfinite stop.")
    most, default = config.max_skipped_steps, type(config).max_skipped_steps
    if config.nonfinite != "skip" and most != default:
        raise ValueError(
            f"--max_skipped_steps {most} would be ignored: steps are skipped only with --nonfinite skip. Add it, or leave this out."
        )


def resolve_checkpointing(config: RunOptions) -> None:
    """`gradient_checkpointing`, the name that users know, steers whatever name this transformers has for it."""
    name = "activation_checkpointing" if hasattr(config, "activation_checkpointing") else "gradient_checkpointing"
    if getattr(config, name) is None:
        setattr(config, name, config.gradient_checkpointing is not False)
    if getattr(config, f"{name}_kwargs") is None:
        setattr(config, f"{name}_kwargs", config.gradient_checkpointing_kwargs)


def resolve_precision(config: RunOptions) -> None:
    on_cpu = config.use_cpu or not torch.accelerator.is_available()
    if config.bf16 is None:
        config.bf16 = not config.fp16 and _computes_in_bfloat16(on_cpu)
    # transformers takes bfloat16 on a CPU only where it was told that the CPU is meant.
    config.use_cpu = config.use_cpu or (on_cpu and config.bf16)


def check_against_trainer(config: RunOptions) -> None:
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


def check_micro_batches(config: RunOptions) -> None:
    if config.max_tokens_per_micro_batch is not None and "inputs" in config.include_for_metrics:
        raise ValueError(
            f"--max_tokens_per_micro_batch {config.max_tokens_per_micro_batch} computes a batch in parts, which have no one "
            "input to hand to metrics: leave it out, or 'inputs' out of --include_for_metrics."
        )


def check_sampling(config: RunOptions, train_dataset: Any) -> None:
    """Once the data is there: transformers would say in its log that it ignores this."""
    if config.train_sampling_strategy in ("group_by_length", "batch_rebalance") and not has_length(train_dataset):
        raise ValueError(
            f"--train_sampling_strategy {config.train_sampling_strategy} orders rows by their length, and the lengths of a "
            "stream are unknown before it is read: leave it out, or load the data without --streaming."
        )


def resolve_dispatch(config: RunOptions) -> None:
    """Every process reads its own batches, those of a stream too: accelerate would cut and send around one process's."""
    config.accelerator_config.dispatch_batches = False


def resolve_transfers(config: RunOptions) -> None:
    """Batches go to a GPU from pinned memory without being waited for, unless `accelerator_config` says how they go."""
    value: Any = config.accelerator_config
    if isinstance(value, str) and value.startswith("{"):
        value = json.loads(value)
    pinned = config.dataloader_pin_memory and torch.cuda.is_available() and not config.use_cpu
    if pinned and (value is None or isinstance(value, dict)):
        config.accelerator_config = {"non_blocking": True, **(value or {})}


def _computes_in_bfloat16(on_cpu: bool) -> bool:
    """Whether the device of this run has bfloat16 instructions (elsewhere bfloat16 is emulated, and slow)."""
    if on_cpu:
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
