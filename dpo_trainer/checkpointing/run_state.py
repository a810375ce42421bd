"""What a checkpoint holds besides model, optimizer and what transformers saves, and whose checkpoint it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.utils import logging

logger = logging.get_logger(__name__)

STATE_FILE = "dpo_state.json"
TENSORS_FILE = "dpo_state.safetensors"
VERSION = 1

WORDS = {
    "model": "the model (class, names and shapes of its weights)",
    "base": "the weights below the adapter",
    "loss": "the loss",
    "data": "the training data",
    "date": "the date that the chat template writes",
    "reference": "the reference model",
    "adapter": "the settings of the adapter",
    "optimizer": "the optimizer (--optim)",
    "engine": "the processes of DeepSpeed, each of which keeps a part of the optimizer",
    "order": "the rows of a step",
    "sampling": "the sampling of completions",
    "feedback": "who gives feedback",
}
"""What makes two runs the same, as a message names it."""

NEVER = {"model", "optimizer", "engine"}
"""Differences that --force_resume cannot bridge: the weights, or the moments of the optimizer, would not fit."""


def write_state(folder: Path, identity: dict[str, Any], state: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    content = {"version": VERSION, "run": identity, "state": state, "tensors": bool(tensors)}
    (folder / STATE_FILE).write_text(json.dumps(content))
    if tensors:
        save_file(tensors, folder / TENSORS_FILE)


def read_state(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    content = _read(folder)
    path = folder / TENSORS_FILE
    try:
        return content["state"], load_file(path) if content["tensors"] else {}
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        what = f"{path} cannot be read" if content.get("tensors") else f"{folder / STATE_FILE} is damaged"
        raise ValueError(f"{what} ({type(error).__name__}: {error}): resume an earlier checkpoint.") from error


def date_of_run(folder: Path) -> str | None:
    """The date that the chat template wrote in the run of a checkpoint; None where there is none to be read."""
    try:
        return json.loads((folder / STATE_FILE).read_text())["run"]["date"]["--template_date"]
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None


def refuse_another_run(checkpoint: str, identity: dict[str, Any], *, force: bool) -> None:
    """Raise ValueError if the checkpoint is not one of the run that `identity` describes."""
    saved = _read(Path(checkpoint))["run"]
    # What one of the two could not tell (the data of a stream) is not compared.
    different = [
        name for name in WORDS if None not in (saved.get(name), identity.get(name)) and saved[name] != identity[name]
    ]
    if not different:
        return
    said = "; ".join(f"{WORDS[name]}{_detail(saved[name], identity[name])}" for name in different)
    if force and not NEVER & set(different):
        logger.warning(f"{checkpoint} was written by another run, which differs in: {said}. --force_resume: going on.")
        return
    anyway = "" if NEVER & set(different) else ", or say --force_resume true to go on regardless"
    raise ValueError(
        f"The checkpoint {checkpoint!r} was written by another run, which differs in: {said}. Resume with what it was written "
        f"with, start a new run from its model (--model_name_or_path {checkpoint}){anyway}."
    )


def readable(arguments: dict[str, Any]) -> str:
    """The arguments of a run as JSON, without what is secret; what JSON cannot hold, as Python shows it."""
    return json.dumps(_without_secrets(arguments), indent=2, default=repr)


def _without_secrets(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    return {
        name: f"<{name.upper()}>" if str(name).endswith("token") and each else _without_secrets(each)
        for name, each in value.items()
    }


def _detail(there: Any, here: Any) -> str:
    """Option by option, where it is known."""
    if not isinstance(there, dict) or not isinstance(here, dict):
        return ""
    names = [name for name in {**there, **here} if there.get(name) != here.get(name)]
    return " (" + ", ".join(f"{name}: {there.get(name)} there, {here.get(name)} here" for name in names) + ")"


def _read(folder: Path) -> dict[str, Any]:
    path = folder / STATE_FILE
    if not path.is_file():
        raise ValueError(
            f"{str(folder)!r} has no {STATE_FILE}: it was written with --save_only_model, or not by DPOTrainer. Such a "
            f"checkpoint can be trained on (--model_name_or_path {folder}), but not resumed."
        )
    try:
        content = json.loads(path.read_text())
        version = content["version"]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ValueError(
            f"{path} is damaged ({type(error).__name__}: {error}): resume an earlier checkpoint."
        ) from error
    if version != VERSION:
        raise ValueError(
            f"{path} has version {version} of this state, and this dpo_trainer reads {VERSION}: resume with the "
            f"release that wrote it, or start a new run from its model (--model_name_or_path {folder})."
        )
    return content


def optimizer_and_row_order(args: Any, *, deepspeed: bool) -> dict[str, Any]:
    """The part of a run's identity that decides which rows a step sees, however ranks and micro-batches share them.

    `args`: `TrainingArguments`.
    """
    return {
        "optimizer": str(getattr(args.optim, "value", args.optim)),
        "engine": {"--num_processes": args.world_size} if deepspeed else None,
        "order": {
            "--data_seed (without it --seed)": order_seed(args),
            "--per_device_train_batch_size x --gradient_accumulation_steps x processes": args.train_batch_size
            * args.gradient_accumulation_steps
            * args.world_size,
            "--train_sampling_strategy": args.train_sampling_strategy,
        },
    }


def order_seed(args: Any) -> int:
    """The seed of the order of rows."""
    return args.seed if args.data_seed is None else args.data_seed
