"""The vision demo from beginning to end: pictures and a model from nothing, training, and whether it looks."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForImageTextToText, AutoProcessor

from ..config import DPOConfig
from ..printable import printable_lines
from ..trainer import DPOTrainer
from . import world
from .pictures import DIFFERENCES, THINGS, Example, examples, shuffled
from .results import Goal, aligned
from .run import FOR_TINY_MODELS, one_thread, set_by_user
from .vision_model import answer_logps, base_model, processor, said
from .vision_page import Shown, write_page

TRAINING, HELD_OUT = 4800, 480  # pictures


@dataclass(frozen=True, kw_only=True)
class Look:
    """What a model makes of pictures: shares of them."""

    label: str
    prefers: float  # the true answer is likelier than the other one of the pair
    by_difference: dict[str, float]  # the same, of pairs that differ in one thing
    says: float  # the likeliest answer is the true one
    well_formed: float


def vision_demo_defaults() -> dict[str, Any]:
    """Options for a model of 0.2 M parameters; the user's own go before them."""
    return {
        "output_dir": "out/demo-vision",
        "beta": 0.5,
        "rpo_alpha": 1.0,
        "learning_rate": 1.5e-3,
        "num_train_epochs": 3,
        "per_device_train_batch_size": 64,
        "per_device_eval_batch_size": 64,
        "logging_steps": 15,
        "save_strategy": "no",
        **FOR_TINY_MODELS,
    }


def run_vision_demo(config: DPOConfig, given: Collection[str]) -> list[Goal] | None:
    """Run the demo, print and write what came out and return its goals; None on all processes but the first.

    Args:
        config: the user's options.
        given: which of them the user set. The others take the demo's defaults.
    """
    began = time.perf_counter()
    config = DPOConfig(**vision_demo_defaults() | set_by_user(config, given))
    with one_thread():
        base = Path(config.output_dir) / "base"
        with config.main_process_first(desc="the demo's base model"):
            if config.process_index == 0:
                made = processor()
                base_model(made, config.seed).save_pretrained(base)
                made.save_pretrained(base)
        trainer = train(base, config)
        return report(base, trainer, began) if trainer.is_world_process_zero() else None


def train(base: Path, config: DPOConfig) -> DPOTrainer:
    """The ordinary path: a model by its folder, rows with images; the trainer finds the processor itself."""
    trainer = DPOTrainer(model=str(base), args=config, train_dataset=rows(TRAINING, held_out=False, seed=config.seed))
    trainer.train(resume_from_checkpoint=config.resume_from_checkpoint)
    if trainer.stopped_by_signal:
        raise SystemExit(trainer.exit_code)
    trainer.save_model()
    return trainer


def rows(count: int, *, held_out: bool, seed: int) -> Dataset:
    return Dataset.from_list([example.row() for example in examples(count, held_out=held_out, seed=seed)])


@torch.no_grad()
def look(folder: Path, label: str, shown: Sequence[Example]) -> Look:
    """Measures the model saved in `folder`."""
    model, made = AutoModelForImageTextToText.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)
    true, other = ([getattr(example, side) for example in shown] for side in ("shown", "other"))
    margin = answer_logps(model, made, shown, true) - answer_logps(model, made, shown, other)
    right = (margin > 0).float()
    answers = said(model, made, shown)
    known = {thing.answer + world.END for thing in THINGS}
    kinds = {kind: torch.tensor([example.difference == kind for example in shown]) for kind in DIFFERENCES}
    return Look(
        label=label,
        prefers=right.mean().item(),
        by_difference={kind: right[which].mean().item() for kind, which in kinds.items()},
        says=sum(text == thing.answer + world.END for text, thing in zip(answers, true, strict=True)) / len(shown),
        well_formed=sum(text in known for text in answers) / len(shown),
    )


def goals(after: Look, blind: Look) -> list[Goal]:
    return [
        Goal(words="true answer preferred, new pictures:", value=after.prefers, limit=0.95),
        Goal(words="true answer said:", value=after.says, limit=0.95),
        Goal(words="preferred, with the pictures shuffled:", value=blind.prefers, limit=0.6, at_least=False),
    ]


def report(base: Path, trainer: DPOTrainer, began: float) -> list[Goal]:
    output, seed = Path(trainer.args.output_dir), trainer.args.seed
    new = examples(HELD_OUT, held_out=True, seed=seed)
    looks = [
        look(base, "base", new),
        look(output, f"final (step {trainer.state.global_step})", new),
        look(output, "final, pictures shuffled", shuffled(new, seed)),
    ]
    reached = goals(looks[1], looks[2])
    page = write_page(output, shown_pairs(base, output, new[:24], trainer.args.beta))
    lines = [
        f"\n## The vision demo: {len(THINGS)} things, {HELD_OUT} new pictures",
        table(looks),
        "\n".join(f"    {goal}" for goal in reached),
        f"Pictures and answers: {page}   Model: {output}   {time.perf_counter() - began:.0f} s in all.",
    ]
    print(printable_lines("\n\n".join(lines)))
    return reached


@torch.no_grad()
def shown_pairs(base: Path, final: Path, examples: Sequence[Example], beta: float) -> list[Shown]:
    """Pictures with their answers, rewards beta * (policy - reference) in nats, and what is said before and after."""
    made = AutoProcessor.from_pretrained(base)
    before, after = (AutoModelForImageTextToText.from_pretrained(folder).eval() for folder in (base, final))
    rewards = [
        beta * (answer_logps(after, made, examples, things) - answer_logps(before, made, examples, things))
        for things in ([example.shown for example in examples], [example.other for example in examples])
    ]
    words = zip(said(before, made, examples), said(after, made, examples), strict=True)
    return [
        Shown(
            picture=example.picture,
            chosen=example.shown.answer,
            rejected=example.other.answer,
            chosen_reward=chosen.item(),
            rejected_reward=rejected.item(),
            before=first.replace(world.END, ""),
            after=last.replace(world.END, ""),
        )
        for example, chosen, rejected, (first, last) in zip(examples, *rewards, words, strict=True)
    ]


def table(looks: Sequence[Look]) -> str:
    """Markdown, one row per model."""
    header = [
        "model",
        "true answer preferred",
        *(f"by {kind}" for kind in DIFFERENCES),
        "true answer said",
        "well-formed",
    ]
    cells = [
        [x.label, *(f"{n:.3f}" for n in (x.prefers, *x.by_difference.values(), x.says, x.well_formed))] for x in looks
    ]
    return aligned(header, cells)
