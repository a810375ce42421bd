"""Code of the user's: a Python file, or a module by its dotted name, that an option names."""

from __future__ import annotations

import hashlib
import importlib
import os
import sys
from pathlib import Path
from types import ModuleType

_executed: dict[str, bytes] = {}  # module name -> text of the file


def import_user_module(path_or_module: str, option: str) -> ModuleType:
    """Import what `option` names. A file is executed once, and again only when its text has changed.

    Raises:
        ValueError: for a file that is not there, and for whatever goes wrong inside.
    """
    path = Path(path_or_module)
    is_file = path_or_module.endswith(".py") or os.sep in path_or_module or path.is_file()
    if is_file and not path.is_file():
        raise ValueError(
            f"{option} {path_or_module}: there is no such file in {Path.cwd()}. Give the path of a Python file, or the dotted "
            "name of an importable module."
        )
    try:
        return _executed_file(path) if is_file else importlib.import_module(path_or_module)
    except Exception as error:
        hint = "" if is_file else " For a file that is not on the import path, give its path, with .py."
        raise ValueError(
            f"{option} {path_or_module} could not be imported: {type(error).__name__}: {error}.{hint}"
        ) from error


def _executed_file(path: Path) -> ModuleType:
    """As a module of its own, from earlier if this very text has been executed."""
    path, text = path.resolve(), path.read_bytes()
    name = f"user_module_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    if _executed.get(name) == text:
        return sys.modules[name]

    # Compiled here and not by the import system, whose cache takes an edit within the same second for the old file.
    code = compile(text, path, "exec")
    module = ModuleType(name)
    module.__file__ = str(path)
    sys.modules[name] = module  # before it runs: dataclasses look their module up
    try:
        exec(code, module.__dict__)
    except BaseException:
        del sys.modules[name]
        _executed.pop(name, None)  # an earlier text, which is gone as well
        raise
    _executed[name] = text
    return module
