"""Checkpoint folders that are whole, or not there.

    with saving(final):                             # what the disk refuses becomes one clear error
        aside = fresh_aside(output_dir, final.name) # main process
        ...                                         # every process writes its files into `aside`
        seal(aside)                                 # main process: synced, and listed in the manifest
        publish(aside, final)                       # main process: one rename

A kill at any moment leaves the folder under its name complete, or absent, or complete as it was before.
"""

from __future__ import annotations

from .as_given import GivenConfig, savable_generation_config
from .failed import MARK, failure, mark_failed, unmark
from .folders import (
    ASIDE,
    checked_checkpoint,
    checkpoint_to_resume,
    fresh_aside,
    last_whole_checkpoint,
    numbered,
    publish,
    recover,
    retire,
    tidy,
)
from .leftovers import DRY_RUN, remove_leftovers
from .manifest import MANIFEST, broken_file, seal
from .rescue import rescuing
from .saving import CheckpointError, saving
from .state_files import check_optimizer_files, check_trainer_state, unreadable
from .weights import load_default_adapter, load_renamed

__all__ = [
    "ASIDE",
    "DRY_RUN",
    "MANIFEST",
    "MARK",
    "CheckpointError",
    "GivenConfig",
    "broken_file",
    "check_optimizer_files",
    "check_trainer_state",
    "checked_checkpoint",
    "checkpoint_to_resume",
    "failure",
    "fresh_aside",
    "last_whole_checkpoint",
    "load_default_adapter",
    "load_renamed",
    "mark_failed",
    "numbered",
    "publish",
    "recover",
    "remove_leftovers",
    "rescuing",
    "retire",
    "savable_generation_config",
    "saving",
    "seal",
    "tidy",
    "unmark",
    "unreadable",
]
