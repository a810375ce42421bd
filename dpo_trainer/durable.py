"""DurableTrainer: a run that survives kills, signals, full disks and bad numbers. Knows nothing of preferences.

Checkpoints are whole or not there (checkpoints/); a resumed run is the run that was interrupted, or is refused
(run_state.py); before each optimizer step all ranks agree that its numbers are finite and that nobody was told to stop
(failures.py).
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import has_length
from transformers.utils import logging

from .callbacks import StepGuard
from .checkpoints import (
    ASIDE,
    RunRecord,
    checkpoint_to_resume,
    fresh_aside,
    load_default_adapter,
    load_renamed,
    names_a_folder,
    publish,
    rescuing,
    savable_generation_config,
    saving,
    seal,
)
from .data.sampling import BalancedSampler
from .failures import StepWatch
from .live_settings import LiveSettings
from .output_folder import OutputFolder
from .run_state import STATE_FILE, read_state, readable, refuse_another_run, write_state
from .save_checks import warn_of_another_kind
from .sharding import own_part

logger = logging.get_logger(__name__)

STOPPED_BY_SIGNAL = 75
"""Exit code of a script whose run was told to stop, and saved: "try again" (EX_TEMPFAIL of sysexits.h)."""


class DurableTrainer(Trainer):
    """`transformers.Trainer`, made to last.

    A subclass says what training changes besides model and optimizer (`run_state`, `load_run_state`), what makes two runs
    the same (`run_identity`), and how to undo a step that was not made (`mark_step`).
    """

    def __init__(self, *args: Any, callbacks: list[TrainerCallback] | None = None, **kwargs: Any):
        super().__init__(*args, callbacks=[StepGuard(self), *(callbacks or [])], **kwargs)
        # Here as well as in the config, which does not see what `accelerate launch` switches on.
        if self.args.nonfinite == "skip" and self.is_deepspeed_enabled:
            raise ValueError("--nonfinite skip cannot keep DeepSpeed from its optimizer step: use --nonfinite stop.")
        self.folder = OutputFolder(self.args)
        self.watch = StepWatch()
        self.stop_asked = False  # this rank was told to stop
        self.stopped_by_signal = False  # all ranks did, and saved
        self.skipped_steps = 0
        self.row_order = torch.Generator()  # of samplers that draw the order of rows, seeded anew with each epoch
        self._aside: Path | None = None  # where the checkpoint is written that has no name yet
        self._resuming: str | None = None
        self._attempted = False

    # --- what a subclass knows ---

    def run_identity(self) -> dict[str, Any]:
        """What must be equal for a checkpoint to be one of this run; JSON. Asked before anything trains."""
        return {}

    def run_state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """What training changes besides model, optimizer and what transformers saves: JSON, and tensors. On all ranks."""
        return {}, {}

    def load_run_state(self, state: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """Take up what `run_state` returned."""
        return

    def saved_as(self) -> contextlib.AbstractContextManager[None]:
        """Around each save: the model as it shall be found in the folder."""
        return contextlib.nullcontext()

    def begin_counting(self) -> None:
        """Forget what was counted since the last log line: an attempt to train begins, and a run that failed may have left it."""
        return

    def mark_step(self) -> Any:
        """What `undo_step` returns to; nothing is copied off the device."""
        return None

    def undo_step(self, mark: Any) -> None:
        """Forget what a step has counted that was not made."""
        return

    # --- a run, from its checkpoint to its end ---

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any):
        """As `Trainer.train`. `resume_from_checkpoint`: a folder; True or "true" for the newest whole checkpoint in
        `output_dir`; "auto" for that one, or none where there is none yet.

        At SIGTERM the step under way is finished and saved, and `stopped_by_signal` is set.
        """
        self._take_folder(resume_from_checkpoint, trial=kwargs.get("trial", args[0] if args else None))
        self.stop_asked = self.stopped_by_signal = self._attempted = False
        self.watch.clear()
        self.begin_counting()
        if self.model_init is None:
            self.know_run()
        with self._heeding_sigterm():
            return super().train(self._resuming, *args, **kwargs)

    def _take_folder(self, asked: str | bool | None, trial: Any) -> None:
        """For this run, with the checkpoint that it goes on from. The trials of a search have folders of their own."""

        def decided() -> tuple[str | None, RunRecord]:
            if trial is None:
                self.folder.hold(self)
            found = checkpoint_to_resume(asked, self.args.output_dir, force=self.args.force_resume, needs=STATE_FILE)
            return found, self.folder.decide(found, named=names_a_folder(asked))

        self._resuming, record = self._same_on_all_ranks(decided)
        self.folder.begin(record, fresh=self._resuming is None, shared=trial is not None)

    def know_run(self) -> None:
        """Take down what this run is, and refuse a checkpoint of another. Its model is there, and has not moved."""
        self.identity = self._same_on_all_ranks(lambda: {**self.run_identity(), **self._way_through_the_data()})
        if self._resuming is not None:
            refuse_another_run(self._resuming, self.identity, force=self.args.force_resume)

    def _way_through_the_data(self) -> dict[str, Any]:
        """What decides which rows a step sees. However they are split over ranks and micro-batches."""
        args = self.args
        return {
            "optimizer": str(getattr(args.optim, "value", args.optim)),
            "engine": {"--num_processes": args.world_size} if self.is_deepspeed_enabled else None,
            "order": {
                "--data_seed (without it --seed)": self.order_seed,
                "--per_device_train_batch_size x --gradient_accumulation_steps x processes": args.train_batch_size
                * args.gradient_accumulation_steps
                * args.world_size,
                "--train_sampling_strategy": args.train_sampling_strategy,
            },
        }

    def _same_on_all_ranks(self, ask: Any) -> Any:
        """The answer of the main process, whose error is everybody's."""
        if self.accelerator.num_processes == 1:
            return ask()
        answer: list[Any] = [None, None]
        if self.accelerator.is_main_process:
            try:
                answer[0] = ask()
            except (ValueError, OSError) as error:
                answer[1] = str(error)
        value, problem = broadcast_object_list(answer)
        if problem is not None:
            raise ValueError(problem)
        return value

    @contextlib.contextmanager
    def _heeding_sigterm(self) -> Iterator[None]:
        """While it trains; Python delivers signals to its main thread alone."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def note(number: int, frame: Any) -> None:
            self.stop_asked = True

        before = signal.signal(signal.SIGTERM, note)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)

    def _update_auto_batch_size(self, batch_size: int) -> None:
        """Called by `auto_find_batch_size` before each attempt."""
        if self._attempted and self.state.global_step > self._initial_global_step:
            raise ValueError(
                f"--auto_find_batch_size: memory ran out at step {self.state.global_step + 1}, after the weights had moved, so "
                f"that a new start would not be one. Start again with --per_device_train_batch_size {batch_size}, or "
                "resume from a checkpoint with it."
            )
        self._attempted = True
        self.watch.clear()
        self.begin_counting()
        super()._update_auto_batch_size(batch_size)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm)
        # A gradient scaler (float16) meets overflow by itself, and is expected to.
        self.watch.gradient_norm = None if self.accelerator.scaler is not None else own_part(norm)
        return norm

    def sum_over_ranks(self, values: Tensor) -> Tensor:
        return self.accelerator.reduce(values, reduction="sum")

    # --- checkpoints ---

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self._aside is None else str(self._aside)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Written aside by `Trainer`, then sealed and given its name. Nobody sees half a checkpoint."""
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
        if main:
            self.keep_newest(run_folder)

    def keep_newest(self, run_folder: Path) -> None:
        """At most `save_total_limit` checkpoints, the best and the newest among them."""
        limit, best = self.args.save_total_limit, self.state.best_model_checkpoint
        self.folder.keep(run_folder, limit, self.state.global_step, best)

    def _finalize_training(self, trial: Any, *args: Any, **kwargs: Any):
        """At a limit of 1 `Trainer` would leave the best checkpoint alone in the folder, and remove those of other runs too."""
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            output = super()._finalize_training(trial, *args, **kwargs)
        finally:
            self.args.save_total_limit = limit
        if limit == 1 and self.state.best_model_checkpoint is not None and self.args.should_save:
            self.folder.keep_only(Path(self._get_output_dir(trial)), self.state.best_model_checkpoint)
        return output

    def _name_best(self, run_folder: Path, final: Path) -> None:
        """By the name that it has from now on, not by the one it was written under."""
        best = run_folder / f"checkpoint-{self.state.best_global_step}"
        if self.state.best_global_step and (best == final or best.exists()):
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
            self._save_to(folder, state_dict)
        if here:
            self.folder.warn_of_leftovers()

    def _save_to(self, folder: Path, state_dict: dict | None) -> None:
        given = None if state_dict is None else dict(state_dict)  # transformers takes out what it has written
        with self.saved_as(), savable_generation_config(self.accelerator.unwrap_model(self.model)):
            super()._save(str(folder), given)
        if self.args.should_save:  # the arguments as text: a pickle can run code when it is read
            (folder / TRAINING_ARGS_NAME).unlink(missing_ok=True)
            (folder / "training_args.json").write_text(readable(self.args.to_dict()))
            warn_of_another_kind(self.model, folder)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        state, tensors = self.run_state()
        if self.args.should_save:
            write_state(Path(output_dir), self.identity, {**state, "skipped_steps": self.skipped_steps}, tensors)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        files = sorted(path.name for path in Path(resume_from_checkpoint).glob("*model*.safetensors"))
        with naming(resume_from_checkpoint, f"its weights ({', '.join(files)})"):
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
        with naming(checkpoint, f"{OPTIMIZER_NAME} or {SCHEDULER_NAME}"):
            if live is not None and not self.is_fsdp_enabled and not Path(checkpoint, OPTIMIZER_NAME).is_file():
                raise FileNotFoundError(f"there is no {OPTIMIZER_NAME}")
            super()._load_optimizer_and_scheduler(checkpoint)
        if live is not None:
            live.put_back(self.optimizer, self.lr_scheduler)
        state, tensors = read_state(Path(checkpoint))
        self.skipped_steps = state.pop("skipped_steps")
        self.load_run_state(state, tensors)

    def _init_training_state(self, max_steps: int, *args: Any, **kwargs: Any) -> tuple[int, int]:
        where = super()._init_training_state(max_steps, *args, **kwargs)
        # The checkpoint has those of the run that wrote it; when to log, save and evaluate is for this one to say.
        self.state.compute_steps(self.args, max_steps)
        return where

    def _run_epoch(self, *args: Any, epoch: int, **kwargs: Any) -> None:
        if self.state.global_step >= self.state.max_steps:  # resumed at its end: Trainer would make one more step
            self.control.should_training_stop = True
            return
        self.row_order.manual_seed(self.order_seed + epoch)
        super()._run_epoch(*args, epoch=epoch, **kwargs)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """Orders that are drawn by the epoch, as shuffled rows are, and not by how many numbers were drawn before."""
        rows = self.train_dataset if train_dataset is None else train_dataset
        if self.args.train_sampling_strategy == "batch_rebalance" and has_length(rows):
            return BalancedSampler(
                rows[self.args.length_column_name],
                batch_size=self._train_batch_size,
                ranks=self.args.world_size,
                accumulation=self.args.gradient_accumulation_steps,
                generator=self.row_order,
            )
        sampler = super()._get_train_sampler(train_dataset)
        if isinstance(sampler, LengthGroupedSampler):
            sampler.generator = self.row_order
        return sampler

    @property
    def order_seed(self) -> int:
        return self.args.seed if self.args.data_seed is None else self.args.data_seed


@contextlib.contextmanager
def naming(checkpoint: str, what: str) -> Iterator[None]:
    """Whatever cannot be read of a checkpoint, said with the place. (A whole one fails here only if it does not fit.)"""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise ValueError(
            f"The checkpoint {checkpoint!r} cannot be resumed: {what} cannot be read, or does not fit ({type(error).__name__}: "
            f"{error}). Start a new run from its model (--model_name_or_path {checkpoint}), or resume an earlier one."
        ) from error
