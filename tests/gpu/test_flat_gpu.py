"""The CUDA path of flat rows: torch's variable-length kernel, whose queries are fewer than its keys behind a prefix.

    make test-gpu

(The other tests hide the GPU in conftest.py, so these skip when they run along with them.) Stands alone, for the same reason.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dpo_trainer.data.batches.collate import flat_inputs, padded_inputs
from dpo_trainer.scoring import attention
from dpo_trainer.scoring.attention import shared_prompt_attention
from dpo_trainer.scoring.layout import Layout
from dpo_trainer.scoring.logprobs import Scorer
from dpo_trainer.scoring.varlen import Kernel, kernels
from dpo_trainer.types import PairBatch, Segments, TokenizedPair

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU (make test-gpu)"),
    pytest.mark.skipif(
        not any(k.takes(None) for k in kernels()), reason="no variable-length kernel: torch >= 2.12 has one"
    ),
]

LENGTHS = [(40, 30, 50), (1, 1, 1), (130, 20, 9), (3, 70, 64)]
VOCABULARY = 512
# bfloat16 keeps 8 bits: each output is rounded once (2^-8 = 0.4 %), gradients sum a few hundred such products. A token that
# sees one key too many or too few is off by 10 % and more.
HALF = 0.02


def random_pairs() -> list[TokenizedPair]:
    numbers = torch.Generator().manual_seed(1)

    def ids(n: int) -> list[int]:
        return torch.randint(1, VOCABULARY, (n,), generator=numbers).tolist()

    return [
        TokenizedPair(example_id=i, prompt_ids=ids(p), chosen_ids=ids(c), rejected_ids=ids(r))
        for i, (p, c, r) in enumerate(LENGTHS)
    ]


def visible(segments: Segments, window: int | None) -> Tensor:
    """[T, T] who sees whom: prefix, then itself causally, both within the window."""
    total, start = sum(segments.length), 0
    seen = torch.zeros(total, total, dtype=torch.bool)
    for n, prefix, n_prefix in zip(segments.length, segments.prefix_start, segments.prefix_length, strict=True):
        keys = [*range(prefix, prefix + n_prefix), *range(start, start + n)]
        for i in range(n):
            place = n_prefix + i
            first = 0 if window is None else max(0, place - window + 1)
            seen[start + i, keys[first : place + 1]] = True
        start += n
    return seen


def relative(got: Tensor, want: Tensor) -> float:
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


@pytest.fixture
def kernel_calls(monkeypatch) -> list[tuple[int, ...]]:
    """The kernel as it is, counting: a comparison of the fallback with itself must not pass."""
    calls: list[tuple[int, ...]] = []
    call = attention.varlen_attention

    def counted(kernel: Kernel, query: Tensor, *args, **kwargs):
        calls.append(tuple(query.shape))
        return call(kernel, query, *args, **kwargs)

    monkeypatch.setattr(attention, "varlen_attention", counted)
    return calls


@pytest.mark.parametrize("window", [None, 16, 4096])
@pytest.mark.parametrize("groups", [8, 2, 1])
def test_kernel_against_a_written_out_mask(groups, window, kernel_calls):
    """Output and gradients of queries, keys and values, on numbers that bfloat16 holds exactly, against float64."""
    segments = flat_inputs(random_pairs(), 0)["segments"]
    total, heads, d = sum(segments.length), 8, 64
    torch.manual_seed(0)
    shapes = [(1, heads, total, d), (1, groups, total, d), (1, groups, total, d)]
    half = [torch.randn(s, device="cuda", dtype=torch.bfloat16).requires_grad_() for s in shapes]
    exact = [x.detach().double().requires_grad_() for x in half]

    got, _ = shared_prompt_attention(nn.Module(), *half, None, segments=segments, sliding_window=window)
    assert len(kernel_calls) == 1, "else the kernel did not run"
    keys, values = (x.repeat_interleave(heads // groups, dim=1) for x in exact[1:])
    mask = visible(segments, window).cuda()
    want = F.scaled_dot_product_attention(exact[0], keys, values, attn_mask=mask).transpose(1, 2)
    assert got.shape == want.shape
    assert relative(got, want) < HALF

    direction = torch.randn_like(got)
    got_grads = torch.autograd.grad(got, half, direction)
    want_grads = torch.autograd.grad(want, exact, direction.double())
    for name, a, b in zip("qkv", got_grads, want_grads, strict=True):
        assert relative(a, b) < HALF, f"gradient of {name}"


def tiny_model(dtype: torch.dtype, **config) -> nn.Module:
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "vocab_size": VOCABULARY, "initializer_range": 0.1, "sliding_window": None}
    return MistralForCausalLM(MistralConfig(**{**sizes, **config})).to("cuda", dtype)


def batch_of(layout: str) -> PairBatch:
    inputs = {"flat": flat_inputs, "padded": padded_inputs}[layout](random_pairs(), 0)
    return PairBatch.from_inputs({k: v.cuda() if isinstance(v, Tensor) else v for k, v in inputs.items()})


def measure(model: nn.Module, layout: str, autocast: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """Log-prob sums [2N], and the gradient of a mix of them in all parameters, as one vector."""
    model.zero_grad()
    scorer = Scorer(model)
    with scorer.step():
        with torch.autocast("cuda", autocast, enabled=autocast is not None):
            logps = scorer(model, batch_of(layout))
        sums = torch.cat([logps.chosen, logps.rejected])
        (sums * torch.linspace(1, 2, len(sums), device="cuda")).sum().backward()
    return sums.detach(), torch.cat([p.grad.double().flatten() for p in model.parameters()])


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16], ids=["float32 under autocast", "bfloat16"])
@pytest.mark.parametrize("reentrant", [None, False, True], ids=["off", "non-reentrant", "reentrant"])
@pytest.mark.parametrize("window", [None, 16])
def test_flat_against_padded_in_bfloat16(window, reentrant, weights, kernel_calls):
    """Both layouts as far from float32 on the same weights: within half precision, kernel against padded rows. Weights in
    float32 under autocast are what a run has by default."""
    model = tiny_model(weights, sliding_window=window).train()
    mixed = torch.bfloat16 if weights == torch.float32 else None
    if reentrant is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    padded, padded_grad = measure(model, "padded", mixed)
    assert not kernel_calls
    flat, flat_grad = measure(model, "flat", mixed)
    assert len(kernel_calls) == (2 if reentrant is None else 4), "once per layer, and again when recomputed"
    assert relative(flat, padded) < HALF
    assert relative(flat_grad, padded_grad) < 3 * HALF  # through two layers, and both sides are rounded


@pytest.mark.parametrize("window", [None, 16])
def test_flat_against_padded_in_float32(window, kernel_calls):
    """Single precision takes the segment-by-segment path, here as on a CPU."""
    model = tiny_model(torch.float32, sliding_window=window).train()
    (flat, flat_grad), (padded, padded_grad) = measure(model, "flat"), measure(model, "padded")
    assert not kernel_calls
    torch.testing.assert_close(flat, padded, rtol=1e-5, atol=5e-4)  # sums of up to 70 tokens
    assert relative(flat_grad, padded_grad) < 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_first_batch_settles_on_flat(dtype, kernel_calls):
    model = tiny_model(dtype).train()
    scorer = Scorer(model)
    layout = Layout("auto", [(scorer, model)], pad_token_id=0)
    layout.settle(model, batch_of("flat"))
    assert layout.name == "flat"
    assert kernel_calls
