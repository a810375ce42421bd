"""PairTrainer: steps and evaluations over weighted pairs in micro-batches. Every number is a mean over all pairs of all ranks.

Knows no model, no loss and no reference: those are in trainer.py.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
from accelerate.utils import recursively_apply
from datasets import IterableDataset
from torch import Tensor, nn
from transformers.trainer_utils import EvalLoopOutput, has_length

from ..checkpointing.durable import DurableTrainer
from ..data import FEATURES, FilledStream, RepeatedStream
from ..data.batches.padding_rows import mask_padding_rows, refuse_empty_rounds
from ..data.images.source import IMAGES
from ..distributed.engines import evaluation
from ..losses import Objective
from ..metrics import METRICS, with_losses
from ..types import micro_batches, pair_weight, sent
from .datasets import balanced_sampler
from .micro_batches import (
    even_micro_batches,
    in_row_order,
    joined_tokens,
    note_pairs,
    step_through,
    weighted_mean,
)
from .run_metrics import RunMetrics


class PairTrainer(DurableTrainer):
    """`DurableTrainer` for batches of preference pairs. A subclass computes the loss of one micro-batch (`compute_loss`)."""

    metric_table = METRICS
    loss_objective: Objective
    compute_metrics: Callable | None
    in_step: bool
    """Whether all ranks must make as many forward passes (`keeps_ranks_in_step`)."""

    # --- for subclasses ---

    def around_micro_batch(self, inputs: dict[str, Any]) -> AbstractContextManager[Any]:
        """What encloses forward and backward of one micro-batch."""
        raise NotImplementedError

    def with_more_metrics(self, means: dict[str, float], split: str) -> dict[str, float]:
        """The means of a log line, and what else it shows. Called on all ranks. `split`: train or eval."""
        return means

    # --- batches ---

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = [*FEATURES, *IMAGES]

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
        weights = [pair_weight(each).sum() for batch in batch_samples for each in micro_batches(batch)]
        weight = sum(weights, torch.zeros((), device=device))
        if self.in_step:
            return even_micro_batches(batch_samples, weight, self.accelerator)
        if self.loss_objective.gathers_pairs and self.args.world_size > 1:
            return note_pairs(batch_samples, weight, self.accelerator)
        return self.sum_over_ranks(weight)

    def _mask_padding_rows(self, inputs: dict[str, Any], rows_per_rank: int) -> list[Tensor]:
        """[N] of each micro-batch, see `mask_padding_rows`."""
        options: Any = {"rows_per_rank": rows_per_rank, "drop_last": self.args.dataloader_drop_last}
        return [mask_padding_rows(each, self.accelerator, **options) for each in micro_batches(inputs)]

    def _prepare_input(self, data: Any) -> Any:
        """Move tensors to the device, and leave their types: for DeepSpeed, `Trainer` would round weights and margins."""
        return sent(data, self.args.device)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        return super().floating_point_ops(joined_tokens(inputs))

    def _track_num_input_tokens(self, inputs: dict[str, Any]) -> None:
        super()._track_num_input_tokens(joined_tokens(inputs))

    # --- steps ---

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        def step(micro_batch: dict[str, Any]) -> Tensor:
            with self.around_micro_batch(micro_batch):
                return super(PairTrainer, self).training_step(model, micro_batch, num_items_in_batch)

        return step_through(step, inputs, self.accelerator, model)  # training/micro_batches.py

    def prediction_step(self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys=None):
        """Leaves out pairs of padding rows: `evaluation_loop` gathers what is returned, however many pairs a rank has."""
        inputs = self._prepare_inputs(inputs)
        real = self._mask_padding_rows(inputs, self.args.eval_batch_size)
        of_this_rank = micro_batches(inputs)[:]  # before repeats are added, which are computed for the other ranks
        if self.in_step:
            even_micro_batches([inputs], torch.zeros((), device=self.args.device), self.accelerator)
        with torch.no_grad(), self.compute_loss_context_manager():
            scored = [self.compute_loss(model, each, return_outputs=True) for each in micro_batches(inputs)]
        losses, outputs = zip(*scored[: len(of_this_rank)], strict=True)
        loss = weighted_mean(losses, of_this_rank)
        if prediction_loss_only:
            return loss, None, None
        pairs = in_row_order(outputs, of_this_rank, real)
        if "loss" not in self.args.include_for_metrics:
            del pairs["losses"]
        return loss, pairs, pairs.pop("example_ids")

    # --- numbers ---

    def start_counting(self) -> None:
        """Before training, and before each trial of a search."""
        self.metrics = RunMetrics(
            self.metric_table,
            device=self.args.device,
            sum_over_ranks=self.sum_over_ranks,
            watch=self.watch.watch,
            has_router=self.loss_objective.router_weight > 0,
            beta=self.args.beta,
            has_reference=self.loss_objective.needs_reference,
        )

    @property
    def num_tokens(self) -> int:
        """Tokens computed since the start of the run, up to its last log line, over all ranks."""
        return self.metrics.num_tokens

    def evaluation_loop(
        self, dataloader, description, *args, metric_key_prefix: str = "eval", **kwargs
    ) -> EvalLoopOutput:
        started = time.perf_counter()
        self.metrics["eval"].clear()
        self.gather_function = self._gather_pairs  # Trainer puts its own back after each loop
        # Data loaders draw a seed: a run that is evaluated more often must not draw other dropout.
        same_dropout = torch.random.fork_rng(devices=[])
        with same_dropout, evaluation(self.model, self.accelerator), self._losses_by_pair():
            output = super().evaluation_loop(
                dataloader, description, *args, metric_key_prefix=metric_key_prefix, **kwargs
            )
        means, _ = self.metrics.reduce("eval")
        means = self.with_more_metrics(means, "eval")
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in means.items()})
        self.metrics.leave_out(time.perf_counter() - started)
        return output

    @contextmanager
    def _losses_by_pair(self) -> Iterator[None]:
        """`EvalPrediction.losses` has one loss per pair, as its predictions have: transformers would repeat means of batches."""
        of_user = self.compute_metrics
        if of_user is not None and "loss" in self.args.include_for_metrics:
            self.compute_metrics = partial(with_losses, of_user)
        try:
            yield
        finally:
            self.compute_metrics = of_user

    def _gather_pairs(self, values: Any) -> Any:
        """Tensors [pairs, ...] of all ranks.

        Not accelerate's `gather_for_metrics`, which needs equal numbers on all ranks and shortens the last batch by rows: a
        row may have several pairs.
        """
        return recursively_apply(lambda tensor: self.loss_objective.ranks.gather(tensor)[0], values)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """A line of training has the means over all pairs since the last line. So has the line that ends the run. A run that
        was stopped leaves them to the run that resumes it.
        """
        of_training, ends_run = "loss" in logs, "train_runtime" in logs
        ours = self._means_since_last_line() if of_training or (ends_run and not self.stopped_by_signal) else {}
        if not of_training and not ours.get("tokens_per_second"):
            super().log(logs, start_time)
            return
        # The loss is a mean over pairs: there is none where no step was made.
        line = {name: value for name, value in (logs | ours).items() if name != "loss" or "loss" in ours}
        super().log(line, start_time)
        logs |= {name: value for name, value in line.items() if name not in ours}

    def _means_since_last_line(self) -> dict[str, float]:
        """Every rank must call."""
        means, tokens = self.metrics.reduce("train")
        ours = self.metrics.line(self.with_more_metrics(means, "train"), tokens, self.state.global_step)
        return ours | ({"skipped_steps": self.skipped_steps} if self.skipped_steps else {})

    # --- checkpoints, and steps that are not made ---

    def run_state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        state, tensors = super().run_state()
        return state | self.metrics.state_dict() | {"objective": self.loss_objective.state_dict()}, tensors

    def load_run_state(self, state: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        super().load_run_state(state, tensors)
        self.metrics.load_state_dict(state, main=self.is_world_process_zero())
        self.loss_objective.load_state_dict(state["objective"])

    def snapshot_counters(self) -> Any:
        return self.metrics["train"].mark(), self.loss_objective.shift.mark()

    def restore_counters(self, snapshot: Any) -> None:
        sums, shift = snapshot
        self.metrics["train"].back_to(sums)
        self.loss_objective.shift.back_to(shift)

    def clear_counters(self) -> None:
        self.metrics["train"].clear()
