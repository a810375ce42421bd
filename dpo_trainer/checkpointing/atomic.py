"""AtomicTrainer: every checkpoint is written beside its place, sealed, and renamed into it; what is read back is checked first.

No reader sees half a checkpoint (folders.py, manifest.py), and a file that cannot be read is named (state_files.py).
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import Trainer
from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.utils import logging

from . import (
    ASIDE,
    check_optimizer_files,
    fresh_aside,
    load_default_adapter,
    load_renamed,
    publish,
    remove_leftovers,
    rescuing,
    savable_generation_config,
    saving,
    seal,
    unreadable,
)
from .live_settings import LiveSettings
from .output_folder import OutputFolder
from .run_state import STATE_FILE, read_state, readable, write_state
from .save_checks import warn_of_another_kind
from .state_files import explain_unreadable

logger = logging.get_logger(__name__)


class AtomicTrainer(Trainer):
    """`transformers.Trainer` with checkpoints that are complete or absent.

    A subclass says what training changes besides model and optimizer (`run_state`, `load_run_state`).
    """

    processing_class: Any
    saves_processing_class = True
    """False for a tokenizer that cannot be written to disk: a checkpoint must not fail for it."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.folder = OutputFolder(
            Path(str(self.args.output_dir)), force=self.args.force_output_dir, main=self.args.process_index == 0
        )
        self.identity: dict[str, Any] = {}
        """Of the run, in each of its checkpoints (`DurableTrainer.fix_run_identity`)."""
        self._aside: Path | None = None  # where a checkpoint is written before it has its name

    # --- for subclasses ---

    def run_state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """What training changes besides model, optimizer and what transformers saves: JSON, and tensors. On all ranks."""
        return {}, {}

    def load_run_state(self, state: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """Take up what `run_state` returned."""
        return

    def saved_as(self) -> contextlib.AbstractContextManager[None]:
        """Around each save: the model as it shall be found in the folder."""
        return contextlib.nullcontext()

    def may_be_best(self, step: int) -> bool:
        """Whether the checkpoint of a step may be named the best of its run."""
        return True

    # --- written ---

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self._aside is None else str(self._aside)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """`Trainer` writes it aside; then it is sealed and gets its name."""
        run_folder = Path(self._get_output_dir(trial))
        final = run_folder / f"checkpoint-{self.state.global_step}"
        main = self.args.should_save
        with saving(final, main=main):
            if main:
                fresh_aside(run_folder, final.name)
            self.accelerator.wait_for_everyone()
            self._aside = run_folder / ASIDE
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._aside = None
            self.accelerator.wait_for_everyone()
            if main:
                self._name_best(run_folder, final)
                self.state.save_to_json(str(run_folder / ASIDE / final.name / TRAINER_STATE_NAME))
                seal(run_folder / ASIDE / final.name, self.folder.record.run)
                publish(run_folder / ASIDE / final.name, final)
        self.accelerator.wait_for_everyone()
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(final))

    def _name_best(self, run_folder: Path, final: Path) -> None:
        """Record the best checkpoint under the name that it has from now on, not under the one it was written to."""
        best = run_folder / f"checkpoint-{self.state.best_global_step}"
        step = self.state.best_global_step
        if step and self.may_be_best(step) and (best == final or best.exists()):
            self.state.best_model_checkpoint = str(best)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self._aside is None:  # once it has its name
            super()._push_from_checkpoint(checkpoint_folder)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        folder = Path(output_dir or self.args.output_dir)
        if self._aside is not None or not self.args.should_save:  # of a checkpoint, an earlier one is left
            self._save_to(folder, state_dict)
            return
        here = folder == self.folder.path
        if here and self.is_world_process_zero():
            self.folder.hold(self)
        with rescuing(folder, self.model, state_dict, lambda elsewhere: self._save_to(elsewhere, state_dict)):
            remove_leftovers(folder)
            self._save_to(folder, state_dict)
        if here:
            self.folder.warn_of_leftovers()

    def _save_to(self, folder: Path, state_dict: dict | None) -> None:
        weights = None if state_dict is None else dict(state_dict)  # transformers takes out what it has written
        processing_class = self.processing_class
        if not self.saves_processing_class:
            self.processing_class = None
        try:
            with self.saved_as(), savable_generation_config(self.accelerator.unwrap_model(self.model)):
                super()._save(str(folder), weights)
        finally:
            self.processing_class = processing_class
        if self.args.should_save:  # the arguments as text: a pickle can run code when it is read
            (folder / TRAINING_ARGS_NAME).unlink(missing_ok=True)
            (folder / "training_args.json").write_text(readable(self.args.to_dict()))
            warn_of_another_kind(self.model, folder)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        state, tensors = self.run_state()
        if self.args.should_save:
            write_state(Path(output_dir), self.identity, state, tensors)

    # --- read ---

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        files = sorted(path.name for path in Path(resume_from_checkpoint).glob("*model*.safetensors"))
        with explain_unreadable(resume_from_checkpoint, f"its weights ({', '.join(files)})"):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            self._load_renamed(resume_from_checkpoint)
            if not self.is_fsdp_enabled:
                load_default_adapter(self.model if model is None else model, resume_from_checkpoint)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        self._load_renamed(self.state.best_model_checkpoint)

    def _load_renamed(self, checkpoint: str) -> None:
        if not self.is_deepspeed_enabled and not self.is_fsdp_enabled:  # whose files have the names of memory
            load_renamed(self.model, checkpoint)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        live = None if self.is_deepspeed_enabled else LiveSettings(self.optimizer, self.lr_scheduler)
        if live is not None:
            check_optimizer_files(checkpoint, fsdp=self.is_fsdp_enabled)
        with explain_unreadable(checkpoint, lambda: unreadable(checkpoint)):
            super()._load_optimizer_and_scheduler(checkpoint)
        if live is not None:
            live.put_back(self.optimizer, self.lr_scheduler)
        state, tensors = read_state(Path(checkpoint))
        with explain_unreadable(checkpoint, STATE_FILE, (LookupError, TypeError, AttributeError)):
            self.load_run_state(state, tensors)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        name = f"rng_state_{self.args.process_index}.pth" if self.args.world_size > 1 else "rng_state.pth"
        if not Path(checkpoint, name).is_file():
            logger.warning_once(
                f"{checkpoint} has no {name}, as after a change of the number of processes: what draws random numbers (dropout, "
                "sampling) uses other numbers than the interrupted run."
            )
        with explain_unreadable(checkpoint, name):
            super()._load_rng_state(checkpoint)
