"""Checkpointing: a run comes in, and survives kills, signals, full disks and bad numbers (durable.py); checkpoints go out, whole or not there.

    with saving(final):                             # what the disk refuses becomes one clear error
        aside = fresh_aside(output_dir, final.name) # main process
        ...                                         # every process writes its files into `aside`
        seal(aside)                                 # main process: synced, and listed in the manifest
        publish(aside, final)                       # main process: one rename

A kill at any moment leaves the folder under its name complete, or absent, or complete as it was before.
"""

from __future__ import annotations

from .failed import MARK, failure, mark_failed, unmark
from .folders import (
    ASIDE,
    checked_checkpoint,
    checkpoint_to_resume,
    fresh_aside,
    last_complete_checkpoint,
    names_a_folder,
    numbered,
    of_this_run,
    publish,
    recover,
    retire,
    step_of,
    surplus,
    tidy,
)
from .leftovers import DRY_RUN, remove_leftovers
from .lock import hold_folder, is_held_elsewhere
from .manifest import MANIFEST, broken_file, run_of, seal
from .original_config import OriginalConfig, savable_generation_config
from .rescue import WEIGHTS, rescuing
from .run_record import RECORD, RunRecord, read_record, write_record
from .saving import CheckpointError, saving
from .state_files import check_optimizer_files, check_trainer_state, unreadable
from .weights import load_default_adapter, load_renamed

__all__ = [
    "ASIDE",
    "DRY_RUN",
    "MANIFEST",
    "MARK",
    "RECORD",
    "WEIGHTS",
    "CheckpointError",
    "OriginalConfig",
    "RunRecord",
    "broken_file",
    "check_optimizer_files",
    "check_trainer_state",
    "checked_checkpoint",
    "checkpoint_to_resume",
    "failure",
    "fresh_aside",
    "hold_folder",
    "is_held_elsewhere",
    "last_complete_checkpoint",
    "load_default_adapter",
    "load_renamed",
    "mark_failed",
    "names_a_folder",
    "numbered",
    "of_this_run",
    "publish",
    "read_record",
    "recover",
    "remove_leftovers",
    "rescuing",
    "retire",
    "run_of",
    "savable_generation_config",
    "saving",
    "seal",
    "step_of",
    "surplus",
    "tidy",
    "unmark",
    "unreadable",
    "write_record",
]
