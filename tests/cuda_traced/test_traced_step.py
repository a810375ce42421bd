"""The path of a step on a GPU, traced without one: which kernels run how often, on what, what is kept, and that nothing waits.

Operations on tensors of two devices raise by themselves (fake_cuda.py).
"""

from __future__ import annotations

import pytest
import torch
from fake_cuda import Kernel, Watch
from traced import KINDS, LAYERS, LENGTHS, Trace, losses, step

from dpo_trainer.losses import LOSSES

ROW = sum(map(sum, LENGTHS))
KEYS = ROW + sum(prompt for prompt, *_ in LENGTHS)  # a rejected completion has its prompt in front
HEADS, GROUPS, SIZE = 4, 2, 64
CHECKPOINTING = pytest.mark.parametrize(
    "checkpointing", [None, False, True], ids=["off", "non-reentrant", "reentrant"]
)

# float32 weights under autocast are what a run has by default. The fake version of the experts' kernel takes bfloat16 alone.
DTYPE = {"mixtral": "bfloat16", "gpt_oss": "bfloat16"}


def varlen_calls(got: Trace) -> list[Kernel]:
    return [kernel for kernel in got.kernels if kernel.name == "varlen"]


def assert_at_the_door(kernel: Kernel, dtype: torch.dtype = torch.bfloat16) -> None:
    """Half precision for all three, entries of a head side by side, everything on the device, and host numbers for the host."""
    assert set(kernel.dtypes) == {dtype}
    assert {strides[-1] for strides in kernel.strides} == {1}
    assert set(kernel.devices) == {"cuda"}
    longest_segment, longest_keys = (n for n in kernel.arguments if type(n) is int)
    assert longest_segment <= longest_keys


@CHECKPOINTING
@pytest.mark.parametrize("kind", [*KINDS, "llava"])
def test_every_kind_of_model(on_cuda, kind, checkpointing):
    """One call per layer and forward: again where layers are computed again. Soft caps and sinks take no kernel of torch."""
    got = on_cuda(step, kind=kind, dtype=DTYPE.get(kind, "float32"), checkpointing=checkpointing)
    forwards = 1 if checkpointing is None else 2
    calls = 0 if kind in ("gemma2", "gpt_oss") else LAYERS
    assert got.count("varlen") == calls * forwards
    assert got.count("varlen backward") == calls
    assert got.count("math") == got.count("efficient") == 0
    for kernel in varlen_calls(got):
        assert_at_the_door(kernel)
    # transformers compares the number of image tokens in the row with that of the images.
    assert got.waits == ["aten::_local_scalar_dense in logprobs.py, _score_in_head"] * (kind == "llava")


def test_what_the_kernel_is_given(on_cuda):
    (first, *_) = on_cuda(step, kind="mistral").kernels
    assert first.shapes == ((ROW, HEADS, SIZE), (KEYS, GROUPS, SIZE), (KEYS, GROUPS, SIZE))
    longest = max(p + c for p, c, _ in LENGTHS)
    assert first.arguments[:2] == (longest, max(longest, *(p + r for p, _, r in LENGTHS)))
    assert first.arguments[3:6] == (SIZE**-0.5, [15, 0], True), "scale, window of 16 keys, heads in groups"


@pytest.mark.parametrize("how", ["full", "lora", "qlora"])
@pytest.mark.parametrize(
    ("dtype", "autocast", "at_the_door"),
    [
        ("float32", "bfloat16", torch.bfloat16),
        ("bfloat16", "bfloat16", torch.bfloat16),
        ("bfloat16", None, torch.bfloat16),
        ("float32", "float16", torch.float16),
        ("float16", None, torch.float16),
    ],
)
def test_every_precision(on_cuda, dtype, autocast, at_the_door, how):
    """Whatever weights, norms and embeddings are in. Without autocast, layers of mixed dtypes do not go together."""
    if how == "qlora" and (autocast is None or dtype == "float32"):
        pytest.skip("a quantised model computes in the dtype of autocast")
    got = on_cuda(step, dtype=dtype, autocast=autocast, how=how)
    assert got.count("varlen") == got.count("varlen backward") == LAYERS
    for kernel in varlen_calls(got):
        assert_at_the_door(kernel, at_the_door)
    assert not got.waits


def test_casts(on_cuda):
    """Queries and keys come from rotary embeddings in float32, values do not; weights in half precision need none."""
    assert on_cuda(step).casts["attention"] == 2 * LAYERS
    assert "attention" not in on_cuda(step, dtype="bfloat16", autocast=None).casts
    # Without the kernel as well: not once per segment.
    assert on_cuda(step, kernel=False).casts["attention"] == 2 * LAYERS


def test_what_is_kept_for_backward(on_cuda):
    """Of attention: queries, gathered keys and values, outputs and normalisers, and the indices once for all layers. Nothing
    has a score per pair of tokens."""
    per_layer = 2 * ROW * HEADS * SIZE * 2 + 2 * KEYS * GROUPS * SIZE * 2 + ROW * HEADS * 4
    indices = 8 * KEYS + 2 * 4 * (2 * len(LENGTHS) + 1)
    small = 64 * LAYERS  # the random state that the kernel would have with dropout
    got = on_cuda(step)
    assert LAYERS * per_layer <= got.kept_in_attention <= LAYERS * per_layer + indices + small
    for checkpointing in (False, True):
        checkpointed = on_cuda(step, checkpointing=checkpointing)
        assert checkpointed.kept_in_attention == 0
        assert checkpointed.kept < got.kept / 2


@CHECKPOINTING
def test_padded_rows(on_cuda, checkpointing):
    """The attention that the model came with."""
    got = on_cuda(step, layout="padded", checkpointing=checkpointing)
    assert got.count("varlen") == 0
    assert got.count("efficient backward") == LAYERS
    assert not got.waits


@pytest.mark.parametrize(
    ("how", "reference", "forwards"),
    [("full", "copy", 2), ("lora", "adapter", 2), ("full", "cache", 1), ("lora", "cache", 1)],
)
@pytest.mark.parametrize("checkpointing", [None, True])
def test_every_reference(on_cuda, how, reference, forwards, checkpointing):
    """It runs in the kernel too, keeps nothing, and a cache is no wait."""
    got = on_cuda(step, how=how, reference=reference, checkpointing=checkpointing)
    alone = on_cuda(step, how=how, checkpointing=checkpointing)
    assert got.count("varlen") == LAYERS * forwards + (0 if checkpointing is None else LAYERS)
    assert got.count("varlen backward") == LAYERS
    assert not got.waits
    assert got.kept_in_attention == alone.kept_in_attention


def test_every_loss(on_cuda):
    waits = on_cuda(losses)
    assert set(waits) == {name for name in LOSSES if LOSSES[name].builtin}
    assert not [name for name, found in waits.items() if found]


def test_a_head_in_chunks(on_cuda):
    """As many columns as make a chunk of 67 tokens; M = 216 scored tokens never have their logits at once."""
    vocabulary = 2_000_000
    got = on_cuda(step, config={"vocab_size": vocabulary})
    assert got.count("varlen") == LAYERS
    assert not got.waits
    whole = on_cuda(step)
    assert got.kept < whole.kept + 2**20 < 100 * vocabulary, "bytes: less than a byte for each of their logits"


# --- where no variable-length kernel serves ---


@pytest.mark.parametrize("autocast", ["bfloat16", None])
def test_without_the_kernel_nothing_has_a_mask(on_cuda, autocast):
    """Half precision: flash attention, with keys in groups. float32: the kernel for both, with a head of keys for each of
    the queries. The scores of all pairs of tokens are never in memory."""
    got = on_cuda(step, autocast=autocast, kernel=False)
    name, groups = ("flash", GROUPS) if autocast else ("efficient", HEADS)
    calls = [kernel for kernel in got.kernels if kernel.name == name]
    assert len(calls) == len([k for k in got.kernels if "backward" not in k.name]) == LAYERS * 2 * len(LENGTHS)
    for kernel in calls:
        assert not kernel.masked
        assert [shape[1] for shape in kernel.shapes] == [HEADS, groups, groups]
    assert not got.waits


def test_a_window_without_the_kernel_has_one_mask_for_all_layers(on_cuda):
    """Of its own dtype, with rows that no kernel copies: a further layer keeps what one of a shorter row would."""
    kept = []
    for layers in (1, 2, 3):
        got = on_cuda(step, kind="mistral", autocast=None, kernel=False, config={"num_hidden_layers": layers})
        kept.append(got.kept_in_attention)
        assert got.count("math") == 0
        masked = [kernel.masked for kernel in got.kernels if kernel.name == "efficient"]
        assert len(masked) == layers * 2 * len(LENGTHS)
        assert any(masked)
    first, second, third = kept
    assert third - second == second - first
    # Queries, keys and values for each head, and outputs, in float32; normalisers in rows of at most 32 more.
    assert third - second <= (2 * ROW + 2 * KEYS) * HEADS * SIZE * 4 + (ROW + 32 * 2 * len(LENGTHS)) * HEADS * 4
    assert first > second - first, "the masks"


@pytest.mark.parametrize("kind", ["qwen2", "mistral", "gemma2"])
def test_batches_forget_their_masks_after_each_backward(on_cuda, kind):
    """Micro-batches live until the optimizer step."""
    got = on_cuda(step, kind=kind, autocast=None, micro_batches=3)
    assert got.remembered == [0, 0, 0]
    assert not got.waits


def test_the_watch_sees_what_it_looks_for(on_cuda):
    assert on_cuda(_a_wait) == ["aten::_local_scalar_dense", "cuda to cpu"]
    with pytest.raises(RuntimeError, match="cuda"):
        on_cuda(_two_devices)


def _a_wait() -> list[str]:
    with Watch() as watch:
        numbers = torch.ones(3, device="cuda")
        numbers.sum().item()
        numbers.cpu()
        numbers.to("cpu", non_blocking=True)
    return watch.waits


def _two_devices() -> None:
    torch.ones(3, device="cuda") + torch.ones(3)
