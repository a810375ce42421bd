"""Losses from a user's own file: `--loss_module my_losses.py`."""

from __future__ import annotations

import hashlib
import importlib
import os
import sys
import types
from pathlib import Path

from .record import LOSSES

_loaded: dict[str, bytes] = {}  # module name -> text of the file that was executed


def load_loss_module(path_or_module: str) -> list[str]:
    """Import a Python file, or a module by its dotted name, and return the names of the losses that it registers.

    A file is executed once, and again only when its text has changed; its losses then replace their former selves.
    """
    is_file = path_or_module.endswith(".py") or os.sep in path_or_module or Path(path_or_module).is_file()
    try:
        module = load_file(Path(path_or_module)) if is_file else importlib.import_module(path_or_module).__name__
    except NoSuchFile as error:
        raise ValueError(
            f"--loss_module {path_or_module}: there is no such file in {Path.cwd()}. Give the path of a Python file, or "
            "the dotted name of an importable module."
        ) from error
    except Exception as error:
        hint = "" if is_file else " For a file that is not on the import path, give its path, with .py."
        raise ValueError(
            f"--loss_module {path_or_module} could not be imported: {type(error).__name__}: {error}.{hint}"
        ) from error

    names = list(LOSSES.from_module(module))
    if not names:
        raise ValueError(
            f"--loss_module {path_or_module} registers no loss: decorate a function in it with "
            '@register_loss("name"), imported from dpo_trainer.'
        )
    return names


class NoSuchFile(Exception):
    pass


def load_file(path: Path) -> str:
    """Execute a file as a module of its own, unless this very text has been executed. Returns the module's name."""
    if not path.is_file():
        raise NoSuchFile(path)
    path, text = path.resolve(), path.read_bytes()
    name = f"loss_module_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    if _loaded.get(name) == text:
        return name

    # Compiled here and not by the import system, whose cache takes an edit within the same second for the old file.
    code = compile(text, path, "exec")
    module = types.ModuleType(name)
    module.__file__ = str(path)
    sys.modules[name] = module  # before it runs: dataclasses look their module up
    try:
        exec(code, module.__dict__)
    except BaseException:
        del sys.modules[name]
        raise
    _loaded[name] = text
    return name
