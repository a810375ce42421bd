"""What a training script does with its command line: options, the demo where no model is named, the run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ..checkpointing.signals import telling_command
from ..config import DPOConfig
from .errors import OneMessage
from .parsing import parse_args


def run_script(
    name: str,
    argv: Sequence[str] | None,
    demo: Callable[[Any, set[str]], object],
    train: Callable[[Any, Any, Any], object],
    config_kind: type[Any] = DPOConfig,
) -> None:
    """`demo` is given the options of the trainer and which of them the user set; `train` those of script, model and trainer.

    Both import what they need when they are called, for that takes seconds, and --help does without.
    """
    with OneMessage(name, argv) as shown, telling_command(argv, name):
        script, model, config, given = parse_args(argv, config_kind)
        shown.traceback |= script.traceback
        if model.model_name_or_path is None:
            demo(config, given)
            return
        if "output_dir" not in given and config.process_index == 0:
            print(f"No --output_dir was given: writing to {config.output_dir}.")
        train(script, model, config)
