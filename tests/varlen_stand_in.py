"""torch's variable-length kernel, played by its documentation: to compare numbers where there is no GPU."""

from __future__ import annotations

import torch
from torch import Tensor

from dpo_trainer.scoring.varlen import Kernel, torch_arguments

calls: list[tuple[int, ...]] = []
"""Shapes of the queries that it was called with."""


def varlen_attn(
    query: Tensor,  # [T, H, d]
    key: Tensor,  # [G, K, d]
    value: Tensor,  # [G, K, d]
    cu_seq_q: Tensor,  # [S + 1]
    cu_seq_k: Tensor,  # [S + 1]
    max_q: int,
    max_k: int,
    *,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
) -> Tensor:
    """[T, H, d]: sequence by sequence, the causal mask aligned at the ends, a window to the left, sums in float32 at least."""
    _check(query, key, value, cu_seq_q, cu_seq_k, (max_q, max_k), enable_gqa)
    calls.append(tuple(query.shape))
    wide = torch.promote_types(query.dtype, torch.float32)
    groups = query.shape[1] // key.shape[1]
    out = []
    for s in range(len(cu_seq_q) - 1):
        q = query[cu_seq_q[s] : cu_seq_q[s + 1]].to(wide)
        k, v = (x[cu_seq_k[s] : cu_seq_k[s + 1]].to(wide).repeat_interleave(groups, 1) for x in (key, value))
        distance = torch.arange(len(k))[None] - (torch.arange(len(q))[:, None] + len(k) - len(q))
        left, right = window_size
        hidden = (distance > right) & (right >= 0) | (distance < -left) & (left >= 0)
        scores = torch.einsum("qhd,khd->hqk", q, k) * (query.shape[-1] ** -0.5 if scale is None else scale)
        weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
        out.append(torch.einsum("hqk,khd->qhd", weights, v).to(query.dtype))
    return torch.cat(out)


def _check(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, longest: tuple[int, int], gqa: bool) -> None:
    """What the kernel asks of its arguments."""
    assert q.dtype == k.dtype == v.dtype
    assert q.stride(-1) == k.stride(-1) == v.stride(-1) == 1
    assert cu_q.dtype == cu_k.dtype == torch.int32
    assert (int(cu_q[-1]), int(cu_k[-1]), int(cu_k[-1])) == (len(q), len(k), len(v))
    assert longest == (int(cu_q.diff().max()), int(cu_k.diff().max()))
    assert [type(n) for n in longest] == [int, int]
    assert gqa == (q.shape[1] != k.shape[1])


KERNEL = Kernel("the stand-in", varlen_attn, torch_arguments)
