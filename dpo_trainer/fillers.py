"""Rows that accelerate repeats, so that all ranks have a full last batch: none of them may count."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers.trainer_utils import has_length

from .batch import pair_weight


def unweigh_fillers(
    inputs: dict[str, Any], accelerator: Accelerator, *, rows_per_rank: int, drop_last: bool
) -> Tensor:
    """Give the repeats of a collated batch weight 0, in place. [N] True for the pairs of rows that are none.

    The last round of batches holds what remains of the rows, in the order of the ranks, and then the repeats.
    """
    weight = pair_weight(inputs)
    remainder = 0 if drop_last else _rows_of_last_round(accelerator, rows_per_rank * accelerator.num_processes)
    if not remainder:
        return torch.ones_like(weight, dtype=torch.bool)
    # A row may have several pairs. Collators of other libraries do not say, and have one.
    row = inputs.get("row", torch.arange(len(weight), device=weight.device))
    real = row + accelerator.process_index * rows_per_rank < remainder
    inputs["weight"] = weight * real
    return real


def _rows_of_last_round(accelerator: Accelerator, rows_of_all_ranks: int) -> int:
    """How many rows are no repeats, where this round of batches is the last and has some; else 0.

    Not accelerate's own `remainder`, which it does not know in an epoch that a resumed run begins in the middle. A stream
    fills itself with rows of weight 0.
    """
    state = accelerator.gradient_state
    if accelerator.num_processes == 1 or not state.end_of_dataloader:
        return 0
    dataset = state.active_dataloader.dataset
    return len(dataset) % rows_of_all_ranks if has_length(dataset) else 0
