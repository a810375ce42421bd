"""DPOTrainer: builds the parts of a run once, and hands each batch from one to the next. No arithmetic here.

rows -> data/ -> PairBatch -> scoring/ (policy), reference/ -> losses/ -> metrics.py
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin, TrainerCallback, set_seed
from transformers.utils import logging

from .checkpointing import OriginalConfig
from .checkpointing.save_checks import check_saving
from .config import DPOConfig
from .data.content import dataset_digest
from .data.files.dataset_inputs import Rows, is_rows
from .distributed.engine_checks import check_engine
from .distributed.engines import evaluation, keep_outputs_exact, prepare_frozen, shards_weights
from .losses import Objective
from .metrics import MetricInputs, per_pair
from .models.load import load_processing_class, made_by, name_of
from .models.unwrap import base_model, evaluation_mode
from .models.vocabulary import check_pad_token
from .options.optimizers import check_given_optimizer
from .options.run import check_sampling
from .reference import CachedReference, Reference
from .reference.check import ReferenceCheck
from .reference.precompute import Filled
from .training.assembly import ModelInputs, assemble, check_models
from .training.best_metric import check_best_metric
from .training.callbacks import CheckReference, MoveReference, beside_progress_bar
from .training.collator import run_collator
from .training.datasets import DatasetPreparer, RunData, by_name, needs_of_models, prepare_evaluation, report_datasets
from .training.fill_cache import fill_cache
from .training.micro_batches import check_splits, keeps_ranks_in_step, step_loss
from .training.model_card import write_model_card
from .training.offloading import ActivationsOnHost
from .training.out_of_memory import MemoryAdvice, out_of_memory_advice
from .training.pair_trainer import PairTrainer
from .training.run_identity import model_identity
from .training.tokenizer import replace_pad_tokens_without_embedding, tokenizer_settings
from .training.unsaved_weights import load_unsaved_weights, unsaved_weights
from .types import PairBatch

logger = logging.get_logger(__name__)


class DPOTrainer(PairTrainer):
    """Trains a causal language model, which may see images too, on preference pairs with DPO or a loss of its family.

    Args:
        model: a hub id or local path, a `PreTrainedModel`, or a `PeftModel`.
        ref_model: the reference, as path or model. None: a frozen copy of `model`, or `model` without its adapter.
        args: the options; None takes every default.
        data_collator: None takes `DataCollatorForPreference` in the layout that the model allows. One of your own may
            return what other DPO libraries expect (see `PairBatch.from_completion_mask`).
        train_dataset: rows in any form that `data/rows/schema.py` reads, or tokenized ones: a dataset, a list of dicts, a pandas
            DataFrame, or a path (str or Path, as --dataset_name takes it); a list of these is a mixture.
        eval_dataset: likewise, or a dict of datasets that are evaluated one by one; `evaluate(dataset)` takes raw rows too.
        processing_class: the tokenizer, or the processor of a vision-language model; None loads the model's.
        compute_metrics: receives an `EvalPrediction` whose `predictions` is a dict of arrays [pairs]: `rewards/chosen`,
            `rewards/rejected`, `logps/chosen`, `logps/rejected`, `ref_logps/chosen`, `ref_logps/rejected`; `label_ids`
            are the example ids. Logits never exist as a whole.
        callbacks, optimizers: as in `transformers.Trainer`.
        quantization_config: for a model given by name.
        peft_config: trains a new adapter; the reference is then the model below it.
        model_init: makes the model, for hyperparameter search; instead of `model`.

    Raises:
        ValueError: for everything that cannot work, at construction: it names the option and the way out.
    """

    _tag_names = ("dpo_trainer", "dpo")
    trained_on = "preference pairs"
    """What the model card says of the data."""

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel | None = None,
        ref_model: str | PreTrainedModel | PeftModel | None = None,
        args: DPOConfig | None = None,
        data_collator: Callable | None = None,
        train_dataset: Rows | list[Rows] | None = None,
        eval_dataset: Rows | list[Rows] | dict[str, Rows] | None = None,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin | None = None,
        compute_metrics: Callable | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple = (None, None),
        quantization_config: Any = None,
        peft_config: PeftConfig | None = None,
        model_init: Callable | None = None,
    ):
        args = DPOConfig() if args is None else args
        if (model is None) == (model_init is None):
            raise ValueError("Give DPOTrainer either a model or a model_init that makes one.")
        if args.process_index > 0:  # the main process logs for all ranks
            logging.get_logger(__package__).setLevel(logging.ERROR)

        # 1. The model and its tokenizer.
        set_seed(args.seed)  # before an adapter is initialised
        self.inputs = ModelInputs(
            args=args,
            model=model if isinstance(model, str) else None,
            ref_model=ref_model,
            peft_config=peft_config,
            quantization_config=quantization_config,
        )
        start = self.inputs.policy(model if model is not None else made_by(model_init))
        check_models(args, start, ref_model)
        if processing_class is None:
            processing_class = load_processing_class(
                name_of(start if model is None else model), trust_remote_code=args.trust_remote_code
            )
        settings = tokenizer_settings(args, processing_class, start)
        self.pad_token_id, self.template_date = settings.pad_token_id, settings.template_date
        self.saves_processing_class = settings.can_be_saved

        # 2. What reads the model: scorer, reference, layout. `_assemble` and what follows read these two of self.
        self.args, self.processing_class = args, processing_class
        model = self._assemble(start)
        check_given_optimizer(optimizers[0], model)
        check_pad_token(self.pad_token_id, model, self.ref_model)
        if args.should_save:
            check_saving(model, processing_class if self.saves_processing_class else None, args.output_dir)

        # 3. The data: rows are checked against the model and its reference.
        self.data = self._make_data(model)
        self.data_reports = self.data.reports
        train_dataset, eval_dataset = self._prepare_datasets(train_dataset, eval_dataset)
        self.user_collator = data_collator

        moves = [MoveReference(self)] if args.sync_ref_model else []
        super().__init__(
            model=model,
            args=args,
            data_collator=self._collator(),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            compute_metrics=compute_metrics,
            callbacks=[*moves, CheckReference(self), *(callbacks or [])],
            optimizers=optimizers,
        )

        # 4. What needs the accelerator, which Trainer.__init__ makes.
        check_engine(self.accelerator)
        if compute_metrics is None:
            self._check_best_metric()
        self.model_init = model_init  # Trainer takes it only in place of a model
        # The loss that compute_loss returns is already a mean over the whole optimizer step.
        self.loss_is_scaled_for_ga = self.model_accepts_loss_kwargs = True
        self.in_step = keeps_ranks_in_step(args, shards_weights=shards_weights(args))
        self.start_counting()
        if hasattr(self.model, "add_model_tags"):
            self.model.add_model_tags(list(self._tag_names))
        keep_outputs_exact(self.accelerator)
        self.place_reference()

    @property
    def ref_model(self) -> nn.Module | None:
        """The second model in memory that is the reference, as it is placed; None where there is none."""
        return next((model for _, model in self.reference.own), None)

    # --- the parts, built once ---

    def use_reference(self, reference: Reference) -> None:
        """Another reference than the options make, before training. Its models are placed, and checked on the first batch."""
        self.reference, self.layout.references = reference, list(reference.own)
        self.reference_check = ReferenceCheck(reference, self.scorer, self.layout)
        self.place_reference()

    def place_reference(self) -> None:
        self.reference.place(lambda model: prepare_frozen(model, self.accelerator, self.args))

    def _assemble(self, model: nn.Module) -> nn.Module:
        self.original_config = OriginalConfig(base_model(model))
        self.loss_objective = Objective.from_config(self.args)
        built = assemble(model, self.inputs, self.loss_objective, self.pad_token_id, self.processing_class)
        self.scorer, self.reference, self.layout = built.scorer, built.reference, built.layout
        self.reference_check = ReferenceCheck(self.reference, self.scorer, self.layout)
        check_splits(self.args, self.loss_objective)
        self._models: dict[str, Any] = {}
        return built.model

    def _check_best_metric(self) -> None:
        router = self.loss_objective.router_weight > 0
        names = [name for name in self.metric_table if router or name != "aux_loss"]
        check_best_metric(self.args, names, self.eval_dataset, self.callback_handler.callbacks)

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """Each trial of a hyperparameter search has a new model, and perhaps other options: all parts are made anew."""
        model: Any = self._assemble(made_by(self.model_init, trial))
        self.model = model.to(self.args.device)
        self.data_collator = self._collator()
        self.place_reference()
        self.start_counting()
        self.prepare_run()
        return self.model

    def _make_data(self, model: nn.Module) -> DatasetPreparer:
        needs = needs_of_models(self.args, model, self.reference, self.loss_objective)
        return RunData(self.args, self.processing_class, needs, self.template_date)

    def _prepare_datasets(self, train: Any, evaluation: Any) -> tuple[Any, Any]:
        """The datasets as rows of token ids, reported and checked against the options."""
        if train is not None:
            train = self.data.prepare(train, "train")
            check_sampling(self.args, train)
        if evaluation is not None:
            evaluation = prepare_evaluation(self.data, evaluation)
        report_datasets(self.args, self.data.reports)
        self.data.check_budget(self.layout, {"train": train, **by_name(evaluation)})
        return train, evaluation

    def _collator(self) -> Callable:
        return run_collator(
            self.user_collator, self.args, self.layout, self.loss_objective, self.pad_token_id, self.reference.keyed
        )

    # --- the data, as Trainer asks for it ---

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        replace_pad_tokens_without_embedding(self.model, self.pad_token_id)
        return super()._prepare_for_training(*args, **kwargs)

    def get_eval_dataloader(self, eval_dataset: Any = None):
        new = is_rows(eval_dataset) and eval_dataset is not self.eval_dataset
        if new:
            eval_dataset = self.data.prepare(eval_dataset, "eval")
            report_datasets(self.args, self.data.reports)
        if new or not self.is_in_train:  # the cache has the datasets of the run before training begins
            rows = self.eval_dataset if eval_dataset is None else eval_dataset
            fill_cache(self, {"eval": self.eval_dataset[rows] if isinstance(rows, str) else rows})
        return super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset: Any):
        prepared = self.data.prepare(test_dataset, "test")
        fill_cache(self, {"test": prepared})
        return super().get_test_dataloader(prepared)

    # --- the step ---

    @contextmanager
    def around_micro_batch(self, inputs: dict[str, Any]) -> Iterator[None]:
        """The attention of flat rows stays in place, and activations stay on the host, until backward is over."""
        offloads, tokens = self.args.activation_offloading, inputs["input_ids"].numel()
        activations: Any = ActivationsOnHost(self.model, tokens=tokens) if offloads else nullcontext()
        with out_of_memory_advice(inputs, self._memory_advice), self.scorer.step(), activations:
            yield

    def _memory_advice(self) -> MemoryAdvice:
        return MemoryAdvice.of(self.args, self.model, self.reference, self.loss_objective)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ):
        """One line per stage; the comment is the module to read next."""
        batch = self.layout.settle(model, PairBatch.from_inputs(inputs))  # types.py, scoring/layout.py
        if model.training:
            self.reference_check.begin(model, batch, untrained=not self.state.global_step)  # reference/check.py
        policy = self.scorer(model, batch)  # scoring/logprobs.py
        reference = self.reference.logps(model, batch)  # reference/
        losses = self.loss_objective(  # losses/  [N]
            policy,
            reference,
            training=model.training,
            weight=batch.weight,
            margin=batch.margin,
            pairs_by_rank=batch.pairs_by_rank,
        ).total
        scored = MetricInputs(batch=batch, policy=policy, reference=reference, losses=losses, beta=self.args.beta)
        self.metrics["train" if model.training else "eval"].add(scored)  # metrics.py
        loss = step_loss(losses, batch.weight, num_items_in_batch, self.accelerator.num_processes)
        return (loss, per_pair(scored)) if return_outputs else loss

    # --- the reference, ahead of training ---

    def precompute_reference(self) -> list[Filled]:
        """Fill the cache of `--precompute_ref_log_probs` for the data of this run; `train` does the same first."""
        if not isinstance(self.reference, CachedReference):
            raise ValueError("There is no cache to fill: set --precompute_ref_log_probs true.")
        return fill_cache(self, {"train": self.train_dataset, **by_name(self.eval_dataset)})

    # --- checkpoints and cards ---

    def train(self, *args, **kwargs):
        """As `DurableTrainer.train`."""
        self.metrics.restart_clock()
        with beside_progress_bar(self.args):
            output = super().train(*args, **kwargs)
        if any(report.streaming for report in self.data.reports.values()):
            report_datasets(self.args, self.data.reports)  # what was read
        return output

    def prepare_run(self) -> None:
        """Fix what this run is, and fill the cache of the reference, whose models are not needed after that."""
        if not self._models:  # a second train() goes on with a reference that has moved: what it was counts
            self._models = model_identity(self.model, self.reference, self.inputs.precision)
        super().prepare_run()
        if self.reference.keyed:
            self.precompute_reference()
            self.reference.release()

    def run_identity(self) -> dict[str, Any]:
        return {
            **self._models,
            "loss": self.loss_objective.description(),
            "data": None if self.train_dataset is None else dataset_digest(self.train_dataset),
            "date": None if self.template_date is None else {"--template_date": self.template_date},
        }

    def run_state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        state, tensors = super().run_state()
        return state, tensors | self.reference.state() | unsaved_weights(self.model)

    def load_run_state(self, state: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        super().load_run_state(state, tensors)
        load_unsaved_weights(self.model, tensors)
        self.reference.load_state(tensors)

    def forward_again(self, batch: PairBatch) -> Tensor:
        model = self.model_wrapped
        in_evaluation = evaluation(self.model, self.accelerator)
        with torch.no_grad(), evaluation_mode(model), in_evaluation, self.compute_loss_context_manager():
            scored = self.scorer(model, batch)
        return torch.cat([scored.chosen, scored.rejected])

    def saved_as(self) -> AbstractContextManager[None]:
        return self.original_config.restored()

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        super().save_model(output_dir, _internal_call)
        if self.args.should_save:
            write_model_card(self, Path(output_dir or self.args.output_dir))

    def create_model_card(self, **fields: Any) -> None:
        """Called by `push_to_hub` with what the user says there: our card, with the loss, the data and the metrics."""
        if self.is_world_process_zero():
            write_model_card(self, Path(self.args.output_dir), **fields)
