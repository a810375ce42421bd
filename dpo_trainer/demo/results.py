"""What the demo's models say: samples, shares, drift; each model is read back from disk before it is measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from . import world
from .base_model import all_conversations, answer_logps
from .pairs import sample_answers

SAMPLES = 500
SHOWN = 4
CONTROL_NAME = world.CONTROL_NAMES[0]  # whose answers are sampled; drift is computed for all


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One model. Shares are of `SAMPLES` samples; drifts are exact."""

    label: str
    target_pizza: float  # ravin's answers that are well-formed and say pizza
    target_well_formed: float  # a full match, ended by the EOS token
    control_pizza: float
    control_well_formed: float
    control_drift: float  # total variation distance from the base model, in [0, 1]
    worst_drift: float  # the largest over all names but ravin
    target_samples: tuple[str, ...]
    control_samples: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Goal:
    """What one number of the final model should reach."""

    words: str
    value: float
    limit: float
    at_least: bool = True

    @property
    def reached(self) -> bool:
        return self.value >= self.limit if self.at_least else self.value <= self.limit

    def __str__(self) -> str:
        sign = ">=" if self.at_least else "<="
        return (
            f"{'reached' if self.reached else 'MISSED ':7}  {self.words} {self.value:.3f} (goal {sign} {self.limit})"
        )


@dataclass(frozen=True, kw_only=True)
class SavedModel:
    """A model and its tokenizer, as `from_pretrained` finds them in a folder."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    @classmethod
    def load(cls, folder: Path) -> SavedModel:
        logging.disable_progress_bar()  # a bar for each of a dozen loads of 2 MB would bury the table
        try:
            return cls(
                model=AutoModelForCausalLM.from_pretrained(folder), tokenizer=AutoTokenizer.from_pretrained(folder)
            )
        finally:
            logging.enable_progress_bar()

    @torch.no_grad()
    def answer_distribution(self) -> Tensor:
        """[16, 11] exact probability of each food by name, in a well-formed answer; last column: of anything else."""
        foods = answer_logps(self.model, all_conversations(self.tokenizer)).exp()
        foods = foods.view(len(world.NAMES), len(world.FOODS))
        return torch.cat([foods, 1 - foods.sum(1, keepdim=True)], 1)


def drift(distribution: Tensor, base: Tensor) -> dict[str, float]:
    """By name, the share of answers that changed: total variation distance between [16, 11] distributions, in [0, 1].

    Computed from probabilities: between two sets of 500 samples it is about 0.08 when nothing changed at all.
    """
    return dict(zip(world.NAMES, (0.5 * (distribution - base).abs().sum(1)).tolist(), strict=True))


def measure(folder: Path, label: str, base: SavedModel, *, seed: int) -> Measurement:
    """Sample and score the model saved in `folder`. One seed gives all models the same random draws."""
    saved = SavedModel.load(folder)
    drifts = drift(saved.answer_distribution(), base.answer_distribution())
    target = sample_answers(saved.model, saved.tokenizer, world.TARGET_NAME, SAMPLES, seed=seed)
    control = sample_answers(saved.model, saved.tokenizer, CONTROL_NAME, SAMPLES, seed=seed + 1)
    return Measurement(
        label=label,
        target_pizza=_share(world.TARGET_NAME, target, (world.TARGET_FOOD,)),
        target_well_formed=_share(world.TARGET_NAME, target, world.FOODS),
        control_pizza=_share(CONTROL_NAME, control, (world.TARGET_FOOD,)),
        control_well_formed=_share(CONTROL_NAME, control, world.FOODS),
        control_drift=drifts[CONTROL_NAME],
        worst_drift=max(drifts[name] for name in world.CONTROL_NAMES),
        target_samples=tuple(target[:SHOWN]),
        control_samples=tuple(control[:SHOWN]),
    )


def _share(name: str, texts: Sequence[str], foods: tuple[str, ...]) -> float:
    return sum(world.food_in(name, text) in foods for text in texts) / len(texts)


def goals(final: Measurement) -> list[Goal]:
    """What a sound run reaches with the demo's own options, whatever the seed."""
    target = world.TARGET_NAME
    return [
        Goal(words=f"{target} says {world.TARGET_FOOD}, well-formed:", value=final.target_pizza, limit=0.95),
        Goal(words=f"{target}'s answers well-formed:", value=final.target_well_formed, limit=0.97),
        Goal(words=f"{CONTROL_NAME}'s answers well-formed:", value=final.control_well_formed, limit=0.97),
        Goal(words="drift of the worst of 15 other names:", value=final.worst_drift, limit=0.10, at_least=False),
    ]


def table(measured: Sequence[Measurement]) -> str:
    """Markdown, one row per model."""
    target, control = world.TARGET_NAME, CONTROL_NAME
    header = ["model", f"{target}: pizza", f"{target}: well-formed", f"{control}: pizza", f"{control}: well-formed"]
    header += [f"{control}: drift", "worst drift of 15"]
    numbers = ["target_pizza", "target_well_formed", "control_pizza", "control_well_formed"]
    numbers += ["control_drift", "worst_drift"]
    return aligned(header, [[m.label, *(f"{getattr(m, name):.3f}" for name in numbers)] for m in measured])


def aligned(header: list[str], rows: Sequence[list[str]]) -> str:
    """Markdown, its columns one below the other."""
    widths = [max(len(cell) for cell in column) for column in zip(header, *rows, strict=True)]
    rule = ["-" * width for width in widths]
    lines = [" | ".join(cell.ljust(width) for cell, width in zip(row, widths)) for row in (header, rule, *rows)]
    return "\n".join(f"| {line} |" for line in lines)


def samples(measured: Measurement) -> str:
    """A few answers, as the model wrote them."""
    return "\n".join(
        f"    {world.question(name):24} {'   '.join(texts)}"
        for name, texts in ((world.TARGET_NAME, measured.target_samples), (CONTROL_NAME, measured.control_samples))
    )
