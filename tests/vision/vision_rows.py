"""Rows with images, and what a model says of them that is asked in the plainest way there is: one prompt with one completion
at a time, just as its processor writes them, all logits, float64, gradients by autograd.

Nothing of dpo_trainer takes part in the answers.
"""

from __future__ import annotations

import copy
import itertools
import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import numpy as np
import oracles
import tiny
import torch
import zoo
from datasets import Dataset
from PIL import Image
from torch import Tensor, nn

from dpo_trainer import DPOTrainer
from dpo_trainer.models.vision import vision_tower

Row = dict[str, Any]

IMAGE = {"type": "image"}


def text(words: str) -> dict[str, str]:
    return {"type": "text", "text": words}


def row(parts: Sequence[dict[str, str]], completions: Sequence[str], *images: Image.Image) -> Row:
    """Every completion is preferred to all that follow it."""
    return {
        "prompt": [{"role": "user", "content": list(parts)}],
        "completions": list(completions),
        "scores": [float(-number) for number in range(len(completions))],
        "images": list(images),
    }


def rows(seed: int = 0) -> list[Row]:
    """One image; two, of other shapes, between words; none; and three completions: 6 pairs, 9 completions, 4 images."""
    return [
        row([IMAGE, text("what?")], ["a cat", "dog"], zoo.noise(seed, 40, 60)),
        row(
            [text("see "), IMAGE, text("and"), IMAGE, text("so?")],
            ["yes it", "no"],
            *(zoo.noise(seed + 1, 50, 20), zoo.noise(seed + 2, 30, 60)),
        ),
        row([text("hi")], ["ho", "he he"]),
        row([IMAGE, text("rank")], ["one", "two 2", "three"], zoo.noise(seed + 3, 33, 33)),
    ]


def text_rows(n: int = 4) -> list[Row]:
    """Without an image, and without a column of them."""
    made = [row([text(f"hi {number}")], ["ho" * (1 + number), "he he"]) for number in range(n)]
    return [{name: value for name, value in one.items() if name != "images"} for one in made]


def shuffled(given: Row) -> Row:
    """The same row, the pixels of its images in another order."""
    draw = np.random.default_rng(5)

    def mixed(image: Image.Image) -> Image.Image:
        pixels = np.asarray(image)
        return Image.fromarray(draw.permutation(pixels.reshape(-1, 3)).reshape(pixels.shape))

    return {**given, "images": [mixed(image) for image in given["images"]]}


def dataset(of: Sequence[Row] | None = None) -> Dataset:
    return Dataset.from_list(list(rows() if of is None else of))


def trainer(folder: Path | str, family: str = "qwen3_vl", *, train: Any = None, **how: Any) -> DPOTrainer:
    """A trainer of a model of the zoo, whose 4 rows are one batch; `how` as of `tiny.trainer`, whose model may be given too.

    A router's loss depends on how often a prompt is computed, and so on the layout: it is off.
    """
    model, processor = zoo.ZOO[family]()
    options: dict[str, Any] = {"model": model, "max_steps": 3, "gradient_checkpointing": False, **how}
    if "moe" in family:
        options.setdefault("router_aux_loss_coef", 0.0)
    parts = {"processing_class": processor, **options.pop("parts", {})}
    return tiny.trainer(folder, train=dataset() if train is None else train, parts=parts, **options)


def trained(folder: Path | str, family: str = "qwen3_vl", **how: Any) -> DPOTrainer:
    made = trainer(folder, family, **how)
    made.train()
    return made


def collated(made: DPOTrainer, places: Sequence[int] | None = None) -> dict[str, Any]:
    """Rows of its training data (all) as the trainer's collator makes a batch of them, not in parts."""
    table: Any = made.train_dataset
    return replace(made.data_collator, pack_tokens=None)(
        [table[place] for place in (range(len(table)) if places is None else places)]
    )


def tower_of(model: nn.Module) -> Any:
    tower = vision_tower(model)
    assert tower is not None
    return tower


def names_of(model: nn.Module, part: nn.Module) -> set[str]:
    """Of the parameters that a part of a model has, as the model calls them."""
    own = set(map(id, part.parameters()))
    return {name for name, parameter in model.named_parameters() if id(parameter) in own}


@contextmanager
def warnings_of(name: str = "dpo_trainer") -> Iterator[list[str]]:
    """What the loggers of a package say meanwhile."""
    said: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger(name)
    logger.addHandler(handler)
    try:
        yield said
    finally:
        logger.removeHandler(handler)


# --- the plainest way ---


def asked(processor: Any, of: Row, number: int | None = None) -> dict[str, Tensor]:
    """What the model reads of a prompt, or of a prompt with its completion `number`: of the processor alone."""
    if "PaliGemma" in type(processor).__name__:
        return _asked_of_paligemma(processor, of, number)
    images = iter(of["images"])
    messages = [
        {**turn, "content": [part | {"image": next(images)} if part["type"] == "image" else part for part in content]}
        for turn in of["prompt"]
        for content in [turn["content"]]
    ]
    if number is not None:
        messages.append({"role": "assistant", "content": [text(of["completions"][number])]})
    made = processor.apply_chat_template(
        messages,
        add_generation_prompt=number is None,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"return_mm_token_type_ids": True},
    )
    return dict(made)


def _asked_of_paligemma(processor: Any, of: Row, number: int | None) -> dict[str, Tensor]:
    """Its completions are no turns but suffixes, whose tokens have type 1. Without an image the processor takes no text."""
    prompt = processor.apply_chat_template(of["prompt"])
    if of["images"]:
        suffix = {} if number is None else {"suffix": of["completions"][number]}
        made = dict(processor(images=[of["images"]], text=[prompt], return_tensors="pt", **suffix))
        return {name: value for name, value in made.items() if name != "labels"}
    ids = [processor.tokenizer(prompt).input_ids]
    if number is not None:
        ids.append([*processor.tokenizer(of["completions"][number]).input_ids, processor.tokenizer.eos_token_id])
    types = [kind for kind, own in enumerate(ids) for _ in own]
    return {"input_ids": torch.tensor([list(itertools.chain(*ids))]), "token_type_ids": torch.tensor([types])}


@dataclass(frozen=True)
class Answer:
    """Of all pairs, in the order of their rows."""

    chosen: Tensor  # [N] float64 nats
    rejected: Tensor  # [N]
    gradients: dict[str, Tensor]  # of `mix`


def mix(chosen: Tensor, rejected: Tensor) -> Tensor:
    """One number of all pairs, with weights that let no two errors cancel."""
    up = torch.linspace(1.0, 2.0, len(chosen), dtype=chosen.dtype)
    return (up * chosen).sum() - (0.7 * up.flip(0) * rejected).sum()


def answer(model: nn.Module, processor: Any, of: Sequence[Row]) -> Answer:
    """From a copy of `model` in float64."""
    exact = oracles.in_double(copy.deepcopy(model))
    sums = [[_logps(exact, processor, one, number) for number in range(len(one["completions"]))] for one in of]
    pairs = [pair for own in sums for pair in itertools.combinations(own, 2)]
    chosen, rejected = (torch.stack(side) for side in zip(*pairs, strict=True))
    gradients = oracles.gradients(exact, mix(chosen, rejected))
    return Answer(chosen.detach(), rejected.detach(), gradients)


def _logps(model: nn.Module, processor: Any, of: Row, number: int) -> Tensor:
    """Summed over the tokens of the completion, which are those beyond the prompt."""
    prompt, inputs = asked(processor, of)["input_ids"][0], asked(processor, of, number)
    ids = inputs["input_ids"][0]
    assert torch.equal(ids[: len(prompt)], prompt)
    assert len(ids) > len(prompt)
    exact = {name: value.double() if value.is_floating_point() else value for name, value in inputs.items()}
    logits = model(**exact, use_cache=False).logits[0].log_softmax(-1)
    return torch.stack([logits[place - 1, ids[place]] for place in range(len(prompt), len(ids))]).sum()
