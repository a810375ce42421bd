"""Sampling by transformers: against a loop of plain forwards, one prompt at a time."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import online_tiny
import pytest
import tiny
import torch
from peft import get_peft_model
from torch import Tensor
from transformers import GenerationConfig, LlamaForCausalLM

from dpo_trainer.online.sampling.generate import Decoding, TransformersGenerator, end_tokens

PROMPTS = [online_tiny.ids_of(text, finished=False) for text in ("cat", "the owl likes", "x", "dog eats figs and hay")]
NEW = 8


def generator(*ends: int, batch_size: int = 64, pad: int = tiny.PAD) -> TransformersGenerator:
    return TransformersGenerator(
        tiny.tokenizer(), pad_token_id=pad, end_ids=ends or (tiny.END,), batch_size=batch_size
    )


def greedy(new: int = NEW) -> Decoding:
    return Decoding(max_new_tokens=new, temperature=0.0)


def sampling(new: int = NEW, **how: Any) -> Decoding:
    return Decoding(max_new_tokens=new, **how)


def ids(completions) -> list[list[list[int]]]:
    return [[completion.ids for completion in of_prompt] for of_prompt in completions]


@torch.no_grad()
def likeliest(model: torch.nn.Module, prompt: list[int], new: int = NEW) -> list[int]:
    """Token by token, without a cache, a mask or padding."""
    so_far = list(prompt)
    for _ in range(new):
        so_far.append(int(model(input_ids=torch.tensor([so_far]), use_cache=False).logits[0, -1].argmax()))
    return so_far[len(prompt) :]


@torch.no_grad()
def next_probabilities(model: torch.nn.Module, prompt: list[int]) -> Tensor:
    return model(input_ids=torch.tensor([prompt])).logits[0, -1].double().softmax(-1)


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return tiny.llama().eval()


@pytest.fixture(scope="module")
def wanted(model) -> list[list[int]]:
    answers = [likeliest(model, prompt) for prompt in PROMPTS]
    assert len({tuple(answer) for answer in answers}) == 4, "answers differ, so that one in another's place is seen"
    return answers


# --- what is written ---


def test_prompts_of_all_lengths_in_one_batch_as_each_alone(model, wanted):
    """Padding on the left changes nothing, and answers come back in the order of the prompts."""
    together = generator()(model, PROMPTS, 1, decoding=greedy(), seed=0)
    assert ids(together) == [[answer] for answer in wanted]
    assert not any(completion.finished for (completion,) in together)
    assert [c.text for (c,) in together] == [tiny.tokenizer().decode(a, skip_special_tokens=True) for a in wanted]
    alone = [generator()(model, [prompt], 1, decoding=greedy(), seed=0)[0] for prompt in PROMPTS]
    assert alone == together


@pytest.mark.parametrize(("batch_size", "count", "calls"), [(1, 1, 4), (3, 1, 2), (4, 2, 2), (5, 2, 2), (2, 4, 4)])
def test_chunks_change_nothing(batch_size, count, calls, model, wanted, monkeypatch):
    """At most so many completions at once, but all of one prompt."""
    sizes = []
    forward = model.generate

    def counted(input_ids, generation_config, **how):
        sizes.append(len(input_ids) * generation_config.num_return_sequences)
        return forward(input_ids=input_ids, generation_config=generation_config, **how)

    monkeypatch.setattr(model, "generate", counted)
    # Near a temperature of 0, sampling takes the likeliest token as well, and takes its own way there.
    cold = sampling(temperature=1e-4)
    got = generator(batch_size=batch_size)(model, PROMPTS, count, decoding=cold, seed=0)
    assert ids(got) == [[answer] * count for answer in wanted]
    assert len(sizes) == calls
    assert max(sizes) <= max(batch_size, count)


def test_cut_behind_the_token_that_ends_it(model, wanted):
    """One answer ends at its first token, one at its last, one in the middle, and one not at all."""
    first, last, middle = wanted[0][0], wanted[1][-1], wanted[2][3]
    ends = {first, last, middle}
    got = generator(*ends)(model, PROMPTS, 1, decoding=greedy(), seed=0)
    for (completion,), whole in zip(got, wanted, strict=True):
        end = next((place for place, token in enumerate(whole) if token in ends), None)
        assert completion.ids == (whole if end is None else whole[: end + 1])
        assert completion.finished == (end is not None)
    assert [len(completion.ids) for (completion,) in got] == [1, NEW, 4, NEW]
    assert [completion.finished for (completion,) in got] == [True, True, True, False]


def test_padding_with_eos_is_no_end(model, wanted):
    """Where the tokenizer pads with its EOS: an answer that did not end has none, and one that ended has one."""
    end = wanted[0][2]
    got = generator(end, pad=end)(model, PROMPTS, 1, decoding=greedy(), seed=0)
    assert [(c.ids, c.finished) for (c,) in got[:2]] == [(wanted[0][:3], True), (wanted[1], False)]


def test_the_end_is_not_in_the_text(model):
    cut = generator().completion([*online_tiny.ids_of("owl"), tiny.PAD, tiny.PAD])
    assert (cut.ids, cut.text, cut.finished) == (online_tiny.ids_of("owl"), "owl", True)
    assert generator().completion(online_tiny.ids_of("owl", finished=False)).finished is False


# --- chance ---


def test_seeds(model):
    ask = generator()
    one, again, other = (ids(ask(model, PROMPTS, 2, decoding=sampling(), seed=seed)) for seed in (3, 3, 4))
    assert one == again
    assert all(a != b for a, b in zip(one, other, strict=True))
    assert all(first != second for first, second in one), "completions of one prompt are drawn apart"


def test_random_numbers_of_training_are_left_alone(model):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = ids(generator()(model, PROMPTS, 2, decoding=sampling(), seed=3))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    assert ids(generator()(model, PROMPTS, 2, decoding=sampling(), seed=3)) == first


def drawn(model, count: int = 4000, **how: Any) -> Tensor:
    """[V] how often each token came first after PROMPTS[1]."""
    got = generator(batch_size=count)(model, [PROMPTS[1]], count, decoding=sampling(1, **how), seed=0)
    often = Counter(completion.ids[0] for completion in got[0])
    return torch.tensor([often[token] for token in range(tiny.VOCABULARY)], dtype=torch.float64)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_come_as_often_as_the_model_says(temperature, model):
    """Pearson's chi-square over the whole vocabulary: its mean is V - 1, its standard deviation sqrt(2 (V - 1))."""
    want = (next_probabilities(model, PROMPTS[1]).log() / temperature).softmax(-1) * 4000
    found = drawn(model, temperature=temperature)
    free = tiny.VOCABULARY - 1

    def off(expected: Tensor) -> float:
        return float((((found - expected) ** 2 / expected).sum() - free) / math.sqrt(2 * free))

    assert abs(off(want)) < 5
    other = (next_probabilities(model, PROMPTS[1]).log() / (temperature / 2)).softmax(-1) * 4000
    assert off(other) > 5, "the test sees another temperature"
    if temperature == 2.0:
        assert (found > 0).sum() > 200, "no limit of 50 tokens, the default of transformers"


@pytest.mark.parametrize(
    ("how", "kept"),
    [
        ({"top_k": 5}, lambda p: p >= p.sort().values[-5]),
        ({"top_p": 0.1}, lambda p: p >= p.sort(descending=True).values[int((p.sort(descending=True).values.cumsum(0) < 0.1).sum())]),
        ({"min_p": 0.5}, lambda p: p >= 0.5 * p.max()),
    ],
    ids=["top_k", "top_p", "min_p"],
)  # fmt: skip
def test_what_may_be_drawn(how, kept, model):
    allowed = kept(next_probabilities(model, PROMPTS[1]))
    found = drawn(model, **how) > 0
    assert 1 < allowed.sum() < 100
    assert torch.equal(found, allowed)


def effective(monkeypatch, model, decoding: Decoding, count: int) -> GenerationConfig:
    """What transformers samples by, when all defaults are in."""
    seen: list[GenerationConfig] = []
    inner = LlamaForCausalLM._sample

    def spy(self, *args, generation_config, **kwargs):
        seen.append(generation_config)
        return inner(self, *args, generation_config=generation_config, **kwargs)

    monkeypatch.setattr(LlamaForCausalLM, "_sample", spy)
    generator()(model, PROMPTS, count, decoding=decoding, seed=0)
    return seen[-1]


def test_options_reach_generate(model, monkeypatch):
    how = {"temperature": 0.7, "top_p": 0.8, "top_k": 9, "min_p": 0.01, "repetition_penalty": 1.2}
    used = effective(monkeypatch, model, sampling(5, **how), 3)
    assert {name: getattr(used, name) for name in how} == how
    assert (used.max_new_tokens, used.do_sample, used.num_return_sequences, used.use_cache) == (5, True, 3, True)
    used = effective(monkeypatch, model, greedy(), 1)
    assert (used.do_sample, used.repetition_penalty) == (False, 1.0)


OWN = {
    "repetition_penalty": 1.3,
    "top_k": 5,
    "top_p": 0.3,
    "min_p": 0.2,
    "typical_p": 0.3,
    "temperature": 0.2,
    "do_sample": True,
    "num_beams": 2,
    "use_cache": False,
    "no_repeat_ngram_size": 1,
    "min_new_tokens": 4,
    "max_new_tokens": 2,
    "return_dict_in_generate": True,
    "exponential_decay_length_penalty": (1, 5.0),
    "renormalize_logits": True,
}


@pytest.mark.parametrize("option", [*OWN, "suppress_tokens", "bad_words_ids", "all"])
@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
def test_the_generation_config_of_a_model_has_no_say(option, adapter, wanted):
    """Many models bring one, for chatting. What is sampled to train on is the model's own distribution."""
    own = {**OWN, "suppress_tokens": [wanted[0][0]], "bad_words_ids": [[wanted[0][0]]]}
    model = tiny.llama().eval()
    ends = (wanted[0][1], tiny.END)

    def sampled(asked: Any) -> list[list[list[list[int]]]]:
        both = ((greedy(), 1), (sampling(), 2))
        return [ids(generator(*ends)(asked, PROMPTS, count, decoding=how, seed=0)) for how, count in both]

    plain = sampled(model)
    model.generation_config = GenerationConfig(**(own if option == "all" else {option: own[option]}))
    before = model.generation_config.to_dict()
    assert sampled(get_peft_model(model, tiny.lora()).eval() if adapter else model) == plain
    assert model.generation_config.to_dict() == before


# --- the model, as training has it ---


def test_a_cache_and_no_checkpointing(model, wanted, monkeypatch):
    trained = tiny.llama()
    trained.gradient_checkpointing_enable({"use_reentrant": False})
    trained.config.use_cache = False  # as Trainer leaves it
    trained.train()
    lengths = []
    trained.model.layers[0].register_forward_pre_hook(lambda module, args: lengths.append(args[0].shape[1]))
    for layer in trained.model.layers:
        monkeypatch.setattr(layer, "_gradient_checkpointing_func", lambda *args, **kwargs: pytest.fail("checkpointed"))
    got = generator()(trained, PROMPTS, 1, decoding=greedy(), seed=0)
    assert ids(got) == [[answer] for answer in wanted]
    assert lengths == [max(map(len, PROMPTS))] + [1] * (NEW - 1), "each token is computed once"
    assert all(module.training for module in trained.modules())


def test_no_dropout_while_sampling(wanted):
    trained = tiny.llama(attention_dropout=0.5).train()
    trained.model.layers[1].eval()  # as somebody may have it
    modes = [module.training for module in trained.modules()]
    assert ids(generator()(trained, PROMPTS, 1, decoding=greedy(), seed=0)) == [[answer] for answer in wanted]
    assert [module.training for module in trained.modules()] == modes


@pytest.mark.parametrize("own", ["eager", "sdpa"])
def test_attention_stays_what_it_is(own, wanted):
    model = tiny.llama(attn_implementation=own).train()
    assert ids(generator()(model, PROMPTS, 1, decoding=greedy(), seed=0)) == [[answer] for answer in wanted]
    assert model.config._attn_implementation == own


def test_adapters_are_asked_too(model, wanted):
    adapted = get_peft_model(tiny.llama(), tiny.lora())
    tiny.fill_adapters(adapted, scale=0.3)
    got = ids(generator()(adapted, PROMPTS, 1, decoding=greedy(), seed=0))
    assert got == [[likeliest(adapted.eval(), prompt)] for prompt in PROMPTS]
    assert got != [[answer] for answer in wanted]


def test_no_gradients(model):
    seen = []
    hook = model.lm_head.register_forward_hook(lambda module, args, out: seen.append(out.requires_grad))
    generator()(model, PROMPTS, 1, decoding=greedy(2), seed=0)
    hook.remove()
    assert seen == [False, False]


# --- decoding, and what ends a completion ---


def test_greedy_is_the_same_decoding_without_chance():
    how = sampling(5, temperature=0.7, top_k=3, repetition_penalty=1.1)
    assert how.greedy() == sampling(5, temperature=0.0, top_k=3, repetition_penalty=1.1)
    assert how.greedy(9).max_new_tokens == 9


def test_what_ends_a_completion(model):
    tokenizer, chatty = tiny.tokenizer(), tiny.llama()
    assert end_tokens(tokenizer, model, None) == [tiny.END, tiny.END]  # the tokenizer's and the model's
    chatty.generation_config.eos_token_id = [2, 3]
    assert end_tokens(tokenizer, chatty, ["<|assistant|>", "a"]) == [tiny.END, 2, 3, 3, tokenizer.encode("a")[0]]
    chatty.generation_config.eos_token_id = None
    assert end_tokens(tokenizer, chatty, []) == [tiny.END]
    assert generator(1, 3, 1, 3).end_ids == [1, 3]


@pytest.mark.parametrize(("text", "tokens"), [("ab", 2), ("", 0)])
def test_a_stop_token_is_one_token(text, tokens, model):
    with pytest.raises(ValueError, match=rf"--stop_tokens '{text}' is {tokens} tokens.*name single tokens"):
        end_tokens(tiny.tokenizer(), model, [text])
