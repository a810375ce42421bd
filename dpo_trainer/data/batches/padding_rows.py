"""Rows that are there so that all ranks have a full last batch: none of them may count.

accelerate repeats rows of a table; a stream fills itself (`FilledStream`).
"""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers.trainer_utils import has_length

from ...types import pair_row, pair_weight
from ..stream import FILLER_ID


def unweigh_fillers(
    inputs: dict[str, Any], accelerator: Accelerator, *, rows_per_rank: int, drop_last: bool
) -> Tensor:
    """Give the fillers of a collated batch weight 0, in place. [N] True for the pairs of rows that are none.

    The last round of batches holds what remains of the rows, in the order of the ranks, and then the repeats. A part of
    a batch (`micro_batches`) knows its rows by their places in the whole.
    """
    weight = pair_weight(inputs)
    remainder = 0 if drop_last else _rows_of_last_round(accelerator, rows_per_rank * accelerator.num_processes)
    if not remainder:
        # Those of a stream have their weight already.
        return inputs["example_ids"] != FILLER_ID if "example_ids" in inputs else torch.ones_like(weight).bool()
    real = pair_row(inputs) + accelerator.process_index * rows_per_rank < remainder
    inputs["weight"] = weight * real
    return real


def refuse_empty_rounds(rows: int, batch_size: int, accelerator: Accelerator) -> None:
    """`--dataloader_drop_last` drops what does not fill a batch of all ranks: that must not be everything."""
    needed = batch_size * accelerator.num_processes
    if rows < needed:
        raise ValueError(
            f"--dataloader_drop_last leaves none of {rows} rows: a batch of all processes takes {needed}. Leave it off, or lower "
            "the batch size."
        )


def _rows_of_last_round(accelerator: Accelerator, rows_of_all_ranks: int) -> int:
    """How many rows are no repeats, where this round of batches is the last and has some; else 0.

    Not accelerate's own `remainder`, which it does not know in an epoch that a resumed run begins in the middle.
    """
    state = accelerator.gradient_state
    if accelerator.num_processes == 1 or not state.end_of_dataloader:
        return 0
    dataset = state.active_dataloader.dataset
    return len(dataset) % rows_of_all_ranks if has_length(dataset) else 0
