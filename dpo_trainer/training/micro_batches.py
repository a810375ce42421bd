"""A device batch as micro-batches within a budget of tokens: each has its own forward and backward pass.

The collator splits the batch (data/batches/collate.py). The gradients of the micro-batches add up to those of the batch. Where
the engine allows it, ranks exchange gradients only with the last micro-batch, where DeepSpeed makes its step.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn
from transformers.utils import logging

from ..config import DPOConfig
from ..losses import Objective
from ..types import MICRO_BATCHES, micro_batches, pair_row, pair_weight

logger = logging.get_logger(__name__)

STAGE_OF_GRADIENTS = 2
"""The first ZeRO stage whose ranks each keep a shard of the gradients, and so exchange them in every backward pass."""


PACK_TOKENS = 512
"""Default micro-batch tokens on a CPU, unless a row is longer: faster than the full batch, about as fast as micro-batches of any size
between, and of less memory (benchmarks/NOTES.md)."""


def default_micro_batch_tokens(args: DPOConfig, objective: Objective) -> int | None:
    """The default size of a micro-batch. None, the full batch: on accelerators, on several ranks, and where the micro-batches would
    not add up to the loss of the batch."""
    alone = args.device.type == "cpu" and args.world_size == 1
    adds_up = objective.separable and not objective.router_weight and "inputs" not in args.include_for_metrics
    return PACK_TOKENS if alone and adds_up and args.max_tokens_per_micro_batch is None else None


def check_splits(args: DPOConfig, objective: Objective) -> None:
    """Refuse a budget with losses that have another value on a micro-batch."""
    if args.max_tokens_per_micro_batch is None:
        return
    if not objective.separable:
        raise ValueError(
            f"--max_tokens_per_micro_batch {args.max_tokens_per_micro_batch} splits a batch, and {objective.couples} looks at "
            "all pairs of a batch at once: leave the budget out, with a smaller --per_device_train_batch_size or "
            "--gradient_checkpointing true for memory; or choose losses of single pairs."
        )
    if objective.router_weight:
        logger.warning(
            "The load-balancing loss is that of the tokens of each micro-batch, so that --max_tokens_per_micro_batch "
            "changes it, as gradient accumulation does. All other terms stay what they are."
        )


def keeps_ranks_in_step(args: DPOConfig, *, shards_weights: bool) -> bool:
    """Whether all ranks must make the same number of passes: each pass gathers weights, or exchanges gradients. ZeRO-2 exchanges
    them because each rank keeps a shard of them; so does `sync_each_batch`."""
    zero = args.deepspeed_plugin
    exchanges = (args.accelerator_config.gradient_accumulation_kwargs or {}).get("sync_each_batch", False)
    exchanges = exchanges or (zero is not None and zero.zero_stage >= STAGE_OF_GRADIENTS)
    return args.max_tokens_per_micro_batch is not None and args.world_size > 1 and (shards_weights or exchanges)


def even_micro_batches(batches: Sequence[dict[str, Any]], weight: Tensor, accelerator: Accelerator) -> Tensor:
    """Give the batches of a step, in place, as many micro-batches as the rank that has most. One collective, one wait.

    Adds repeats of weight 0, which are computed and do not count. Returns the sum of `weight` over ranks.
    """
    total, table = _numbers_of_ranks(weight, [len(batch[MICRO_BATCHES]) for batch in batches], accelerator)
    for batch, numbers in zip(batches, table, strict=True):
        _fill_up(batch[MICRO_BATCHES], max(numbers))
    return total


def note_pairs(batches: Sequence[dict[str, Any]], weight: Tensor, accelerator: Accelerator) -> Tensor:
    """Write into the batches of a step, in place, how many pairs each rank has: a loss that gathers them in the middle of a
    micro-batch would wait for its forward pass to find out. One collective, one wait. Returns the sum of `weight` over ranks."""
    total, table = _numbers_of_ranks(weight, [len(pair_weight(batch)) for batch in batches], accelerator)
    for batch, numbers in zip(batches, table, strict=True):
        batch["pairs_by_rank"] = tuple(numbers)
    return total


def _numbers_of_ranks(weight: Tensor, numbers: list[int], accelerator: Accelerator) -> tuple[Tensor, list[list[int]]]:
    """The sum of `weight` over ranks, and the value that each rank has for each of `numbers`."""
    here = torch.stack([weight, *(weight.new_full((), number) for number in numbers)])
    table = accelerator.gather(here[None])  # [ranks, 1 + numbers]
    return table[:, 0].sum(), [[int(number) for number in column] for column in table[:, 1:].T.tolist()]


def _fill_up(batches: list[dict[str, Any]], number: int) -> None:
    smallest = min(batches, key=lambda each: each["input_ids"].numel())
    batches += [smallest | {"weight": torch.zeros_like(smallest["weight"])}] * (number - len(batches))


def step_through(
    step: Callable[[dict[str, Any]], Tensor], inputs: dict[str, Any], accelerator: Accelerator, model: nn.Module
) -> Tensor:
    """`step` is forward and backward of one micro-batch, and returns its loss. Returns the sum of the losses."""
    *others, last = micro_batches(inputs)
    losses = []
    for each in others:
        with _gradients_kept(accelerator, model):
            losses.append(step(each))
    return torch.stack([*losses, step(last)]).sum()


@contextlib.contextmanager
def _gradients_kept(accelerator: Accelerator, model: nn.Module) -> Iterator[None]:
    """Backward adds to the gradients of this rank: nothing is exchanged, and DeepSpeed makes no step.

    With `sync_each_batch` they are exchanged all the same. In an earlier batch of the step Trainer holds them back itself,
    and a second hold would let them go too soon under FSDP2.
    """
    state = accelerator.gradient_state
    syncs, each = state.sync_gradients, state.plugin_kwargs.get("sync_each_batch", False)
    deepspeed = accelerator.distributed_type == DistributedType.DEEPSPEED
    hold = accelerator.no_sync(model) if syncs and not each and not deepspeed else contextlib.nullcontext()
    state._set_sync_gradients(False)  # DeepSpeed's step is made where this is True
    try:
        with hold:
            yield
    finally:
        state._set_sync_gradients(syncs)


def weighted_mean(losses: Sequence[Tensor], batches: Sequence[dict[str, Any]]) -> Tensor:
    """The mean loss of a batch, from the means of its micro-batches."""
    weights = torch.stack([pair_weight(each).sum() for each in batches])
    total = weights.sum().clamp_min(torch.finfo(torch.float32).tiny)
    return (torch.stack(list(losses)) * weights).sum() / total


def in_row_order(
    outputs: Sequence[dict[str, Tensor]], batches: Sequence[dict[str, Any]], real: Sequence[Tensor]
) -> dict[str, Tensor]:
    """[N] per pair of each micro-batch -> of the batch, in the order of its rows, without the pairs that are not `real`."""
    order = torch.cat([pair_row(each) for each in batches]).argsort(stable=True)
    order = order[torch.cat(list(real))[order]]
    return {name: torch.cat([output[name] for output in outputs])[order] for name in outputs[0]}


def joined_tokens(inputs: dict[str, Any]) -> dict[str, Any]:
    """The tokens of all micro-batches in one row, to be counted."""
    if MICRO_BATCHES not in inputs:
        return inputs
    batches = micro_batches(inputs)
    names = [name for name in ("input_ids", "attention_mask") if name in batches[0]]
    return {name: torch.cat([each[name].flatten() for each in batches])[None] for name in names}


def step_loss(losses: Tensor, weight: Tensor, weight_of_step: Tensor | None, ranks: int) -> Tensor:
    """What to call backward on: summed over the micro-batches and averaged over the ranks, as the engines average
    gradients, it is the mean over all pairs of the optimizer step. Without `weight_of_step`: the mean of this batch.
    """
    if weight_of_step is None:
        weight_of_step, ranks = weight.sum(), 1
    return (losses * weight).sum() * ranks / weight_of_step.clamp_min(torch.finfo(torch.float32).tiny)
