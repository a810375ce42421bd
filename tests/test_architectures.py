"""Every architecture that is promised, as a tiny model from its config: the layout it gets, its log-probs and gradients
against the one-sequence oracle, under no gradient checkpointing and both kinds of it.
"""

from __future__ import annotations

import copy
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

from dpo_trainer.batch import PairBatch, TokenizedPair
from dpo_trainer.data.collate import flat_inputs, padded_inputs
from dpo_trainer.layout import Layout
from dpo_trainer.logprobs import Scorer

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
        "Gemma2Config", {**WINDOW, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0, "query_pre_attn_scalar": 8}
    ),
    "gemma3": Architecture("Gemma3TextConfig", {**WINDOW, "query_pre_attn_scalar": 8}, model="Gemma3ForCausalLM"),
    "phi3": Architecture("Phi3Config"),
    "gpt-oss": Architecture("GptOssConfig", {**WINDOW, **EXPERTS, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}),
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
    "mamba2": Architecture("Mamba2Config", {"num_heads": 8, "head_dim": 8, "n_groups": 1, "state_size": 8, "expand": 2}),
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
