"""What all ranks agree on before an optimizer step: finite numbers, a signal to stop."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..distributed.sharding import local_shard
from ..metrics import MetricInputs
from ..types import PairBatch

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

    def watch(self, inputs: MetricInputs) -> None:
        """Called for every micro-batch; launches nothing."""
        self.seen.append((inputs.batch.example_ids, inputs.losses.detach()))
        self.newest = inputs.batch

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


def last_step_error(problem: str, ways_out: Sequence[str], *, then: str) -> FloatingPointError:
    """`problem`: what is not finite after the last step. `then`: what becomes of its checkpoints."""
    ways = ["Lower the learning rate", "set --max_grad_norm", *ways_out]
    return FloatingPointError(f"{problem}. {', '.join(ways[:-1])}, or {ways[-1]}.{then}")


def number_of_bad_tensors(model: nn.Module, scores: Tensor | None, device: torch.device) -> Tensor:
    """How many of the trained weights, as far as this rank holds them, and of the scores are not finite: a number, float32."""
    trained = [local_shard(getattr(p, "ds_tensor", p)).detach() for p in model.parameters() if p.requires_grad]
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
