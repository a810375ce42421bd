"""What `--activation_offloading` moves on a GPU: activations of the forward, without waiting, and nothing else."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from fake_cuda import fake_batch
from torch.utils._python_dispatch import TorchDispatchMode
from traced import SIZES, model_of, pairs

from dpo_trainer.scoring.logprobs import Scorer
from dpo_trainer.training import offloading

WIDTH = SIZES["hidden_size"]


class Copies(TorchDispatchMode):
    """Shapes that went to the host, in forward and in backward, and how many copies were waited for."""

    def __init__(self) -> None:
        super().__init__()
        self.forward: Counter[tuple[int, ...]] = Counter()
        self.backward: Counter[tuple[int, ...]] = Counter()
        self.back = self.waited_for = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs, name = kwargs or {}, func._schema.name
        out = func(*args, **kwargs)
        if name in ("aten::_to_copy", "aten::copy_"):
            source, target = (args[0], out) if name == "aten::_to_copy" else (args[1], args[0])
            if source.device.type != target.device.type:
                self.waited_for += not (kwargs.get("non_blocking") or args[2:] == (True,))
                self.back += target.device.type == "cuda"
                if target.device.type == "cpu":
                    in_backward = torch._C._current_graph_task_id() != -1
                    (self.backward if in_backward else self.forward)[tuple(source.shape)] += 1
        return out


def copies_of_a_step(dtype: str, checkpointing: bool | None) -> dict[str, Any]:
    """Of Qwen2 with weights in `dtype` under bfloat16 autocast; and the shapes of all weights."""
    model: Any = model_of("qwen2", getattr(torch, dtype))
    if checkpointing is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": checkpointing})
    batch = fake_batch(pairs([(400, 300, 200)]), "flat")
    scorer = Scorer(model)
    with Copies() as copies, scorer.step(), offloading.ActivationsOnHost(model, batch.input_ids.numel()):
        with torch.autocast("cuda", torch.bfloat16):
            logps = scorer(model, batch)
        logps.margin().sum().backward()
    found = {name: getattr(copies, name) for name in ("forward", "backward", "back", "waited_for")}
    return {**found, "weights": {tuple(weight.shape) for weight in model.parameters()}}


@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["off", "non-reentrant", "reentrant"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_activations_of_the_forward_alone_are_moved(on_cuda, dtype, checkpointing):
    """No weight, and no copy of one in autocast's dtype; nothing that backward computes again; no wait."""
    got = on_cuda(copies_of_a_step, dtype=dtype, checkpointing=checkpointing)
    moved = got["forward"]
    assert not got["backward"]
    assert not got["waited_for"]
    matrices = {shape for shape in got["weights"] if len(shape) > 1}
    assert not {shape for shape in moved if shape in matrices or shape[::-1] in matrices}
    assert not {shape for shape in moved if shape in got["weights"]}
    rows = 900 * WIDTH
    if checkpointing is None:
        assert sum(moved.values()) > 20
    else:  # what enters each layer, and what the head keeps
        assert moved[1, 900, WIDTH] >= 2
        assert sum(moved.values()) < 20
    assert sum(count * torch.Size(shape).numel() for shape, count in moved.items()) > 2 * rows
    assert got["back"] >= sum(moved.values())


def test_a_batch_with_as_many_tokens_as_a_weight_has_rows_is_moved(on_cuda):
    assert on_cuda(moved_at_the_width) > 10


def moved_at_the_width() -> int:
    model: Any = model_of("qwen2", torch.float32)
    batch = fake_batch(pairs([(WIDTH - 20, 10, 10)]), "flat")
    scorer = Scorer(model)
    with Copies() as copies, scorer.step(), offloading.ActivationsOnHost(model, batch.input_ids.numel()):
        scorer(model, batch)
    return sum(count for shape, count in copies.forward.items() if WIDTH in shape)
