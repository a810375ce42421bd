"""Files of a checkpoint that `Trainer` reads besides weights: one that is missing or cannot be read is named.

A checkpoint with a manifest was compared file by file; `--force_resume` takes a folder as it is.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from transformers import TrainerState
from transformers.trainer import OPTIMIZER_NAME, OPTIMIZER_NAME_BIN, SCHEDULER_NAME, TRAINER_STATE_NAME


def check_trainer_state(checkpoint: str) -> None:
    """Raise ValueError unless the steps made so far can be read."""
    path = Path(checkpoint, TRAINER_STATE_NAME)
    try:
        TrainerState.load_from_json(str(path))
    except FileNotFoundError:
        raise ValueError(missing(checkpoint, TRAINER_STATE_NAME)) from None
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise ValueError(
            f"{path} cannot be read ({type(error).__name__}: {error}), and the checkpoint cannot be resumed without. {_way_out(checkpoint)}"
        ) from error


def check_optimizer_files(checkpoint: str, *, fsdp: bool) -> None:
    """Raise ValueError unless state of the optimizer and of the learning rate is there: `Trainer` would begin both anew where
    one of them is missing, with a learning rate of 0."""
    folder = Path(checkpoint)
    # FSDP writes one file, or a folder with a part from each process.
    optimizer = (folder / OPTIMIZER_NAME).is_file() or (
        fsdp and any(folder.glob(f"{OPTIMIZER_NAME_BIN.removesuffix('.bin')}*"))
    )
    there = {OPTIMIZER_NAME: optimizer, SCHEDULER_NAME: (folder / SCHEDULER_NAME).is_file()}
    if lost := [name for name, is_there in there.items() if not is_there]:
        raise ValueError(missing(checkpoint, *lost))


def unreadable(checkpoint: str) -> str:
    """Which of the two files of the optimizer cannot be read; both, where both can, and do not fit."""
    broken = [name for name in (OPTIMIZER_NAME, SCHEDULER_NAME) if not _loads(Path(checkpoint, name))]
    return " and ".join(broken) or f"{OPTIMIZER_NAME} or {SCHEDULER_NAME}"


def missing(checkpoint: str, *names: str) -> str:
    return f"The checkpoint {checkpoint!r} has no {' and no '.join(names)}, and cannot be resumed without. {_way_out(checkpoint)}"


def _loads(file: Path) -> bool:
    try:
        torch.load(file, map_location="cpu", weights_only=True)
    except Exception:  # torch raises of many kinds
        return False
    return True


def _way_out(checkpoint: str) -> str:
    return f"Start a new run from its model (--model_name_or_path {checkpoint}), or resume an earlier one."


@contextlib.contextmanager
def explain_unreadable(
    checkpoint: str, what: str | Callable[[], str], kinds: tuple[type[Exception], ...] = (Exception,)
) -> Iterator[None]:
    """Turn an error while a part of a checkpoint is loaded into a ValueError that names the part. (A complete one fails only if it does not fit.)"""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except kinds as error:
        named = what if isinstance(what, str) else what()
        raise ValueError(
            f"The checkpoint {checkpoint!r} cannot be resumed: {named} cannot be read, or does not fit ({type(error).__name__}: "
            f"{error}). {_way_out(checkpoint)}"
        ) from error
