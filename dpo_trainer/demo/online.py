"""The online demo: the same tiny model, and a rule in the place of preference pairs.

One name shall like pizza, and nobody else. Of the sampled answers those that are well-formed are better than those that
are not, and best are those that say what is wanted. The rest ties, and teaches nothing.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset

from ..online.config import OnlineDPOConfig
from ..online.feedback.protocol import Judge, Scores
from ..online.samples import Sampled
from ..online.trainer import OnlineDPOTrainer
from ..printable import printable_lines
from . import results, world
from .base_model import demo_model_and_tokenizer
from .results import Goal, Measurement, SavedModel
from .run import FOR_TINY_MODELS, one_thread, set_by_user

PROMPTS_OF_TARGET = 256  # and as many of all other names together


class DemoJudge(Judge):
    """0 for what is no answer, 1 for an answer, 2 for pizza where it is wanted, and for anything else where it is not."""

    name = "the demo's rule"

    def scores(self, samples: Sequence[Sampled]) -> Scores:
        return [
            [_score(str(sampled.columns["name"]), answer.text, answer.finished) for answer in sampled.completions]
            for sampled in samples
        ]


def _score(name: str, text: str, finished: bool) -> float:
    food = world.food_in(name, text + world.END * finished)
    if food is None:
        return 0.0
    return 2.0 if (name == world.TARGET_NAME) == (food == world.TARGET_FOOD) else 1.0


def online_demo_defaults() -> dict[str, Any]:
    """Options for a model of 0.4 M parameters; the user's own go before them."""
    return {
        "output_dir": "out/online-demo",
        "beta": [0.5],
        "rpo_alpha": 1.0,
        "learning_rate": 1e-3,
        "num_train_epochs": 5,
        "per_device_train_batch_size": 32,
        "per_device_eval_batch_size": 64,
        "num_generations": 4,
        "max_new_tokens": 8,
        "temperature": 1.0,
        "missing_eos_penalty": 1.0,
        "logging_steps": 4,
        "eval_strategy": "epoch",
        "save_strategy": "no",
        **FOR_TINY_MODELS,
    }


def run_online_demo(config: OnlineDPOConfig, given: Collection[str]) -> list[Goal] | None:
    """Run the demo, print what came out and return its goals; None on all processes but the first.

    Args:
        config: the user's options.
        given: which of them the user set. The others take the demo's defaults.
    """
    began = time.perf_counter()
    options = online_demo_defaults() | set_by_user(config, given)
    options |= {"beta": config.betas} if "beta" in given else {}
    config = OnlineDPOConfig(**options)
    with one_thread():
        with config.main_process_first(desc="the demo's base model"):
            base = demo_model_and_tokenizer(seed=config.seed)
        trainer = train(base, config)
        if not trainer.is_world_process_zero():
            return None
        return _report(base, trainer, began)


def train(base: Path, config: OnlineDPOConfig) -> OnlineDPOTrainer:
    start = SavedModel.load(base)
    names = [world.TARGET_NAME] * PROMPTS_OF_TARGET
    names += [world.CONTROL_NAMES[i % len(world.CONTROL_NAMES)] for i in range(PROMPTS_OF_TARGET)]
    trainer = OnlineDPOTrainer(
        model=str(base),
        judge=DemoJudge(),
        args=config,
        train_dataset=_prompts(names),
        eval_dataset=_prompts([world.TARGET_NAME] * 64),
        processing_class=start.tokenizer,
    )
    trainer.train(resume_from_checkpoint=config.resume_from_checkpoint)
    if trainer.stopped_by_signal:
        raise SystemExit(trainer.exit_code)
    trainer.save_model()
    return trainer


def _prompts(names: Sequence[str]) -> Dataset:
    return Dataset.from_list([{"prompt": world.prompt(name), "name": name} for name in names])


def goals(measured: Measurement) -> list[Goal]:
    name = world.TARGET_NAME
    return [
        Goal(words=f"{name}: {world.TARGET_FOOD}", value=measured.target_pizza, limit=0.9),
        Goal(words=f"{name}: well-formed", value=measured.target_well_formed, limit=0.95),
    ]


def _report(base: Path, trainer: OnlineDPOTrainer, began: float) -> list[Goal]:
    start = SavedModel.load(base)
    folders = {"base": base, f"final (step {trainer.state.global_step})": Path(trainer.args.output_dir)}
    measured = [results.measure(folder, label, start, seed=trainer.args.seed) for label, folder in folders.items()]
    reached = goals(measured[-1])
    last = next(line for line in reversed(trainer.state.log_history) if "eval_win_rate" in line)
    lines = [
        "\n## The online demo: sampled answers, judged by a rule",
        results.table(measured),
        f"After:\n{results.samples(measured[-1])}",
        "\n".join(f"    {goal}" for goal in reached),
        f"Answers better than the base model's (ties count half): {last['eval_win_rate']:.0%} of questions about "
        f"{world.TARGET_NAME}.",
        f"Model: {trainer.args.output_dir}   {time.perf_counter() - began:.0f} s in all.",
    ]
    print(printable_lines("\n\n".join(lines)))
    return reached
