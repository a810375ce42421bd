"""The path of a step on a GPU, traced without one: which kernels run, on what, and that nothing waits."""

from __future__ import annotations

import pytest
from traced import LAYERS, step


@pytest.mark.parametrize("kind", ["qwen2", "mistral"])
def test_one_kernel_call_per_layer(on_cuda, kind):
    got = on_cuda(step, kind=kind, dtype="bfloat16")
    assert not got.waits
    assert got.count("varlen") == got.count("varlen backward") == LAYERS
    assert all(set(kernel.devices) == {"cuda"} for kernel in got.kernels)
