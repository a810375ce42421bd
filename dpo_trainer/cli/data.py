"""The datasets that the arguments of a script name."""

from __future__ import annotations

from typing import Any

from ..data.files.datasets import load_dataset_splits
from ..data.files.mixture import load_mixture
from .arguments import ScriptArguments


def load_data(script: ScriptArguments, seed: int) -> tuple[Any, Any]:
    """What to train on and what to evaluate on (None for nothing): datasets, or lists of them for a mixture."""
    which: dict[str, Any] = {
        "train_split": script.dataset_train_split,
        "test_split": script.dataset_test_split,
        "test_split_size": script.test_split_size,
        "eval_name_or_path": script.eval_dataset,
        "streaming": script.streaming,
        "seed": seed,
    }
    if script.datasets is not None:
        return load_mixture(script.datasets, **which)
    assert script.dataset_name is not None  # parse_args refuses neither
    return load_dataset_splits(script.dataset_name, config=script.dataset_config, columns=script.columns, **which)
