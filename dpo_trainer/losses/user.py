"""Losses from a user's own file: `--loss_module my_losses.py`."""

from __future__ import annotations

from ..user_module import import_user_module
from .registry import LOSSES


def load_loss_module(path_or_module: str) -> list[str]:
    """Import a Python file, or a module by its dotted name, and return the names of the losses that it registers.

    A file is executed once, and again only when its text has changed; its losses then replace their former selves.
    """
    module = import_user_module(path_or_module, "--loss_module")
    names = list(LOSSES.from_module(module.__name__))
    if not names:
        raise ValueError(
            f"--loss_module {path_or_module} registers no loss: decorate a function in it with "
            '@register_loss("name"), imported from dpo_trainer.'
        )
    return names
