"""Which variable-length kernel is taken, and its arguments. The kernels themselves run in tests/gpu."""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

import oracles
import pytest
import torch
import varlen_stand_in
from test_attention import MODULE, PAIRS, SEGMENTS, SINKS, VARIANTS, T, tensors
from torch import Tensor

from dpo_trainer.scoring import attention, varlen
from dpo_trainer.scoring.attention import shared_prompt_attention
from dpo_trainer.scoring.varlen import Kernel, choose, flash_attn_arguments, torch_arguments
from dpo_trainer.types import Segments


@dataclasses.dataclass
class Cuda:
    """What the choice looks at, of a tensor that would live on a GPU."""

    shape: tuple[int, ...] = (1, 4, T, 64)
    dtype: torch.dtype = torch.bfloat16
    is_cuda: bool = True
    device: str = "cuda:0"


def of_torch_2_10(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None):
    raise AssertionError("this release is not to be called")


def of_torch_2_11(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1)
):
    raise AssertionError("this release is not to be called")


def of_flash_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
):
    """flash-attn 2.6 and later, whose window and causal mask are those of torch's kernel."""
    assert causal
    assert not softcap
    left, _ = window_size
    return varlen_stand_in.varlen_attn(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        scale=softmax_scale,
        window_size=(left, 0),
        enable_gqa=q.shape[1] != k.shape[1],
    )


NEW = Kernel("new torch", varlen_stand_in.varlen_attn, torch_arguments)
OLD = [Kernel("old torch", function, torch_arguments) for function in (of_torch_2_10, of_torch_2_11)]
FLASH = Kernel("flash-attn", of_flash_attn, flash_attn_arguments)


@pytest.fixture
def card(monkeypatch):
    """card(kernels, capability): what is installed, and the GPU."""

    def put(kernels: list[Kernel], capability: tuple[int, int] = (8, 0), built: bool = True) -> None:
        varlen.why_no_flash.cache_clear()
        monkeypatch.setattr(varlen, "kernels", lambda: kernels)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: built)

    yield put
    varlen.why_no_flash.cache_clear()


@pytest.mark.parametrize(
    ("query", "value", "options", "reason"),
    [
        (Cuda(), Cuda(), {}, None),
        (Cuda(dtype=torch.float16), Cuda(), {}, None),
        (Cuda(shape=(1, 4, T, 256)), Cuda(shape=(1, 2, T, 256)), {}, None),
        (Cuda(dtype=torch.float32), Cuda(), {}, "float32 has no"),
        (Cuda(), Cuda(shape=(1, 4, T, 32)), {}, "heads of size 64 with values of 32"),
        (Cuda(shape=(1, 4, T, 512)), Cuda(shape=(1, 4, T, 512)), {}, "heads of size 512"),
        (Cuda(shape=(1, 4, T, 20)), Cuda(shape=(1, 4, T, 20)), {}, "heads of size 20"),
        (Cuda(), Cuda(), {"dropout": 0.1}, "with dropout"),
        (Cuda(), Cuda(), {"softcap": 30.0}, "nor an installed flash-attn"),
        (Cuda(), Cuda(), {"s_aux": SINKS}, "with attention sinks"),
    ],
)
def test_a_kernel_is_taken_only_where_it_can_serve(card, query, value, options, reason):
    card([NEW])
    kernel, why = choose(query, value, **{"dropout": 0.0, "softcap": None, "s_aux": None, **options})
    assert (kernel is None) == (reason is not None)
    assert (reason or "new torch, one call per layer") in why


@pytest.mark.parametrize(
    ("installed", "softcap", "taken"),
    [
        ([NEW, FLASH], None, NEW),
        ([OLD[0], FLASH], None, FLASH),
        ([OLD[1], FLASH], None, FLASH),
        ([FLASH], None, FLASH),
        ([NEW, FLASH], 30.0, FLASH),  # torch's has no soft cap
        ([OLD[0]], None, None),
        ([OLD[1]], None, None),
        ([], None, None),
    ],
    ids=lambda value: "+".join(k.name for k in value) if isinstance(value, list) else None,
)
def test_the_first_kernel_whose_signature_fits(card, installed, softcap, taken):
    """varlen_attn of torch 2.10 has no scale, and that of 2.11 no enable_gqa: a call would be a TypeError."""
    card(installed)
    kernel, why = choose(Cuda(), Cuda(), 0.0, softcap, None)
    assert kernel is taken
    assert (taken.name if taken else "has the variable-length kernel that is needed") in why


def test_the_installed_torch_is_asked():
    found = {kernel.name.split()[0]: kernel for kernel in varlen.kernels()}
    new = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 12)
    assert ("varlen_attn" in found and found["varlen_attn"].takes(None)) == new


@pytest.mark.parametrize(
    ("capability", "built", "reason"),
    [((7, 5), True, "this GPU has 7.5"), ((9, 0), False, "not part of this build"), ((12, 0), True, None)],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_cards_before_ampere_have_no_flash_attention(card, capability, built, reason, dtype):
    card([NEW, FLASH], capability, built)
    kernel, why = choose(Cuda(dtype=dtype), Cuda(dtype=dtype), 0.0, None, None)
    assert (kernel is None) == (reason is not None)
    assert (reason or "new torch") in why
    assert varlen.flash_serves(Cuda(dtype=dtype), Cuda(dtype=dtype)) is (reason is None)


def test_one_line_says_what_is_taken(card, monkeypatch):
    """Once, however many layers and batches ask."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    attention.logger.addHandler(handler)
    attention.logger.warning_once.__func__.cache_clear()
    try:
        card([NEW])
        for _ in range(3):
            assert attention._kernel_for(Cuda(), Cuda(), SEGMENTS, 0.0, None, None) is NEW
        card([OLD[1]], (7, 5))
        for _ in range(3):
            assert attention._kernel_for(Cuda(), Cuda(), SEGMENTS, 0.0, None, None) is None
        both_ways = Segments(length=(4,), prefix_start=(0,), prefix_length=(0,), mutual=((1, 3),))
        assert attention._kernel_for(Cuda(), Cuda(), both_ways, 0.0, None, None) is None
    finally:
        attention.logger.removeHandler(handler)
    assert lines == [
        "Attention of flat rows: new torch, one call per layer.",
        "Attention of flat rows: one call per segment (flash attention needs compute capability 8.0 (Ampere), this GPU has 7.5).",
        "Attention of flat rows: one call per segment (no variable-length kernel for tokens that see each other both ways).",
    ]


@pytest.mark.parametrize("kernel", [NEW, FLASH], ids=lambda kernel: kernel.name)
@pytest.mark.parametrize("name", ["plain", "scaled", "grouped", "window 2", "window 3", "window 8", "window 64"])
def test_arguments_of_the_kernel(monkeypatch, name, kernel):
    """The call, with the kernel played by its documentation: indices, window and scale are those of the mask."""
    shapes, options = VARIANTS[name]
    monkeypatch.setattr(attention, "_kernel_for", lambda *_: kernel)
    qkv = tensors(**shapes)
    varlen_stand_in.calls.clear()
    got, _ = shared_prompt_attention(MODULE, *qkv, None, segments=SEGMENTS, **options)
    assert len(varlen_stand_in.calls) == 1
    seen = oracles.visible(PAIRS, options.get("sliding_window"))
    want = oracles.attention(*qkv, seen, options.get("scaling", 8**-0.5))
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


def test_options_of_flash_attn():
    """A soft cap is named only where there is one, for releases before 2.6 have none."""
    assert flash_attn_arguments(0.5, 7, 30.0, True)["softcap"] == 30.0
    options: dict[str, Any] = flash_attn_arguments(0.5, 7, None, True)
    assert options == {"softmax_scale": 0.5, "causal": True, "window_size": (7, 0), "deterministic": False}


@pytest.mark.parametrize("wide", [torch.float32, torch.float64])
def test_tensors_arrive_in_the_dtype_of_autocast(monkeypatch, wide):
    """Rotary embeddings leave queries and keys in float32, beside values in bfloat16; float64 is none of autocast's."""
    seen: list[torch.dtype] = []

    def kernel(query, *_):
        seen.append(query.dtype)
        return None

    monkeypatch.setattr(attention, "_kernel_for", kernel)
    query, key, value = tensors(dtype=wide)
    value = value.to(torch.bfloat16) if wide == torch.float32 else value
    with torch.autocast("cpu", torch.bfloat16):
        got, _ = shared_prompt_attention(MODULE, query, key, value, None, segments=SEGMENTS)
    want = torch.bfloat16 if wide == torch.float32 else wide
    assert seen == [want]
    assert got.dtype == want
