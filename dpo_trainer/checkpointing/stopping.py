"""How a run that was told to stop ends, and what it leaves to the run that goes on."""

from __future__ import annotations

from typing import Any, Protocol

from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_utils import SaveStrategy


class Ending:
    """The step that a run is stopped after: it gets its log line and a checkpoint, an evaluation that is due waits for the resumed run.

    Part of the state of a run.
    """

    def __init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        self.unplanned: set[int] = set()
        """Steps that were saved for a stop alone: a run that was not stopped has no such checkpoint, and cannot call it its best."""
        self.evaluation_due = False
        self.asked = False  # all ranks agreed to stop
        self._saved = self._save_due = self._at_end_of_epoch = False

    def settle(self, control: TrainerControl, state: TrainerState) -> None:
        """Called before what is due at the end of the step, and again before what is due at the end of the epoch.

        Where the step is the last of its epoch, its checkpoint is that of the epoch's end, as a resumed run begins with the next one.
        """
        if self._saved:
            control.should_log = control.should_save = control.should_evaluate = False
            return
        ends_epoch = state.epoch % 1 == 0 or control.should_training_stop or control.should_epoch_stop
        self.evaluation_due |= control.should_evaluate
        self._save_due |= control.should_save
        self._saved = self._at_end_of_epoch or not ends_epoch
        self._at_end_of_epoch = True
        control.should_save, control.should_evaluate, control.should_training_stop = self._saved, False, True
        if self._saved and not self._save_due:
            self.unplanned.add(state.global_step)

    def state_dict(self) -> dict[str, Any]:
        return {"evaluation_due": self.evaluation_due, "unplanned": sorted(self.unplanned)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.evaluation_due, self.unplanned = state["evaluation_due"], set(state["unplanned"])


class EvaluatingTrainer(Protocol):
    """What `MakeUpEvaluation` needs of a trainer."""

    eval_dataset: Any
    ending: Ending
    evaluated_as: tuple[Any, Any]

    @property
    def resumed_from(self) -> str | None: ...

    def _evaluate(self, trial: Any, ignore_keys_for_eval: Any) -> dict[str, float]: ...

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool: ...


class MakeUpEvaluation(TrainerCallback):
    """Begins a resumed run with the evaluation that the one before it left out: before its next step, or its end."""

    def __init__(self, trainer: EvaluatingTrainer):
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer, ending = self.trainer, self.trainer.ending
        if not ending.evaluation_due:
            return
        ending.evaluation_due = False
        if trainer.eval_dataset is None or args.eval_strategy == "no":
            return
        trial, ignored = trainer.evaluated_as
        is_best = trainer._determine_best_metric(metrics=trainer._evaluate(trial, ignored), trial=trial)
        step = state.global_step
        if args.save_strategy == SaveStrategy.BEST and is_best:
            ending.unplanned.discard(step)
        if state.best_global_step == step and step not in ending.unplanned:
            state.best_model_checkpoint = trainer.resumed_from
