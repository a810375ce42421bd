"""Which of transformers' optimizers a run can have: refused before a model is loaded, not when training begins."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.training_args import OptimizerNames

from ..registry import did_you_mean

if TYPE_CHECKING:
    from transformers import TrainingArguments

OF_TORCH = ("adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "adagrad", "rmsprop")
"""Those that are there wherever torch and transformers are."""

IN_BACKWARD = ("lomo", "adalomo", *(name.value for name in OptimizerNames if name.value.endswith("_layerwise")))
NOT_RESUMED = (
    *(name.value for name in OptimizerNames if name.value.startswith(("galore", "apollo", "schedule_free"))),
    "stable_adamw",
    "grokadamw",
)
SMALL = "--optim adamw_8bit and adafactor need little memory, too"


def check_optimizer(config: TrainingArguments) -> None:
    """Refuse an `--optim` that is not installed, or that does not keep what other options promise."""
    name = str(getattr(config.optim, "value", config.optim))
    known = [each.value for each in OptimizerNames]
    if name not in known:
        raise ValueError(f"--optim {name} is not an optimizer of transformers.{did_you_mean(name, known)}")
    if name in IN_BACKWARD:
        raise ValueError(
            f"--optim {name} makes its steps within backward, before --nonfinite can stop one and before gradients are clipped or "
            f"accumulated, and leaves no state in checkpoints: choose another. {SMALL}."
        )
    if name in NOT_RESUMED:
        raise ValueError(
            f"--optim {name} keeps what it counts where a checkpoint does not bring it back (in objects that only a pickle could "
            f"hold, or among its settings), so that a resumed run would be another run: choose another. {SMALL}."
        )
    if config.optim_target_modules is not None:
        raise ValueError(
            f"--optim_target_modules {config.optim_target_modules} would be ignored by --optim {name}: it is for GaLore and "
            "APOLLO, which are not available here. Leave it out; --use_peft with --lora_target_modules trains some modules alone."
        )
    config.optim = OptimizerNames(name)
    if name not in OF_TORCH or config.optim_args:
        _make(config)
    if config.optim_args:
        _refuse_unread(config, name)


def check_given_optimizer(optimizer: torch.optim.Optimizer | None, model: nn.Module) -> None:
    """Refuse an optimizer object (`optimizers=`) that lacks a weight to be trained: it would stay as it is, without an error."""
    if optimizer is None:
        return
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    missing = [name for name, p in trained.items() if id(p) not in held]
    if missing:
        raise ValueError(
            f"The optimizer given by optimizers= lacks {len(missing)} of the {len(trained)} weights to be trained "
            f"({', '.join(missing[:3])}{' ...' if len(missing) > 3 else ''}). An optimizer that was made before the adapter of peft_config, "
            "or for another model, does not know them. Make the PeftModel first and the optimizer from its parameters, freeze "
            "what shall not train (requires_grad_(False)), or use --optim."
        )


def _refuse_unread(config: TrainingArguments, name: str) -> None:
    for pair in config.optim_args.replace(" ", "").split(","):
        key = pair.split("=")[0]
        if not _is_read(config, key):
            raise ValueError(
                f"--optim_args: {key} would be ignored by --optim {name}. Correct the name or leave it out; learning rate, betas, "
                "epsilon and weight decay are options of their own (--learning_rate, --adam_beta1, --weight_decay ...)."
            )


def _is_read(config: TrainingArguments, key: str) -> bool:
    """Whether it makes a difference that its value is a number, a boolean or nonsense: another setting, or another error."""

    def made_with(value: str) -> str:
        other = copy.copy(config)
        other.optim_args = f"{key}={value}"
        try:
            return repr(_class_and_settings(other))
        except Exception as error:
            return repr(error)

    return len({made_with(value) for value in ("0.75", "true", "nonsense")}) > 1


def _class_and_settings(config: TrainingArguments) -> tuple[Any, Any]:
    from transformers import Trainer  # slow to import, and most runs do not need it here

    return Trainer.get_optimizer_cls_and_kwargs(config)


def _make(config: TrainingArguments) -> None:
    """As the run will, to see now what fails."""
    try:
        _class_and_settings(config)
    except Exception as error:  # of whatever package
        value = f"--optim {config.optim.value}" + (f" --optim_args {config.optim_args}" if config.optim_args else "")
        raise ValueError(
            f"{value} cannot be used here ({type(error).__name__}: {error}). Install or correct that, or take an optimizer that "
            f"needs no package: {', '.join(OF_TORCH)}."
        ) from error
