"""A resumed online run is the run that was interrupted, to the bit: also within a round of sampling, and after a judge failed."""

from __future__ import annotations

import json
import logging
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import online_tiny
import pytest
import tiny
import torch
from datasets import IterableDataset
from online_tiny import Recording, Told, by_chance, without_times
from torch import Tensor
from transformers import TrainerCallback

from dpo_trainer.checkpointing.run_state import STATE_FILE
from dpo_trainer.online.feedback.protocol import FeedbackUnavailable
from dpo_trainer.online.trainer import OnlineDPOTrainer

# --- runs: 10 rows, 2 to a batch and 2 batches to a step, make epochs of 3 steps; the last of each has one batch ---


class SaveAt(TrainerCallback):
    def __init__(self, steps: list[int]):
        self.steps = steps

    def on_step_end(self, args, state, control, **kwargs):
        control.should_save = state.global_step in self.steps


def build(folder: Path, *, parts: dict[str, Any] | None = None, **how: Any) -> OnlineDPOTrainer:
    """Logged after steps 3 and 6: a checkpoint of any other step lies within a window. The generator is a `Recording`."""
    defaults: dict[str, Any] = {
        "model": tiny.llama(num_hidden_layers=1),
        "train": online_tiny.dataset(10),
        "optim": "adamw_torch",
        "learning_rate": 1e-2,
        "weight_decay": 0.1,
        "max_grad_norm": 1.0,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "gradient_checkpointing": False,
        "max_steps": 6,
        "logging_steps": 3,
    }
    online = online_tiny.trainer(folder, parts=parts, **{**defaults, **how})
    online.generator = Recording(online.generator)
    return online


@dataclass(repr=False)
class Outcome:
    weights: dict[str, Tensor]
    tensors: dict[str, Tensor]
    """Of the optimizer, and the state of two random number generators."""
    log: list[dict[str, float]]
    sampled: list[Any]
    """What each call of the generator returned."""
    beta: float


def run(online: OnlineDPOTrainer, resume: Path | None = None) -> Outcome:
    # A resumed process has drawn other numbers before it trains than the first one had.
    for _ in range(3 if resume else 0):
        torch.rand(5), np.random.rand()
    online.train(resume_from_checkpoint=None if resume is None else str(resume))
    moments = online.optimizer.state_dict()["state"]
    return Outcome(
        weights=tiny.weights(online.model),
        tensors={
            **{f"{at} {key}": value.clone() for at, own in moments.items() for key, value in own.items()},
            "torch": torch.get_rng_state(),
            "numpy": torch.from_numpy(np.asarray(np.random.get_state()[1], dtype=np.int64)),
        },
        log=[without_times(line) for line in online.state.log_history],
        sampled=online.generator.sampled,
        beta=online.beta,
    )


def assert_same(got: Outcome, want: Outcome) -> None:
    """To the bit."""
    tiny.assert_same_weights(got.weights, want.weights)
    assert got.tensors.keys() == want.tensors.keys()
    assert [name for name in want.tensors if not torch.equal(got.tensors[name], want.tensors[name])] == []
    assert got.log == want.log
    assert got.beta == want.beta


@dataclass
class Cell:
    """A kind of run, and the steps whose checkpoints it is resumed from."""

    how: Callable[[], dict[str, Any]]
    at: list[int] = field(default_factory=lambda: [2])
    waiting: list[int] = field(default_factory=lambda: [0])
    """Steps of a round that the checkpoint holds."""
    resampled: list[int] = field(default_factory=list)
    """Calls of the generator after the checkpoint, where not as many as steps remain."""


def stream(n: int) -> Iterator[dict[str, str]]:
    yield from online_tiny.rows(n)


def options(**how: Any) -> Callable[[], dict[str, Any]]:
    return lambda: how


def streaming(n: int = 10, **how: Any) -> Callable[[], dict[str, Any]]:
    return lambda: {"train": IterableDataset.from_generator(stream, gen_kwargs={"n": n}), **how}


def lora(**how: Any) -> Callable[[], dict[str, Any]]:
    """With dropout, so that training draws random numbers, and sampling must not."""
    return lambda: {"parts": {"peft_config": tiny.lora(lora_dropout=0.2)}, **how}


def evaluating() -> dict[str, Any]:
    return {"eval_strategy": "steps", "eval_steps": 1, "parts": {"eval_dataset": online_tiny.dataset(3)}}


CELLS = {
    "every step": Cell(options(), [2, 3, 4], [0, 0, 0], [4, 3, 2]),
    "every 3": Cell(options(generate_every=3), [1, 2, 3, 5], [2, 1, 0, 1], [1, 1, 1, 0]),
    "every 2, by epochs of 3": Cell(options(generate_every=2), [1, 2, 4], [1, 0, 1], [3, 3, 1]),
    "stream": Cell(streaming(), [2], [0], [4]),
    "stream, every 3": Cell(streaming(generate_every=3), [2, 4], [1, 2], [1, 0]),
    "lora": Cell(lora(), [2], [0], [4]),
    "lora, every 3": Cell(lora(generate_every=3), [2, 4], [1, 2], [1, 0]),
    "all pairs of 4": Cell(
        options(num_generations=4, pair_selection="all", generate_every=3, layout="padded"), [2], [1], [1]
    ),
    "in parts": Cell(options(max_tokens_per_micro_batch=60, generate_every=3), [2], [1], [1]),
    "beta by epochs": Cell(
        options(beta=[0.1, 0.4], max_steps=-1, num_train_epochs=2), [2, 3, 4], [0, 0, 0], [4, 3, 2]
    ),
    "evaluation": Cell(evaluating),
    "moving reference": Cell(options(sync_ref_model=True, ref_model_sync_steps=3), [2, 4], [0, 0], [4, 2]),
}


class Runs:
    """Each uninterrupted run is made once, and saves what it is resumed from."""

    def __init__(self, root: Path):
        self.root = root
        self.made: dict[str, tuple[Path, Outcome]] = {}

    def whole(self, name: str) -> tuple[Path, Outcome]:
        if name not in self.made:
            folder, cell = self.root / str(len(self.made)) / "whole", CELLS[name]
            online = build(folder, **cell.how())
            online.add_callback(SaveAt(cell.at))
            self.made[name] = folder, run(online)
        return self.made[name]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return Runs(tmp_path_factory.mktemp("runs"))


@pytest.mark.parametrize(
    ("name", "place"), [(name, place) for name, cell in CELLS.items() for place in range(len(cell.at))]
)
def test_resumed_equals_uninterrupted(name, place, runs):
    folder, want = runs.whole(name)
    cell = CELLS[name]
    checkpoint = folder / f"checkpoint-{cell.at[place]}"
    (rounds,) = json.loads((checkpoint / STATE_FILE).read_text())["state"]["rounds"]
    assert len(rounds["waiting"]) == cell.waiting[place]
    got = run(build(folder.parent / f"from{cell.at[place]}", **cell.how()), resume=checkpoint)
    assert_same(got, want)
    if cell.resampled:
        assert got.sampled == want.sampled[len(want.sampled) - cell.resampled[place] :], "nothing was sampled twice"
        assert len(got.sampled) == cell.resampled[place]


def test_a_run_that_saves_is_the_run_that_does_not(runs, tmp_path):
    _, want = runs.whole("lora, every 3")
    assert_same(run(build(tmp_path, **CELLS["lora, every 3"].how())), want)


@pytest.mark.parametrize("part", ["waiting", "sampled_at", "tally"])
def test_every_part_of_the_state_matters(part, runs, tmp_path):
    """The comparison sees a checkpoint that is wrong in one place."""
    folder, want = runs.whole("every 3")
    copied = shutil.copytree(folder / "checkpoint-2", tmp_path / "checkpoint-2")
    content = json.loads((copied / STATE_FILE).read_text())
    rounds = content["state"]["rounds"][0]
    if part == "waiting":
        for row in rounds["waiting"][0][0]:
            row["prompt_ids"] = row["prompt_ids"][1:]
    elif part == "sampled_at":
        rounds["sampled_at"] -= 1
    else:
        content["state"]["tally"]["objective/scores"][0] += 1
    (copied / STATE_FILE).write_text(json.dumps(content))
    got = run(build(tmp_path / "run", force_resume=True, **CELLS["every 3"].how()), resume=copied)
    with pytest.raises(AssertionError):
        assert_same(got, want)


def test_the_same_trainer_may_resume(tmp_path):
    """With the beta of its last epoch, and what waits of its last round."""
    online = build(tmp_path, beta=[0.1, 0.4], max_steps=-1, num_train_epochs=2, generate_every=2)
    online.add_callback(SaveAt([4]))
    whole = run(online)
    again = run(online, resume=tmp_path / "checkpoint-4")
    tiny.assert_same_weights(again.weights, whole.weights)
    assert again.log == whole.log


# --- another run ---


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"temperature": 0.5}, "the sampling of completions (--temperature: 0.9 there, 0.5 here)"),
        ({"max_new_tokens": 5}, "--max_new_tokens: 6 there, 5 here"),
        ({"num_generations": 3}, "--num_generations: 2 there, 3 here"),
        ({"generate_every": 2}, "--generate_every: 3 there, 2 here"),
        ({"missing_eos_penalty": 1.0}, "who gives feedback"),
        ({"beta": [0.1, 0.2]}, "who gives feedback"),
        ({"judge": "random"}, "who gives feedback"),
    ],
    ids=str,
)
def test_a_checkpoint_of_another_run_is_refused(options, said, runs, tmp_path):
    folder, _ = runs.whole("every 3")
    online = build(tmp_path, **{"generate_every": 3, **options})
    with pytest.raises(ValueError, match="was written by another run") as refused:
        online.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
    assert said in str(refused.value)


def test_what_waits_on_another_number_of_processes_is_sampled_anew(runs, tmp_path, caplog):
    folder, _ = runs.whole("every 3")
    state = json.loads((folder / "checkpoint-2" / STATE_FILE).read_text())["state"]
    online = build(tmp_path, generate_every=3)
    with caplog.at_level(logging.WARNING):
        online.load_run_state({**state, "rounds": state["rounds"] * 2}, {})
    assert "that were not trained on yet are sampled again" in caplog.text
    assert online.rounds.state()["waiting"] == []


# --- feedback that is down ---


class DownOnce(Told):
    """Is not there at one call, in this process."""

    def __init__(self, at: int | None):
        super().__init__(lambda prompt, number, answer: by_chance(prompt, answer.ids))
        self.at = at
        self.asked = 0

    def scores(self, samples):
        self.asked += 1
        if self.asked == self.at:
            raise FeedbackUnavailable("Nobody is at home.")
        return super().scores(samples)


@pytest.mark.parametrize(
    ("how", "at"),
    [({}, 3), ({"save_strategy": "steps", "save_steps": 1}, 3), ({"generate_every": 2}, 2)],
    ids=["no other checkpoint", "saved already", "rounds of 2"],
)
def test_a_judge_that_is_down_loses_nothing(how, at, tmp_path):
    """It fails in the third step: what two steps made is saved, and goes on as if nothing had been."""
    want = run(build(tmp_path / "whole", judge=DownOnce(None), **how))
    stopped = build(tmp_path / "run", judge=DownOnce(at), **how)
    with pytest.raises(
        FeedbackUnavailable, match=r"Nobody is at home\. The run is saved at step 2.*--resume_from_checkpoint"
    ):
        stopped.train()
    assert (tmp_path / "run" / "checkpoint-2").is_dir()
    got = run(build(tmp_path / "run", judge=DownOnce(None), **how), resume=tmp_path / "run" / "checkpoint-2")
    assert_same(got, want)


class Paid(Told):
    """Counts what it is asked, and what that costs."""

    def __init__(self) -> None:
        super().__init__(lambda prompt, number, answer: by_chance(prompt, answer.ids))
        self.counts = {"calls": 0.0, "cost": 0.0}

    def scores(self, samples):
        self.counts["calls"] += len(samples)
        self.counts["cost"] += 0.25 * len(samples)
        return super().scores(samples)


def test_what_feedback_counts_goes_on_after_a_resume(tmp_path):
    want = run(build(tmp_path / "whole", judge=Paid(), parts={"callbacks": [SaveAt([2])]}))
    assert [line["told/calls"] for line in want.log if "told/calls" in line][-1] > 10
    resumed = build(tmp_path / "run", judge=Paid())
    got = run(resumed, tmp_path / "whole" / "checkpoint-2")
    assert_same(got, want)
    assert resumed.feedback.counts["cost"] == 0.25 * resumed.feedback.counts["calls"]


def test_a_checkpoint_without_counts_resumes(tmp_path):
    """One of an earlier release."""
    run(build(tmp_path / "whole", judge=Paid(), parts={"callbacks": [SaveAt([2])]}))
    file = tmp_path / "whole" / "checkpoint-2" / STATE_FILE
    content = json.loads(file.read_text())
    del content["state"]["feedback_counts"]
    file.write_text(json.dumps(content))
    resumed = build(tmp_path / "run", judge=Paid(), force_resume=True)
    run(resumed, tmp_path / "whole" / "checkpoint-2")
    assert resumed.feedback.counts["calls"] > 0


def test_it_may_be_down_again(tmp_path):
    """And the checkpoint that is there already is written once more."""
    with pytest.raises(FeedbackUnavailable, match="saved at step 2"):
        build(tmp_path, judge=DownOnce(3)).train()
    with pytest.raises(FeedbackUnavailable, match="saved at step 2"):
        build(tmp_path, judge=DownOnce(1)).train(resume_from_checkpoint="auto")
    online = build(tmp_path, judge=DownOnce(None))
    online.train(resume_from_checkpoint="auto")
    assert online.state.global_step == 6
    assert len(online.generator.sampled) == 4


class Interrupted:
    """A generator that is told to stop in one of its calls."""

    def __init__(self, inner: Any, call: int):
        self.inner, self.call, self.calls = inner, call, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def __call__(self, *args: Any, **how: Any) -> Any:
        self.calls += 1
        if self.calls == self.call:
            signal.raise_signal(signal.SIGINT)
        return self.inner(*args, **how)


@pytest.mark.parametrize("every", [1, 3])
def test_ctrl_c_while_sampling_ends_after_the_step_and_changes_nothing(every, tmp_path):
    """With an evaluation due after it, which samples as well and is made up."""
    how = {"generate_every": every, "save_strategy": "no", **evaluating()}
    whole = run(build(tmp_path / "whole", **how))
    stopped = build(tmp_path / "run", **how)
    stopped.generator = Interrupted(stopped.generator, 1)
    stopped.train()
    assert (stopped.exit_code, stopped.state.global_step) == (130, 1)
    assert not any("eval_loss" in line for line in stopped.state.log_history)
    got = run(build(tmp_path / "run", **how), tmp_path / "run" / "checkpoint-1")
    assert sum("eval_loss" in line for line in got.log) == 6
    assert_same(got, whole)
