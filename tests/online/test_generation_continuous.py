"""Continuous batching writes what `generate` writes."""

from __future__ import annotations

import online_tiny
import pytest
import tiny
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM

from dpo_trainer.online.sampling.generate import ContinuousGenerator, Decoding, TransformersGenerator

GREEDY = Decoding(max_new_tokens=6, temperature=0.0)
PROMPTS = [[5, 6, 7], [9], [11, 12, 13, 14, 15]]


def generators() -> list[TransformersGenerator]:
    options = {"pad_token_id": tiny.PAD, "end_ids": [tiny.END], "batch_size": 8}
    return [kind(tiny.tokenizer(), **options) for kind in (TransformersGenerator, ContinuousGenerator)]


def test_the_same_greedy_answers_in_the_same_order():
    model = tiny.llama().train()
    before = model.config._attn_implementation, torch.get_rng_state()
    plain, continuous = (g(model, PROMPTS, 1, decoding=GREEDY, seed=0) for g in generators())
    assert [[answer.ids for answer in row] for row in plain] == [[answer.ids for answer in row] for row in continuous]
    assert len({tuple(answers[0].ids) for answers in plain}) == 3, "the order can be told"
    assert model.training
    assert model.config._attn_implementation == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])


def test_several_completions_of_each_prompt_stand_together():
    model = tiny.llama()
    sampled = generators()[1](model, PROMPTS, 3, decoding=Decoding(max_new_tokens=5), seed=1)
    assert [len(row) for row in sampled] == [3, 3, 3]
    assert all(1 <= len(answer.ids) <= 5 for row in sampled for answer in row)
    assert len({tuple(answer.ids) for row in sampled for answer in row}) > 6, "they are drawn"
    assert generators()[1](model, PROMPTS, 3, decoding=Decoding(max_new_tokens=5), seed=1) == sampled
    assert generators()[1](model, PROMPTS, 3, decoding=Decoding(max_new_tokens=5), seed=2) != sampled


def test_a_run_samples_by_the_generator_that_is_named(tmp_path):
    named = online_tiny.config(tmp_path, generator="continuous", max_steps=1)
    online = online_tiny.trainer(tmp_path, parts={"args": named})
    assert type(online.generator) is ContinuousGenerator
    online.train()
    assert online_tiny.lines(online)[0]["completions/length"] > 0
    assert type(online_tiny.trainer(tmp_path).generator) is TransformersGenerator


def test_a_model_with_capped_scores_is_refused(tmp_path):
    """Continuous batching leaves the cap out, without an error."""
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "head_dim": 8,
    }
    model = Gemma2ForCausalLM(Gemma2Config(vocab_size=tiny.VOCABULARY, num_key_value_heads=1, **sizes))
    named = online_tiny.config(tmp_path, generator="continuous")
    with pytest.raises(ValueError, match=r"--generator continuous.*Gemma2ForCausalLM caps.*--generator transformers"):
        online_tiny.trainer(tmp_path, model=model, parts={"args": named})
