"""What happens before and after an optimizer step, so that no step spoils the run."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from torch import Tensor
from transformers import TrainerCallback
from transformers.utils import logging

from . import tidy
from .output_folder import OutputFolder
from .signals import StopSignals
from .step_watch import StepWatch, Verdict, non_finite_error, precision_ways_out

logger = logging.get_logger(__name__)


class GuardedTrainer(Protocol):
    """What the guard of a step needs of a trainer: `DurableTrainer` has it."""

    args: Any
    model: Any
    optimizer: Any
    folder: OutputFolder
    watch: StepWatch
    signals: StopSignals
    skipped_steps: int
    skipped_in_a_row: int
    is_deepspeed_enabled: bool
    _tr_loss: Tensor
    _initial_global_step: int

    @property
    def stop_asked(self) -> bool: ...

    def sum_over_ranks(self, values: Tensor) -> Tensor: ...

    def stop_after_step(self, *, interrupted: bool) -> None: ...

    def prove_checkpoints(self) -> None: ...

    def fail_checkpoints(self, problem: str) -> str: ...

    def snapshot_counters(self) -> Any: ...

    def restore_counters(self, snapshot: Any) -> None: ...


class StepGuard(TrainerCallback):
    """Looks at a step before it is made."""

    def __init__(self, trainer: GuardedTrainer):
        self.trainer = trainer
        self.said_no_gradient = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step and args.should_save:  # resumed: what a kill left undone
            tidy(Path(args.output_dir))

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self.trainer.folder.claim()
        self.counters = self.trainer.snapshot_counters()
        self.loss_before = self.trainer._tr_loss.clone()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer = self.trainer
        verdict = trainer.watch.verdict(
            trainer.sum_over_ranks, stop_asked=trainer.stop_asked, interrupted=trainer.signals.interrupted
        )
        if verdict.stop_asked:
            trainer.stop_after_step(interrupted=verdict.interrupted)
        if verdict.finite:
            trainer.skipped_in_a_row = 0
            trainer.prove_checkpoints()
            self._say_no_gradient(verdict, state.global_step + 1)
        elif args.nonfinite == "stop":
            self._give_up(verdict, state.global_step + 1)
        elif trainer.skipped_in_a_row == args.max_skipped_steps:
            self._give_up(
                verdict,
                state.global_step + 1,
                f", and --max_skipped_steps {args.max_skipped_steps} in a row before it were left out",
            )
        else:
            self._leave_out(verdict, state.global_step + 1)

    def _give_up(self, verdict: Verdict, step: int, after: str = "") -> None:
        args, trainer = self.trainer.args, self.trainer
        ways = precision_ways_out(args, trainer.model)
        if after:
            ways.append(f"raise --max_skipped_steps, which is {args.max_skipped_steps}")
        elif not trainer.is_deepspeed_enabled:
            ways.append("leave such steps out with --nonfinite skip")
        raise non_finite_error(verdict, step, ways, after=after, then=trainer.fail_checkpoints(verdict.problem(step)))

    def _say_no_gradient(self, verdict: Verdict, step: int) -> None:
        if verdict.no_gradient and not self.said_no_gradient:
            self.said_no_gradient = True
            logger.warning(
                f"The gradient of optimizer step {step} is 0 for every weight: nothing is learned from its pairs. That is right where each "
                "of them is beyond the margin of its loss (hinge). Otherwise what is trained has no part in these rows (tokens "
                "that do not occur, an adapter that is not active). Said once; grad_norm in the log shows the later steps."
            )

    def _leave_out(self, verdict: Verdict, step: int) -> None:
        """Without gradients an optimizer touches neither weights nor its own state."""
        trainer = self.trainer
        trainer.optimizer.zero_grad()
        trainer.restore_counters(self.counters)
        trainer._tr_loss.copy_(self.loss_before)
        trainer._initial_global_step += 1  # the mean loss of the run is over the steps that were made
        trainer.skipped_steps += 1
        trainer.skipped_in_a_row += 1
        logger.warning(f"{verdict.problem(step)}: it was left out, number {trainer.skipped_steps} of this run.")
