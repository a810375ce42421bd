"""Shared-prompt attention against a [T, T] mask that is written out, and how it gets on and off a model."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
from typing import Any

import oracles
import pytest
import tiny
import torch
from torch import Tensor, nn
from torch.nn.attention.bias import CausalBias
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AttentionInterface,
    CLIPVisionConfig,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MistralConfig,
    MistralForCausalLM,
)
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from dpo_trainer.data.batches.collate import flat_inputs, padded_inputs
from dpo_trainer.scoring import attention
from dpo_trainer.scoring.attention import NAME, SegmentsLost, SharedPromptAttention, shared_prompt_attention
from dpo_trainer.scoring.logprobs import Scorer
from dpo_trainer.types import PairBatch, Segments

# Several pairs in a row; parts of one token; prompts and completions on both sides of the windows below.
PAIRS = oracles.random_pairs([(4, 3, 5), (1, 1, 1), (7, 2, 1), (2, 6, 4)])
SEGMENTS = flat_inputs(PAIRS, 0)["segments"]
T = sum(SEGMENTS.length)
MODULE = nn.Module()


def tensors(
    heads: int = 4, groups: int = 4, d: int = 8, dv: int = 8, dtype: torch.dtype = torch.float64
) -> list[Tensor]:
    """Random queries [1, H, T, d], keys [1, K, T, d] and values [1, K, T, dv], of unit size."""
    numbers = torch.Generator().manual_seed(5)
    shapes = [(1, heads, T, d), (1, groups, T, d), (1, groups, T, dv)]
    return [torch.randn(s, generator=numbers, dtype=dtype).requires_grad_() for s in shapes]


SINKS = torch.tensor([-1.0, 0.0, 1.0, 3.0], dtype=torch.float64)
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # shapes, options
    "plain": ({}, {}),
    "scaled": ({}, {"scaling": 1.7}),
    "grouped": ({"groups": 2}, {}),
    "one key head": ({"groups": 1}, {}),
    "value size": ({"dv": 6}, {}),
    "window 2": ({}, {"sliding_window": 2}),
    "window 3": ({"groups": 2}, {"sliding_window": 3}),  # smaller than most segments and prefixes
    "window 8": ({}, {"sliding_window": 8}),  # larger than most segments, smaller than prefix + segment
    "window 64": ({}, {"sliding_window": 64}),
    "softcap": ({"groups": 2}, {"softcap": 1.5}),
    "softcap, window": ({}, {"softcap": 1.5, "sliding_window": 3}),
    "sinks": ({"groups": 2}, {"s_aux": SINKS}),
    "sinks, window": ({"dv": 6}, {"s_aux": SINKS, "sliding_window": 3}),
}


@pytest.mark.parametrize("block", [attention.QUERY_BLOCK, 2])
@pytest.mark.parametrize("name", VARIANTS)
def test_against_the_mask_written_out(name, block, monkeypatch):
    """Output, and gradients of queries, keys, values (and sinks); segments in one block of queries, and in several."""
    assert max(SEGMENTS.length) < attention.QUERY_BLOCK
    monkeypatch.setattr(attention, "QUERY_BLOCK", block)
    shapes, options = VARIANTS[name]
    if "s_aux" in options:
        options = {**options, "s_aux": SINKS.clone().requires_grad_()}
    leaves = [*tensors(**shapes), *[v for v in options.values() if isinstance(v, Tensor)]]

    got, weights = shared_prompt_attention(MODULE, *leaves[:3], None, segments=SEGMENTS, **options)
    want = oracles.attention(
        *leaves[:3],
        oracles.visible(PAIRS, options.get("sliding_window")),
        options.get("scaling", 8**-0.5),
        options.get("softcap"),
        options.get("s_aux"),
    )
    assert weights is None
    assert got.shape == (1, T, 4, leaves[2].shape[-1])
    # float64; the written-out path takes its softmax in float32, as the models that need it do.
    atol = 1e-6 if {"softcap", "s_aux"} & options.keys() else 1e-12
    torch.testing.assert_close(got, want, rtol=0, atol=atol)

    direction = torch.randn(want.shape, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    got_grads = torch.autograd.grad((got * direction).sum(), leaves)
    want_grads = torch.autograd.grad((want * direction).sum(), leaves)
    for a, b in zip(got_grads, want_grads, strict=True):
        assert b.abs().max() > 0.01
        torch.testing.assert_close(a, b, rtol=0, atol=10 * atol)


@pytest.mark.filterwarnings("ignore:.*(kernel|attention|dtype).*")
@pytest.mark.parametrize("name", [name for name in VARIANTS if not name.startswith("one")])
def test_calls_per_segment_as_on_a_gpu(name, monkeypatch):
    """No mask without a window, rows of 16 entries in one with it, keys repeated for each head: the numbers are the same. The
    tensors only say that they are on a GPU."""
    masks: list[Tensor | None] = []
    mask_of = attention._mask

    def noted(*args: Any) -> Tensor | None:
        masks.append(mask_of(*args))
        return masks[-1]

    shapes, options = VARIANTS[name]
    want, _ = shared_prompt_attention(MODULE, *tensors(**shapes), None, segments=SEGMENTS, **options)
    segments = dataclasses.replace(SEGMENTS)  # which remembers nothing
    monkeypatch.setattr(attention, "_mask", noted)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    monkeypatch.setattr(torch.Tensor, "is_cpu", False)
    got, _ = shared_prompt_attention(MODULE, *tensors(**shapes), None, segments=segments, **options)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
    read = [mask for mask in masks if mask is not None and not isinstance(mask, CausalBias)]
    assert bool(read) == (options.get("sliding_window", 64) < 64 and not {"softcap", "s_aux"} & options.keys())
    assert all(mask.stride(0) % 16 == 0 for mask in read)


def test_calls_per_segment_as_on_a_gpu_while_operations_are_counted(monkeypatch):
    """torch cannot make its causal bias there: a mask serves."""
    want, _ = shared_prompt_attention(MODULE, *tensors(), None, segments=SEGMENTS)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    monkeypatch.setattr(torch.Tensor, "is_cpu", False)
    with FlopCounterMode(display=False):
        got, _ = shared_prompt_attention(MODULE, *tensors(), None, segments=dataclasses.replace(SEGMENTS))
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


def test_the_variants_differ_from_each_other():
    """Each option changes the result: none of the comparisons above is of an option that does nothing."""
    options = [{}, {"scaling": 1.7}, {"sliding_window": 1}, {"sliding_window": 3}, {"sliding_window": 8}]
    options += [{"softcap": 1.5}, {"s_aux": SINKS}]
    outputs = [shared_prompt_attention(MODULE, *tensors(), None, segments=SEGMENTS, **o)[0] for o in options]
    for a, b in itertools.combinations(outputs, 2):
        assert (a - b).abs().max() > 1e-3


def test_blocks_of_queries_do_not_look_at_keys_behind_their_last(monkeypatch):
    """Pairs of query and key that the kernel is given: those of blocks [2 x 2, 2 x 4, 1 x 5], and not 5 x 5."""
    given, kernel = [], attention.F.scaled_dot_product_attention

    def counted(query: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        given.append((query.shape[2], key.shape[2]))
        return kernel(query, key, *args, **kwargs)

    monkeypatch.setattr(attention.F, "scaled_dot_product_attention", counted)
    monkeypatch.setattr(attention, "QUERY_BLOCK", 2)
    segments = Segments(length=(5, 3), prefix_start=(0, 0), prefix_length=(0, 4))
    shared_prompt_attention(MODULE, *(x[:, :, :8] for x in tensors()), None, segments=segments)
    assert given == [(2, 2), (2, 4), (1, 5), (2, 6), (1, 7)]


def test_samples_of_one_prompt_share_it():
    """prompt | a | b | c: every completion sees the prompt (3 tokens) and itself."""
    segments = Segments(length=(5, 4, 3), prefix_start=(0, 0, 0), prefix_length=(0, 3, 3))
    owner = [0, 0, 0, 1, 1, 2, 2, 2, 2, 3, 3, 3]
    seen = torch.tensor([[j <= i and owner[j] in (0, owner[i]) for j in range(len(owner))] for i in range(len(owner))])
    qkv = [x[:, :, :12] for x in tensors()]
    got, _ = shared_prompt_attention(MODULE, *qkv, None, segments=segments)
    torch.testing.assert_close(got, oracles.attention(*qkv, seen, 8**-0.5), rtol=0, atol=1e-12)


def test_a_completion_never_sees_its_sibling_or_another_pair():
    """Not a little: bit for bit the same output whatever stands there."""
    query, key, value = tensors(dtype=torch.float32)
    seen = oracles.visible(PAIRS)
    for first in (4, 8, 15, 23):  # somewhere in a chosen, a rejected, a prompt, the last pair
        changed = [x.detach().clone() for x in (query, key, value)]
        for x in changed:
            x[:, :, first] += 100.0
        before, _ = shared_prompt_attention(MODULE, query, key, value, None, segments=SEGMENTS)
        after, _ = shared_prompt_attention(MODULE, *changed, None, segments=SEGMENTS)
        differs = (before != after).any(dim=-1).any(dim=-1)[0]
        assert torch.equal(differs, seen[:, first]), "exactly the tokens that see it change"


@pytest.mark.parametrize("options", [{}, {"softcap": 50.0}], ids=["kernel", "written out"])
def test_dropout_drops_weights_and_scales_the_rest(options):
    """With values of 1 the output is the sum of the kept weights / (1 - p): 1 on average.

    A token that sees only itself has one weight: 0 or 1 / (1 - p) exactly.
    """
    p = 0.25
    query, key, value = tensors(dtype=torch.float32)
    ones = torch.ones_like(value)
    draws = torch.stack(
        [
            shared_prompt_attention(MODULE, query, key, ones, None, dropout=p, segments=SEGMENTS, **options)[
                0
            ].detach()
            for _ in range(200)
        ]
    )
    assert draws.shape[1:] == (1, T, 4, 8)
    first = draws[:, 0, 0, :, 0]  # 800 draws of one weight
    kept = first > 0
    torch.testing.assert_close(first[kept], torch.full_like(first[kept], 1 / (1 - p)))
    assert abs(kept.float().mean() - (1 - p)) < 4 * math.sqrt(p * (1 - p) / 800)  # four standard deviations
    assert abs(draws.mean() - 1) < 0.03
    plain, _ = shared_prompt_attention(MODULE, query, key, ones, None, segments=SEGMENTS, **options)
    torch.testing.assert_close(plain, torch.ones_like(plain))


# --- what it refuses ---


def test_missing_segments_are_an_error():
    with pytest.raises(SegmentsLost, match="Linear does not pass extra arguments on"):
        shared_prompt_attention(nn.Linear(1, 1), *tensors(), None)


@pytest.mark.parametrize("where", ["argument", "module", "bias"])
def test_attention_that_is_not_plainly_causal_is_refused(where):
    module = nn.Module()
    if where == "module":
        module.is_causal = False
    options = {"argument": {"is_causal": False}, "module": {}, "bias": {"position_bias": torch.zeros(1)}}[where]
    with pytest.raises(SegmentsLost, match="not a plain causal attention"):
        shared_prompt_attention(module, *tensors(), None, segments=SEGMENTS, **options)


# --- how it gets on and off a model ---


def batch_of(layout: str = "flat") -> PairBatch:
    return PairBatch.from_inputs({"flat": flat_inputs, "padded": padded_inputs}[layout](PAIRS, 0))


def test_registered_under_a_name_that_transformers_reads_nothing_into():
    assert AttentionInterface()[NAME] is shared_prompt_attention
    assert not any(word in NAME for word in ("flash", "sdpa", "flex_attention"))
    assert (
        NAME not in ALL_MASK_ATTENTION_FUNCTIONS
    )  # else restarted positions become a [T, T] mask of packed sequences


def test_installed_and_taken_off():
    model = tiny.llama(attn_implementation="eager")
    switch = SharedPromptAttention(model)
    with switch.installed():
        assert switch.is_installed
        assert model.config._attn_implementation == NAME
        with switch.installed():
            assert switch.is_installed
        assert switch.is_installed, "an inner use must not take it off"
    assert not switch.is_installed
    assert model.config._attn_implementation == "eager"


def test_taken_off_after_an_error():
    model = tiny.llama()
    switch = SharedPromptAttention(model)
    with pytest.raises(KeyError), switch.installed(), switch.installed():
        raise KeyError
    assert model.config._attn_implementation == "sdpa"


def test_a_config_with_several_parts_changes_in_the_text_part_only():
    """A vision tower must keep its own attention."""
    config = LlavaConfig(
        text_config=LlamaConfig(**tiny.SIZES),
        vision_config=CLIPVisionConfig(
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            image_size=8,
            patch_size=4,
        ),
    )
    model = LlavaForConditionalGeneration(config)
    with SharedPromptAttention(model).installed():
        assert model.config.text_config._attn_implementation == NAME
        assert model.config.vision_config._attn_implementation == "sdpa"
        assert model.config._attn_implementation == "sdpa"
    assert model.config.text_config._attn_implementation == "sdpa"


class Broken(RuntimeError):
    pass


@pytest.mark.parametrize("inside_step", [False, True])
def test_scoring_leaves_the_model_its_own_attention(inside_step):
    """After a call, after an error in the middle of the model, and after the step that held it."""
    model = tiny.llama()
    scorer = Scorer(model)
    if inside_step:
        with scorer.step():
            scorer(model, batch_of())
            assert model.config._attn_implementation == NAME, "backward is still to come"
            with torch.no_grad():
                scorer(model, batch_of())
            assert model.config._attn_implementation == NAME, "scoring without gradients must not take it off"
    else:
        scorer(model, batch_of())
    assert model.config._attn_implementation == "sdpa"

    def fail(*_: Any) -> None:
        assert model.config._attn_implementation == NAME
        raise Broken

    model.model.layers[1].register_forward_pre_hook(fail)
    with pytest.raises(Broken), scorer.step() if inside_step else torch.no_grad():
        scorer(model, batch_of())
    assert model.config._attn_implementation == "sdpa"


def test_a_step_without_gradients_or_flat_rows_installs_nothing():
    model = tiny.llama()
    scorer = Scorer(model)
    with scorer.step():
        scorer(model, batch_of("padded"))
        assert model.config._attn_implementation == "sdpa"
        with torch.no_grad():
            scorer(model, batch_of())
        assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("options", [{"sliding_window": 3}, {"sliding_window": None}])
def test_a_batch_forgets_its_masks_when_its_step_is_over(options):
    """Micro-batches of an optimizer step are there until its end: their masks would be as well."""
    model = MistralForCausalLM(MistralConfig(**{**tiny.SIZES, **options}))
    scorer, batch = Scorer(model), batch_of()
    with scorer.step():
        scorer(model, batch).chosen.sum().backward()
        assert batch.segments._memo, "policy and reference share them"
    assert not batch.segments._memo


def test_all_layers_share_the_mask_of_a_segment(monkeypatch):
    """Also where autocast changes dtypes, and where the formula is written out."""
    made: list[tuple[int, ...]] = []
    visible = attention._visible

    def counted(q: int, k: int, *more: Any) -> Tensor:
        made.append((q, k))
        return visible(q, k, *more)

    monkeypatch.setattr(attention, "_visible", counted)
    for model in (MistralForCausalLM(MistralConfig(**{**tiny.SIZES, "sliding_window": 2})), Gemma2ForCausalLM(CAPPED)):
        made.clear()
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            Scorer(model)(model, batch_of())
        assert len(model.model.layers) == 2
        assert len(made) == len(set(made)) > 0


def test_backward_after_the_step_is_refused():
    model = tiny.llama()
    scorer = Scorer(model)
    late = scorer(model, batch_of()).chosen.sum()
    with pytest.raises(RuntimeError, match=r"inside one `Scorer.step\(\)` context"):
        late.backward()
    with scorer.step():
        later = scorer(model, batch_of()).chosen.sum()
    with pytest.raises(RuntimeError, match=r"inside one `Scorer.step\(\)` context"):
        later.backward()

    scorer(model, batch_of("padded")).chosen.sum().backward()  # padded rows need no context
    with scorer.step():
        scorer(model, batch_of()).chosen.sum().backward()


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
def test_why_the_guard_exists(monkeypatch):
    """A reentrant checkpoint that recomputes with the model's own attention gives wrong gradients without an error."""
    model = tiny.llama()
    model.train()
    want = oracles.answer(model, PAIRS).gradients
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    monkeypatch.setattr(SharedPromptAttention, "guard", lambda *_: None)
    logps = Scorer(model)(model, batch_of())
    oracles.mix(torch.stack([logps.chosen, logps.rejected], dim=1).flatten()).backward()
    off = [(p.grad - want[name]).norm() / want[name].norm() for name, p in model.named_parameters()]
    assert max(off) > 0.05


CAPPED = Gemma2Config(
    vocab_size=300,
    hidden_size=16,
    intermediate_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=8,
    query_pre_attn_scalar=1,
    attn_logit_softcapping=0.5,
    initializer_range=0.5,
    attn_implementation="eager",
)


@pytest.mark.parametrize("layout", ["flat", "padded"])
def test_scores_are_capped_whatever_attention_a_model_came_with(layout):
    """transformers before 5.21 gives Gemma 2 `sdpa`, and that leaves the cap out."""
    torch.manual_seed(0)
    model = Gemma2ForCausalLM(CAPPED).eval()
    want = oracles.answer(model, PAIRS)
    model.config._attn_implementation = "sdpa"
    logps = Scorer(model)(model, batch_of(layout))
    got = torch.stack([logps.chosen, logps.rejected], dim=1).flatten()
    torch.testing.assert_close(got.double(), want.sums, rtol=0, atol=oracles.NATS)
    assert model.config._attn_implementation == "eager"


def test_the_cap_matters():
    torch.manual_seed(0)
    model = Gemma2ForCausalLM(CAPPED).eval()
    want = oracles.answer(model, PAIRS).sums
    for layer in model.model.layers:
        layer.self_attn.attn_logit_softcapping = None
    assert (oracles.answer(model, PAIRS).sums - want).abs().max() > 0.1


def test_generate_before_during_and_after_a_step():
    """Greedy decoding of a model between steps is that of a copy that was never touched."""
    model = tiny.llama()
    untouched = copy.deepcopy(model)
    prompt = {"input_ids": torch.tensor([[5, 6, 7]]), "attention_mask": torch.ones(1, 3, dtype=torch.int64)}
    want = untouched.generate(**prompt, max_new_tokens=8, do_sample=False)
    scorer = Scorer(model)
    for _ in range(2):
        assert torch.equal(model.generate(**prompt, max_new_tokens=8, do_sample=False), want)
        with scorer.step():
            scorer(model, batch_of()).chosen.sum().backward()
    assert torch.equal(model.generate(**prompt, max_new_tokens=8, do_sample=False), want)
    assert model.config.to_dict() == untouched.config.to_dict()
