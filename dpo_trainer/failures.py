"""What stops a run, noticed in time and said so that one can act: non-finite numbers, a signal, too little memory."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .batch import PairBatch
from .metrics import StepParts
from .sharding import own_part

FIRST = 20  # ids that a message names


class Verdict(NamedTuple):
    """On an optimizer step, the same on all ranks."""

    bad_pairs: int  # with a non-finite loss
    bad_gradients: bool
    stop_asked: bool  # on any rank
    ids: list[int]  # of the bad pairs of this rank
    no_gradient: bool = False  # of every weight it is 0
    interrupted: bool = False  # by Ctrl-C, on any rank

    @property
    def finite(self) -> bool:
        return not self.bad_pairs and not self.bad_gradients

    def problem(self, step: int) -> str:
        if not self.bad_pairs:
            return f"The gradient of optimizer step {step} is not finite, though every loss is"
        named = f"example_ids {self.ids[:FIRST]}" if self.ids else "on another rank"
        return f"The loss of optimizer step {step} is not finite ({named})"


class StepWatch:
    """Everything that all ranks must agree on before an optimizer step, in one collective and one wait."""

    def __init__(self) -> None:
        self.finite_batch: PairBatch | None = None  # the last micro-batch of the last step that was finite
        self.clear()

    def clear(self) -> None:
        self.seen: list[tuple[Tensor, Tensor]] = []
        self.gradient_norm: Tensor | float | None = None
        self.newest: PairBatch | None = None

    def watch(self, parts: StepParts) -> None:
        """Called for every micro-batch; launches nothing."""
        self.seen.append((parts.batch.example_ids, parts.losses.detach()))
        self.newest = parts.batch

    def verdict(self, gather: Callable[[Tensor], Tensor], *, stop_asked: bool, interrupted: bool = False) -> Verdict:
        """`gather` sums over ranks. Every rank must call."""
        seen, norm, newest = self.seen, self.gradient_norm, self.newest
        self.clear()
        if not seen:
            return Verdict(0, False, stop_asked, [], interrupted=interrupted)
        ids, losses = (torch.cat(column) for column in zip(*seen, strict=True))
        bad = ~torch.isfinite(losses)
        # Filled in on the device: a number that is copied there would be waited for.
        size = (
            norm.to(losses.device) if isinstance(norm, Tensor) else losses.new_full((), 1.0 if norm is None else norm)
        )
        stop, ctrl_c = (losses.new_full((), told) for told in (stop_asked, interrupted))
        here = torch.stack([bad.sum(), ~torch.isfinite(size), stop, size != 0, ctrl_c])
        pairs, gradients, stops, moves, ctrl_cs = gather(here.float()).tolist()
        own = list(dict.fromkeys(ids[bad].tolist())) if pairs else []  # pairs of one row have one id
        found = Verdict(int(pairs), gradients > 0, stops > 0, own, moves == 0, ctrl_cs > 0)
        if found.finite:
            self.finite_batch = newest
        return found


def non_finite_error(
    verdict: Verdict, step: int, ways_out: Sequence[str] = (), *, after: str = "", then: str = ""
) -> FloatingPointError:
    """`ways_out`: what the options of the run leave to try, besides the rows and the learning rate. `then`: of its checkpoints."""
    ways = ["Look at these rows", "lower the learning rate", *ways_out]
    return FloatingPointError(
        f"{verdict.problem(step)}{after}. The weights were not updated. {', '.join(ways[:-1])}, or {ways[-1]}.{then}"
    )


def number_of_bad_tensors(model: nn.Module, scores: Tensor | None, device: torch.device) -> Tensor:
    """How many of the trained weights, as far as this rank holds them, and of the scores are not finite: a number, float32."""
    trained = [own_part(getattr(p, "ds_tensor", p)).detach() for p in model.parameters() if p.requires_grad]
    tensors = [tensor for tensor in (*trained, scores) if tensor is not None and tensor.is_floating_point()]
    bad = [(~torch.isfinite(tensor)).any().to(device) for tensor in tensors]
    return torch.stack([torch.zeros((), dtype=torch.bool, device=device), *bad]).sum().float()


def precision_ways_out(args: Any, model: nn.Module) -> list[str]:
    """What makes the numbers of a run wider, as far as they are narrow: mixed precision, and the weights that compute.

    `args`: a `DPOConfig`.
    """
    ways = []
    if args.bf16 or args.fp16:
        ways.append(f"train in float32 (--{'bf16' if args.bf16 else 'fp16'} false)")
    held = {p.dtype for p in model.parameters() if p.is_floating_point() and p.element_size() == 2}
    if held:
        ways.append(
            f"load the weights, which are held in {str(min(held, key=str)).removeprefix('torch.')}, in float32 (--dtype float32)"
        )
    return ways


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
    def of(cls, args: Any, *, second_model: bool, adapter: bool, splits: bool) -> MemoryAdvice:
        """`args`: a `DPOConfig`."""
        return cls(
            batch_size=args.per_device_train_batch_size,
            checkpointing=bool(args.gradient_checkpointing),
            second_model=second_model,
            adapter=adapter,
            finds_batch_size=args.auto_find_batch_size,
            splits=splits,
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
def explained(inputs: Mapping[str, Any], advice: Callable[[], MemoryAdvice]) -> Iterator[None]:
    """Around a step: if memory runs out, say what was in the batch and what helps."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        message = out_of_memory_message(PairBatch.from_inputs(inputs), advice(), str(error))
        raise torch.OutOfMemoryError(message) from error


def out_of_memory_message(batch: PairBatch, advice: MemoryAdvice, cause: str) -> str:
    """The cause stays in it: whoever looks for a batch size that fits reads it there."""
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
