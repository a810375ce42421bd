"""What a process that was killed has left in the folder of a model."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from transformers.utils import logging

logger = logging.get_logger(__name__)

DRY_RUN = ".dry_run_"
"""Beginning of the name of a folder in which all but the weights is saved on trial."""

UNFINISHED = re.compile(r"\.tmp[A-Za-z0-9]{6}")
"""Name of a file into which safetensors writes weights, and which it renames at the end. It makes no folders."""

UNFINISHED_FOLDER = re.compile(rf"{re.escape(DRY_RUN)}\w+")


def remove_leftovers(folder: Path) -> None:
    """Remove unfinished files and folders of earlier saves. For the one process that saves into `folder`."""
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        is_folder = path.is_dir() and not path.is_symlink()
        if not (UNFINISHED_FOLDER if is_folder else UNFINISHED).fullmatch(path.name):
            continue
        try:
            shutil.rmtree(path) if is_folder else path.unlink()
        except OSError as error:
            logger.warning(f"{path}, which a killed run left, could not be removed ({error.strerror}): remove it.")
