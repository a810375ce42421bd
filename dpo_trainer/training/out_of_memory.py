"""What stops a run, noticed in time and said so that one can act: non-finite numbers, a signal, too little memory."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import nn

from ..config import DPOConfig
from ..losses import Objective
from ..reference import Reference
from ..types import PairBatch


@dataclass(frozen=True, kw_only=True)
class MemoryAdvice:
    """What of a run decides its memory, as far as its options go."""

    batch_size: int
    checkpointing: bool
    second_model: bool
    adapter: bool
    finds_batch_size: bool
    splits: bool = False  # its losses allow that a batch is computed in parts
    max_length: int | None = None
    in_float32: bool = False  # activations are, on a device that has bfloat16

    @classmethod
    def of(cls, args: DPOConfig, model: nn.Module, reference: Reference, objective: Objective) -> MemoryAdvice:
        return cls(
            batch_size=args.per_device_train_batch_size,
            checkpointing=bool(args.gradient_checkpointing),
            # Log-probs of a reference that moves cannot be computed ahead.
            second_model=bool(reference.own) and not reference.moving,
            adapter=isinstance(model, PeftModel),
            finds_batch_size=args.auto_find_batch_size,
            splits=objective.separable,
            max_length=args.max_length,
            in_float32=not (args.bf16 or args.fp16) and args.device.type == "cuda" and torch.cuda.is_bf16_supported(),
        )

    def ways_out(self, fewer_tokens: int | None = None) -> list[str]:
        """`fewer_tokens`: a budget that would split the batch; None where it cannot be split."""
        ways = []
        if self.splits and fewer_tokens is not None:
            ways.append(f"--max_tokens_per_micro_batch {fewer_tokens} (the same gradients)")
        if self.batch_size > 1:
            smaller = math.ceil(self.batch_size / 2)
            ways.append(
                f"--per_device_train_batch_size {smaller} (with more --gradient_accumulation_steps the numbers stay)"
            )
            if not self.finds_batch_size:
                ways.append("--auto_find_batch_size true")
        if not self.checkpointing:
            ways.append("--gradient_checkpointing true")
        if self.second_model:
            ways.append("--precompute_ref_log_probs true (no second model while training)")
        if not self.adapter:
            ways.append("--use_peft true")
        if self.in_float32:
            ways.append("--bf16 true")
        limit = (
            "--max_length, which is not set" if self.max_length is None else f"--max_length below {self.max_length}"
        )
        return [*ways, limit]


@contextlib.contextmanager
def out_of_memory_advice(inputs: Mapping[str, Any], advice: Callable[[], MemoryAdvice]) -> Iterator[None]:
    """Around a step: if memory runs out, say what was in the batch and what helps."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        message = out_of_memory_message(PairBatch.from_inputs(inputs), advice(), str(error))
        raise torch.OutOfMemoryError(message) from error


def out_of_memory_message(batch: PairBatch, advice: MemoryAdvice, cause: str) -> str:
    """The message keeps the cause, which the search for a batch size that fits reads."""
    tokens, example_id = largest_row(batch)
    return (
        f"{cause} The batch has {len(batch.chosen)} pairs and {batch.num_tokens:,} tokens; its largest row (example_id "
        f"{example_id}) has {tokens:,}. What helps: {'; '.join(advice.ways_out(_fewer_tokens(batch, tokens)))}."
    )


def _fewer_tokens(batch: PairBatch, largest_row: int) -> int | None:
    """Half the batch, but no less than its largest row; None where that is all of it."""
    least = largest_row if batch.is_flat else 2 * largest_row
    computed = batch.input_ids.numel()
    fewer = max(math.ceil(computed / 2), least)
    return fewer if fewer < computed else None


def largest_row(batch: PairBatch) -> tuple[int, int]:
    """(tokens, example id) of the row that takes most of the batch; of padded rows, which stand alone, the longest."""
    if batch.segments is None:
        assert batch.attention_mask is not None
        lengths = batch.attention_mask.sum(1)
        completion = int(lengths.argmax())
        mine = (batch.chosen == completion) | (batch.rejected == completion)
        return int(lengths.max()), int(batch.example_ids[mine][0])
    rows: list[list[int]] = []  # [tokens, completions before it]
    for number, (length, prefix) in enumerate(zip(batch.segments.length, batch.segments.prefix_length, strict=True)):
        if not prefix:
            rows.append([0, number])
        rows[-1][0] += length
    real = [row for row in rows if row[1] < len(batch.lengths)]  # the padding at the end is no row
    tokens, first = max(real)
    mine = batch.chosen >= first
    return tokens, int(batch.example_ids[mine][0])
