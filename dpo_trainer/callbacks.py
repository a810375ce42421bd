"""What happens between the steps of a run, at the moments that `transformers.Trainer` announces."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from logging import getLogger
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm.contrib.logging import logging_redirect_tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_utils import has_length
from transformers.utils import logging

from .checkpoints import tidy
from .failures import Verdict, non_finite_error, precision_ways_out

if TYPE_CHECKING:
    from .config import DPOConfig
    from .durable import DurableTrainer
    from .trainer import DPOTrainer

logger = logging.get_logger(__name__)


class StepGuard(TrainerCallback):
    """Looks at a step before it is made."""

    def __init__(self, trainer: DurableTrainer):
        self.trainer = trainer
        self.said_no_gradient = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step and args.should_save:  # resumed: what a kill left undone
            tidy(Path(args.output_dir))

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self.trainer.folder.claim()
        self.mark = self.trainer.mark_step()
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
            trainer.proven()
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
        raise non_finite_error(verdict, step, ways, after=after, then=trainer.disown(verdict.problem(step)))

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
        trainer.undo_step(self.mark)
        trainer._tr_loss.copy_(self.loss_before)
        trainer._initial_global_step += 1  # the mean loss of the run is over the steps that were made
        trainer.skipped_steps += 1
        trainer.skipped_in_a_row += 1
        logger.warning(f"{verdict.problem(step)}: it was left out, number {trainer.skipped_steps} of this run.")


class MoveReference(TrainerCallback):
    """Moves the reference towards the policy, every so many optimizer steps or epochs.

    At the end of a step, which is before its log line, evaluation and checkpoint: they see the reference that moved. An
    epoch ends with its last step, so that a checkpoint written there needs no move to be made up for after a resume.
    """

    def __init__(self, trainer: DPOTrainer):
        self.trainer = trainer

    def on_train_begin(
        self,
        args: DPOConfig,
        state: TrainerState,
        control: TrainerControl,
        train_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:
        """Refuse a run in which the reference could not move before the last step is over."""
        steps, epochs = args.ref_model_sync_steps, args.ref_model_sync_epochs
        if epochs is not None and not has_length(train_dataloader):
            raise ValueError(
                f"--ref_model_sync_epochs {epochs} counts epochs, and a stream of unknown length has none: use "
                "--ref_model_sync_steps."
            )
        if steps is not None and steps >= state.max_steps:
            raise ValueError(
                f"--sync_ref_model would change nothing: the reference moves every {steps} steps, and the run has "
                f"{state.max_steps}. Lower --ref_model_sync_steps, or leave --sync_ref_model off."
            )
        if epochs is not None and epochs >= state.num_train_epochs:
            raise ValueError(
                f"--sync_ref_model would change nothing: the reference moves every {epochs} epochs, and the run ends with "
                f"epoch {state.num_train_epochs}. Use --ref_model_sync_steps, or leave --sync_ref_model off."
            )

    def on_step_end(self, args: DPOConfig, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if args.ref_model_sync_epochs is not None:
            # (step + 1) / steps of the epoch is 1.0 at its last step, so that the sum is a whole number there and nowhere else.
            due = state.epoch % args.ref_model_sync_epochs == 0
        else:
            due = state.global_step % args.ref_model_sync_steps == 0
        if due:
            alpha: float = args.ref_model_mixup_alpha  # type: ignore[assignment]  # filled in by now
            self.trainer.reference.move(self.trainer.model_wrapped, alpha)


class CheckReference(TrainerCallback):
    """Looks at the end of training whether the reference is what it was (reference_check.py)."""

    def __init__(self, trainer: DPOTrainer):
        self.trainer = trainer

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.reference_check.end(self.trainer.model_wrapped)


def beside_progress_bar(args: DPOConfig) -> AbstractContextManager[None]:
    """While a bar shows the progress of a run, warnings stand on lines of their own, above it."""
    if args.disable_tqdm:
        return nullcontext()
    return logging_redirect_tqdm([getLogger(), getLogger("transformers")])
