"""The one place where losses talk to other ranks."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor


class Ranks:
    """All ranks of the process group, or this process alone where there is none.

    Losses that couple the pairs of a batch take it as the argument `ranks`; tests put simulated ranks in its place.
    """

    counts: Sequence[int] | None = None

    @property
    def index(self) -> int:
        return dist.get_rank() if self._distributed else 0

    def exchange(self, tensor: Tensor) -> list[Tensor]:
        """What every rank passed, in rank order, without gradients. All must pass the same shape."""
        tensor = tensor.detach().contiguous()
        if not self._distributed:
            return [tensor]
        received = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
        dist.all_gather(received, tensor)
        return received

    @property
    def _distributed(self) -> bool:
        return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1

    def knowing(self, counts: Sequence[int] | None) -> Ranks:
        """The same ranks, with the number of pairs of each in this micro-batch; None: not known."""
        ranks = copy.copy(self)
        ranks.counts = counts
        return ranks

    def gather(self, rows: Tensor) -> tuple[Tensor, int]:
        """Rows of every rank, [sum of N, ...], and where this rank's begin. N may differ between ranks.

        The counts go to the host, which on an accelerator waits for the forward pass.
        """
        if not self._distributed:
            return rows.detach(), 0
        here = rows.new_full((1,), len(rows), dtype=torch.int64)
        return self._gather(rows, torch.cat(self.exchange(here)).tolist())

    def gather_pairs(self, rows: Tensor) -> tuple[Tensor, int]:
        """`gather` of one row for each pair, without a wait where it is known how many pairs each rank has."""
        known = self._distributed and self.counts is not None
        return self._gather(rows, self.counts) if known else self.gather(rows)  # type: ignore[arg-type]

    def _gather(self, rows: Tensor, counts: Sequence[int]) -> tuple[Tensor, int]:
        padding = rows.new_zeros(max(counts) - len(rows), *rows.shape[1:])
        received = self.exchange(torch.cat([rows.detach(), padding]))
        return torch.cat([r[:n] for r, n in zip(received, counts, strict=True)]), sum(counts[: self.index])


ALL_RANKS = Ranks()
