"""The least work that a training step can do, and how fast this machine multiplies matrices: their quotient is the floor.

No attention scores, norms, softmax or optimizer: matrix products with weights only. What a trainer computes beyond them
(padding, prompts twice, logits of prompts) lowers its share of the floor, and so does everything that is no matrix product.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

MATMUL_ROWS = 1024  # tokens of one product; its largest result, [1024, 16384] float32, is 64 MiB


@dataclass(frozen=True)
class Weights:
    """Parameters that multiply a token: `layers` (N, of all layers), `head` (h = V * D), `adapter` (of LoRA)."""

    layers: int
    head: int
    adapter: int = 0


def weights_of(model: dict[str, int], vocab_size: int, lora_rank: int = 0) -> Weights:
    """Of a Qwen2 with the given shape. LoRA on its query and value projections."""
    hidden, inner, layers = (model[key] for key in ("hidden_size", "intermediate_size", "num_hidden_layers"))
    grouped = hidden * model["num_key_value_heads"] // model["num_attention_heads"]
    attention, mlp = 2 * hidden * (hidden + grouped), 3 * hidden * inner
    adapter = lora_rank * (2 * hidden + hidden + grouped)
    return Weights(layers * (attention + mlp), vocab_size * hidden, layers * adapter)


def useful_flops(
    weights: Weights, prompt: int, completion: int, *, checkpointing: bool = False, reference: bool = True
) -> int:
    """Of training on `prompt` and `completion` tokens, every one computed once.

    Full fine-tuning: (6 + 2 g) N (p + c + r) + 6 h (c + r), g = 1 with gradient checkpointing; a frozen weight has no
    gradient and costs 4 instead of 6, its adapter is trained. The reference: 2 N (p + c + r) + 2 h (c + r), or nothing where
    its log-probs are there already. `completion` is c + r, or all completions of a ranked list.
    """
    again, trained = 2 * checkpointing, 4 if weights.adapter else 6
    tokens = prompt + completion
    policy = ((trained + again) * weights.layers + (6 + again) * weights.adapter) * tokens
    policy += trained * weights.head * completion
    return policy + (2 * weights.layers * tokens + 2 * weights.head * completion if reference else 0)


def matmul_rate(
    shapes: Iterable[tuple[int, int]], dtype: Any, device: str = "cpu", clock: Callable[[], float] = time.process_time
) -> float:
    """FLOP per second of `clock`: the best over the given weight shapes [in, out], of products with `MATMUL_ROWS` rows."""
    return max(_rate(shape, dtype, device, clock) for shape in shapes)


def _rate(shape: tuple[int, int], dtype: Any, device: str, clock: Callable[[], float]) -> float:
    import torch

    rows = torch.randn(MATMUL_ROWS, shape[0], dtype=dtype, device=device)
    weight, out = (
        torch.randn(shape, dtype=dtype, device=device),
        torch.empty(MATMUL_ROWS, shape[1], dtype=dtype, device=device),
    )
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    flops, best, spent = 2 * MATMUL_ROWS * shape[0] * shape[1], float("inf"), 0.0
    while spent < 0.5:  # seconds; a lone product is as often disturbed as not, the best of many is the machine's
        began = clock()
        for _ in range(4):
            torch.mm(rows, weight, out=out)
        wait()
        took = clock() - began
        spent, best = spent + took, min(best, took / 4)
    return flops / best


def matmul_shapes(model: dict[str, int], vocab_size: int) -> list[tuple[int, int]]:
    """The weights of one layer, and the head up to 16,384 words of it."""
    hidden, inner = model["hidden_size"], model["intermediate_size"]
    return [(hidden, hidden), (hidden, inner), (inner, hidden), (hidden, min(vocab_size, 16_384))]
