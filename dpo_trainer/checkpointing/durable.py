"""DurableTrainer: a run that survives kills, signals, full disks and bad numbers. Knows nothing of preferences.

Checkpoints are whole or not there (folders.py, manifest.py); a resumed run is the run that was interrupted, or is refused
(run_state.py); before each optimizer step all ranks agree that its numbers are finite and that no rank was told to stop
(step_guard.py, step_watch.py).
"""

from __future__ import annotations

import contextlib
import signal
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.utils import logging

from ..distributed.same_answer import same_on_all_ranks
from ..distributed.sharding import local_shard
from . import (
    ASIDE,
    RunRecord,
    check_optimizer_files,
    check_trainer_state,
    checkpoint_to_resume,
    fresh_aside,
    load_default_adapter,
    load_renamed,
    names_a_folder,
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
from .run_state import (
    STATE_FILE,
    optimizer_and_row_order,
    order_seed,
    read_state,
    readable,
    refuse_another_run,
    write_state,
)
from .save_checks import warn_of_another_kind
from .signals import INTERRUPTED, STOPPED_BY_SIGNAL, StopSignals, how_to_go_on
from .state_files import explain_unreadable
from .step_guard import StepGuard
from .step_watch import StepWatch, last_step_error, number_of_bad_tensors, precision_ways_out
from .stopping import Ending, MakeUpEvaluation
from .unproven import UnprovenCheckpoints

logger = logging.get_logger(__name__)


class DurableTrainer(Trainer):
    """`transformers.Trainer`, made to last.

    A subclass says what training changes besides model and optimizer (`run_state`, `load_run_state`), what makes two runs
    the same (`run_identity`), and how to undo a step that was not made (`snapshot_counters`).
    """

    def __init__(self, *args: Any, callbacks: list[TrainerCallback] | None = None, **kwargs: Any):
        super().__init__(*args, callbacks=[StepGuard(self), *(callbacks or [])], **kwargs)
        # Here as well as in the config, which does not see what `accelerate launch` switches on.
        if self.args.nonfinite == "skip" and self.is_deepspeed_enabled:
            raise ValueError("--nonfinite skip cannot keep DeepSpeed from its optimizer step: use --nonfinite stop.")
        self.folder = OutputFolder(
            Path(str(self.args.output_dir)), force=self.args.force_output_dir, main=self.args.process_index == 0
        )
        self.watch = StepWatch()
        self.signals = StopSignals(says=self.args.process_index == 0)
        self.exit_code: int | None = None
        """Of a script whose run was told to stop; None for one that was not."""
        self.ending = Ending()
        self.add_callback(MakeUpEvaluation(self))
        self.evaluated_as: tuple[Any, Any] = (None, None)  # trial and ignored keys of the run, for its evaluations
        self.skipped_steps = self.skipped_in_a_row = 0
        self.unproven = UnprovenCheckpoints(writes=self.args.should_save)
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

    def clear_counters(self) -> None:
        """Forget what was counted since the last log line: an attempt to train begins, and a run that failed may have left it."""
        return

    def snapshot_counters(self) -> Any:
        """What `restore_counters` returns to; nothing is copied off the device."""
        return None

    def restore_counters(self, snapshot: Any) -> None:
        """Forget what a step has counted that was not made."""
        return

    def forward_again(self, batch: Any) -> Tensor | None:
        """What the weights as they are now make of a micro-batch, of the last step that was finite. On all ranks."""
        return None

    # --- a run, from its checkpoint to its end ---

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ):
        """As `Trainer.train`. `resume_from_checkpoint`: a folder; True or "true" for the newest whole checkpoint in
        `output_dir`; "auto" for that one, or none where there is none yet.

        At SIGTERM, SIGHUP or Ctrl-C the step under way is finished and saved, `stopped_by_signal` is set, and the way to go on is
        logged; a second Ctrl-C is a KeyboardInterrupt at once.
        """
        self._take_folder(resume_from_checkpoint, trial)
        self.evaluated_as = (trial, ignore_keys_for_eval)
        self.exit_code, self._attempted = None, False
        self.unproven = UnprovenCheckpoints(writes=self.args.should_save, resumed=self._resuming)
        self.skipped_in_a_row = 0
        self.signals.begin()
        self.ending.begin()
        self.watch.clear()
        self.clear_counters()
        if self.model_init is None:
            self.prepare_run()
        if self._resuming is not None:
            check_trainer_state(self._resuming)
        with self.signals.heeded():
            output = super().train(self._resuming, trial, ignore_keys_for_eval)
            if self.stopped_by_signal:
                self._say_how_to_go_on()
        return output

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """Samplers draw the order of rows by the epoch, not by how many numbers were drawn before."""
        sampler = super()._get_train_sampler(train_dataset)
        if isinstance(sampler, LengthGroupedSampler):
            sampler.generator = self.row_order
        return sampler

    @property
    def resumed_from(self) -> str | None:
        """The checkpoint that this run goes on from."""
        return self._resuming

    @property
    def stop_asked(self) -> bool:
        """Whether this rank was told to stop."""
        return self.signals.first is not None

    @stop_asked.setter
    def stop_asked(self, asked: bool) -> None:
        """By a program: as by SIGTERM."""
        self.signals.first = signal.SIGTERM if asked else None

    @property
    def stopped_by_signal(self) -> bool:
        """Whether the run ended early because a rank was told to stop. It is saved then."""
        return self.exit_code is not None

    def stop_after_step(self, *, interrupted: bool) -> None:
        """On all ranks, before an optimizer step: it is the last one. `interrupted`: by Ctrl-C."""
        self.ending.asked = True
        self.exit_code = INTERRUPTED if interrupted else STOPPED_BY_SIGNAL
        name = "Ctrl-C" if interrupted else self.signals.first.name if self.signals.first else "on another rank"
        logger.warning(f"Told to stop ({name}): saving after step {self.state.global_step + 1}.")

    def _say_how_to_go_on(self) -> None:
        step = self.state.global_step
        if self.args.save_only_model:
            logger.warning(f"Stopped and saved after step {step}. --save_only_model: there is nothing to resume from.")
            return
        logger.warning(f"Stopped and saved after step {step}. To go on:\n  {how_to_go_on()}")

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        """After all callbacks at the end of a step, and of an epoch, had their say."""
        if self.ending.asked:
            self.ending.settle(self.control, self.state)
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def _take_folder(self, asked: str | bool | None, trial: Any) -> None:
        """For this run, with the checkpoint that it goes on from. The trials of a search have folders of their own."""

        def decided() -> tuple[str | None, RunRecord]:
            if trial is None:
                self.folder.hold(self)
            found = checkpoint_to_resume(asked, self.args.output_dir, force=self.args.force_resume, needs=STATE_FILE)
            return found, self.folder.decide(found, named=names_a_folder(asked), goes_on=str(asked).lower() == "auto")

        self._resuming, record = same_on_all_ranks(decided, self.accelerator)
        self.folder.begin(record, fresh=self._resuming is None, shared=trial is not None)

    def prepare_run(self) -> None:
        """Called before training, when the model is there and has not moved."""
        self.fix_run_identity()

    def fix_run_identity(self) -> None:
        """Record the run's identity, and refuse a checkpoint of another run. Its model is there, and has not moved."""
        self.identity = same_on_all_ranks(
            lambda: {**self.run_identity(), **optimizer_and_row_order(self.args, deepspeed=self.is_deepspeed_enabled)},
            self.accelerator,
        )
        if self._resuming is not None:
            refuse_another_run(self._resuming, self.identity, force=self.args.force_resume)

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
        self.clear_counters()
        super()._update_auto_batch_size(batch_size)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm)
        # A gradient scaler (float16) meets overflow by itself, and is expected to.
        self.watch.gradient_norm = None if self.accelerator.scaler is not None else local_shard(norm)
        return norm

    def sum_over_ranks(self, values: Tensor) -> Tensor:
        return self.accelerator.reduce(values, reduction="sum")

    # --- checkpoints ---

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self._aside is None else str(self._aside)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Written aside by `Trainer`, then sealed and given its name. No reader sees half a checkpoint."""
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
        best = self.state.best_model_checkpoint
        self.unproven.replace_by(final, limited=bool(self.args.save_total_limit), best=best)

    def prove_checkpoints(self) -> None:
        """On all ranks, after a finite forward pass: the weights of the newest checkpoint are finite, and older ones may be deleted."""
        if self.unproven.prove() and self.args.should_save:
            self._keep_newest(self._run_folder())

    def fail_checkpoints(self, problem: str) -> str:
        """Mark the checkpoints that no finite step followed, on all ranks. Returns what an error says of them."""
        return self.unproven.mark_failed(self._run_folder(), problem)

    def _finalize_training(self, trial: Any, *args: Any, **kwargs: Any):
        self.watch.finite_batch, batch = None, self.watch.finite_batch
        if not self.stopped_by_signal:
            self._prove_last_step(batch)
        limit, best = self.args.save_total_limit, self.state.best_model_checkpoint
        # At a limit of 1 `Trainer` would leave the best checkpoint alone in the folder, and remove those of other runs too.
        self.args.save_total_limit = None
        if self.stopped_by_signal:  # not the end of the run: its best model is not known yet
            self.state.best_model_checkpoint = None
        try:
            output = super()._finalize_training(trial, *args, **kwargs)
        finally:
            self.args.save_total_limit, self.state.best_model_checkpoint = limit, best
        if limit == 1 and best is not None and self.args.should_save and not self.stopped_by_signal:
            self.folder.keep_only(Path(self._get_output_dir(trial)), best)
        return output

    def _prove_last_step(self, batch: Any) -> None:
        """No step follows whose losses would show what became of the weights."""
        scores = None if batch is None else self.forward_again(batch)
        bad = number_of_bad_tensors(self.model, scores, self.args.device)
        if not self.sum_over_ranks(bad).item():
            self.prove_checkpoints()
            return
        problem = f"After step {self.state.global_step}, the last one, the weights or their log-probs are not finite"
        raise last_step_error(problem, precision_ways_out(self.args, self.model), then=self.fail_checkpoints(problem))

    def _run_folder(self) -> Path:
        return Path(self._get_output_dir(self.evaluated_as[0]))

    def _keep_newest(self, run_folder: Path) -> None:
        """At most `save_total_limit` checkpoints, the best and the newest among them."""
        limit, best = self.args.save_total_limit, self.state.best_model_checkpoint
        self.folder.keep(run_folder, limit, self.state.global_step, best)

    def _name_best(self, run_folder: Path, final: Path) -> None:
        """By the name that it has from now on, not by the one it was written under."""
        best = run_folder / f"checkpoint-{self.state.best_global_step}"
        planned = self.state.best_global_step not in self.ending.unplanned
        if self.state.best_global_step and planned and (best == final or best.exists()):
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
            own = {
                "skipped_steps": self.skipped_steps,
                "skipped_in_a_row": self.skipped_in_a_row,
                "ending": self.ending.state_dict(),
            }
            write_state(Path(output_dir), self.identity, {**state, **own}, tensors)

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
            self.skipped_steps = state.pop("skipped_steps")
            self.skipped_in_a_row = state.pop("skipped_in_a_row", 0)  # not in older checkpoints
            if "ending" in state:
                self.ending.load_state_dict(state.pop("ending"))
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

    def _init_training_state(self, max_steps: int, *args: Any, **kwargs: Any) -> tuple[int, int]:
        where = super()._init_training_state(max_steps, *args, **kwargs)
        # The checkpoint has those of the run that wrote it; when to log, save and evaluate is for this one to say.
        self.state.compute_steps(self.args, max_steps)
        return where

    def _run_epoch(self, *args: Any, epoch: int, **kwargs: Any) -> None:
        # Resumed at its end, or stopped early by the evaluation that was made up: Trainer would make one more step.
        if self.state.global_step >= self.state.max_steps or self.control.should_training_stop:
            self.control.should_training_stop = True
            return
        self.row_order.manual_seed(order_seed(self.args) + epoch)
        super()._run_epoch(*args, epoch=epoch, **kwargs)
