"""DPOTrainer: builds the parts of a run once, and hands each batch from one to the next. No arithmetic here.

rows -> data/ -> PairBatch -> scoring/ (policy), reference/ -> losses/ -> metrics.py
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import recursively_apply
from datasets import IterableDataset
from peft import PeftConfig, PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin, TrainerCallback, set_seed
from transformers.trainer_utils import EvalLoopOutput, has_length
from transformers.utils import logging

from .checkpointing import GivenConfig
from .checkpointing.durable import DurableTrainer
from .checkpointing.save_checks import check_saving
from .config import DPOConfig
from .data import FEATURES, FilledStream, Needs, RepeatedStream
from .data.batches.padding_rows import mask_padding_rows, refuse_empty_rounds
from .data.content import dataset_digest
from .data.files.dataset_inputs import Rows, is_rows
from .data.files.local_files import AnyDataset
from .data.images.source import IMAGES
from .distributed.engine_checks import check_engine
from .distributed.engines import evaluation, keep_outputs_exact, prepare_frozen, shards_weights
from .losses import Objective
from .metrics import METRICS, StepParts, per_pair, with_losses
from .models.load import load_processing_class
from .models.unwrap import base_model
from .models.vocabulary import check_pad_token
from .options.optimizers import check_given_optimizer
from .options.run import check_sampling
from .reference import CachedReference, Reference
from .reference.check import ReferenceCheck
from .reference.precompute import Filled
from .training.assembly import Given, assemble, check_models
from .training.best_metric import check_best_metric
from .training.callbacks import CheckReference, MoveReference, beside_progress_bar
from .training.collator import check_budget, run_collator
from .training.datasets import RunData, balanced_sampler, needs_of_models
from .training.fill_cache import fill_cache
from .training.micro_batches import (
    check_splits,
    even_parts,
    in_row_order,
    joined,
    keeps_ranks_in_step,
    note_pairs,
    step_loss,
    step_through,
    weighted_mean,
)
from .training.model_card import write_model_card
from .training.offloading import ActivationsOnHost
from .training.out_of_memory import MemoryAdvice, out_of_memory_advice
from .training.run_identity import model_identity
from .training.run_metrics import RunMetrics
from .training.tokenizer import replace_pad_tokens_without_embedding, tokenizer_settings
from .training.unsaved_weights import load_unsaved_weights, unsaved_weights
from .types import PairBatch, micro_batches, pair_weight, sent

logger = logging.get_logger(__name__)


class DPOTrainer(DurableTrainer):
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
    _metrics = METRICS
    compute_metrics: Callable | None
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
        if args.process_index > 0:  # the main process speaks for all ranks
            logging.get_logger(__package__).setLevel(logging.ERROR)
        set_seed(args.seed)  # before an adapter is initialised
        self.given = Given(
            args=args,
            model=model if isinstance(model, str) else None,
            ref_model=ref_model,
            peft_config=peft_config,
            quantization_config=quantization_config,
        )
        self.model_init = model_init
        start = self.given.policy(model if model is not None else super().call_model_init())
        check_models(args, start, ref_model)
        if processing_class is None:
            processing_class = load_processing_class(
                model if isinstance(model, str) else base_model(start).config._name_or_path,
                trust_remote_code=args.trust_remote_code,
            )
        # Read before Trainer.__init__ sets them as well.
        self.args, self.processing_class = args, processing_class
        self.tokenizer_settings = tokenizer_settings(args, processing_class, start)
        self.pad_token_id = self.tokenizer_settings.pad_token_id
        self.template_date = self.tokenizer_settings.template_date
        model = self._assemble(start)
        if optimizers[0] is not None:
            check_given_optimizer(optimizers[0], model)
        check_pad_token(self.pad_token_id, model, self.ref_model)
        if args.should_save:
            check_saving(model, processing_class if self.tokenizer_settings.can_be_saved else None, args.output_dir)
        self.data = self._make_data(model)
        self.data_reports = self.data.reports
        train_dataset, eval_dataset = self._prepare_datasets(train_dataset, eval_dataset)
        self.given_collator = data_collator

        if isinstance(model, PeftModel) and args.ddp_find_unused_parameters is None:
            # As transformers does for models that are its own: DDP's search and reentrant checkpointing exclude each other.
            args.ddp_find_unused_parameters = not args.gradient_checkpointing

        super().__init__(
            model=model,
            args=args,
            data_collator=self._collator(),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            compute_metrics=compute_metrics,
            callbacks=[
                *([MoveReference(self)] if args.sync_ref_model else []),
                CheckReference(self),
                *(callbacks or []),
            ],
            optimizers=optimizers,
        )
        check_engine(self.accelerator)
        if compute_metrics is None:
            self._check_best_metric()
        self.model_init = model_init
        # The loss that compute_loss returns is already a mean over the whole optimizer step.
        self.loss_is_scaled_for_ga = self.model_accepts_loss_kwargs = True
        self.in_step = keeps_ranks_in_step(args, shards_weights=shards_weights(args))
        self._start_counting()
        if hasattr(self.model, "add_model_tags"):
            self.model.add_model_tags(list(self._tag_names))
        keep_outputs_exact(self.accelerator)
        self._place_reference()

    @property
    def ref_model(self) -> nn.Module | None:
        """The second model in memory that is the reference, as it is placed; None where there is none."""
        return next((model for _, model in self.reference.own), None)

    # --- the parts, built once ---

    def use_reference(self, reference: Reference) -> None:
        """Another reference than the options make, before training. Its models are placed, and checked on the first batch."""
        self.reference, self.layout.references = reference, list(reference.own)
        self.reference_check = ReferenceCheck(reference, self.scorer, self.layout)
        self._place_reference()

    def _place_reference(self) -> None:
        self.reference.place(lambda model: prepare_frozen(model, self.accelerator, self.args))

    def _assemble(self, model: nn.Module) -> nn.Module:
        self.given_config = GivenConfig(base_model(model))
        self.objective = Objective.from_config(self.args)
        parts = assemble(model, self.given, self.objective, self.pad_token_id, self.processing_class)
        self.scorer, self.reference, self.layout = parts.scorer, parts.reference, parts.layout
        self.reference_check = ReferenceCheck(self.reference, self.scorer, self.layout)
        check_splits(self.args, self.objective)
        self._models: dict[str, Any] = {}
        return parts.model

    def _check_best_metric(self) -> None:
        router = self.objective.router_weight > 0
        names = [name for name in self._metrics if router or name != "aux_loss"]
        check_best_metric(self.args, names, self.eval_dataset, self.callback_handler.callbacks)

    def _start_counting(self) -> None:
        self.metrics = RunMetrics(
            self._metrics,
            device=self.args.device,
            sum_over_ranks=self.sum_over_ranks,
            watch=self.watch.watch,
            has_router=self.objective.router_weight > 0,
            beta=self.args.beta,
            has_reference=self.objective.needs_reference,
        )

    @property
    def num_tokens(self) -> int:
        """Tokens computed since the start of the run, up to its last log line, over all ranks."""
        return self.metrics.num_tokens

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """Each trial of a hyperparameter search has a new model, and perhaps other options: all parts are made anew."""
        model: Any = self._assemble(super().call_model_init(trial))
        self.model = model.to(self.args.device)
        self.data_collator = self._collator()
        self._place_reference()
        self._start_counting()
        self.prepare_run()
        return self.model

    def _make_data(self, model: nn.Module) -> Any:
        """Return the object that prepares the rows of the datasets of this run (training/datasets.py)."""
        return RunData(self.args, self.processing_class, self._needs(model), self.template_date)

    def _prepare_datasets(self, train: Any, evaluation: Any) -> tuple[Any, Any]:
        """The datasets as rows of token ids, reported and checked against the options."""
        if train is not None:
            train = self.data.prepare(train, "train")
            check_sampling(self.args, train)
        if evaluation is not None:
            evaluation = self.data.prepare_evaluation(evaluation)
        self.data.report()
        named = evaluation if isinstance(evaluation, dict) else {"eval": evaluation}
        self._check_budget({"train": train, **named})
        return train, evaluation

    def _check_budget(self, datasets: dict[str, Any]) -> None:
        check_budget(self.args, self.layout, datasets)

    def _collator(self) -> Callable:
        return run_collator(
            self.given_collator,
            self.args,
            layout=self.layout,
            objective=self.objective,
            pad_token_id=self.pad_token_id,
            keyed=self.reference.keyed,
        )

    def _needs(self, model: nn.Module) -> Needs:
        return needs_of_models(
            model,
            [own for _, own in self.reference.own],
            unusable_margin=self.objective.unusable_margin if self.objective.needs_margin else None,
            multiple=self.args.pad_to_multiple_of,
        )

    # --- the data, as Trainer asks for it ---

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        replace_pad_tokens_without_embedding(self.model, self.pad_token_id)
        return super()._prepare_for_training(*args, **kwargs)

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = [*FEATURES, *IMAGES]

    def get_eval_dataloader(self, eval_dataset: Any = None):
        new = is_rows(eval_dataset) and eval_dataset is not self.eval_dataset
        if new:
            eval_dataset = self.data.prepare(eval_dataset, "eval")
            self.data.report()
        if new or not self.is_in_train:  # while it trains, what it began with is there
            self._fill_cache({"eval": self._named_evaluation(eval_dataset)})
        return super().get_eval_dataloader(eval_dataset)

    def _named_evaluation(self, dataset: Any) -> AnyDataset:
        dataset = self.eval_dataset if dataset is None else dataset
        return self.eval_dataset[dataset] if isinstance(dataset, str) else dataset

    def get_test_dataloader(self, test_dataset: Any):
        prepared = self.data.prepare(test_dataset, "test")
        self._fill_cache({"test": prepared})
        return super().get_test_dataloader(prepared)

    def _get_dataloader(
        self, dataset: Any, description: str, batch_size: int, *args, is_training: bool = False, **kwargs
    ):
        if isinstance(dataset, IterableDataset):
            every_rank = batch_size * self.accelerator.num_processes
            dataset = RepeatedStream(dataset) if is_training else FilledStream(dataset, every_rank)
        elif self.args.dataloader_drop_last:
            refuse_empty_rounds(len(dataset), batch_size, self.accelerator)
        return super()._get_dataloader(dataset, description, batch_size, *args, is_training=is_training, **kwargs)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        rows = self.train_dataset if train_dataset is None else train_dataset
        if self.args.train_sampling_strategy == "batch_rebalance" and has_length(rows):
            return balanced_sampler(rows, self.args, self._train_batch_size, self.row_order)
        return super()._get_train_sampler(train_dataset)

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Tensor:
        """The weight of all pairs of the optimizer step, on all ranks: what the sum of their losses is divided by."""
        if batch_samples:
            self._mask_padding_rows(batch_samples[-1], self._train_batch_size)
        parts = [part for batch in batch_samples for part in micro_batches(batch)]
        weight = sum((pair_weight(part).sum() for part in parts), torch.zeros((), device=device))
        if self.in_step:
            return even_parts(batch_samples, weight, self.accelerator)
        if self.objective.gathers_pairs and self.args.world_size > 1:
            return note_pairs(batch_samples, weight, self.accelerator)
        return self.sum_over_ranks(weight)

    def _mask_padding_rows(self, inputs: dict[str, Any], rows_per_rank: int) -> list[Tensor]:
        """[N] of each part, see `mask_padding_rows`."""
        how: Any = {"rows_per_rank": rows_per_rank, "drop_last": self.args.dataloader_drop_last}
        return [mask_padding_rows(part, self.accelerator, **how) for part in micro_batches(inputs)]

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        return super().floating_point_ops(joined(inputs))

    def _track_num_input_tokens(self, inputs: dict[str, Any]) -> None:
        super()._track_num_input_tokens(joined(inputs))

    # --- the step ---

    def _prepare_input(self, data: Any) -> Any:
        """Moved to the device, and no more: for DeepSpeed, `Trainer` would round weights and margins to its dtype."""
        return sent(data, self.args.device)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        step = partial(self._step_of_part, model, num_items_in_batch)
        return step_through(step, inputs, self.accelerator, model)  # training/micro_batches.py

    def _step_of_part(self, model: nn.Module, num_items_in_batch: Any, inputs: dict[str, Any]) -> Tensor:
        # The attention of flat rows stays in place, and activations stay on the host, until backward is over.
        with out_of_memory_advice(inputs, self._memory_advice), self.scorer.step(), self._activations(inputs):
            return super().training_step(model, inputs, num_items_in_batch)

    def _activations(self, inputs: dict[str, Any]) -> AbstractContextManager[Any]:
        if not self.args.activation_offloading:
            return nullcontext()
        return ActivationsOnHost(self.model, tokens=inputs["input_ids"].numel())

    def _memory_advice(self) -> MemoryAdvice:
        return MemoryAdvice.of(
            self.args,
            second_model=bool(self.reference.own) and not self.reference.moving,
            adapter=isinstance(self.model, PeftModel),
            splits=self.objective.separable,
        )

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ):
        """One line per stage; the comment is the module to read next."""
        batch = self.layout.settle(model, PairBatch.from_inputs(inputs))  # types.py, scoring/layout.py
        if model.training:
            self.reference_check.begin(model, batch, untrained=not self.state.global_step)  # reference/check.py
        policy = self.scorer(model, batch)  # scoring/logprobs.py
        reference = self.reference.logps(model, batch)  # reference/
        losses = self.objective(  # losses/  [N]
            policy,
            reference,
            training=model.training,
            weight=batch.weight,
            margin=batch.margin,
            pairs_by_rank=batch.pairs_by_rank,
        ).total
        parts = StepParts(batch=batch, policy=policy, reference=reference, losses=losses, beta=self.args.beta)
        self.metrics["train" if model.training else "eval"].add(parts)  # metrics.py
        loss = step_loss(losses, batch.weight, num_items_in_batch, self.accelerator.num_processes)
        return (loss, per_pair(parts)) if return_outputs else loss

    def prediction_step(self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys=None):
        """Pairs of fillers are left out here: `evaluation_loop` gathers what is returned, however many a rank has."""
        inputs = self._prepare_inputs(inputs)
        real = self._mask_padding_rows(inputs, self.args.eval_batch_size)
        own = micro_batches(inputs)[:]  # without what may be added here, to be computed for the other ranks
        if self.in_step:
            even_parts([inputs], torch.zeros((), device=self.args.device), self.accelerator)
        with torch.no_grad(), self.compute_loss_context_manager():
            scored = [self.compute_loss(model, part, return_outputs=True) for part in micro_batches(inputs)]
        losses, outputs = zip(*scored[: len(own)], strict=True)
        loss = weighted_mean(losses, own)
        if prediction_loss_only:
            return loss, None, None
        pairs = in_row_order(outputs, own, real)
        if "loss" not in self.args.include_for_metrics:
            del pairs["losses"]
        return loss, pairs, pairs.pop("example_ids")

    # --- numbers ---

    def evaluation_loop(
        self, dataloader, description, *args, metric_key_prefix: str = "eval", **kwargs
    ) -> EvalLoopOutput:
        began = time.perf_counter()
        self.metrics["eval"].clear()
        self.gather_function = self._gather_pairs  # Trainer puts its own back after each loop
        # Data loaders draw a seed: a run that is evaluated more often must not draw other dropout.
        no_other_dropout = torch.random.fork_rng(devices=[])
        with no_other_dropout, evaluation(self.model, self.accelerator), self._losses_by_pair():
            output = super().evaluation_loop(
                dataloader, description, *args, metric_key_prefix=metric_key_prefix, **kwargs
            )
        means, _ = self.metrics.reduce("eval")
        means = self._with_more(means, "eval")
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in means.items()})
        self.metrics.leave_out(time.perf_counter() - began)
        return output

    @contextmanager
    def _losses_by_pair(self) -> Iterator[None]:
        """`EvalPrediction.losses` has one loss per pair, as its predictions have: transformers would repeat means of batches."""
        given = self.compute_metrics
        if given is not None and "loss" in self.args.include_for_metrics:
            self.compute_metrics = partial(with_losses, given)
        try:
            yield
        finally:
            self.compute_metrics = given

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """A line of training has the means over all pairs since the last one. So has the line that ends the run, for the steps
        after the last line; where the run was told to stop, the run that resumes it logs them.
        """
        of_training, ends_run = "loss" in logs, "train_runtime" in logs
        ours = self._means_since_last_line() if of_training or (ends_run and not self.stopped_by_signal) else {}
        if not of_training and not ours.get("tokens_per_second"):
            super().log(logs, start_time)
            return
        # The loss is a mean over pairs, and there is none where no step was made.
        line = {name: value for name, value in (logs | ours).items() if name != "loss" or "loss" in ours}
        super().log(line, start_time)
        logs |= {name: value for name, value in line.items() if name not in ours}

    def _means_since_last_line(self) -> dict[str, float]:
        """Every rank must call."""
        means, tokens = self.metrics.reduce("train")
        ours = self.metrics.line(self._with_more(means, "train"), tokens, self.state.global_step)
        return ours | ({"skipped_steps": self.skipped_steps} if self.skipped_steps else {})

    def _with_more(self, means: dict[str, float], split: str) -> dict[str, float]:
        """For a subclass: the means of a log line, and what else it shows. Called on all ranks."""
        return means

    def _gather_pairs(self, values: Any) -> Any:
        """Tensors [pairs, ...] of all ranks. Rows may have several pairs, so that ranks differ in how many they hold, and
        accelerate's `gather_for_metrics`, which wants equal numbers and cuts the last batch by rows, would lose some."""
        return recursively_apply(lambda tensor: self.objective.ranks.gather(tensor)[0], values)

    # --- the reference, ahead of training ---

    def precompute_reference(self) -> list[Filled]:
        """Fill the cache of `--precompute_ref_log_probs` for the data of this run; `train` does the same first."""
        if not isinstance(self.reference, CachedReference):
            raise ValueError("There is no cache to fill: set --precompute_ref_log_probs true.")
        named = self.eval_dataset if isinstance(self.eval_dataset, dict) else {"eval": self.eval_dataset}
        given = {"train": self.train_dataset, **named}
        return self._fill_cache({name: rows for name, rows in given.items() if rows is not None})

    def _fill_cache(self, datasets: dict[str, AnyDataset]) -> list[Filled]:
        """Look every completion up, and compute what is missing, where there is a cache."""
        if not isinstance(self.reference, CachedReference):
            return []
        filled = fill_cache(
            self.reference,
            self.model,
            datasets,
            args=self.args,
            layout=self.layout,
            pad_token_id=self.pad_token_id,
            accelerator=self.accelerator,
            place=self._place_reference,
        )
        self.data.count_streams_anew()
        for each in filled:
            logger.warning(str(each))
        return filled

    # --- checkpoints and cards ---

    def train(self, *args, **kwargs):
        """See `DurableTrainer.train`."""
        self.metrics.restart_clock()
        with beside_progress_bar(self.args):
            output = super().train(*args, **kwargs)
        if self.data.has_stream():
            self.data.report()  # what was read
        return output

    def prepare_run(self) -> None:
        """Fix what this run is, and fill the cache of the reference, whose models are not needed after that."""
        if not self._models:  # a second train() goes on with a reference that has moved: what it was counts
            self._models = model_identity(self.model, self.reference, self.given.precision)
        super().prepare_run()
        if self.reference.keyed:
            self.precompute_reference()
            self.reference.release()

    def run_identity(self) -> dict[str, Any]:
        return {
            **self._models,
            "loss": self.objective.description(),
            "data": None if self.train_dataset is None else dataset_digest(self.train_dataset),
            "date": None if self.template_date is None else {"--template_date": self.template_date},
        }

    def run_state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        state = self.metrics.state_dict() | {"objective": self.objective.state_dict()}
        return state, self.reference.state() | unsaved_weights(self.model)

    def load_run_state(self, state: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        self.metrics.load_state_dict(state, main=self.is_world_process_zero())
        self.objective.load_state_dict(state["objective"])
        load_unsaved_weights(self.model, tensors)
        self.reference.load_state(tensors)

    def snapshot_counters(self) -> Any:
        return self.metrics["train"].mark(), self.objective.shift.mark()

    def clear_counters(self) -> None:
        self.metrics["train"].clear()

    def restore_counters(self, snapshot: Any) -> None:
        table, shift = snapshot
        self.metrics["train"].back_to(table)
        self.objective.shift.back_to(shift)

    def forward_again(self, batch: PairBatch) -> Tensor:
        model = self.model_wrapped
        trains = model.training
        model.eval()  # no random numbers
        with torch.no_grad(), evaluation(self.model, self.accelerator), self.compute_loss_context_manager():
            scored = self.scorer(model, batch)
        model.train(trains)
        return torch.cat([scored.chosen, scored.rejected])

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Without a tokenizer that cannot be written down: a run shall not end at its first checkpoint for it."""
        own = self.processing_class
        self.processing_class = own if self.tokenizer_settings.can_be_saved else None
        try:
            super()._save(output_dir, state_dict)
        finally:
            self.processing_class = own

    def saved_as(self) -> AbstractContextManager[None]:
        return self.given_config.restored()

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        super().save_model(output_dir, _internal_call)
        if self.args.should_save:
            write_model_card(self, Path(output_dir or self.args.output_dir))

    def create_model_card(self, **fields: Any) -> None:
        """Called by `push_to_hub` with what the user says there: our card, with the loss, the data and the metrics."""
        if self.is_world_process_zero():
            write_model_card(self, Path(self.args.output_dir), **fields)
