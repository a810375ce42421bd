"""A mark on a checkpoint whose files are whole and whose weights are of no use: no step that followed was finite."""

from __future__ import annotations

import json
import logging
from contextlib import suppress
from pathlib import Path

from .manifest import sync

logger = logging.getLogger(__name__)

MARK = "failed.json"
"""Beside the files that the manifest lists: it goes with the folder, when that is retired or replaced."""


def mark_failed(checkpoint: Path, problem: str) -> None:
    """`problem`: what went wrong at once after it was written or resumed. Where it cannot be written, a warning."""
    if not checkpoint.is_dir():
        return
    try:
        (checkpoint / MARK).write_text(json.dumps({"problem": problem}))
        sync(checkpoint / MARK)
        sync(checkpoint)
    except OSError as error:
        logger.warning(
            f"{checkpoint} could not be marked as failed ({error}): --resume_from_checkpoint auto will use it."
        )


def unmark(checkpoint: Path) -> None:
    """A step that followed was finite after all."""
    with suppress(OSError):
        (checkpoint / MARK).unlink(missing_ok=True)


def failure(checkpoint: Path) -> str | None:
    """Why `auto` must not go on from a checkpoint; None for one without a mark."""
    try:
        text = (checkpoint / MARK).read_text()
    except (OSError, UnicodeDecodeError):
        return None
    try:
        problem = str(json.loads(text)["problem"])
    except (ValueError, TypeError, KeyError, RecursionError):  # cut off
        problem = "no step that followed was finite"
    return f"it failed at once ({problem}); name the folder to resume it all the same"
