"""The name in --metric_for_best_model: looked up before training, among those that an evaluation will log."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from ..registry import did_you_mean

if TYPE_CHECKING:
    from ..config import DPOConfig

OF_TRANSFORMERS = ("runtime", "samples_per_second", "steps_per_second")


def check_best_metric(
    args: DPOConfig, metrics: Iterable[str], eval_dataset: Any, callbacks: Iterable[TrainerCallback]
) -> None:
    """Refuse a name that no evaluation logs.

    Args:
        metrics: names of this package, without a prefix.
        eval_dataset: one dataset, or several by name, whose names are then part of those of the metrics.
        callbacks: those that have a say in evaluations may add metrics of their own: then any name is taken.

    Raises:
        ValueError: names the flag, what was meant perhaps, and all names.
    """
    asked, evaluates = args.metric_for_best_model, getattr(args.eval_strategy, "value", args.eval_strategy) != "no"
    if asked is None or not evaluates or any(map(_adds_metrics, callbacks)):
        return
    prefixes = [f"{name}_" for name in eval_dataset] if isinstance(eval_dataset, Mapping) else [""]
    known = [f"{prefix}{name}" for prefix in prefixes for name in (*metrics, *OF_TRANSFORMERS)]
    name = asked.removeprefix("eval_")
    if name in known:
        return
    several = f" Each evaluation dataset has its own: {prefixes[0]}loss, ..." if prefixes[0] else ""
    raise ValueError(
        f"--metric_for_best_model {asked} is no metric of an evaluation.{did_you_mean(name, known)}{several} There are "
        f"{', '.join(known)}. Where a callback adds another, pass it as callbacks; compute_metrics may add any."
    )


def _adds_metrics(callback: TrainerCallback) -> bool:
    kind = type(callback)
    return kind.on_evaluate is not TrainerCallback.on_evaluate and not kind.__module__.startswith("transformers.")
