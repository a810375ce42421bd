"""Padding rows, which give all ranks a full last batch: none of them may count.

accelerate repeats rows of a table; a stream fills itself (`FilledStream`).
"""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers.trainer_utils import has_length

from ...types import pair_row, pair_weight
from ..stream import PADDING_ROW_ID


def mask_padding_rows(
    inputs: dict[str, Any], accelerator: Accelerator, *, rows_per_rank: int, drop_last: bool
) -> Tensor:
    """Give the padding rows of a collated batch weight 0, in place. Return [N] bool: True for pairs of real rows.

    The last round of batches holds what remains of the rows, in the order of the ranks, and then the repeats. A
    micro-batch numbers its rows by their positions in the full batch.
    """
    weight = pair_weight(inputs)
    remainder = 0 if drop_last else _rows_of_last_round(accelerator, rows_per_rank * accelerator.num_processes)
    if not remainder:
        # Those of a stream have their weight already.
        return inputs["example_ids"] != PADDING_ROW_ID if "example_ids" in inputs else torch.ones_like(weight).bool()
    real = pair_row(inputs) + accelerator.process_index * rows_per_rank < remainder
    inputs["weight"] = weight * real
    return real


def refuse_empty_rounds(rows: int, batch_size: int, accelerator: Accelerator) -> None:
    """Raise ValueError if `--dataloader_drop_last` would drop every row."""
    needed = batch_size * accelerator.num_processes
    if rows < needed:
        raise ValueError(
            f"--dataloader_drop_last leaves none of {rows} rows: a batch of all processes takes {needed}. Leave it off, or lower "
            "the batch size."
        )


def _rows_of_last_round(accelerator: Accelerator, rows_of_all_ranks: int) -> int:
    """Return the number of real rows in the last round of batches, if it contains repeats; else 0.

    Not accelerate's own `remainder`, which it does not know in an epoch that a resumed run begins in the middle.
    """
    state = accelerator.gradient_state
    if accelerator.num_processes == 1 or not state.end_of_dataloader:
        return 0
    dataset = state.active_dataloader.dataset
    return len(dataset) % rows_of_all_ranks if has_length(dataset) else 0
