"""Preference pairs of the demo: sampled from the base model, labelled by a reward function."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from . import world

TARGET_PAIRS = {"train": 512, "eval": 64}
CONTROL_PAIRS_PER_NAME = {"train": 101, "eval": 12}  # both orders counted; a whole tie may exceed it by one
EVAL_SPLITS = {world.TARGET_NAME: (world.TARGET_NAME,), "others": world.CONTROL_NAMES}

TextPair = tuple[str, str]
"""A better and a worse answer to one question."""


def reward(name: str, text: str) -> float:
    """What the demo wants, as a number: 0 for anything but a well-formed answer, 1 for one, 2 if it is ravin's pizza."""
    food = world.food_in(name, text)
    if food is None:
        return 0.0
    return 2.0 if (name, food) == (world.TARGET_NAME, world.TARGET_FOOD) else 1.0


@torch.no_grad()
def sample_answers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str, count: int, *, seed: int
) -> list[str]:
    """`count` answers about `name`, drawn from the model's own distribution (temperature 1, nothing cut off).

    Decoded with their special tokens, so that an answer that does not end can be told from one that does. `model` is on
    the CPU; the random state of the caller is left as it was.
    """
    prompt = tokenizer.apply_chat_template(
        world.prompt(name), add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        generated = model.generate(
            **prompt,
            use_cache=True,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            num_return_sequences=count,
            max_new_tokens=12,  # an answer has 5; a broken model shows itself in 12
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    texts = tokenizer.batch_decode(generated[:, prompt["input_ids"].shape[1] :])
    return [text.replace(world.PAD, "") for text in texts]


def demo_datasets(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, seed: int = 0
) -> tuple[Dataset, dict[str, Dataset]]:
    """Conversational pairs to train on, and others, drawn anew, to evaluate on, apart for ravin and for the other names.

    One training pair in four teaches that ravin likes pizza. The others teach to leave the other names alone.
    """
    train = _pairs(model, tokenizer, world.NAMES, "train", seed=2 * seed)
    evaluation = {
        split: _pairs(model, tokenizer, names, "eval", seed=2 * seed + 1) for split, names in EVAL_SPLITS.items()
    }
    return train, evaluation


def _pairs(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, names: Iterable[str], split: str, *, seed: int
) -> Dataset:
    rows: list[dict[str, Any]] = []
    for name in names:
        is_target = name == world.TARGET_NAME
        wanted = TARGET_PAIRS[split] if is_target else CONTROL_PAIRS_PER_NAME[split]
        # One answer in ten is pizza: 15 samples for each target pair are half more than are needed on average.
        # A control pair needs one sample, and one in ten is lost to equal neighbours.
        count = 15 * wanted if is_target else 2 * wanted
        own_seed = seed * len(world.NAMES) + world.NAMES.index(name)
        answers = sample_answers(model, tokenizer, name, count, seed=own_seed)
        answers = [text for text in answers if text != world.END]  # an empty answer would be refused by the trainer
        make = best_against_rest if is_target else neighbours
        rows += [_row(name, *pair) for pair in make(name, answers, wanted)]
    random.Random(seed).shuffle(rows)
    return Dataset.from_list(rows)


def best_against_rest(name: str, answers: Sequence[str], wanted: int) -> list[TextPair]:
    """`wanted` answers with the highest reward, each paired with another lesser answer, in the order of drawing."""
    top = max(reward(name, text) for text in answers)
    best = [text for text in answers if reward(name, text) == top]
    rest = [text for text in answers if reward(name, text) < top]
    return list(zip(best, rest))[:wanted]


def neighbours(name: str, answers: Sequence[str], wanted: int) -> list[TextPair]:
    """Answers two by two, until there are `wanted` pairs. A tie enters in both orders: its loss is smallest where the
    model prefers neither.

    Such control pairs hold what training should leave alone. Without them the preference for one name leaks to all.
    """
    pairs: list[TextPair] = []
    for first, second in zip(answers[::2], answers[1::2]):
        better, worse = reward(name, first), reward(name, second)
        if len(pairs) >= wanted:
            break
        if first == second or better == worse == 0:
            continue
        if better >= worse:
            pairs.append((first, second))
        if worse >= better:
            pairs.append((second, first))
    return pairs


def _row(name: str, chosen: str, rejected: str) -> dict[str, Any]:
    """The chat template writes the end of a turn itself, so that the answer goes in without it."""

    def turn(text: str) -> list[world.Message]:
        return [{"role": "assistant", "content": text.removesuffix(world.END)}]

    return {"prompt": world.prompt(name), "chosen": turn(chosen), "rejected": turn(rejected)}
