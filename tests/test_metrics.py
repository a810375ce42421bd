"""Metrics are sums and counts until the line is logged: right by hand, exact over uneven batches, and free of waiting."""

from __future__ import annotations

import dataclasses
import itertools
import json
import logging
import math
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from datasets import Dataset
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import EarlyStoppingCallback, TrainerCallback
from two_processes import torchrun

from dpo_trainer import DPOTrainer, register_loss
from dpo_trainer.data.batches.padding_rows import mask_padding_rows
from dpo_trainer.metrics import METRICS, FallingChosenWarning, MetricInputs, MetricSums, per_pair
from dpo_trainer.training.micro_batches import step_loss
from dpo_trainer.types import PairBatch, PairLogps, TokenLogps

# --- by hand ---

# Pair 0: chosen 2 tokens, rejected 1. Pair 1: chosen 1, rejected 3. Pair 2 only fills the batch: absurd numbers.
LENGTHS = [2, 1, 1, 3, 1, 1]
LOGPS = [-1.0, -2.0, -4.0, -0.5, -1.0, -1.0, -4.0, -100.0, -100.0]
MEAN_LOGIT = [1.0, 2.0, 2.0, 6.0, 0.0, 1.0, 5.0, 900.0, 900.0]
ENTROPY = [1.0, 1.0, 2.0, 0.0, 3.0, 3.0, 4.0, 900.0, 900.0]
IS_TOP1 = [1.0, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]

BY_HAND = {
    "loss": 3.25,  # (1 * 1 + 3 * 4) / (1 + 3): the only metric that pairs enter by their weight
    "rewards/chosen": 0.75,  # 0.5 (-3 + 4) = 0.5 and 0.5 (-0.5 + 2.5) = 1
    "rewards/rejected": 0.5,  # 0.5 (-4 + 10) = 3 and 0.5 (-6 + 2) = -2
    "rewards/accuracies": 0.5,  # 0.5 < 3, 1 > -2
    "rewards/margins": 0.25,  # -2.5 and 3
    "logps/chosen": -1.75,  # -3 and -0.5
    "logps/rejected": -5.0,  # -4 and -6
    "logits/chosen": 3.0,  # (1 + 2 + 6) / 3 tokens
    "logits/rejected": 2.0,  # (2 + 0 + 1 + 5) / 4 tokens
    "entropy": 2.0,  # (1 + 1 + 2 + 0 + 3 + 3 + 4) / 7 tokens
    "mean_token_accuracy": 2 / 3,  # 1, 0 | 1 of the chosen tokens
    "nll_loss": 1.0,  # 3 / 2 and 0.5 / 1 nats per token
    "aux_loss": 0.25,
}


def parts(*, reference: bool = True, weight: tuple[float, ...] = (1.0, 3.0, 0.0), chosen=(0, 2, 4)) -> MetricInputs:
    lengths, chosen, rejected = torch.tensor(LENGTHS), torch.tensor(chosen), torch.tensor([1, 3, 5])
    completion = torch.repeat_interleave(torch.arange(6), lengths)
    position = torch.cat([torch.arange(n) for n in LENGTHS])
    batch = PairBatch(
        example_ids=torch.tensor([70, 71, 72]),
        weight=torch.tensor(weight),
        input_ids=torch.zeros(1, 12, dtype=torch.long),
        score_at=torch.arange(9),
        target_ids=torch.arange(9),
        completion=completion,
        completion_position=position,
        lengths=lengths,
        chosen=chosen,
        rejected=rejected,
        num_tokens=12,
    )
    tokens = TokenLogps(
        logps=torch.tensor(LOGPS),
        completion=completion,
        position=position,
        chosen=chosen,
        rejected=rejected,
        lengths=lengths,
        entropy=torch.tensor(ENTROPY),
        is_top1=torch.tensor(IS_TOP1),
        mean_logit=torch.tensor(MEAN_LOGIT),
    )
    ref = PairLogps(
        chosen=torch.tensor([-4.0, -2.5, 50.0]),
        rejected=torch.tensor([-10.0, -2.0, 50.0]),
        chosen_lengths=lengths[chosen],
        rejected_lengths=lengths[rejected],
    )
    return MetricInputs(
        batch=batch,
        policy=PairLogps.from_tokens(tokens, aux_loss=torch.tensor(0.25)),
        reference=ref if reference else None,
        losses=torch.tensor([1.0, 4.0, 1000.0]),
        beta=0.5,
    )


def reduced(*micro_batches: MetricInputs) -> dict[str, float]:
    sums = MetricSums(METRICS, aux_loss=True)
    for micro_batch in micro_batches:
        sums.add(micro_batch)
    return sums.reduce(lambda table: table, torch.device("cpu"))[0]


def test_every_metric_by_hand():
    assert set(BY_HAND) == set(METRICS)
    assert reduced(parts()) == pytest.approx(BY_HAND, rel=1e-7)


def test_metrics_of_the_issue_are_all_there():
    promised = (
        "loss rewards/chosen rewards/rejected rewards/accuracies rewards/margins logps/chosen logps/rejected "
        "logits/chosen logits/rejected entropy mean_token_accuracy nll_loss aux_loss"
    )
    assert set(promised.split()) == set(METRICS)


def test_two_batches_are_one_mean():
    """Only pair 0, then only pair 1: sums over sums, not the mean of two means (`entropy` would be 4/3 and 10/4)."""
    first, second = parts(weight=(1.0, 0.0, 0.0)), parts(weight=(0.0, 3.0, 0.0))
    assert reduced(first)["entropy"] == pytest.approx(4 / 3)
    assert reduced(second)["entropy"] == pytest.approx(10 / 4)
    assert reduced(first, second) == pytest.approx(BY_HAND, rel=1e-7)


def test_rewards_without_a_reference_are_against_zero():
    got = reduced(parts(reference=False))
    assert got["rewards/chosen"] == pytest.approx(0.5 * -1.75)
    assert got["rewards/margins"] == pytest.approx(0.5 * (-1.75 + 5.0))


def test_shared_completion_counts_its_tokens_once():
    """Pairs 0 and 1 prefer the same completion 0: its two tokens are 2, not 4; pairs still count one each."""
    got = reduced(parts(chosen=(0, 0, 4)))
    assert got["logits/chosen"] == pytest.approx(1.5)
    assert got["logps/chosen"] == pytest.approx(-3.0)


def test_a_completion_in_the_middle_of_a_ranking_is_on_both_sides():
    """0 > 3 > 1: completion 3 is rejected and chosen. Its tokens count on either side, and once in the entropy."""
    whole = parts(chosen=(0, 3, 4))
    rejected = torch.tensor([3, 1, 5])
    whole = dataclasses.replace(whole, batch=dataclasses.replace(whole.batch, rejected=rejected))
    got = reduced(whole)
    assert got["logits/chosen"] == pytest.approx((1 + 2 + 0 + 1 + 5) / 5)
    assert got["logits/rejected"] == pytest.approx((2 + 0 + 1 + 5) / 4)
    assert got["entropy"] == pytest.approx((1 + 1 + 2 + 3 + 3 + 4) / 6)


def test_sums_start_anew_after_a_line():
    sums = MetricSums(METRICS, aux_loss=False)
    sums.add(parts())
    first, tokens = sums.reduce(lambda table: table, torch.device("cpu"))
    assert tokens == 12
    assert "aux_loss" not in first
    assert sums.reduce(lambda table: table, torch.device("cpu")) == ({}, 0)


def test_reduction_is_one_collective():
    calls = []

    def over_two_ranks(table: Tensor) -> Tensor:
        calls.append(table)
        return 2 * table

    sums = MetricSums(METRICS, aux_loss=True)
    for _ in range(3):
        sums.add(parts())
    got, tokens = sums.reduce(over_two_ranks, torch.device("cpu"))
    assert len(calls) == 1
    assert got == pytest.approx(BY_HAND, rel=1e-7)
    assert tokens == 2 * 3 * 12


def test_per_pair_arrays():
    got = per_pair(parts())
    assert got["rewards/chosen"][:2].tolist() == [0.5, 1.0]
    assert got["rewards/rejected"][:2].tolist() == [3.0, -2.0]
    assert got["logps/chosen"][:2].tolist() == [-3.0, -0.5]
    assert got["ref_logps/rejected"][:2].tolist() == [-10.0, -2.0]
    assert got["example_ids"].tolist() == [70, 71, 72]


def test_step_loss_is_the_mean_over_the_step():
    """Two micro-batches on each of two ranks, weights 1, 3 | 0, 2: engines average over ranks, so each part is doubled."""
    losses, weight = torch.tensor([1.0, 4.0]), torch.tensor([1.0, 3.0])
    more, more_weight = torch.tensor([7.0, 5.0]), torch.tensor([0.0, 2.0])
    total = torch.tensor(6.0)
    ranks = step_loss(losses, weight, total, 2), step_loss(more, more_weight, total, 2)
    assert sum(ranks).item() / 2 == pytest.approx((1 + 12 + 10) / 6)
    assert step_loss(losses, weight, None, 2).item() == pytest.approx(13 / 4)
    assert step_loss(losses, torch.zeros(2), torch.tensor(0.0), 1).item() == 0  # nothing but fillers


# --- through the trainer ---


def test_evaluation_does_not_depend_on_the_batch_size(tmp_path):
    """7 rows in batches of 1, 2, 3, 4, 7: a mean of batch means would differ, for 3 + 3 + 1 and 4 + 3 are uneven."""
    got = {}
    for size in (1, 2, 3, 4, 7):
        trainer = tiny.trainer(tmp_path, per_device_eval_batch_size=size, parts={"ref_model": tiny.llama(seed=5)})
        metrics = trainer.evaluate(tiny.dataset(7, seed=3))
        got[size] = {name: metrics[f"eval_{name}"] for name in METRICS if name != "aux_loss"}
    for size in (1, 2, 3, 4):
        # float32 log-probs of rows of other lengths: relative to sums of up to 200 nats.
        assert got[size] == pytest.approx(got[7], rel=1e-6, abs=1e-6), size
    assert abs(got[7]["loss"] - math.log(2)) > 0.01
    spread = [tiny.trainer(tmp_path).evaluate(tiny.dataset(n, seed=3))["eval_entropy"] for n in (3, 7)]
    assert abs(spread[0] - spread[1]) > 1e-4  # rows differ, or every mean would be the same


def test_evaluation_after_an_interrupted_one(tmp_path, monkeypatch):
    """Sums of the batches before Ctrl-C must not enter the next evaluation."""
    trainer = tiny.trainer(tmp_path, parts={"ref_model": tiny.llama(seed=5)}, per_device_eval_batch_size=2)
    want = trainer.evaluate(tiny.dataset(4, seed=3))["eval_logps/chosen"]
    step = trainer.prediction_step
    calls = iter([step, step, None])
    monkeypatch.setattr(trainer, "prediction_step", lambda *args, **kwargs: next(calls)(*args, **kwargs))
    with pytest.raises(TypeError):
        trainer.evaluate(tiny.dataset(6, seed=9))
    monkeypatch.setattr(trainer, "prediction_step", step)
    assert trainer.evaluate(tiny.dataset(4, seed=3))["eval_logps/chosen"] == want


def test_weights_of_rows_enter_the_loss(tmp_path):
    rows = tiny.rows(4)
    trainer = tiny.trainer(tmp_path, parts={"ref_model": tiny.llama(seed=5)})
    each = [trainer.evaluate(Dataset.from_list([row]))["eval_loss"] for row in rows]
    weights = [0.5, 2.0, 1.0, 3.0]
    both = Dataset.from_list([row | {"weight": w} for row, w in zip(rows, weights, strict=True)])
    assert trainer.evaluate(both)["eval_loss"] == pytest.approx(np.average(each, weights=weights), rel=1e-5)


def test_training_metrics_under_accumulation(tmp_path):
    """One optimizer step over 7 rows in batches of 2, 2, 2, 1 logs what evaluation of the same rows says before it."""
    rows = tiny.dataset(7, seed=3)
    other = tiny.llama(seed=5)
    trainer = tiny.trainer(
        tmp_path,
        train=rows,
        parts={"ref_model": other},
        per_device_train_batch_size=2,
        gradient_accumulation_steps=4,
        max_steps=1,
    )
    want = trainer.evaluate(rows)
    trainer.train()
    (line,) = tiny.log_lines(trainer)
    for name in METRICS:
        if name != "aux_loss":
            assert line[name] == pytest.approx(want[f"eval_{name}"], rel=1e-6, abs=1e-6), name
    assert line["tokens_per_second"] > 0


def test_a_line_is_about_all_steps_since_the_last(tmp_path):
    """A line every second step is the mean of the two lines that every step would have written (same number of pairs)."""
    fine = tiny.log_lines(tiny.trained(tmp_path))
    coarse = tiny.log_lines(tiny.trained(tmp_path, logging_steps=2))
    assert [len(fine), len(coarse)] == [4, 2]
    for name in ("loss", "logps/chosen", "rewards/margins", "nll_loss"):
        assert coarse[1][name] == pytest.approx((fine[2][name] + fine[3][name]) / 2, rel=1e-6)
    assert coarse[1]["num_tokens"] == fine[3]["num_tokens"]


def test_num_tokens_counts_what_is_computed(tmp_path):
    """Flat: prompts once. One epoch over all 8 rows, so the order does not matter."""
    trainer = tiny.trained(tmp_path, train=tiny.dataset(8), max_steps=2, layout="flat")
    assert trainer.state.log_history[-1].get("num_tokens", trainer.num_tokens) == trainer.num_tokens
    assert trainer.num_tokens == sum(trainer.train_dataset["length"])
    padded = tiny.trained(tmp_path, train=tiny.dataset(8), max_steps=2, layout="padded")
    prompts = sum(len(ids) for ids in padded.train_dataset["prompt_ids"])
    assert padded.num_tokens == trainer.num_tokens + prompts


@pytest.mark.parametrize("logging_steps", [1, 2], ids=["line at the checkpoint", "line after the checkpoint"])
def test_lines_survive_resume(logging_steps, tmp_path):
    """From a checkpoint at step 3: `num_tokens` and all means, also of steps between the last line and the checkpoint."""
    how = {"logging_steps": logging_steps, "save_steps": 3}
    whole = tiny.trained(tmp_path, save_strategy="steps", **how)
    resumed = tiny.trainer(tmp_path, **how)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    kept = {"num_tokens", *METRICS} - {"aux_loss"}
    want = [{name: line[name] for name in kept} for line in tiny.log_lines(whole)]
    assert len(want) == len({line["num_tokens"] for line in want}) == 4 // logging_steps
    assert [{name: line[name] for name in kept} for line in tiny.log_lines(resumed)] == want


# --- the last steps of a run ---


def mean_of(lines: list[dict[str, float]], name: str) -> float:
    """Of lines of one step each: every step has 4 pairs, so that the mean over pairs is the mean of means."""
    return float(np.mean([line[name] for line in lines]))


def assert_means(line: dict[str, float], of: list[dict[str, float]]) -> None:
    for name in ("loss", "rewards/margins", "logps/chosen", "nll_loss"):
        assert line[name] == pytest.approx(mean_of(of, name), rel=1e-6), name


class StopAfter(TrainerCallback):
    """Ends a run after `step`; with the trainer, as SIGTERM does."""

    def __init__(self, step: int, trainer: DPOTrainer | None = None):
        self.step, self.trainer = step, trainer

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.trainer is not None and state.global_step + 1 == self.step:
            self.trainer.stop_asked = True

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop |= self.trainer is None and state.global_step == self.step


@pytest.mark.parametrize("logging_steps", [10, 3, 2], ids=["no line before", "one line before", "nothing left"])
def test_the_line_that_ends_a_run_has_the_steps_after_the_last_line(logging_steps, tmp_path):
    fine = tiny.log_lines(tiny.trained(tmp_path))
    made = tiny.trainer(tmp_path, logging_steps=logging_steps)
    result = made.train()
    *lines, last = made.state.log_history
    left = fine[len(lines) * logging_steps :]
    assert last["train_loss"] == pytest.approx(mean_of(fine, "loss"), rel=1e-5)
    assert result.metrics["epoch"] == last["epoch"] > 0
    assert ("loss" in last) == bool(left)
    assert "rewards/margins" not in result.metrics
    if left:
        assert_means(last, left)
        assert last["num_tokens"] == fine[-1]["num_tokens"]


def test_a_run_that_is_ended_early_logs_its_last_steps(tmp_path):
    fine = tiny.log_lines(tiny.trained(tmp_path))
    made = tiny.trained(tmp_path, logging_steps=2, parts={"callbacks": [StopAfter(3)]})
    assert_means(made.state.log_history[-1], fine[2:3])


def test_a_run_that_was_told_to_stop_leaves_its_last_steps_to_the_next(tmp_path):
    fine = tiny.log_lines(tiny.trained(tmp_path))
    how = {"logging_steps": 2, "max_steps": 4, "save_strategy": "steps", "save_steps": 50}
    stopped = tiny.trainer(tmp_path, **how)
    stopped.add_callback(StopAfter(3, stopped))
    stopped.train()
    assert stopped.stopped_by_signal
    assert "loss" not in stopped.state.log_history[-1]
    resumed = tiny.trainer(tmp_path, **how)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    first, second = tiny.log_lines(resumed)
    assert_means(first, fine[:2])
    assert_means(second, fine[2:])


def test_a_run_that_failed_leaves_nothing_to_the_next(tmp_path):
    made = tiny.trainer(tmp_path, logging_steps=10)
    step = made.training_step

    def fails_at_the_third(*args: Any, **kwargs: Any) -> Tensor:
        if made.state.global_step == 2:
            raise RuntimeError("out of luck")
        return step(*args, **kwargs)

    made.training_step = fails_at_the_third
    with pytest.raises(RuntimeError, match="out of luck"):
        made.train()
    made.training_step = step
    made.train()
    assert made.state.log_history[-1]["num_tokens"] == tiny.trained(tmp_path).num_tokens


def test_ref_model_is_the_second_model_where_there_is_one(tmp_path):
    made = tiny.trained(tmp_path, max_steps=1)
    assert made.ref_model is not made.model
    tiny.assert_same_weights(tiny.weights(made.ref_model), tiny.weights(tiny.llama()))
    given = tiny.llama(seed=5)
    assert tiny.trainer(tmp_path, parts={"ref_model": given}).ref_model is given
    for parts, options in (({"peft_config": tiny.lora()}, {}), ({}, {"loss_type": "simpo"})):
        assert tiny.trainer(tmp_path, parts=parts, **options).ref_model is None


def test_compute_metrics_receives_pairs(tmp_path):
    """Documented keys, one number per row, in the order of the rows, and the numbers of the scorer."""
    seen: list[Any] = []

    def compute_metrics(prediction) -> dict[str, float]:
        seen.append(prediction)
        return {"mine": 7.0}

    rows = tiny.dataset(7, seed=3)
    trainer = tiny.trainer(tmp_path, parts={"compute_metrics": compute_metrics, "ref_model": tiny.llama(seed=5)})
    metrics = trainer.evaluate(rows)
    assert metrics["eval_mine"] == 7.0
    (prediction,) = seen
    documented = {f"{kind}/{side}" for kind in ("rewards", "logps", "ref_logps") for side in ("chosen", "rejected")}
    assert set(prediction.predictions) == documented
    assert prediction.label_ids.tolist() == list(range(7))
    prepared = trainer.data.prepare(rows, "again")
    batch = PairBatch.from_inputs(trainer.data_collator(list(prepared)))
    with torch.no_grad():
        policy = trainer.scorer(trainer.model, batch)
    reference = trainer.reference.logps(trainer.model, batch)
    for side in ("chosen", "rejected"):
        got = {kind: prediction.predictions[f"{kind}/{side}"] for kind in ("rewards", "logps", "ref_logps")}
        assert all(values.shape == (7,) for values in got.values())
        np.testing.assert_allclose(got["logps"], getattr(policy, side).numpy(), rtol=1e-6, atol=1e-4)
        np.testing.assert_allclose(got["ref_logps"], getattr(reference, side).numpy(), rtol=1e-6, atol=1e-4)
        np.testing.assert_allclose(got["rewards"], 0.1 * (got["logps"] - got["ref_logps"]), rtol=0, atol=1e-5)
    accuracy = (prediction.predictions["rewards/chosen"] > prediction.predictions["rewards/rejected"]).mean()
    assert metrics["eval_rewards/accuracies"] == pytest.approx(accuracy)


@pytest.mark.parametrize("how", [{}, {"eval_do_concat_batches": False}, {"batch_eval_metrics": True}], ids=str)
def test_losses_for_compute_metrics_are_one_per_pair(how, tmp_path):
    """transformers would hand over as many as the batch has rows, of the last, smaller batch too."""
    seen: list[Any] = []

    def compute_metrics(prediction, compute_result: bool = True) -> dict[str, float]:
        seen.append(prediction)
        return {"mine": 7.0}

    parts = {"compute_metrics": compute_metrics, "ref_model": tiny.llama(seed=5)}
    trainer = tiny.trainer(tmp_path, parts=parts, include_for_metrics=["loss"], **how)
    metrics = trainer.evaluate(tiny.dataset(7, seed=3))
    batches = [
        p for one in seen for p in (one.predictions if isinstance(one.predictions, list) else [one.predictions])
    ]
    losses = [
        np.atleast_1d(each) for one in seen for each in (one.losses if isinstance(one.losses, list) else [one.losses])
    ]
    assert [len(each) for each in losses] == [len(batch["rewards/chosen"]) for batch in batches]
    assert not any("losses" in batch for batch in batches)
    each, margins = (
        np.concatenate(losses),
        np.concatenate([b["rewards/chosen"] - b["rewards/rejected"] for b in batches]),
    )
    np.testing.assert_allclose(each, np.log1p(np.exp(-margins)), rtol=1e-5)
    assert metrics["eval_loss"] == pytest.approx(each.mean())
    assert trainer.compute_metrics is compute_metrics


# --- the metric that decides which model is best ---

EVALUATED = {"eval_strategy": "steps", "eval_steps": 2}


def deciding(folder: Path, name: str | None, several: bool = False, **parts: Any) -> DPOTrainer:
    rows = tiny.dataset(4, seed=1)
    parts["eval_dataset"] = {"easy": rows, "hard": rows} if several else rows
    return tiny.trainer(folder, parts=parts, metric_for_best_model=name, **EVALUATED)


@pytest.mark.parametrize("name", ["loss", "eval_loss", "rewards/margins", "eval_runtime"])
def test_metrics_of_an_evaluation_may_decide(name, tmp_path):
    deciding(tmp_path, name).train()
    deciding(tmp_path, f"eval_hard_{name.removeprefix('eval_')}", several=True).train()


def test_a_metric_that_no_evaluation_logs_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"--metric_for_best_model rewards/margin .*Did you mean 'rewards/margins'"):
        deciding(tmp_path, "rewards/margin")
    with pytest.raises(ValueError, match=r"--metric_for_best_model aux_loss is no metric"):
        deciding(tmp_path, "aux_loss")
    with pytest.raises(ValueError, match=r"eval_loss is no metric .*Each evaluation dataset has its own: easy_loss"):
        deciding(tmp_path, "eval_loss", several=True)


def test_a_metric_of_ones_own_may_decide(tmp_path):
    class Adds(TrainerCallback):
        def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
            metrics["eval_mine"] = 1.0

    deciding(tmp_path, "mine", compute_metrics=lambda prediction: {"mine": 7.0}).train()
    deciding(tmp_path, "eval_mine", callbacks=[Adds()]).train()
    with pytest.raises(ValueError, match="is no metric of an evaluation"):
        deciding(tmp_path, "mine", callbacks=[EarlyStoppingCallback()])


# --- rows of several pairs ---


def ranked_rows(n: int, seed: int = 0) -> Dataset:
    """Token ids: rows of 2, 3, 4, 2 ... completions, each better than all that follow it: 1, 3, 6, 1 ... pairs."""
    numbers = torch.Generator().manual_seed(seed)

    def ids(most: int) -> list[int]:
        length = int(torch.randint(1, most, (1,), generator=numbers))
        return torch.randint(len(tiny.SPECIAL), tiny.VOCABULARY, (length,), generator=numbers).tolist()

    rows = []
    for i in range(n):
        k = 2 + i % 3
        rows.append(
            {
                "example_id": i,
                "prompt_ids": ids(8),
                "chosen_ids": [7, *ids(6)],
                "rejected_ids": [8, *ids(6)],
                "more_ids": [[9 + number, *ids(6)] for number in range(k - 2)],
                "pairs": [list(pair) for pair in itertools.combinations(range(k), 2)],
            }
        )
    return Dataset.from_list(rows)


PAIRS_OF_ROW = [1, 3, 6, 1, 3, 6, 1]  # of `ranked_rows(7)`


@pytest.mark.parametrize("size", [1, 2, 4, 7])
def test_compute_metrics_receives_every_pair_of_ranked_rows(size, tmp_path):
    """Rows in batches of 4 + 3, say: the last batch has 10 pairs in 3 rows, and none of them is lost."""
    seen: list[Any] = []
    trainer = tiny.trainer(
        tmp_path,
        per_device_eval_batch_size=size,
        max_length=None,
        parts={"compute_metrics": lambda p: seen.append(p) or {}, "ref_model": tiny.llama(seed=5)},
    )
    metrics = trainer.evaluate(ranked_rows(7))
    (prediction,) = seen
    assert prediction.label_ids.tolist() == [i for i, n in enumerate(PAIRS_OF_ROW) for _ in range(n)]
    margins = prediction.predictions["rewards/chosen"] - prediction.predictions["rewards/rejected"]
    assert metrics["eval_rewards/margins"] == pytest.approx(margins.mean(), abs=1e-5)
    assert metrics["eval_rewards/accuracies"] == pytest.approx((margins > 0).mean())
    assert len(set(margins.tolist())) == 21


def unweighed(
    inputs: dict[str, Any], rank: int, rows: Any, *, last: bool = True, drop_last: bool = False
) -> list[bool]:
    """On one of two ranks with batches of three rows, in the last round over `rows`."""
    state = SimpleNamespace(end_of_dataloader=last, active_dataloader=SimpleNamespace(dataset=rows))
    accelerator: Any = SimpleNamespace(num_processes=2, process_index=rank, gradient_state=state)
    return mask_padding_rows(inputs, accelerator, rows_per_rank=3, drop_last=drop_last).tolist()


@pytest.mark.parametrize(
    ("rank", "remainder", "real"),
    [
        (0, 4, [True] * 6),
        (1, 4, [True, True, True, False, False, False]),  # the first of its rows has three pairs
        (1, 5, [True, True, True, True, False, False]),
        (0, 2, [True, True, True, True, False, False]),
        (1, 2, [False] * 6),
        (1, 0, [True] * 6),  # the rows fill all batches
        (1, None, [True] * 6),  # a stream: nobody knows, and it fills itself with weights of 0
    ],
)
def test_fillers_are_rows_and_weights_are_of_pairs(rank, remainder, real):
    """Batches of three rows with 3, 1 and 2 pairs on each of two ranks."""
    weight = torch.tensor([1.0, 1.0, 1.0, 0.5, 2.0, 2.0])
    inputs = {"weight": weight, "row": torch.tensor([0, 0, 0, 1, 2, 2])}
    rows = iter(()) if remainder is None else range(12 + remainder)
    assert unweighed(inputs, rank, rows) == real
    assert inputs["weight"].tolist() == [w if r else 0.0 for w, r in zip(weight.tolist(), real, strict=True)]


def test_fillers_of_a_collator_that_says_nothing_of_rows():
    """One of another library: a pair is a row."""
    inputs = {"input_ids": torch.zeros(6, 4, dtype=torch.long)}
    assert unweighed(inputs, 1, range(17)) == [True, True, False]
    assert inputs["weight"].tolist() == [1.0, 1.0, 0.0]
    early = {"input_ids": torch.zeros(6, 4, dtype=torch.long)}
    assert all(unweighed(early, 1, range(17), last=False))
    assert all(unweighed(early, 1, range(17), drop_last=True)), "then there are none"
    assert "weight" not in early


TWO_RANKS = """
from test_metrics import lines_and_predictions
lines_and_predictions({folder!r}, ranks=2)
"""


def lines_and_predictions(folder: str, ranks: int) -> None:
    """Trains on 7 ranked rows, 4 + 3 to a step, and evaluates: written to a file by the main process."""
    seen: list[Any] = []
    trainer = tiny.trainer(
        folder,
        train=ranked_rows(7),
        max_length=None,
        max_steps=4,
        train_sampling_strategy="sequential",
        per_device_train_batch_size=4 // ranks,
        per_device_eval_batch_size=4 // ranks,
        parts={"compute_metrics": lambda p: seen.append(p) or {}},
    )
    trainer.train()
    metrics = trainer.evaluate(ranked_rows(7, seed=1))
    if trainer.is_world_process_zero():
        (prediction,) = seen
        means = [name for name in METRICS if name != "aux_loss"]
        found = {
            "ranks": trainer.accelerator.num_processes,
            "lines": [{name: line[name] for name in means} for line in tiny.log_lines(trainer)],
            "eval": {name: metrics[f"eval_{name}"] for name in means},
            "example_ids": prediction.label_ids.tolist(),
            "logps": {name: values.tolist() for name, values in prediction.predictions.items()},
        }
        Path(folder, f"{ranks}.json").write_text(json.dumps(found))


@pytest.mark.distributed
def test_two_processes_count_every_pair_of_ranked_rows_once(tmp_path):
    """Rank 0 has 1 + 3 pairs where rank 1 has 6 + 1; of the last batch, one row is a filler, with 3 pairs or with 1."""
    script = tmp_path / "script.py"
    script.write_text(TWO_RANKS.format(folder=str(tmp_path)))
    torchrun(script)
    lines_and_predictions(str(tmp_path), ranks=1)
    got, want = (json.loads((tmp_path / f"{ranks}.json").read_text()) for ranks in (2, 1))
    assert (got["ranks"], want["ranks"]) == (2, 1)
    assert got["example_ids"] == want["example_ids"] == [i for i, n in enumerate(PAIRS_OF_ROW) for _ in range(n)]
    # float32: the sums of two ranks are added in another order.
    for name, values in want["logps"].items():
        assert got["logps"][name] == pytest.approx(values, abs=1e-4), name
    assert got["eval"] == pytest.approx(want["eval"], rel=1e-6, abs=1e-5)
    assert len(want["lines"]) == 4
    for mine, theirs in zip(got["lines"], want["lines"], strict=True):
        assert mine == pytest.approx(theirs, rel=1e-6, abs=1e-5)


# --- nothing waits for the device between two log lines ---

WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "unique_dim", "_unique2", "_unique"}


class Waits(TorchDispatchMode):
    """Counts the operations that make a host wait for its accelerator: scalars read, and shapes that depend on values."""

    def __init__(self):
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        by_mask = name in ("index", "index_put", "index_put_") and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        if name in WAITS or by_mask:
            self.seen[f"{name} by mask" if by_mask else name] += 1
        return function(*args, **(kwargs or {}))


def test_the_counter_sees_what_waits():
    values = torch.arange(3.0)
    with Waits() as waits:
        values.sum().item()
        bool(values.any())
        values[values > 1]
        values.nonzero()
    assert waits.seen == {"_local_scalar_dense": 2, "index by mask": 1, "nonzero": 1}


def test_a_micro_batch_waits_for_nothing(tmp_path, monkeypatch):
    """Forward, reference, losses, metrics and backward of every micro-batch after the first, which settles the layout."""
    trainer = tiny.trainer(tmp_path, layout="flat", max_steps=2, gradient_accumulation_steps=2, logging_steps=1000)
    collectives: list[str] = []
    reduce = trainer.accelerator.reduce
    monkeypatch.setattr(trainer.accelerator, "reduce", lambda *a, **k: collectives.append("reduce") or reduce(*a, **k))
    monkeypatch.setattr(trainer.accelerator, "gather", lambda *a, **k: pytest.fail("a collective"))
    step = trainer.training_step
    waited: list[Counter[str]] = []

    def counted(*args, **kwargs):
        before = len(collectives)
        with Waits() as waits:
            loss = step(*args, **kwargs)
        waited.append(waits.seen + Counter(collectives[before:]))
        return loss

    monkeypatch.setattr(trainer, "training_step", counted)
    trainer.train()
    assert len(waited) == 4
    assert waited[0]["_local_scalar_dense"] > 0  # the check of the first batch does look: the counter is alive
    assert waited[1:] == [Counter()] * 3
    # Per optimizer step: the number of pairs, and the finite check; at the end, a look at the weights and the one line.
    assert len(collectives) <= 2 * 2 + 2


# --- the warning that loss and accuracy do not give ---


def warned(caplog, lines: list[dict[str, float]], **how: Any) -> list[str]:
    warning = FallingChosenWarning(**{"beta": 0.1, "has_reference": True, **how})
    with caplog.at_level(logging.WARNING):
        for step, line in enumerate(lines, start=1):
            warning.look(line, step)
    return [record.getMessage() for record in caplog.records if "chosen log-probs fall" in record.getMessage()]


def rewards(chosen: float, rejected: float) -> dict[str, float]:
    """Of log-ratios in nats, at beta 0.1."""
    return {"rewards/chosen": 0.1 * chosen, "rewards/margins": 0.1 * (chosen - rejected)}


def test_warning_fires_once_when_chosen_falls_and_the_margin_grows(caplog):
    (message,) = warned(caplog, [rewards(-0.5, -4), rewards(-3, -8), rewards(-5, -20)])
    assert "Step 2" in message
    assert "3.0 nats less" in message
    assert "margin is 5.0 nats" in message
    assert "--rpo_alpha" in message


@pytest.mark.parametrize(
    "line",
    [
        rewards(2, -8),  # chosen rises
        rewards(-0.5, -8),  # hardly falls
        rewards(-3, -3.5),  # falls, but the margin does not grow: nothing looks perfect
        rewards(-3, 2),
        {},  # a line without pairs
    ],
    ids=str,
)
def test_warning_stays_silent(line, caplog):
    assert warned(caplog, [line] * 3) == []


def test_warning_needs_a_reference(caplog):
    """Without one, rewards are log-probs, and always negative."""
    assert warned(caplog, [rewards(-80, -90)], has_reference=False) == []


@register_loss("push_both_down")
def push_both_down(policy: PairLogps, reference: PairLogps, *, beta: float) -> Tensor:
    """What unlearning looks like in fast motion."""
    return beta * (policy.chosen + 3 * policy.rejected)


@pytest.mark.parametrize(("loss_type", "fires"), [("push_both_down", True), ("sigmoid", False)])
def test_warning_through_the_trainer(loss_type, fires, caplog, tmp_path):
    rows = [{"prompt": prompt, "chosen": " ab", "rejected": " zzyzzyzz"} for prompt in "pqrs"]
    with caplog.at_level(logging.WARNING):
        trainer = tiny.trained(tmp_path, loss_type=loss_type, learning_rate=0.05, train=Dataset.from_list(rows))
    last = tiny.log_lines(trainer)[-1]
    assert (last["rewards/chosen"] < -0.1 and last["rewards/margins"] > 0.1) == fires
    messages = [r.getMessage() for r in caplog.records if "chosen log-probs fall" in r.getMessage()]
    assert len(messages) == fires
