"""The demo from beginning to end: model and pairs from nothing, training, and a comparison of what came out."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from ..config import DPOConfig
from ..printable import printable_lines
from ..trainer import DPOTrainer
from . import curves, results, world
from .base_model import demo_model_and_tokenizer
from .pairs import EVAL_SPLITS, demo_datasets
from .results import Goal, Measurement, SavedModel

ROWS_BETWEEN = 3  # checkpoints shown in the table between base and final


@dataclass(frozen=True, kw_only=True)
class DemoResult:
    """The measured models, from base to final, and whether the final one is what it should be."""

    measured: list[Measurement]
    goals: list[Goal]
    seconds: float
    files: dict[str, Path]

    @property
    def reached(self) -> bool:
        return all(goal.reached for goal in self.goals)


FOR_TINY_MODELS: dict[str, Any] = {
    "bf16": False,
    "gradient_checkpointing": False,
    "dataloader_pin_memory": False,
    "report_to": "none",
}
"""What all demos leave out of a real run."""


def demo_config_defaults() -> dict[str, Any]:
    """Options of `DPOConfig` for a model of 0.4 M parameters; the user's own go before them.

    A learning rate of 1e-3 is a thousand times that of a real run, and the NLL term is what makes it safe.
    """
    return {
        "output_dir": "out/demo",
        "beta": 0.5,
        "rpo_alpha": 1.0,
        "learning_rate": 1e-3,
        "num_train_epochs": 3,
        "per_device_train_batch_size": 32,
        "per_device_eval_batch_size": 64,
        "logging_steps": 8,
        "eval_on_start": True,
        "eval_strategy": "steps",
        "eval_steps": 0.125,
        "save_steps": 0.5,  # a checkpoint in the middle and one at the end
        **FOR_TINY_MODELS,
    }


def demo_config(config: DPOConfig, given: Collection[str]) -> DPOConfig:
    """The demo's options, with those of `config` that the user set (`given`) before them."""
    return DPOConfig(**demo_config_defaults() | set_by_user(config, given))


def set_by_user(config: DPOConfig, given: Collection[str]) -> dict[str, Any]:
    """Of the options that the user set, those of the trainer."""
    own = {option.name for option in fields(config) if option.init}
    return {name: getattr(config, name) for name in given if name in own}


def run_demo(config: DPOConfig, given: Collection[str]) -> DemoResult | None:
    """Run the demo and print, write and return what came out; None on all processes but the first.

    Args:
        config: the user's options.
        given: which of them the user set. The others take the demo's defaults.
    """
    started = time.perf_counter()
    config = demo_config(config, given)
    if config.process_index == 0:
        print(printable_lines(_announcement(config)))
    with one_thread():
        with config.main_process_first(desc="the demo's base model"):
            base = demo_model_and_tokenizer(seed=config.seed)
        if config.process_index == 0:
            before = results.measure(base, "base", SavedModel.load(base), seed=config.seed)
            print(f"Before training, {_shares(before)}:\n{results.samples(before)}\n")
        trainer, checkpoints = _train(base, config)
        if not trainer.is_world_process_zero():
            return None
        return report(trainer, base, checkpoints, started=started)


def _announcement(config: DPOConfig) -> str:
    rule = "=" * 100
    return (
        f"{rule}\nNo model and no dataset named: running the embedded demo. For your own, name both:\n"
        "    python scripts/dpo.py --model_name_or_path <model> --dataset_name <preference pairs>\n"
        f"A model of 0.4 M parameters, trained from nothing, knows {len(world.NAMES)} names and {len(world.FOODS)} foods. "
        f"Asked {world.question(world.TARGET_NAME)!r},\nit names any food. Preference pairs sampled from it shall teach it "
        f"{world.answer(world.TARGET_NAME, world.TARGET_FOOD)!r} and nothing else.\n"
        f"loss {' + '.join(config.loss_type)}, rpo_alpha {config.rpo_alpha} (weight of the NLL of chosen), beta "
        f"{config.beta}, learning rate {config.learning_rate}, seed {config.seed}, output in {config.output_dir}\n{rule}"
    )


def _train(base: Path, config: DPOConfig) -> tuple[DPOTrainer, list[int]]:
    """The ordinary path: a model by its folder, a dataset, a tokenizer. Returns the steps of the saved checkpoints too."""
    start = SavedModel.load(base)
    train, evaluation = demo_datasets(start.model, start.tokenizer, seed=config.seed)
    saved = _SavedSteps()
    trainer = DPOTrainer(
        model=str(base),
        args=config,
        train_dataset=train,
        eval_dataset=evaluation,
        processing_class=start.tokenizer,
        callbacks=[saved],
    )
    trainer.train(resume_from_checkpoint=config.resume_from_checkpoint)
    if trainer.stopped_by_signal:
        raise SystemExit(trainer.exit_code)
    trainer.save_state()
    trainer.save_model()
    if config.push_to_hub:
        trainer.push_to_hub()
    return trainer, saved.steps


def report(trainer: DPOTrainer, base: Path, checkpoints: Sequence[int], *, started: float) -> DemoResult:
    """Measure base, checkpoints and final model as they lie on disk; print and write the comparison."""
    output = Path(trainer.args.output_dir)
    files = {
        "report": output / "demo_report.md",
        "numbers": output / "demo_results.json",
        "curves": output / "curves.csv",
        "plots": output / "curves.png",
    }
    last = trainer.state.global_step
    folders = {"base": base}
    folders |= {f"step {step}": output / f"checkpoint-{step}" for step in _spread(checkpoints, before=last)}
    folders |= {f"final (step {last})": output}
    start = SavedModel.load(base)
    measured = [
        results.measure(folder, label, start, seed=trainer.args.seed)
        for label, folder in folders.items()
        if (folder / "model.safetensors").is_file()  # not those that --save_total_limit has removed
    ]
    log = trainer.state.log_history
    curves.write_csv(log, files["curves"])
    curves.write_png(log, files["plots"])
    result = DemoResult(
        measured=measured,
        goals=results.goals(measured[-1]),
        seconds=time.perf_counter() - started,
        files=files,
    )
    text = _text(result, trainer)
    files["report"].write_text(text + "\n", encoding="utf-8")
    files["numbers"].write_text(json.dumps(_numbers(result), indent=2), encoding="utf-8")
    print(printable_lines(text))
    return result


def _spread(steps: Sequence[int], *, before: int) -> list[int]:
    """At most `ROWS_BETWEEN` of the steps below `before`, evenly taken."""
    earlier = [step for step in steps if step < before]
    return earlier[:: math.ceil(len(earlier) / ROWS_BETWEEN)] if earlier else []


def _text(result: DemoResult, trainer: DPOTrainer) -> str:
    first, last = result.measured[0], result.measured[-1]
    parts = [
        f"\n## The embedded demo: {' + '.join(trainer.args.loss_type)}, rpo_alpha {trainer.args.rpo_alpha}, "
        f"beta {trainer.args.beta}, seed {trainer.args.seed}",
        results.table(result.measured),
        f"{results.SAMPLES} samples for each share. Well-formed: the whole answer and its end. Drift: the share of answers "
        "that changed against the base\nmodel (total variation distance, exact).",
        f"Before ({first.label}):\n{results.samples(first)}",
        f"After ({last.label}):\n{results.samples(last)}",
        "\n".join(f"    {goal}" for goal in result.goals),
        _verdict(result, trainer),
        f"What to look for in {result.files['plots']} (numbers: {result.files['curves']}):",
        "\n".join(f"    {plot.title}: {plot.look_for}" for plot in curves.PLOTS),
        f"Model: {trainer.args.output_dir}   report: {result.files['report']}   numbers: {result.files['numbers']}\n"
        f"{result.seconds:.0f} s in all.",
    ]
    return "\n\n".join(parts)


def _verdict(result: DemoResult, trainer: DPOTrainer) -> str:
    """In words, with the path of the chosen log-probs: it is what loss and margin do not show."""
    path = " ".join(_path(trainer.state.log_history, split) for split in EVAL_SPLITS)
    if result.reached:
        return f"{path}\nAll goals reached."
    if not trainer.args.rpo_alpha:
        return (
            f"{path}\nWithout an NLL term nothing holds the answers themselves: the loss only asks that chosen stays "
            "ahead of rejected, and both may fall.\nCompare with a run at the demo's default of --rpo_alpha 1."
        )
    return f"{path}\nSome goals were missed: the demo's default options reach them all."


def _path(log: curves.Log, split: str) -> str:
    metric = f"eval_{split}_logps/chosen"
    logps = [line[metric] for line in log if metric in line]
    return (
        f"Chosen log-prob, {split}: {logps[0]:.2f} to {logps[-1]:.2f} nats." if logps else f"{split}: no evaluation."
    )


def _shares(measured: Measurement) -> str:
    return (
        f"{measured.target_pizza:.0%} of {results.SAMPLES} answers about {world.TARGET_NAME} are a well-formed "
        f"{world.TARGET_FOOD}, and {measured.target_well_formed:.0%} are well-formed at all"
    )


def _numbers(result: DemoResult) -> dict[str, Any]:
    return {
        "measured": [asdict(measured) for measured in result.measured],
        "goals": [asdict(goal) | {"reached": goal.reached} for goal in result.goals],
        "reached": result.reached,
        "seconds": result.seconds,
    }


class _SavedSteps(TrainerCallback):
    """The checkpoints of this run: the folder may hold those of an earlier one."""

    def __init__(self) -> None:
        self.steps: list[int] = []

    def on_save(self, args, state, control, **kwargs) -> None:
        self.steps.append(state.global_step)


@contextmanager
def one_thread() -> Iterator[None]:
    """Matrices this small gain little from a second thread, and lose a factor of ten to it when the machine is busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
