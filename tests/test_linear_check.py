"""A layer whose backward is not that of its forward is found, whatever quantised it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from dpo_trainer.models.linear_check import wrong_gradients


class Product(torch.autograd.Function):
    """x W^T forward, and backward as if W were another matrix."""

    @staticmethod
    def forward(ctx, inputs: Tensor, weight: Tensor, other: Tensor) -> Tensor:
        ctx.save_for_backward(other)
        return inputs @ weight.T

    @staticmethod
    def backward(ctx, gradient: Tensor):
        (other,) = ctx.saved_tensors
        return gradient @ other, None, None


class Eighths(nn.Module):
    """Weights in steps of 1/8, held as int8. `wrong`: how far (relative) its backward is off; None: it has none."""

    def __init__(self, wrong: float | None, bias: bool = False):
        super().__init__()
        numbers = torch.Generator().manual_seed(0)
        self.in_features, self.out_features = 12, 8
        self.register_buffer("codes", torch.randint(-16, 16, (8, 12), generator=numbers, dtype=torch.int8))
        self.bias = nn.Parameter(torch.randn(8, generator=numbers), requires_grad=False) if bias else None
        self.wrong = wrong

    def forward(self, inputs: Tensor) -> Tensor:
        weight = self.codes.to(inputs.dtype) / 8
        if self.wrong is None:
            out = inputs.detach() @ weight.T
        else:
            out = Product.apply(inputs, weight, weight * (1 + self.wrong))
        return out if self.bias is None else out + self.bias.to(inputs.dtype)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("wrong", "found"), [(0.0, False), (0.3, True), (-1.0, True), (None, True)])
def test_a_wrong_backward_is_found(wrong, found, dtype, bias):
    model = nn.Sequential(nn.Linear(12, 12), nn.Sequential(Eighths(wrong, bias)))
    got = wrong_gradients(model, dtype)
    assert (got is not None) == found
    if found:
        assert got[0] == "1.0"
        assert got[1] == pytest.approx(1.0 if wrong is None else abs(wrong), rel=0.1)  # roundings of bfloat16


def test_layers_that_are_not_quantised_or_not_here_are_left_alone():
    with torch.device("meta"):
        elsewhere = Eighths(None)
    assert (
        wrong_gradients(nn.Sequential(nn.Linear(4, 4), nn.Embedding(4, 4), nn.LayerNorm(4), elsewhere), torch.float32)
        is None
    )
