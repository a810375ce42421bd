"""The options of the reference: fields of `DPOConfig`, and what does not go together."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields

from ..registry import check_at_least


@dataclass
class ReferenceOptions:
    """Options of the reference: which model, whether its log-probs are precomputed, whether it moves. docs/references.md."""

    # --- the reference ---
    reference_free: bool = field(
        default=False, metadata={"help": "Use no reference: its log-probs count as 0 (a uniform reference)."}
    )
    model_adapter_name: str | None = field(
        default=None, metadata={"help": "The adapter to train, when the model has several. Default: its active one."}
    )
    ref_adapter_name: str | None = field(
        default=None, metadata={"help": "The adapter that is the reference, when the model carries it."}
    )
    precompute_ref_log_probs: bool = field(
        default=False,
        metadata={
            "help": "Compute the log-probs of the reference before training, and keep them on disk: no second model in memory "
            "while training, and no reference forward in later epochs and runs."
        },
    )
    precompute_ref_max_tokens: int | None = field(
        default=None,
        metadata={
            "help": "Most tokens of one forward pass of --precompute_ref_log_probs. Default: 2,048 on a CPU, 16,384 on an "
            "accelerator."
        },
    )
    ref_cache_dir: str | None = field(
        default=None,
        metadata={
            "help": "Where --precompute_ref_log_probs keeps log-probs. Default: $DPO_TRAINER_CACHE/reference, else "
            "$HF_HOME/dpo_trainer/reference."
        },
    )
    ref_cache_quota: float = field(
        default=50.0,
        metadata={
            "help": "Most gigabytes of --ref_cache_dir, > 0. Beyond it, the least recently used references are deleted."
        },
    )
    use_separate_reference_adapter: bool | None = field(
        default=None,
        metadata={
            "help": "The reference of an adapter: a frozen copy of the adapter (true), or its base model (false). "
            "Default: the copy for an adapter that was trained before, the base model for a new adapter.",
            "nargs": "?",
            "const": True,
        },
    )
    sync_ref_model: bool = field(
        default=False,
        metadata={"help": "Move the reference towards the policy at intervals (TR-DPO)."},
    )
    ref_model_mixup_alpha: float | None = field(
        default=None,
        metadata={
            "help": "Share of the policy in each mix of --sync_ref_model, in (0, 1]; 1 replaces the reference. Default: 0.6."
        },
    )
    ref_model_sync_steps: int | None = field(
        default=None,
        metadata={"help": "Optimizer steps between two mixes of --sync_ref_model. Default: 512, unless by epochs."},
    )
    ref_model_sync_epochs: int | None = field(
        default=None, metadata={"help": "Epochs between two mixes of --sync_ref_model, instead of steps."}
    )


def check_reference_options(config: ReferenceOptions) -> None:
    """Refuse options that contradict each other, then fill in the defaults of a moving reference."""
    for name in ("ref_model_sync_steps", "ref_model_sync_epochs", "precompute_ref_max_tokens"):
        check_at_least(1, name, getattr(config, name))
    quota = config.ref_cache_quota
    if not (isinstance(quota, int | float) and 0 < quota < math.inf):
        raise ValueError(f"--ref_cache_quota must be a number of gigabytes above 0, got {quota!r}.")
    _check_moving_reference(config)
    _check_cache(config)
    _fill_in_moving_reference(config)


def _check_cache(config: ReferenceOptions) -> None:
    if config.precompute_ref_log_probs:
        return
    for option in fields(ReferenceOptions):
        name, value = option.name, getattr(config, option.name)
        of_cache = name.startswith("ref_cache_") or name == "precompute_ref_max_tokens"
        if of_cache and value != option.default:
            raise ValueError(
                f"--{name} {value} would be ignored without --precompute_ref_log_probs. Add that flag, or leave this out."
            )


def _check_moving_reference(config: ReferenceOptions) -> None:
    """Refuse what contradicts a moving reference. The model has a say in `reference/`."""
    how = ("ref_model_mixup_alpha", "ref_model_sync_steps", "ref_model_sync_epochs")
    set_options = [name for name in how if getattr(config, name) is not None]
    if not config.sync_ref_model:
        if set_options:
            raise ValueError(
                f"--{set_options[0]} {getattr(config, set_options[0])} would be ignored without --sync_ref_model. Add that "
                "flag, or leave this out."
            )
        return
    if config.ref_model_sync_steps is not None and config.ref_model_sync_epochs is not None:
        raise ValueError(
            f"--ref_model_sync_steps {config.ref_model_sync_steps} and --ref_model_sync_epochs "
            f"{config.ref_model_sync_epochs} both set when the reference moves: give one of them."
        )
    alpha = config.ref_model_mixup_alpha
    if alpha is not None and not (isinstance(alpha, int | float) and 0 < alpha <= 1):
        raise ValueError(
            f"--ref_model_mixup_alpha must be a number above 0 and at most 1, got {alpha!r}: the share of the policy, "
            "the default is 0.6; 1 replaces the reference. For a reference that does not move, leave --sync_ref_model off."
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


def _fill_in_moving_reference(config: ReferenceOptions) -> None:
    if not config.sync_ref_model:
        return
    if config.ref_model_mixup_alpha is None:
        config.ref_model_mixup_alpha = 0.6  # as in the paper's best runs, and in TRL
    if config.ref_model_sync_steps is None and config.ref_model_sync_epochs is None:
        config.ref_model_sync_steps = 512
