"""DurableTrainer: a run that survives kills, signals, full disks and bad numbers. Knows nothing of preferences.

Checkpoints are complete or absent (atomic.py). A resumed run is the run that was interrupted, or it is refused (run_state.py).
Before each optimizer step all ranks agree that its numbers are finite and that no rank was told to stop (step_guard.py,
step_watch.py).
"""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.utils import logging

from ..distributed.same_answer import same_on_all_ranks
from ..distributed.sharding import local_shard
from . import RunRecord, check_trainer_state, checkpoint_to_resume, names_a_folder
from .atomic import AtomicTrainer
from .run_state import STATE_FILE, optimizer_and_row_order, order_seed, refuse_another_run
from .signals import INTERRUPTED, STOPPED_BY_SIGNAL, StopSignals, how_to_go_on
from .step_guard import StepGuard
from .step_watch import StepWatch, last_step_error, number_of_bad_tensors, precision_ways_out
from .stopping import Ending, MakeUpEvaluation
from .unproven import UnprovenCheckpoints

logger = logging.get_logger(__name__)


class DurableTrainer(AtomicTrainer):
    """`AtomicTrainer`, whose runs can be stopped, resumed and checked step by step.

    A subclass says what training changes besides model and optimizer (`run_state`, `load_run_state`), what makes two runs
    the same (`run_identity`), and how to undo a step that was not made (`snapshot_counters`).
    """

    def __init__(self, *args: Any, callbacks: list[TrainerCallback] | None = None, **kwargs: Any):
        super().__init__(*args, callbacks=[StepGuard(self), *(callbacks or [])], **kwargs)
        # Here as well as in the config, which does not see what `accelerate launch` switches on.
        if self.args.nonfinite == "skip" and self.is_deepspeed_enabled:
            raise ValueError("--nonfinite skip cannot keep DeepSpeed from its optimizer step: use --nonfinite stop.")
        self.watch = StepWatch()
        self.signals = StopSignals(says=self.args.process_index == 0)
        self.exit_code: int | None = None
        """The exit code of the script, if the run was told to stop; else None."""
        self.ending = Ending()
        self.add_callback(MakeUpEvaluation(self))
        self.evaluated_as: tuple[Any, Any] = (None, None)  # trial and ignored keys of the run, for its evaluations
        self.skipped_steps = self.skipped_in_a_row = 0
        self.unproven = UnprovenCheckpoints(writes=self.args.should_save)
        self.row_order = torch.Generator()  # for samplers that draw the order of rows; seeded for each epoch
        self._resuming: str | None = None
        self._attempted = False

    # --- what a subclass knows ---

    def run_identity(self) -> dict[str, Any]:
        """What must be equal for a checkpoint to belong to this run, as JSON. Called before anything trains."""
        return {}

    def run_state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        state = {"skipped_steps": self.skipped_steps, "skipped_in_a_row": self.skipped_in_a_row}
        return {**state, "ending": self.ending.state_dict()}, {}

    def load_run_state(self, state: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        self.skipped_steps = state["skipped_steps"]
        self.skipped_in_a_row = state.get("skipped_in_a_row", 0)  # older checkpoints lack these two
        if "ending" in state:
            self.ending.load_state_dict(state["ending"])

    def clear_counters(self) -> None:
        """Forget what was counted since the last log line. Called before each attempt to train: a run that failed may have left counts."""
        return

    def snapshot_counters(self) -> Any:
        """The counts that `restore_counters` returns to. Copies nothing off the device."""
        return None

    def restore_counters(self, snapshot: Any) -> None:
        """Forget what was counted for a step that is not made."""
        return

    def forward_again(self, batch: Any) -> Tensor | None:
        """The log-probs of a micro-batch under the present weights. `batch` is from the last finite step. Called on all ranks."""
        return None

    # --- a run, from its checkpoint to its end ---

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ):
        """As `Trainer.train`. `resume_from_checkpoint`: a folder; True or "true" for the newest complete checkpoint in
        `output_dir`; "auto" for that one, or none where there is none yet.

        At SIGTERM, SIGHUP or Ctrl-C the present step is finished and saved, `stopped_by_signal` is set, and the command that
        resumes the run is logged. A second Ctrl-C raises KeyboardInterrupt at once.
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
        """The order of rows depends on the epoch alone, not on how many random numbers were drawn before."""
        sampler = super()._get_train_sampler(train_dataset)
        if isinstance(sampler, LengthGroupedSampler):
            sampler.generator = self.row_order
        return sampler

    @property
    def resumed_from(self) -> str | None:
        """The checkpoint that this run resumes."""
        return self._resuming

    @property
    def stop_asked(self) -> bool:
        """Whether this rank was told to stop."""
        return self.signals.first is not None

    @stop_asked.setter
    def stop_asked(self, asked: bool) -> None:
        """A program may ask for it, with the effect of SIGTERM."""
        self.signals.first = signal.SIGTERM if asked else None

    @property
    def stopped_by_signal(self) -> bool:
        """Whether the run ended early because a rank was told to stop. It is saved then."""
        return self.exit_code is not None

    def stop_after_step(self, *, interrupted: bool) -> None:
        """Make the next optimizer step the last one. Called on all ranks. `interrupted`: by Ctrl-C."""
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
        """Called after all callbacks at the end of a step and of an epoch."""
        if self.ending.asked:
            self.ending.settle(self.control, self.state)
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def _take_folder(self, asked: str | bool | None, trial: Any) -> None:
        """Take the output folder for this run, with the checkpoint to resume. Each trial of a search has its own folder."""

        def decided() -> tuple[str | None, RunRecord]:
            if trial is None:
                self.folder.hold(self)
            found = checkpoint_to_resume(asked, self.args.output_dir, force=self.args.force_resume, needs=STATE_FILE)
            return found, self.folder.decide(found, named=names_a_folder(asked), goes_on=str(asked).lower() == "auto")

        self._resuming, record = same_on_all_ranks(decided, self.accelerator)
        self.folder.begin(record, fresh=self._resuming is None, shared=trial is not None)

    def prepare_run(self) -> None:
        """Called before training, when the model exists and has not moved."""
        self.fix_run_identity()

    def fix_run_identity(self) -> None:
        """Record the run's identity, and refuse a checkpoint of another run. Called before the model moves."""
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
                f"that training cannot start again from the same weights. Start the run again with --per_device_train_batch_size {batch_size}, or "
                "resume from a checkpoint with it."
            )
        self._attempted = True
        self.watch.clear()
        self.clear_counters()
        super()._update_auto_batch_size(batch_size)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm)
        # A gradient scaler (float16) handles overflow itself.
        self.watch.gradient_norm = None if self.accelerator.scaler is not None else local_shard(norm)
        return norm

    def sum_over_ranks(self, values: Tensor) -> Tensor:
        return self.accelerator.reduce(values, reduction="sum")

    # --- checkpoints, until a finite step proves them ---

    def may_be_best(self, step: int) -> bool:
        return step not in self.ending.unplanned

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        newest = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
        best = self.state.best_model_checkpoint
        self.unproven.replace_by(newest, limited=bool(self.args.save_total_limit), best=best)

    def prove_checkpoints(self) -> None:
        """A forward pass was finite, so the weights of the newest checkpoint are, and older ones may be deleted. Called on all ranks."""
        if self.unproven.prove() and self.args.should_save:
            self._keep_newest(self._run_folder())

    def fail_checkpoints(self, problem: str) -> str:
        """Mark the checkpoints that no finite step followed. Called on all ranks. Returns what an error says of them."""
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
        """Check the weights by one more forward pass: no later step will show whether they are finite."""
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

    def _init_training_state(self, max_steps: int, *args: Any, **kwargs: Any) -> tuple[int, int]:
        where = super()._init_training_state(max_steps, *args, **kwargs)
        # The checkpoint holds the intervals of the run that wrote it; this run's own options decide when to log, save and evaluate.
        self.state.compute_steps(self.args, max_steps)
        return where

    def _run_epoch(self, *args: Any, epoch: int, **kwargs: Any) -> None:
        # The run was resumed at its end, or the evaluation at its start stopped it early: Trainer would make one more step.
        if self.state.global_step >= self.state.max_steps or self.control.should_training_stop:
            self.control.should_training_stop = True
            return
        self.row_order.manual_seed(order_seed(self.args) + epoch)
        super()._run_epoch(*args, epoch=epoch, **kwargs)
