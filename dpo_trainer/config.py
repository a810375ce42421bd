"""DPOConfig: every option of a run. The options of a stage stand with their bounds and refusals beside the code that reads them.

losses/options.py   reference/options.py   data/options.py   models/options.py   options/ (the run, transformers' own)

An option works or is refused at construction, by an error that names the flag, the value and the way out. Refusals that depend on
the model or the data stand in the module that sees them.
"""

from __future__ import annotations

from dataclasses import dataclass

from transformers import TrainingArguments

from .data.options import RowOptions, check_row_options
from .distributed.engine_checks import check_engine_files, check_launcher
from .losses.options import LossOptions, check_loss_options
from .models.options import ModelOptions, check_model_options
from .options.numbers import check_numbers
from .options.optimizers import check_optimizer
from .options.run import (
    RunOptions,
    check_against_trainer,
    check_micro_batches,
    check_run_options,
    fill_in,
    resolve_dispatch,
)
from .reference.options import ReferenceOptions, check_reference_options
from .registry import check_choices


@dataclass
class DPOConfig(LossOptions, ReferenceOptions, RowOptions, ModelOptions, RunOptions):
    """Options of `DPOTrainer`, on top of `transformers.TrainingArguments`.

    Lengths count tokens; log-probs and rewards are in nats. `docs/config.md` lists every field.
    """

    _VALID_DICT_FIELDS = [*TrainingArguments._VALID_DICT_FIELDS, "model_init_kwargs"]

    def __post_init__(self):
        check_choices(self)
        check_run_options(self)
        check_loss_options(self)
        check_row_options(self)
        check_model_options(self)
        check_reference_options(self)
        check_numbers(self)
        check_engine_files(self)
        check_optimizer(self)
        fill_in(self)
        super().__post_init__()
        check_against_trainer(self)
        check_launcher(self)
        check_micro_batches(self)
        resolve_dispatch(self)
