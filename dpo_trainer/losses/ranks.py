"""The one place where losses talk to other ranks."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


class Ranks:
    """All ranks of the process group, or this process alone where there is none.

    Losses that couple the pairs of a batch take it as the argument `ranks`; tests put simulated ranks in its place.
    """

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

    def gather(self, rows: Tensor) -> tuple[Tensor, int]:
        """Rows of every rank, [sum of N, ...], and where this rank's begin. N may differ between ranks.

        The counts go to the host, which on an accelerator waits for the forward pass.
        """
        if not self._distributed:
            return rows.detach(), 0
        counts = [int(n) for n in self.exchange(torch.tensor([len(rows)], device=rows.device))]
        padding = rows.new_zeros(max(counts) - len(rows), *rows.shape[1:])
        received = self.exchange(torch.cat([rows.detach(), padding]))
        return torch.cat([r[:n] for r, n in zip(received, counts, strict=True)]), sum(counts[: self.index])


ALL_RANKS = Ranks()
