"""A step with bad numbers is not made, on any rank; a batch that does not fit is described; a signal is heeded."""

from __future__ import annotations

import logging
import math
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from datasets import Dataset
from safetensors.torch import load_file
from torch import Tensor
from transformers import TrainerCallback

from dpo_trainer import register_loss
from dpo_trainer.checkpointing import MARK, broken_file, failure, mark_failed
from dpo_trainer.checkpointing.durable import STOPPED_BY_SIGNAL
from dpo_trainer.checkpointing.step_watch import StepWatch, non_finite_error, precision_ways_out
from dpo_trainer.data.batches.collate import flat_inputs, padded_inputs
from dpo_trainer.training.out_of_memory import MemoryAdvice, largest_row, out_of_memory_message
from dpo_trainer.types import PairBatch, PairLogps

BAD = 9  # the row with a long chosen completion
ROWS = tiny.rows(12)
ROWS[BAD]["chosen"] = " " + "a" * 40


@register_loss("nan_for_one_pair", needs_reference=False)
def nan_for_one_pair(policy: PairLogps, reference: PairLogps, *, beta: float) -> Tensor:
    """NaN for one pair alone: the one whose chosen completion has more than 30 tokens. All gradients are finite."""
    return -beta * policy.margin() + torch.where(policy.chosen_lengths > 30, math.nan, 0.0)


@register_loss("nan_gradient_for_long_chosen", needs_reference=False)
def nan_gradient_for_long_chosen(policy: PairLogps, reference: PairLogps, *, beta: float) -> Tensor:
    """Finite, and with the gradient 0 * infinity for that pair."""
    margin = policy.margin()
    bump = torch.where(policy.chosen_lengths > 30, margin - margin.detach(), 1.0).abs().sqrt()
    return -beta * margin + 0 * bump


class WeightsAfterEachStep(TrainerCallback):
    def __init__(self):
        self.seen: list[dict[str, Tensor]] = []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.seen.append(tiny.weights(model))


def sequential(folder: Any, **options: Any) -> Any:
    """Batches of 2 rows in their order: the bad row is in the fifth."""
    after = WeightsAfterEachStep()
    defaults = {
        "train": Dataset.from_list(ROWS),
        "loss_type": "nan_for_one_pair",
        "per_device_train_batch_size": 2,
        "train_sampling_strategy": "sequential",
        "max_steps": 6,
        "parts": {"callbacks": [after]},
    }
    return tiny.trainer(folder, **{**defaults, **options}), after


def test_the_rows_are_what_the_tests_need():
    assert all(len(row["chosen"]) < 28 for i, row in enumerate(ROWS) if i != BAD)


# --- stop ---


@pytest.mark.parametrize("accumulate", [1, 2])
def test_nan_stops_the_run_before_the_weights_are_touched(accumulate, tmp_path):
    trainer, after = sequential(tmp_path, gradient_accumulation_steps=accumulate)
    step = 5 if accumulate == 1 else 3
    with pytest.raises(FloatingPointError, match=rf"optimizer step {step} is not finite \(example_ids \[9\]\)"):
        trainer.train()
    assert len(after.seen) == step - 1
    tiny.assert_same_weights(tiny.weights(trainer.model), after.seen[-1])
    assert tiny.moved(tiny.weights(tiny.llama()), after.seen[-1]) > 0  # the steps before did train


@pytest.mark.parametrize("max_grad_norm", [0.0, 1.0])
def test_a_gradient_that_is_not_finite_stops_the_run_too(max_grad_norm, tmp_path):
    trainer, after = sequential(tmp_path, loss_type="nan_gradient_for_long_chosen", max_grad_norm=max_grad_norm)
    with pytest.raises(FloatingPointError, match="gradient of optimizer step 5 is not finite, though every loss is"):
        trainer.train()
    tiny.assert_same_weights(tiny.weights(trainer.model), after.seen[3])
    assert all(weight.isfinite().all() for weight in tiny.weights(trainer.model).values())


def verdict(watch: StepWatch, gather: Any = lambda n: n, stop_asked: bool = False) -> Any:
    return watch.verdict(gather, stop_asked=stop_asked)


def watched(example_ids: list[int], losses: list[float]) -> Any:
    """As much of a micro-batch as the watch looks at."""
    from types import SimpleNamespace as Some

    return Some(batch=Some(example_ids=torch.tensor(example_ids)), losses=torch.tensor(losses))


def test_the_watch_is_silent_about_finite_numbers_and_forgets():
    watch = StepWatch()
    assert verdict(watch).finite  # nothing seen
    watch.watch(watched([4], [1.0]))
    assert verdict(watch).finite
    watch.watch(watched([5, 6], [1.0, math.inf]))
    found = verdict(watch)
    assert not found.finite
    assert found.ids == [6]
    with pytest.raises(
        FloatingPointError, match=r"step 2 .*example_ids \[6\].*not updated.*learning rate, or do that\."
    ):
        raise non_finite_error(found, 2, ["do that"])
    watch.watch(watched([5], [1.0]))
    assert verdict(watch).finite, "forgotten"


@pytest.mark.parametrize(
    ("options", "dtype", "ways"),
    [
        ({}, torch.float32, []),
        ({"bf16": True}, torch.float32, ["--bf16 false"]),
        ({}, torch.float16, ["held in float16, in float32 (--dtype float32)"]),
        ({"bf16": True}, torch.bfloat16, ["--bf16 false", "held in bfloat16, in float32"]),
    ],
    ids=str,
)
def test_the_way_to_wider_numbers_is_one_that_the_run_has(options, dtype, ways, tmp_path):
    found = precision_ways_out(tiny.config(tmp_path, **options), tiny.llama().to(dtype))
    assert len(found) == len(ways)
    for said, way in zip(found, ways, strict=True):
        assert way in said.replace("which are ", "")


def test_the_watch_names_a_row_of_several_pairs_once():
    watch = StepWatch()
    watch.watch(watched([7, 7, 7, 3], [math.nan, 1.0, math.nan, math.inf]))
    assert verdict(watch).ids == [7, 3]


@pytest.mark.parametrize("what", ["losses", "gradients", "signal", "Ctrl-C"])
def test_what_another_rank_met_stops_this_one(what):
    """This rank is fine; the sums over ranks say that another is not."""
    at = {"losses": 0, "gradients": 1, "signal": 2, "Ctrl-C": 4}[what]
    watch = StepWatch()
    watch.watch(watched([4], [1.0]))
    watch.gradient_norm = torch.tensor(1.0)
    found = verdict(watch, lambda sums: sums + torch.eye(5)[at])
    assert found.finite == (what in ("signal", "Ctrl-C"))
    assert (found.stop_asked, found.interrupted) == (what == "signal", what == "Ctrl-C")
    if what == "losses":
        assert "on another rank" in found.problem(1)


@pytest.mark.parametrize(
    ("norm", "elsewhere", "want"), [(0.0, 0.0, True), (0.0, 1.0, False), (1e-9, 0.0, False), (None, 0.0, False)]
)
def test_no_gradient_is_none_on_any_rank(norm, elsewhere, want):
    """Without a norm (a gradient scaler is at work) there is nothing to say."""
    watch = StepWatch()
    watch.watch(watched([4], [1.0]))
    watch.gradient_norm = norm
    found = verdict(watch, lambda sums: sums + elsewhere * torch.eye(5)[3])
    assert found.no_gradient == want
    assert found.finite


# --- skip ---


@pytest.mark.parametrize("optim", ["sgd", "adamw_torch"])
@pytest.mark.parametrize("kind", ["nan_for_one_pair", "nan_gradient_for_long_chosen"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_skip_leaves_the_step_out_and_goes_on(accumulate, kind, optim, tmp_path, caplog):
    """The weights are those of a run over the other rows alone: nothing of the step is left behind, in Adam's moments either."""
    how = {
        "loss_type": kind,
        "gradient_accumulation_steps": accumulate,
        "optim": optim,
        "learning_rate": 0.1 if optim == "sgd" else 1e-3,
    }
    with caplog.at_level(logging.WARNING):
        trainer, after = sequential(tmp_path, nonfinite="skip", max_steps=6 // accumulate, **how)
        trainer.train()
    steps, bad = 6 // accumulate, 5 if accumulate == 1 else 3
    assert len(after.seen) == steps
    tiny.assert_same_weights(after.seen[bad - 1], after.seen[bad - 2])
    window = slice(2 * accumulate * (bad - 1), 2 * accumulate * bad)
    others = [row for i, row in enumerate(ROWS) if i not in range(*window.indices(len(ROWS)))]
    without, _ = sequential(tmp_path, train=Dataset.from_list(others), max_steps=steps - 1, **how)
    without.train()
    tiny.assert_same_weights(tiny.weights(trainer.model), tiny.weights(without.model))
    said = [message for message in caplog.messages if "left out" in message]
    assert len(said) == 1
    assert f"optimizer step {bad} is not finite" in said[0]
    assert ("example_ids [9]" in said[0]) == (kind == "nan_for_one_pair")


def test_skip_keeps_what_is_logged_free_of_the_step(tmp_path):
    trainer, _ = sequential(tmp_path, nonfinite="skip", logging_steps=1)
    output = trainer.train()
    lines = [line for line in trainer.state.log_history if "learning_rate" in line]
    assert [line.get("skipped_steps") for line in lines] == [None] * 4 + [1, 1]
    assert ["loss" in line for line in lines] == [True] * 4 + [
        False,
        True,
    ]  # no pair was trained on, so there is no mean
    assert all(math.isfinite(line["loss"]) for line in lines if "loss" in line)
    mean = sum(line["loss"] for line in lines if "loss" in line) / 5
    assert output.training_loss == pytest.approx(mean, rel=1e-5)  # float32 sums of five steps


def test_skip_leaves_the_running_shift_of_bco_alone(tmp_path):
    trainer, _ = sequential(tmp_path, nonfinite="skip", loss_type=["bco_pair", "nan_for_one_pair"], logging_steps=100)
    trainer.train()
    assert trainer.loss_objective.shift.count.item() == 10  # of 12 pairs
    assert trainer.loss_objective.shift.mean.isfinite()


def test_skip_with_deepspeed_is_refused(tmp_path):
    with pytest.raises(ValueError, match="--nonfinite skip cannot keep DeepSpeed from its optimizer step"):
        tiny.config(tmp_path, nonfinite="skip", deepspeed={"zero_optimization": {"stage": 1}})


def with_bad_rows(*steps: int) -> Dataset:
    """For batches of 2 rows in their order."""
    rows = tiny.rows(12)
    for step in steps:
        rows[2 * step - 1]["chosen"] = " " + "a" * 40
    return Dataset.from_list(rows)


def test_skip_gives_up_after_steps_in_a_row(tmp_path):
    how = {"nonfinite": "skip", "max_skipped_steps": 1}
    apart, _ = sequential(tmp_path / "apart", train=with_bad_rows(2, 4, 6), **how)
    apart.train()
    assert apart.skipped_steps == 3
    together, after = sequential(tmp_path / "together", train=with_bad_rows(2, 4, 5), **how)
    with pytest.raises(FloatingPointError) as caught:
        together.train()
    said = str(caught.value)
    assert "optimizer step 5 is not finite" in said
    assert "and --max_skipped_steps 1 in a row before it were left out" in said
    assert "or raise --max_skipped_steps, which is 1." in said
    tiny.assert_same_weights(tiny.weights(together.model), after.seen[2])


def test_steps_in_a_row_are_counted_across_a_resume(tmp_path):
    how = {
        "train": with_bad_rows(3, 4),
        "nonfinite": "skip",
        "max_skipped_steps": 1,
        "save_strategy": "steps",
        "save_steps": 3,
    }
    first, _ = sequential(tmp_path, max_steps=3, **how)
    first.train()
    resumed, _ = sequential(tmp_path, **how)
    with pytest.raises(FloatingPointError, match=r"step 4 is not finite.* 1 in a row before it were left out"):
        resumed.train(resume_from_checkpoint="auto")


# --- checkpoints of weights that are of no use ---


class Spike(TrainerCallback):
    """A rate so high that the update leaves weights that are finite, and of which no forward pass is."""

    def __init__(self, step: int):
        self.step = step

    def on_step_begin(self, args, state, control, optimizer=None, **kwargs):
        for group in optimizer.param_groups:
            group["lr"] = 1e36 if state.global_step + 1 == self.step else 1e-3


def spiked(folder: Path, step: int | None, *callbacks: TrainerCallback, **options: Any) -> Any:
    how = {"max_steps": 6, "save_strategy": "steps", "save_steps": 1, "save_total_limit": 1, "optim": "adamw_torch"}
    parts = {"callbacks": [Spike(step or 0), *callbacks]}
    return tiny.trainer(folder, parts=parts, **{**how, **options})


def there(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("checkpoint-*"))


def test_a_checkpoint_that_fails_at_once_is_stepped_over(tmp_path, caplog):
    whole = spiked(tmp_path / "whole", None)
    whole.train()
    assert there(tmp_path / "whole") == ["checkpoint-6"]
    folder = tmp_path / "run"
    with pytest.raises(FloatingPointError, match=r"step 4 .*No step after .*checkpoint-3 was finite"):
        spiked(folder, 3).train()
    assert there(folder) == ["checkpoint-2", "checkpoint-3"], "the last good one is there"
    assert broken_file(folder / "checkpoint-3") is None
    saved = load_file(folder / "checkpoint-3" / "model.safetensors")
    assert all(weight.isfinite().all() for weight in saved.values())
    resumed = spiked(folder, None)
    resumed.train(resume_from_checkpoint="auto")
    assert "checkpoint-3 is skipped: it failed at once (The loss of optimizer step 4 is not finite" in caplog.text
    assert f"Resuming from {folder / 'checkpoint-2'}" in caplog.text
    tiny.assert_same_weights(tiny.weights(resumed.model), tiny.weights(whole.model))
    assert there(folder) == ["checkpoint-6"]


def test_a_checkpoint_without_a_mark_gets_one_as_it_fails(tmp_path):
    """Written by an earlier release, or by a run that was killed before its next step."""
    with pytest.raises(FloatingPointError):
        spiked(tmp_path, 3, save_total_limit=None).train()
    (tmp_path / "checkpoint-3" / MARK).unlink()
    with pytest.raises(FloatingPointError, match="auto goes on from the one before"):
        spiked(tmp_path, None).train(resume_from_checkpoint="auto")
    assert there(tmp_path) == ["checkpoint-1", "checkpoint-2", "checkpoint-3"], "nothing was retired for it"
    spiked(tmp_path, None).train(resume_from_checkpoint="auto")
    assert there(tmp_path) == ["checkpoint-6"]


@pytest.mark.parametrize("strategy", ["steps", "no"])
def test_the_last_step_is_looked_at_too(strategy, tmp_path):
    with pytest.raises(
        FloatingPointError, match="After step 4, the last one, the weights or their log-probs are not finite"
    ):
        spiked(tmp_path, 4, max_steps=4, save_strategy=strategy).train()
    if strategy == "no":
        return
    assert there(tmp_path) == ["checkpoint-3", "checkpoint-4"]
    resumed = spiked(tmp_path, None, max_steps=4)
    resumed.train(resume_from_checkpoint="auto")
    assert all(weight.isfinite().all() for weight in tiny.weights(resumed.model).values())
    assert there(tmp_path) == ["checkpoint-4"]


def test_a_last_step_that_was_left_out_is_no_fault_of_the_weights(tmp_path):
    trainer, _ = sequential(
        tmp_path, train=with_bad_rows(6), nonfinite="skip", save_strategy="steps", save_total_limit=1
    )
    trainer.train()
    assert there(tmp_path) == ["checkpoint-6"]


def test_skip_gives_up_on_weights_and_leaves_the_last_good_checkpoint(tmp_path):
    """Of the checkpoints without a finite step after them the newest alone is kept: they have the same weights."""
    how = {"nonfinite": "skip", "max_skipped_steps": 2}
    with pytest.raises(
        FloatingPointError, match=r"step 6 is not finite.* 2 in a row before it were left out.*checkpoint-5 was finite"
    ):
        spiked(tmp_path, 3, **how).train()
    assert there(tmp_path) == ["checkpoint-2", "checkpoint-5"]
    resumed = spiked(tmp_path, None, **how)
    resumed.train(resume_from_checkpoint="auto")
    assert resumed.skipped_steps == 0
    assert there(tmp_path) == ["checkpoint-6"]


def test_after_a_signal_the_resumed_run_retires_the_older_checkpoint(tmp_path):
    spiked(tmp_path, None, Terminate(2)).train()
    assert there(tmp_path) == ["checkpoint-2", "checkpoint-3"]
    spiked(tmp_path, None, Terminate(3), save_steps=100).train(resume_from_checkpoint="auto")
    assert there(tmp_path) == ["checkpoint-3", "checkpoint-4"]


def test_a_marked_checkpoint_that_is_named_is_used_and_loses_its_mark(tmp_path):
    spiked(tmp_path, None, max_steps=2).train()
    mark_failed(tmp_path / "checkpoint-2", "a row was bad")
    spiked(tmp_path, None, max_steps=3, save_total_limit=None).train(
        resume_from_checkpoint=str(tmp_path / "checkpoint-2")
    )
    assert not (tmp_path / "checkpoint-2" / MARK).exists()


def test_a_lone_checkpoint_that_failed_lets_auto_begin_anew(tmp_path, caplog):
    spiked(tmp_path, None, max_steps=2).train()
    (tmp_path / "checkpoint-2" / MARK).write_text("{")
    made = spiked(tmp_path, None, save_steps=3, max_steps=1)
    made.train(resume_from_checkpoint="auto")
    assert "starting fresh" in caplog.text
    assert there(tmp_path) == ["checkpoint-1"], "the one that failed goes first"


def test_a_mark_that_cannot_be_written_is_a_warning(tmp_path, caplog):
    (tmp_path / MARK).mkdir()
    mark_failed(tmp_path, "no number")
    assert "could not be marked as failed" in caplog.text
    mark_failed(tmp_path / "gone", "no number")
    assert failure(tmp_path) is None


# --- too little memory ---

ROOM = MemoryAdvice(batch_size=8, checkpointing=False, second_model=True, adapter=False, finds_batch_size=False)


def out_of_memory_above(rows: int, trainer: Any) -> list[int]:
    """Make the trainer's forward run out of memory for batches of more rows than that; the sizes that were tried."""
    tried: list[int] = []
    score = trainer.scorer.__call__

    class Full:
        def __getattr__(self, name: str) -> Any:
            return getattr(score.__self__, name)

        def __call__(self, model: Any, batch: PairBatch, **how: Any) -> PairLogps:
            tried.append(len(batch.chosen))
            if len(batch.chosen) > rows:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
            return score(model, batch, **how)

    trainer.scorer = Full()
    return tried


def test_out_of_memory_says_what_was_in_the_batch_and_what_helps(tmp_path):
    trainer, _ = sequential(tmp_path, loss_type="sigmoid", per_device_train_batch_size=4, gradient_checkpointing=False)
    out_of_memory_above(3, trainer)
    with pytest.raises(torch.OutOfMemoryError) as caught:
        trainer.train()
    said = str(caught.value)
    tokens = sum(trainer.train_dataset[i]["length"] for i in range(4))
    largest = max(range(4), key=lambda i: trainer.train_dataset[i]["length"])
    assert said.startswith("CUDA out of memory. Tried to allocate 20.00 GiB.")
    assert f"4 pairs and {tokens} tokens" in said
    assert f"largest row (example_id {largest}) has {trainer.train_dataset[largest]['length']}" in said
    for flag in (
        "--per_device_train_batch_size 2",
        "--auto_find_batch_size",
        "--gradient_checkpointing",
        "--precompute_ref_log_probs",
        "--use_peft",
        "--max_length",
    ):
        assert flag in said


def test_advice_names_only_what_is_not_on_already():
    least = MemoryAdvice(batch_size=1, checkpointing=True, second_model=False, adapter=True, finds_batch_size=True)
    assert least.ways_out() == ["--max_length, which is not set"]
    assert replace(least, max_length=512).ways_out() == ["--max_length below 512"]
    assert replace(least, in_float32=True).ways_out()[0] == "--bf16 true"
    assert len(ROOM.ways_out()) == 6


def test_advice_on_a_cpu_names_no_precision_of_a_card(tmp_path):
    advice = tiny.trainer(tmp_path)._memory_advice()
    assert not advice.in_float32


@pytest.mark.parametrize("collate", [flat_inputs, padded_inputs])
def test_largest_row(collate):
    import oracles

    rows = oracles.random_pairs([(3, 2, 4), (2, 4, 3, 9), (6, 1, 1)])
    batch = PairBatch.from_inputs(collate(rows, 0))
    sizes = [len(r.prompt_ids) + sum(map(len, r.completions)) for r in rows]
    longest = [len(r.prompt_ids) + max(map(len, r.completions)) for r in rows]
    want = max(sizes) if collate is flat_inputs else max(longest)
    assert largest_row(batch) == (want, rows[1].example_id)
    assert str(want) in out_of_memory_message(batch, ROOM, "Full.")


def test_auto_find_batch_size_trains_with_what_fits(tmp_path):
    """From 6 down (accelerate takes a tenth off each time) to 3, as if it had been asked for 3 at once."""
    how = {"loss_type": "bco_pair", "max_steps": 3, "logging_steps": 3}
    trainer, _ = sequential(tmp_path, per_device_train_batch_size=6, auto_find_batch_size=True, **how)
    tried = out_of_memory_above(3, trainer)
    trainer.train()
    assert tried == [6, 5, 4, 3, 3, 3, 3]  # three steps, and a look at what the last one made of the weights
    want, _ = sequential(tmp_path, per_device_train_batch_size=3, **how)
    want.train()
    tiny.assert_same_weights(tiny.weights(trainer.model), tiny.weights(want.model))
    got, line = tiny.log_lines(trainer)[-1], tiny.log_lines(want)[-1]
    assert {**got, "tokens_per_second": 0} == {**line, "tokens_per_second": 0}


def test_auto_find_batch_size_does_not_start_again_with_weights_that_moved(tmp_path):
    trainer, _ = sequential(tmp_path, per_device_train_batch_size=4, auto_find_batch_size=True, max_steps=3)
    score, calls = trainer.compute_loss, []

    def full_at_the_second(*args: Any, **how: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
        return score(*args, **how)

    trainer.compute_loss = full_at_the_second
    with pytest.raises(ValueError, match=r"memory ran out at step 2, .*--per_device_train_batch_size 3"):
        trainer.train()


# --- a signal ---


class Terminate(TrainerCallback):
    def __init__(self, step: int):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("strategy", ["no", "steps"])
def test_sigterm_finishes_the_step_saves_and_stops(strategy, tmp_path):
    whole = tiny.trained(tmp_path / "whole", max_steps=5)
    handler = signal.getsignal(signal.SIGTERM)
    stopped = tiny.trainer(
        tmp_path / "run", max_steps=5, save_strategy=strategy, save_steps=4, parts={"callbacks": [Terminate(2)]}
    )
    stopped.train()
    assert stopped.stopped_by_signal
    assert stopped.state.global_step == 3
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-3"]
    assert signal.getsignal(signal.SIGTERM) is handler, "put back"
    resumed = tiny.trainer(tmp_path / "run", max_steps=5, save_strategy=strategy, save_steps=4)
    resumed.train(resume_from_checkpoint="auto")
    assert not resumed.stopped_by_signal
    assert tiny.losses(resumed) == tiny.losses(whole)
    tiny.assert_same_weights(tiny.weights(resumed.model), tiny.weights(whole.model))


def test_sigterm_does_not_wait_for_an_evaluation(tmp_path):
    stopped = tiny.trainer(
        tmp_path,
        max_steps=5,
        eval_strategy="steps",
        eval_steps=1,
        parts={"callbacks": [Terminate(1)], "eval_dataset": tiny.dataset(4, seed=5)},
    )
    stopped.train()
    assert [line["step"] for line in stopped.state.log_history if "eval_loss" in line] == [1]


def test_the_exit_code_is_the_documented_one():
    assert STOPPED_BY_SIGNAL == os.EX_TEMPFAIL
