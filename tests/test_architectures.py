"""Every architecture that is promised, as a tiny model from its config: the layout it gets, its log-probs and gradients
against the one-sequence oracle, under no gradient checkpointing and both kinds of it.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import logging
from dataclasses import dataclass, field
from typing import Any

import oracles
import pytest
import torch
import transformers
from oracles import Answer
from peft import PromptTuningConfig, get_peft_model
from torch import Tensor, nn

from dpo_trainer.data.batches.collate import flat_inputs, padded_inputs
from dpo_trainer.scoring.layout import Layout
from dpo_trainer.scoring.logprobs import Scorer
from dpo_trainer.types import PairBatch, TokenizedPair

pytestmark = pytest.mark.filterwarnings(
    "ignore:`(gradient_checkpointing_enable|is_gradient_checkpointing)` is deprecated"
)

VOCABULARY = 97
# Prompts and completions on both sides of the sliding window of 4, and the shortest pair there is.
LENGTHS = [(5, 3, 6), (1, 1, 1), (9, 4, 2)]
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,  # attention far from uniform: a wrong mask must show
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
WINDOW = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"], "head_dim": 8}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}


@dataclass(frozen=True)
class Architecture:
    config: str
    options: dict[str, Any] = field(default_factory=dict)
    sizes: dict[str, Any] = field(default_factory=lambda: SIZES)
    model: str = ""  # class, where it is not that of the config with another ending

    def build(self) -> nn.Module:
        torch.manual_seed(0)
        config = getattr(transformers, self.config)(**{**self.sizes, **self.options})
        name = self.model or self.config.removesuffix("TextConfig").removesuffix("Config") + "ForCausalLM"
        return getattr(transformers, name)(config).eval()


def without(*names: str) -> dict[str, Any]:
    return {name: value for name, value in SIZES.items() if name not in names}


NO_DROPOUT_GPT2 = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
FLAT = {
    "llama": Architecture("LlamaConfig"),
    "qwen2": Architecture("Qwen2Config"),
    "qwen3": Architecture("Qwen3Config", {"head_dim": 8}),
    "mistral": Architecture("MistralConfig", {"sliding_window": 4}),
    "gemma2": Architecture(
        "Gemma2Config",
        {
            **WINDOW,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
            "query_pre_attn_scalar": 8,
            "attn_implementation": "eager",  # the default of transformers before 5.21 leaves the cap out
        },
    ),
    "gemma3": Architecture("Gemma3TextConfig", {**WINDOW, "query_pre_attn_scalar": 8}, model="Gemma3ForCausalLM"),
    "phi3": Architecture("Phi3Config"),
    "gpt-oss": Architecture(
        "GptOssConfig", {**WINDOW, **EXPERTS, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
    ),
    "olmo3": Architecture("Olmo3Config", {k: v for k, v in WINDOW.items() if k != "head_dim"}),
    "mixtral": Architecture("MixtralConfig", EXPERTS),
    "qwen3-moe": Architecture(
        "Qwen3MoeConfig", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8}
    ),
    "gpt2": Architecture("GPT2Config", NO_DROPOUT_GPT2, without("num_key_value_heads"), model="GPT2LMHeadModel"),
    "gpt-neox": Architecture("GPTNeoXConfig", sizes=without("num_key_value_heads")),
    "cohere": Architecture("CohereConfig", {"logit_scale": 0.3}),
    "granite": Architecture("GraniteConfig", {"logits_scaling": 4.0}),
    "opt": Architecture(
        "OPTConfig",
        {"ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.0, "init_std": 0.2},
        without("num_key_value_heads"),
    ),
}
PADDED = {
    "lfm2": Architecture("Lfm2Config", {"layer_types": ["conv", "full_attention"]}),
    "mamba2": Architecture(
        "Mamba2Config", {"num_heads": 8, "head_dim": 8, "n_groups": 1, "state_size": 8, "expand": 2}
    ),
    "qwen3-next": Architecture(
        "Qwen3NextConfig",
        {
            "layer_types": ["linear_attention", "full_attention"],
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 16,
            "linear_num_value_heads": 2,
            "linear_num_key_heads": 2,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "head_dim": 8,
        },
    ),
    "bloom": Architecture("BloomConfig", {"n_layer": 2, "n_head": 4}),
    "falcon": Architecture("FalconConfig"),
    "stablelm": Architecture("StableLmConfig"),
}


def prompt_tuned() -> nn.Module:
    torch.manual_seed(0)
    return get_peft_model(FLAT["llama"].build(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))


BUILD = {**{name: a.build for name, a in (FLAT | PADDED).items()}, "prompt-tuning": prompt_tuned}
REASON = {
    "lfm2": "its layers of type conv run along the row",
    "mamba2": "its layers of type linear_attention run along the row",
    "qwen3-next": "its layers of type linear_attention run along the row",
    "bloom": "its attention cannot be exchanged",
    "falcon": "its attention cannot be exchanged",
    "stablelm": "StableLmAttention does not pass extra arguments on to its attention",
    "prompt-tuning": "prompt-learning adapters put virtual tokens in front of a row",
}
LAYOUTS = {"flat": flat_inputs, "padded": padded_inputs}


def pairs() -> list[TokenizedPair]:
    return oracles.random_pairs(LENGTHS, VOCABULARY)


@functools.cache
def case(name: str) -> tuple[nn.Module, Answer]:
    """The model, and what the oracle says of it. Callers copy the model before they touch it."""
    model = BUILD[name]()
    return model, oracles.answer(model, pairs())


def train_copy(name: str, checkpointing: str) -> nn.Module:
    """A copy in training mode (the configs above leave no dropout), under "off", "reentrant" or "non-reentrant"."""
    model = copy.deepcopy(case(name)[0]).train()
    if checkpointing != "off":
        model.gradient_checkpointing_enable(
            gradient_checkpointing_kwargs={"use_reentrant": checkpointing == "reentrant"}
        )
    return model


def backward(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    """Gradients as a training step gets them: reentrant checkpoints allow `backward` only."""
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def count_attention_calls(model: nn.Module) -> list[str]:
    """A list that grows with each forward of a layer's attention, recomputed ones among them."""
    calls: list[str] = []
    for name, module in model.named_modules():
        if type(module).__name__.endswith(("Attention", "FlashAttention2")):
            module.register_forward_pre_hook(lambda *_, name=name: calls.append(name))
    return calls


def settled(model: nn.Module) -> tuple[Layout, Scorer, PairBatch]:
    """Layout and scorer after their first batch, and that batch as it is then trained on."""
    scorer = Scorer(model)
    layout = Layout("auto", [(scorer, model)], pad_token_id=0)
    batch = PairBatch.from_inputs(LAYOUTS[layout.name](pairs(), 0))
    return layout, scorer, layout.settle(model, batch)


def assert_equals_oracle(name: str, model: nn.Module, scorer: Scorer, batch: PairBatch) -> None:
    """Log-prob sums and the gradients of all parameters. Worst seen: 4e-6 nats, 6e-6 of a gradient."""
    want = case(name)[1]
    with scorer.step():
        logps = scorer(model, batch)
        sums = torch.stack([logps.chosen, logps.rejected], dim=1).flatten()
        got = backward(model, oracles.mix(sums))
    torch.testing.assert_close(sums.detach().double(), want.sums, rtol=0, atol=oracles.NATS)
    oracles.assert_same_gradients(got, want.gradients)


@pytest.mark.parametrize("checkpointing", ["off", "reentrant", "non-reentrant"])
@pytest.mark.parametrize("name", FLAT)
def test_flat(name, checkpointing, caplog):
    """`auto` settles on one row, without a complaint, and the row gives the oracle's numbers."""
    model = train_copy(name, checkpointing)
    layout, scorer, batch = settled(model)
    assert layout.name == "flat"
    assert batch.is_flat
    assert scorer.through_head
    assert "is trained with padded rows" not in caplog.text

    calls = count_attention_calls(model)
    assert_equals_oracle(name, model, scorer, batch)
    layers = model.config.num_hidden_layers
    assert len(calls) == (layers if checkpointing == "off" else 2 * layers), "is anything recomputed?"


@pytest.mark.parametrize("name", FLAT)
def test_padded_rows_of_a_model_that_takes_flat_ones(name):
    model = train_copy(name, "off")
    assert_equals_oracle(name, model, Scorer(model), PairBatch.from_inputs(padded_inputs(pairs(), 0)))


@pytest.mark.parametrize("checkpointing", ["off", "reentrant", "non-reentrant"])
@pytest.mark.parametrize("name", REASON)
def test_padded(name, checkpointing, caplog):
    """What cannot be trained in one row is found out, said with its reason, and scored right in padded rows."""
    model = train_copy(name, checkpointing)
    with caplog.at_level(logging.WARNING, logger="dpo_trainer.scoring.layout"):
        layout, scorer, batch = settled(model)
    assert layout.name == "padded"
    assert not batch.is_flat
    assert scorer.through_head
    assert REASON[name] in caplog.text
    assert_equals_oracle(name, model, scorer, batch)


def test_every_promised_architecture_is_here():
    promised_flat = "llama qwen2 qwen3 mistral gemma2 gemma3 phi3 gpt-oss olmo3 mixtral qwen3-moe gpt2 gpt-neox"
    promised_padded = "lfm2 mamba2 qwen3-next bloom falcon stablelm prompt-tuning"
    assert set(promised_flat.split()) <= FLAT.keys()
    assert set(promised_padded.split()) == REASON.keys()


# --- would the tests above notice? ---


@pytest.mark.parametrize("name", FLAT)
def test_a_rejected_completion_without_its_prompt_would_show(name):
    batch = PairBatch.from_inputs(flat_inputs(pairs(), 0))
    apart = dataclasses.replace(batch.segments, prefix_length=(0,) * len(batch.segments.length))
    model, want = case(name)
    with torch.no_grad():
        got = Scorer(model)(model, dataclasses.replace(batch, segments=apart))
    torch.testing.assert_close(got.chosen.double(), want.sums[0::2], rtol=0, atol=oracles.NATS)
    assert (got.rejected - want.sums[1::2]).abs().max() > 100 * oracles.NATS


@pytest.mark.parametrize("name", ["mistral", "gemma2", "gemma3", "gpt-oss", "olmo3"])
def test_a_lost_sliding_window_would_show(name):
    wide = dataclasses.replace(FLAT[name], options={**FLAT[name].options, "sliding_window": 64}).build()
    wide.load_state_dict(case(name)[0].state_dict())
    assert (oracles.sums(wide, pairs()) - case(name)[1].sums).abs().max() > 100 * oracles.NATS


# --- the load-balancing loss of mixtures of experts ---


def balancing_loss(model: nn.Module, flat: bool) -> tuple[Tensor, dict[str, Tensor]]:
    """E * sum over experts of (share of tokens routed to e) * (mean probability of e), over the tokens computed.

    A flat row computes each prompt once, padded rows twice: the loss couples the tokens of a batch, so it differs.
    """
    exact, rows = oracles.in_double(model), []
    for i, (prompt, completion) in enumerate(oracles.sequences(pairs())):
        ids = torch.tensor([prompt + completion])
        again = len(prompt) if flat and i % 2 else 0
        rows += [layer[again:] for layer in exact(input_ids=ids, output_router_logits=True).router_logits]
    probabilities = torch.cat(rows).softmax(-1)  # [layers * tokens, E]
    chosen = torch.zeros_like(probabilities).scatter(1, probabilities.topk(2, dim=1).indices, 1.0)
    loss = probabilities.shape[1] * (chosen.mean(0) * probabilities.mean(0)).sum()
    return loss, oracles.gradients(exact, loss)


@pytest.mark.parametrize("checkpointing", ["off", "non-reentrant"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["mixtral", "qwen3-moe", "gpt-oss"])
def test_router_loss(name, layout, checkpointing):
    """Returned beside the same log-probs, equal to its formula, with the formula's gradients."""
    model = train_copy(name, checkpointing)
    scorer = Scorer(model, router_loss=True)
    with scorer.step():
        logps = scorer(model, PairBatch.from_inputs(LAYOUTS[layout](pairs(), 0)))
        got = backward(model, logps.aux_loss + 0 * logps.chosen.sum())
    want, want_gradients = balancing_loss(case(name)[0], flat=layout == "flat")
    torch.testing.assert_close(logps.aux_loss.double(), want, rtol=1e-5, atol=0)  # float32, 20 tokens
    oracles.assert_same_gradients({n: got[n] for n in want_gradients}, want_gradients)
    torch.testing.assert_close(logps.chosen.double(), case(name)[1].sums[0::2], rtol=0, atol=oracles.NATS)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_reentrant_checkpoints_cut_the_router_loss_off():
    """A fact of transformers, not a wish: router logits are recorded inside the checkpoint, where gradients are off.

    Whoever lets `use_reentrant=True` meet a router loss must refuse it: the loss would be logged and never trained.
    If this fails, transformers has mended it, and the refusal can go.
    """
    model = train_copy("mixtral", "reentrant")
    logps = Scorer(model, router_loss=True)(model, PairBatch.from_inputs(padded_inputs(pairs(), 0)))
    assert logps.chosen.requires_grad
    assert not logps.aux_loss.requires_grad


def test_router_loss_is_not_computed_unasked():
    model, _ = case("mixtral")
    with torch.no_grad():
        assert Scorer(model)(model, PairBatch.from_inputs(flat_inputs(pairs(), 0))).aux_loss is None
