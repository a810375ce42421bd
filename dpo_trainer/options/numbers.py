"""Bounds of the numbers in `TrainingArguments`: transformers takes most of them as they are, and fails later, or ignores them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import TrainingArguments


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """The values of one option. `none`: what None (or what else there is besides numbers) means, where it is allowed."""

    least: float = 0.0
    above_least: bool = False
    below: float = math.inf
    integer: bool = False
    none: str = ""
    also: tuple[Any, ...] = ()  # values outside of the bounds that mean something

    def allow(self, value: Any) -> bool:
        if value is None or value in self.also:
            return value is not None or bool(self.none)
        if isinstance(value, bool) or not isinstance(value, int if self.integer else int | float):
            return False
        return (self.least < value if self.above_least else self.least <= value) and value < self.below

    def __str__(self) -> str:
        kind = "a whole number" if self.integer else "a number"
        bound = f"above {self.least:g}" if self.above_least else f"of at least {self.least:g}"
        below = "" if self.below == math.inf else f" and below {self.below:g}"
        others = "".join(f", or {value}" for value in self.also)
        return f"{kind} {bound}{below}{others}{f', or None ({self.none})' if self.none else ''}"


COUNT = Bounds(least=1, integer=True)
STEPS = Bounds(above_least=True)  # below 1: a share of all steps
RATE = Bounds(below=1)

BOUNDS = {
    "gradient_accumulation_steps": COUNT,
    "per_device_train_batch_size": COUNT,
    "per_device_eval_batch_size": COUNT,
    "eval_accumulation_steps": Bounds(least=1, integer=True, none="all at the end"),
    "save_total_limit": Bounds(least=1, integer=True, none="keep all"),
    "max_steps": Bounds(least=1, integer=True, also=(-1,)),
    "num_train_epochs": Bounds(above_least=True),
    "dataloader_num_workers": Bounds(integer=True),
    "max_skipped_steps": COUNT,
    "learning_rate": Bounds(),
    "weight_decay": Bounds(),
    "max_grad_norm": Bounds(),
    "adam_beta1": RATE,
    "adam_beta2": RATE,
    "adam_epsilon": Bounds(),
    "neftune_noise_alpha": Bounds(none="no noise"),
    "logging_steps": STEPS,
    "save_steps": STEPS,
    "eval_steps": Bounds(none="as logging_steps"),
    "eval_delay": Bounds(none="no delay"),
}
"""By the name of the option."""


def check_numbers(config: TrainingArguments) -> None:
    """Refuse numbers that could only be ignored, or fail in the middle of a run.

    Raises:
        ValueError: names the flag, its value and its bounds.
    """
    for name, bounds in BOUNDS.items():
        value = getattr(config, name)
        if isinstance(value, str) or not _is_used(config, name):  # text is refused, or parsed, by transformers
            continue
        if not bounds.allow(value):
            raise ValueError(f"--{name} must be {bounds}, got {value!r}.{WAY_OUT.get(name, '')}")


def _is_used(config: TrainingArguments, name: str) -> bool:
    """Whether the run reads the option: the number of steps of a strategy that counts none is left alone."""
    strategy = name.removesuffix("_steps") + "_strategy"
    if name == "num_train_epochs" and config.max_steps > 0:
        return False
    return name not in WAY_OUT or getattr(getattr(config, strategy), "value", getattr(config, strategy)) == "steps"


WAY_OUT = {
    name: f" For none at all: --{name.removesuffix('_steps')}_strategy no."
    for name in ("logging_steps", "save_steps", "eval_steps")
}
