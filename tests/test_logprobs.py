"""Log-probs through the scoring head: equal to all logits of one sequence at a time, without holding them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import oracles
import pytest
import tiny
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from oracles import Answer
from peft import get_peft_model
from test_architectures import FLAT
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaForCausalLM, PhiConfig, PhiForCausalLM

from dpo_trainer.data.batches.collate import flat_inputs, padded_inputs
from dpo_trainer.models.unwrap import base_model, evaluation_mode
from dpo_trainer.scoring import head as head_module
from dpo_trainer.scoring import logprobs
from dpo_trainer.scoring.head import Head, chunk_size, stats_of
from dpo_trainer.scoring.logprobs import METRIC_STATS, Scorer, router_loss_weight
from dpo_trainer.types import PairBatch, PairLogps, Preferred, TokenizedPair

PAIRS = oracles.random_pairs([(5, 3, 6), (1, 1, 1), (9, 4, 2)])  # 17 scored tokens
LAYOUTS = {"flat": flat_inputs, "padded": padded_inputs}
STATS = METRIC_STATS | {"log_sum_sq"}


def batch_of(layout: str = "flat", rows: Sequence[TokenizedPair] = PAIRS) -> PairBatch:
    return PairBatch.from_inputs(LAYOUTS[layout](rows, 0))


def sums(logps: PairLogps) -> Tensor:
    """[2N] in the order of `oracles.sequences`."""
    return torch.stack([logps.chosen, logps.rejected], dim=1).flatten()


def score(
    model: nn.Module, layout: str = "flat", rows: Sequence[TokenizedPair] = PAIRS, **options: Any
) -> tuple[PairLogps, dict[str, Tensor]]:
    """Log-probs, and the gradients of their mix, as a training step gets them."""
    model.zero_grad()
    scorer = Scorer(model, **options)
    with scorer.step():
        logps = scorer(model, batch_of(layout, rows))
        oracles.mix(sums(logps)).backward()
    return logps, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_equals_oracle(got: PairLogps, gradients: dict[str, Tensor], want: Answer) -> None:
    """float32 against float64: worst seen 5e-6 nats and 1e-5 of a gradient."""
    assert got.chosen.dtype == got.rejected.dtype == got.tokens.logps.dtype == torch.float32
    torch.testing.assert_close(sums(got).detach().double(), want.sums, rtol=0, atol=oracles.NATS)
    oracles.assert_same_gradients(gradients, want.gradients)


pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")

# --- heads ---


def with_adapter(**options: Any) -> nn.Module:
    """A Llama with adapters that were trained before, so that they change what the head says."""
    model = get_peft_model(tiny.llama(), tiny.lora(**options))
    tiny.fill_adapters(model, scale=0.3)
    return model.eval()


def phi() -> nn.Module:
    """Its head has a bias, which begins at zero: give it one that matters."""
    model = PhiForCausalLM(PhiConfig(**tiny.SIZES)).eval()
    nn.init.normal_(model.lm_head.bias)
    return model


HEADS: dict[str, Callable[[], nn.Module]] = {
    "plain": lambda: tiny.llama().eval(),
    "bias": phi,
    "tied": lambda: tiny.llama(tie_word_embeddings=True).eval(),
    "soft cap": FLAT["gemma2"].build,
    "logit scale": FLAT["cohere"].build,
    "logits scaling": FLAT["granite"].build,
    "lora beside": lambda: with_adapter(target_modules=["q_proj", "v_proj"]),
    "lora on it": lambda: with_adapter(target_modules=["q_proj", "lm_head"]),
    "dora on it": lambda: with_adapter(target_modules=["lm_head"], use_dora=True),
    "saved module": lambda: with_adapter(target_modules=["q_proj"], modules_to_save=["lm_head"]),
}


@pytest.mark.parametrize("chunk", [None, 1, 4], ids=["one chunk", "chunks of 1", "chunks of 4"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("head", HEADS)
def test_against_the_oracle(head, layout, chunk, monkeypatch):
    """17 scored tokens in 1, 17 or 5 chunks: the last one shorter than the others."""
    model, calls = HEADS[head](), []
    if chunk is not None:
        monkeypatch.setattr(head_module, "chunk_size", lambda *_: calls.append(chunk) or chunk)
    got, gradients = score(model, layout)
    assert_equals_oracle(got, gradients, oracles.answer(model, PAIRS))
    assert bool(calls) == (chunk is not None)


def test_the_heads_above_differ_from_a_plain_one():
    """What makes a head special is at work in its case: without it, the log-probs are others."""

    def off(model: nn.Module, change: Callable[[], Any]) -> float:
        before = oracles.sums(model, PAIRS[:1])
        change()
        return (oracles.sums(model, PAIRS[:1]) - before).abs().max().item()

    models = {name: HEADS[name]() for name in HEADS}
    bias, cap, granite = models["bias"], models["soft cap"], models["logits scaling"]
    assert off(bias, lambda: nn.init.zeros_(bias.lm_head.bias)) > 0.1
    assert off(cap, lambda: setattr(cap.config, "final_logit_softcapping", None)) > 0.1
    assert off(models["logit scale"], lambda: setattr(models["logit scale"], "logit_scale", 1.0)) > 0.1
    assert off(granite, lambda: setattr(granite.config, "logits_scaling", 1.0)) > 0.1
    assert off(models["lora on it"], models["lora on it"].disable_adapter_layers) > 0.1
    assert models["tied"].lm_head.weight is models["tied"].model.embed_tokens.weight


@pytest.mark.parametrize("layout", LAYOUTS)
def test_token_by_token(layout):
    want = torch.cat(order(oracles.answer(tiny.llama(), PAIRS).tokens, layout))
    got, _ = score(tiny.llama(), layout)
    torch.testing.assert_close(got.tokens.logps.detach().double(), want, rtol=0, atol=oracles.NATS)


def order(per_sequence: list[Any], layout: str) -> list[Any]:
    """chosen 0, rejected 0, chosen 1 ... as the layout's completions stand: padded has all chosen ones first."""
    return per_sequence if layout == "flat" else per_sequence[0::2] + per_sequence[1::2]


def test_bfloat16_models_sum_in_float32():
    """The weights are rounded to 8 bits, the sums are not: within 2 % of the oracle on the very same weights."""
    model = tiny.llama().bfloat16()
    got, _ = score(model)
    want = oracles.sums(model, PAIRS)
    assert got.chosen.dtype == torch.float32
    torch.testing.assert_close(sums(got).detach().double(), want, rtol=0.02, atol=0)


# --- rows of several completions, and tokens that are read but not scored ---

MIXED = oracles.random_pairs([(5, 3, 6), (4, 2, 5, 3), (1, 1, 1), (6, 3, 1, 4, 2, 5)])
MIXED[0] = dataclasses.replace(MIXED[0], unscored=((1, 1, 4),))
MIXED[1] = dataclasses.replace(MIXED[1], unscored=((0, 0, 1), (2, 2, 3)), pairs=(Preferred(0, 1), Preferred(2, 1)))
MIXED[3] = dataclasses.replace(MIXED[3], unscored=((2, 1, 2), (4, 0, 2), (4, 3, 4)))
ROWS = {
    "K = 2": oracles.random_pairs([(5, 3, 6), (2, 4, 1)]),
    "K = 3": oracles.random_pairs([(5, 3, 6, 2), (2, 4, 1, 3)]),
    "K = 5": oracles.random_pairs([(5, 3, 6, 2, 1, 4)]),
    "mixed": MIXED,
}
# Plain; soft caps and sliding windows; sinks and experts; learned positions; a window shorter than the rows.
ARCHITECTURES = ["llama", "gemma2", "gpt-oss", "gpt2", "mistral"]


@cache
def answer_of(name: str, rows: str) -> tuple[nn.Module, Answer]:
    model = FLAT[name].build()
    return model, oracles.answer(model, ROWS[rows])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_rows_of_several_completions_against_the_oracle(name, rows, layout):
    """Each completion behind its prompt as if nothing else were there; gradients of all pairs that share it add up."""
    model, want = answer_of(name, rows)
    got, gradients = score(model, layout, ROWS[rows])
    assert len(got.chosen) == sum(len(row.pairs) for row in ROWS[rows])
    assert_equals_oracle(got, gradients, want)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_third_completion_that_sees_the_first_would_show(name):
    """In the two pairs that it is in, and nowhere else: (0, 1), (0, 2), (1, 2) of the first row, then those of the second."""
    model, want = answer_of(name, "K = 3")
    batch, longer = batch_of("flat", ROWS["K = 3"]), len(ROWS["K = 3"][0].chosen_ids)
    before, (third, *after) = batch.segments.prefix_length[:2], batch.segments.prefix_length[2:]
    wrong = dataclasses.replace(batch.segments, prefix_length=(*before, third + longer, *after))
    with torch.no_grad():
        got = sums(Scorer(model)(model, dataclasses.replace(batch, segments=wrong)))
    assert ((got - want.sums).abs() > 20 * oracles.NATS).nonzero().flatten().tolist() == [3, 5]


@pytest.mark.parametrize("rows", ROWS)
def test_every_token_is_computed_once(rows):
    """prompt + completions, however many pairs they are in: counted where tokens enter the model."""
    model, entered = tiny.llama(), []
    model.get_input_embeddings().register_forward_pre_hook(lambda _, args: entered.append(args[0].numel()))
    batch = batch_of("flat", ROWS[rows])
    Scorer(model)(model, batch)
    tokens = sum(len(row.prompt_ids) + sum(map(len, row.completions)) for row in ROWS[rows])
    assert entered == [tokens]
    assert batch.num_tokens == tokens


def test_unscored_tokens_are_read():
    """Other tokens there, other log-probs behind them; their own log-probs are in no sum."""
    row = oracles.random_pairs([(3, 6, 2)])[0]
    row = dataclasses.replace(row, unscored=((0, 2, 4),))
    other = dataclasses.replace(row, chosen_ids=[*row.chosen_ids[:2], 5, 6, *row.chosen_ids[4:]])
    model = tiny.llama()
    (one, _), (two, _) = score(model, rows=[row]), score(model, rows=[other])
    assert one.chosen_lengths.tolist() == [4]
    same, different = one.tokens.logps[:2] - two.tokens.logps[:2], one.tokens.logps[2:4] - two.tokens.logps[2:4]
    assert same.abs().max() < oracles.NATS
    assert different.abs().min() > 20 * oracles.NATS


# --- chunks ---


@pytest.mark.parametrize("head", ["plain", "lora on it"])
def test_chunks_change_nothing(head, monkeypatch):
    """Log-probs, gradients and every statistic, against one chunk. float32, other shapes of the same products: 1e-6."""
    whole, whole_gradients = score(HEADS[head](), stats=STATS)
    monkeypatch.setattr(head_module, "chunk_size", lambda *_: 3)
    parts, part_gradients = score(HEADS[head](), stats=STATS)
    for name in ("logps", *STATS):
        torch.testing.assert_close(getattr(parts.tokens, name), getattr(whole.tokens, name), rtol=1e-5, atol=1e-5)
    oracles.assert_same_gradients(part_gradients, whole_gradients, rtol=1e-5)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_recomputed_chunks_repeat_their_dropout(dropout, monkeypatch):
    """LoRA on the head drops some of its input: backward must see the mask that forward saw.

    The same run without recomputation draws the same masks from the same seed, so it is equal to the last bits.
    """
    monkeypatch.setattr(head_module, "chunk_size", lambda *_: 4)
    model = with_adapter(target_modules=["lm_head"], lora_dropout=dropout).train()
    torch.manual_seed(3)
    recomputed, gradients = score(model)

    monkeypatch.setattr(head_module, "checkpoint", lambda function, *args, **_: function(*args))
    torch.manual_seed(3)
    kept, kept_gradients = score(model)
    torch.testing.assert_close(sums(recomputed), sums(kept), rtol=0, atol=1e-5)
    oracles.assert_same_gradients(gradients, kept_gradients, rtol=1e-5)

    torch.manual_seed(4)
    other, _ = score(model)
    assert ((sums(other) - sums(kept)).abs().max() > 0.01) == (dropout > 0), "another seed, another mask"


@pytest.mark.parametrize(
    ("vocabulary", "tokens"), [(32_000, 524), (151_936, 110), (262_144, 64), (1_000_000, 64), (260, 64_527)]
)
def test_chunk_size_on_a_cpu(vocabulary, tokens):
    """2^24 float32 logits, 64 MB, and never fewer than 64 tokens."""
    with torch.device("meta"):
        module, states = nn.Linear(8, vocabulary), torch.empty(1, 8)
    head = Head(module, module.forward)
    assert chunk_size(head, torch.empty(1, 8)) == tokens
    assert chunk_size(head, states) == max(64, 2**27 // vocabulary), "512 MB on an accelerator"


class LargestTensor(TorchDispatchMode):
    """Records the most elements that any operation returned, in forward and backward."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        made = [x.numel() for x in tree_leaves(out) if isinstance(x, Tensor)]
        self.elements = max([self.elements, *made])
        return out


LARGE = 4000
LARGE_HEADS: dict[str, Callable[[], nn.Module]] = {
    "plain": lambda: tiny.llama(vocab_size=LARGE),
    "soft cap": dataclasses.replace(FLAT["gemma2"], options=FLAT["gemma2"].options | {"vocab_size": LARGE}).build,
    "lora on it": lambda: get_peft_model(tiny.llama(vocab_size=LARGE), tiny.lora(target_modules=["lm_head"])),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("head", LARGE_HEADS)
def test_the_logits_of_a_batch_never_exist(head, layout, monkeypatch):
    """Nothing as large as [M, V], in forward or backward: the largest tensor is the head's own matrix [V, D]."""
    pairs = oracles.random_pairs([(2, 60, 50), (3, 70, 40)])
    scored, chunk, width = 60 + 50 + 70 + 40, 16, 32
    monkeypatch.setattr(head_module, "chunk_size", lambda *_: chunk)
    model = LARGE_HEADS[head]()
    batch = PairBatch.from_inputs(LAYOUTS[layout](pairs, 0))

    def largest(scorer: Scorer) -> int:
        with LargestTensor() as recorded, scorer.step():
            scorer(model, batch).margin().sum().backward()
        return recorded.elements

    scorer = Scorer(model, stats=STATS)
    # The states of a chunk, its logits and 4 heads' scores of [L, L] are smaller than [V, D] by these sizes.
    assert chunk * LARGE <= largest(scorer) <= LARGE * width
    scorer.through_head = False
    assert largest(scorer) >= scored * LARGE, "the recorder sees what the plain way holds"


def test_no_chunk_is_kept_for_backward(monkeypatch):
    """Small chunks that all wait for backward would be [M, V] again: what forward saves holds no logits at all."""
    monkeypatch.setattr(head_module, "chunk_size", lambda *_: 16)
    model = tiny.llama(vocab_size=LARGE)
    batch = PairBatch.from_inputs(flat_inputs(oracles.random_pairs([(2, 60, 50)]), 0))

    def logits_saved(scorer: Scorer) -> int:
        """Elements of tensors [tokens, V]; the head's matrix, which lives anyway, is [V, D] or its transpose."""
        saved: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
            scorer(model, batch)
        return sum(x.numel() for x in saved if x.shape[-1:] == (LARGE,) and x.shape[0] != tiny.SIZES["hidden_size"])

    scorer = Scorer(model, stats=STATS)
    assert logits_saved(scorer) == 0
    scorer.through_head = False
    assert logits_saved(scorer) >= 110 * LARGE


# --- statistics ---


def test_statistics_by_hand():
    """Logits (0, ln 3) -> p = (1/4, 3/4). Entropy ln 4 - 3/4 ln 3, log of summed squares ln(1/16 + 9/16)."""
    logits = torch.tensor([[0.0, math.log(3)], [0.0, math.log(3)]])
    out = stats_of(logits, torch.tensor([0, 1]), STATS)
    assert out["logps"].tolist() == pytest.approx([math.log(1 / 4), math.log(3 / 4)], abs=1e-6)
    assert out["entropy"].tolist() == pytest.approx([math.log(4) - 0.75 * math.log(3)] * 2, abs=1e-6)
    assert out["log_sum_sq"].tolist() == pytest.approx([math.log(10 / 16)] * 2, abs=1e-6)
    assert out["mean_logit"].tolist() == pytest.approx([math.log(3) / 2] * 2, abs=1e-6)
    assert out["is_top1"].tolist() == [0.0, 1.0]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 2**-8)], ids=str)
@pytest.mark.parametrize("block", [1, 3, 100])
def test_gradient_of_the_logits_by_blocks(block, dtype, tolerance, monkeypatch):
    """grad_t (1[v is the target] - p_v), from autograd in float64. The gradient is rounded once to the dtype of the logits.

    Large logits (exponentials alone would overflow), a masked entry of the vocabulary, a target that is certain.
    """
    monkeypatch.setattr(head_module, "_block_size", lambda *_: block)
    numbers = torch.Generator().manual_seed(1)
    logits = (torch.randn(7, 11, generator=numbers) * 4 + torch.arange(7)[:, None] * 30).to(dtype)
    logits[:, 4] = -math.inf
    logits[6, 2] += 500
    targets, grad = torch.tensor([0, 1, 2, 3, 10, 5, 2]), torch.randn(7, generator=numbers)
    mine, exact = logits.clone().requires_grad_(), logits.double().requires_grad_()

    out = stats_of(mine, targets, STATS)
    want = exact.log_softmax(1).gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(out["logps"].double(), want, rtol=1e-6, atol=1e-5)
    p = exact.detach().softmax(1)
    entropy = -(p * p.clamp_min(1e-300).log()).sum(1)
    torch.testing.assert_close(out["entropy"].double(), entropy, rtol=1e-5, atol=1e-5)

    (got,) = torch.autograd.grad(out["logps"], mine, grad)
    (reference,) = torch.autograd.grad(want, exact, grad.double())
    assert got.dtype == dtype
    assert reference.abs().max() > 0.5
    torch.testing.assert_close(got.double(), reference, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("head", ["plain", "soft cap", "logit scale", "lora on it"])
def test_statistics_against_the_full_softmax(head, layout):
    """Of the distribution that the model predicts with: after caps and scales, with adapters. float32: 1e-5."""
    model = HEADS[head]()
    got = score(model, layout, stats=STATS)[0].tokens
    exact, rows, targets = oracles.in_double(model), [], []
    for prompt, completion in order(oracles.sequences(PAIRS), layout):
        rows.append(oracles.completion_logits(exact, prompt, completion).double())
        targets += completion
    logits = torch.cat(rows).detach()
    p = logits.softmax(-1)
    want = {
        "entropy": -(p * p.log()).sum(-1),
        "log_sum_sq": p.square().sum(-1).log(),
        "mean_logit": logits.mean(-1),
        "is_top1": (logits.argmax(-1) == torch.tensor(targets)).double(),
    }
    assert want.keys() == STATS
    for name, value in want.items():
        mine = getattr(got, name)
        assert not mine.requires_grad, name
        assert mine.dtype == torch.float32
        torch.testing.assert_close(mine.double(), value, rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_mixed_precision_leaves_the_statistics_alone(dtype, autocast):
    """To the bit, gradients too. Autocast rounds what goes into products of vectors: entropies were off by 1e-2, and NaN under
    float16 with a masked entry of the vocabulary."""
    logits = (torch.randn(9, 300, generator=torch.Generator().manual_seed(0)) * 3).to(dtype)
    logits[:, 7] = -math.inf
    targets = torch.arange(9)

    def computed() -> dict[str, Tensor]:
        leaf = logits.clone().requires_grad_()
        out = stats_of(leaf, targets, STATS)
        out["logps"].sum().backward()
        return {**out, "gradient": leaf.grad}

    plain = computed()
    with torch.autocast("cpu", dtype=autocast):
        mixed = computed()
    assert plain["entropy"].isfinite().all()
    for name, value in plain.items():
        assert torch.equal(mixed[name], value), name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_statistics_of_a_model_under_mixed_precision(layout, monkeypatch):
    """From the logits of a bfloat16 head, in float32: 1e-5 of what float64 makes of the same logits."""
    logits: list[Tensor] = []
    inner = head_module.stats_of
    monkeypatch.setattr(head_module, "stats_of", lambda x, *rest: logits.append(x.detach()) or inner(x, *rest))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        tokens = score(tiny.llama(), layout, stats=STATS)[0].tokens
    assert logits[0].dtype == torch.bfloat16
    p = logits[0].double().softmax(-1)
    torch.testing.assert_close(tokens.entropy.double(), -(p * p.log()).sum(-1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(tokens.log_sum_sq.double(), p.square().sum(-1).log(), rtol=1e-5, atol=1e-5)


def test_top1_is_not_always_0():
    """Random targets are never the most likely token: give the model its own choice as the target."""
    model = tiny.llama().eval()
    pair = PAIRS[0]
    best = oracles.completion_logits(model, pair.prompt_ids, pair.chosen_ids)[0].argmax().item()
    pairs = [dataclasses.replace(pair, chosen_ids=[best])]
    with torch.no_grad():
        tokens = Scorer(model, stats=STATS)(model, PairBatch.from_inputs(flat_inputs(pairs, 0))).tokens
    assert tokens.is_top1[0] == 1


def test_statistics_only_when_asked():
    tokens = score(tiny.llama())[0].tokens
    assert all(getattr(tokens, name) is None for name in STATS)
    one = score(tiny.llama(), stats=frozenset({"entropy"}))[0].tokens
    assert one.entropy is not None
    assert one.log_sum_sq is None
    scorer = Scorer(tiny.llama(), stats=STATS)
    reference = scorer(tiny.llama(), batch_of(), extras=False)
    assert all(getattr(reference.tokens, name) is None for name in STATS)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_plain_way_gives_the_same(layout):
    """All logits at once: the yardstick of the first batch, and the last resort for unknown heads."""
    model = tiny.llama()
    through_head, _ = score(model, layout, stats=STATS)
    scorer = Scorer(model, stats=STATS)
    scorer.through_head = False
    plain = scorer(model, batch_of(layout))
    torch.testing.assert_close(sums(plain), sums(through_head), rtol=0, atol=oracles.NATS)
    torch.testing.assert_close(plain.tokens.entropy, through_head.tokens.entropy, rtol=1e-5, atol=1e-5)


# --- the model afterwards ---


class Broken(RuntimeError):
    pass


def break_layer(model: LlamaForCausalLM) -> None:
    def fail(*_: Any) -> None:
        raise Broken

    model.model.norm.register_forward_pre_hook(fail)


@pytest.mark.parametrize("broken", [False, True])
@pytest.mark.parametrize("head", ["plain", "soft cap", "logit scale", "logits scaling", "lora on it"])
def test_head_and_config_are_as_before(head, broken):
    """After a call and after an error inside it: `generate`, callbacks and `save_pretrained` see the model itself."""
    model = HEADS[head]()
    base = base_model(model)
    config, scale = base.config.to_dict(), getattr(base, "logit_scale", None)
    batch = batch_of()
    ids = {"input_ids": torch.tensor([[5, 6, 7]]), "use_cache": False}
    before = model(**ids).logits
    if broken:
        break_layer(base)
        with pytest.raises(Broken):
            Scorer(model)(model, batch)
        base.model.norm._forward_pre_hooks.clear()
    else:
        Scorer(model)(model, batch)
    assert "forward" not in base.get_output_embeddings().__dict__
    assert base.config.to_dict() == config
    assert getattr(base, "logit_scale", None) == scale
    assert torch.equal(model(**ids).logits, before)


@pytest.mark.parametrize("broken", [False, True])
def test_a_forward_that_somebody_else_put_on_the_head_stays(broken):
    """accelerate's device hooks put theirs on the instance; it runs for each chunk, and is there afterwards."""
    model, calls = tiny.llama(), []

    class Counting(ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            calls.append(args[0].shape)
            return args, kwargs

    add_hook_to_module(model.lm_head, Counting())
    theirs = model.lm_head.__dict__["forward"]
    if broken:
        break_layer(model)
        with pytest.raises(Broken):
            Scorer(model)(model, batch_of())
    else:
        got, gradients = score(model)
        assert calls == [(17, tiny.SIZES["hidden_size"])]
        assert_equals_oracle(got, gradients, oracles.answer(tiny.llama(), PAIRS))
    assert model.lm_head.__dict__["forward"] is theirs


def test_log_probs_leave_through_the_models_output():
    """Wrappers such as DDP attach their backward to what the model returns: it must be on the way of the gradient."""
    model, seen = tiny.llama(), []
    model.register_forward_hook(lambda module, args, output: seen.append(output.logits))
    scorer = Scorer(model)
    with scorer.step():
        logps = scorer(model, batch_of())
        (output,) = seen
        assert output.shape == (1, 17)
        (reaching,) = torch.autograd.grad(logps.chosen.sum(), output, retain_graph=True)
    chosen = torch.isin(logps.tokens.completion, logps.tokens.chosen)
    assert torch.equal(reaching[0], chosen.float())


class LastLogitOnly(LlamaForCausalLM):
    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits = out.logits[..., -1:]
        return out


def test_a_model_that_reshapes_its_logits_is_an_error():
    model = LastLogitOnly(tiny.llama().config)
    with pytest.raises(RuntimeError, match=r"LastLogitOnly reshapes .* got \(1, 1\) for 17 scored tokens"):
        Scorer(model)(model, batch_of())


# --- virtual tokens, router loss, small helpers ---


def test_virtual_tokens_shift_the_scored_states():
    """Rows of 3 tokens behind 2 virtual ones: position (r, c) of 3 r + c stands at 5 r + 2 + c."""
    pairs = oracles.random_pairs([(1, 2, 2)])
    batch = PairBatch.from_inputs(padded_inputs(pairs, 0))
    assert batch.score_at.tolist() == [0, 1, 3, 4]
    hidden = torch.arange(10.0).view(2, 5, 1)
    assert logprobs._states(hidden, batch).flatten().tolist() == [2.0, 3.0, 7.0, 8.0]
    assert logprobs._states(hidden[:, 2:], batch).flatten().tolist() == [2.0, 3.0, 7.0, 8.0]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_router_loss_when_asked(layout):
    """Its value and gradients are checked in test_architectures.py."""
    model = tiny.mixtral()
    assert Scorer(model)(model, batch_of(layout)).aux_loss is None
    scorer = Scorer(model, router_loss=True)
    assert (
        scorer(model, batch_of(layout)).aux_loss > 1
    )  # E * sum of f p is 2, the number of experts per token, when even
    assert scorer(model, batch_of(layout), extras=False).aux_loss is None
    scorer.through_head = False
    assert scorer(model, batch_of("padded")).aux_loss is not None


def test_weight_of_the_router_loss():
    off, on = tiny.mixtral(), tiny.mixtral(output_router_logits=True, router_aux_loss_coef=0.03)
    assert router_loss_weight(off, None) == 0.0
    assert router_loss_weight(on, None) == 0.03
    assert router_loss_weight(off, 0.5) == 0.5
    assert router_loss_weight(on, 0.0) == 0.0
    assert router_loss_weight(tiny.llama(), None) == 0.0
    assert router_loss_weight(tiny.llama(), 0.0) == 0.0
    with pytest.raises(ValueError, match=r"--router_aux_loss_coef 0.1 needs a mixture-of-experts .*LlamaForCausalLM"):
        router_loss_weight(tiny.llama(), 0.1)


def test_base_model_under_peft():
    model = tiny.llama()
    assert base_model(model) is model
    assert base_model(get_peft_model(model, tiny.lora())) is model


def test_evaluation_mode_gives_each_module_its_own_mode_back():
    model = tiny.llama().train()
    model.lm_head.eval()
    before = {name: module.training for name, module in model.named_modules()}
    assert set(before.values()) == {True, False}
    with evaluation_mode(model):
        assert not any(module.training for module in model.modules())
    assert {name: module.training for name, module in model.named_modules()} == before
    with pytest.raises(Broken), evaluation_mode(model):
        raise Broken
    assert {name: module.training for name, module in model.named_modules()} == before
