"""What happens between the steps of a run, at the moments that `transformers.Trainer` announces."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from logging import getLogger
from typing import Any, Protocol

from tqdm.contrib.logging import logging_redirect_tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_utils import has_length
from transformers.utils import logging

from ..config import DPOConfig
from ..reference import Reference
from ..reference.check import ReferenceCheck

logger = logging.get_logger(__name__)


class ReferringTrainer(Protocol):
    """What these callbacks need of a trainer."""

    model_wrapped: Any
    reference: Reference
    reference_check: ReferenceCheck


class MoveReference(TrainerCallback):
    """Moves the reference towards the policy, every so many optimizer steps or epochs.

    At the end of a step, which is before its log line, evaluation and checkpoint: they see the reference that moved. An
    epoch ends with its last step, so that a checkpoint written there needs no move to be made up for after a resume.
    """

    def __init__(self, trainer: ReferringTrainer):
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
    """Looks at the end of training whether the reference is what it was (reference/check.py)."""

    def __init__(self, trainer: ReferringTrainer):
        self.trainer = trainer

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.reference_check.end(self.trainer.model_wrapped)


def beside_progress_bar(args: DPOConfig) -> AbstractContextManager[None]:
    """While a bar shows the progress of a run, warnings stand on lines of their own, above it."""
    if args.disable_tqdm:
        return nullcontext()
    return logging_redirect_tqdm([getLogger(), getLogger("transformers")])
