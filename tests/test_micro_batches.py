"""A budget of tokens splits a batch into parts: memory has a ceiling, and no number changes."""

from __future__ import annotations

import contextlib
import copy
import itertools
import logging
import math
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import tiny
import torch
from accelerate.utils import DistributedType
from datasets import Dataset, IterableDataset
from hypothesis import given, settings
from hypothesis import strategies as st
from test_failures import nan_for_one_pair  # noqa: F401  registers the loss of that name
from test_invariances import CHECKPOINTING, TRAINED, ranked_rows
from test_invariances import run as run_with_checkpoints
from torch import Tensor, nn

from dpo_trainer import DataCollatorForPreference, DPOTrainer, register_loss
from dpo_trainer.data import FEATURES
from dpo_trainer.data.batches.collate import read_row
from dpo_trainer.data.batches.packs import check_rows_fit, even_places, flat_size, packed_places
from dpo_trainer.data.batches.padding_rows import mask_padding_rows
from dpo_trainer.scoring.layout import Layout
from dpo_trainer.training.micro_batches import (
    PACK_TOKENS,
    even_micro_batches,
    in_row_order,
    keeps_ranks_in_step,
    note_pairs,
    step_through,
    weighted_mean,
)
from dpo_trainer.types import MICRO_BATCHES, PairBatch, PairLogps, TokenizedPair, micro_batches

# float32 on CPU, the same products added up in another order: worst seen 1.2e-7 in a weight, in runs that
# move weights by more than 0.005 (asserted).
LOSS_ATOL, WEIGHT_ATOL = 2e-6, 1e-6
BUDGET = {"flat": 90, "padded": 160}
LINES = ("loss", "rewards/chosen", "rewards/margins", "logps/rejected", "entropy", "mean_token_accuracy", "num_tokens")


def spy(trainer: DPOTrainer) -> list[int]:
    """Tokens, padding included, of each forward of the policy in training; the check of the layout is none."""
    sizes: list[int] = []

    def look(module: nn.Module, args: Any, inputs: dict[str, Any]) -> None:
        if module.training:
            sizes.append(inputs["input_ids"].numel())

    trainer.model.register_forward_pre_hook(look, with_kwargs=True)
    return sizes


def keeping(seen: list[Any]) -> Any:
    """A `compute_metrics` that keeps what it receives."""

    def compute_metrics(given: Any) -> dict[str, float]:
        seen.append(given)
        return {}

    return compute_metrics


def trained(folder: Path, budget: int | None, **how: Any) -> tuple[DPOTrainer, list[int]]:
    """8 pairs a step; weights move by more than 0.005."""
    options = {"per_device_train_batch_size": 8, "max_steps": 3, "learning_rate": 0.2, "layout": "flat", **how}
    trainer = tiny.trainer(folder, max_tokens_per_micro_batch=budget, **copy.deepcopy(options))
    sizes, before = spy(trainer), tiny.weights(trainer.model)
    trainer.train()
    assert tiny.moved(before, tiny.weights(trainer.model)) > 0.005
    assert trainer.layout.name == options["layout"]
    return trainer, sizes


def assert_same_run(got: DPOTrainer, want: DPOTrainer) -> None:
    for name in LINES:
        ours, theirs = ([line[name] for line in tiny.log_lines(made)] for made in (got, want))
        assert ours == pytest.approx(theirs, rel=1e-6, abs=LOSS_ATOL), name
    tiny.assert_same_weights(tiny.weights(got.model), tiny.weights(want.model), WEIGHT_ATOL)


def weighted_rows() -> Dataset:
    return tiny.dataset(22).add_column("weight", [0.25 * (i % 7) for i in range(22)])


def ranked_table() -> Dataset:
    return Dataset.from_list(ranked_rows((3, 2, 5, 2, 4, 2, 3)))


RANKED = {"train": ranked_table, "max_length": None, "per_device_train_batch_size": 7}
CASES: dict[str, dict[str, Any]] = {
    "flat": {},
    "padded": {"layout": "padded"},
    "flat lora": TRAINED["lora"],
    "padded lora non-reentrant": {"layout": "padded", **CHECKPOINTING["non_reentrant"], **TRAINED["lora"]},
    "accumulated": {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2},
    "reentrant": CHECKPOINTING["reentrant"],
    "weights": {"train": weighted_rows},
    "ranked": RANKED,
    "ranked padded": {**RANKED, "layout": "padded"},
    "cached": {"precompute_ref_log_probs": True, "parts": {"ref_model": tiny.llama(seed=5)}},
    "moving": {"sync_ref_model": True, "ref_model_sync_steps": 1},
    "shaped": {
        "loss_type": ["ipo", "hinge"],
        "ld_alpha": 0.3,
        "use_weighting": True,
        "rpo_alpha": 0.5,
        "learning_rate": 0.05,
    },
    "loader worker": {"dataloader_num_workers": 1},
    "a step left out": {"nonfinite": "skip", "loss_type": "nan_for_one_pair", "train_sampling_strategy": "sequential"},
}


@pytest.mark.parametrize("case", CASES)
def test_a_budget_changes_nothing(case, tmp_path):
    """3 steps of 8 pairs of 22 rows (the third has 6), or of 7 ranked rows with 25 pairs."""
    how = dict(CASES[case])
    layout = how.get("layout", "flat")
    if "train" in how:
        how["train"] = how["train"]()
    if case == "a step left out":
        rows = tiny.rows(22)
        rows[9]["chosen"] = " " + "a" * 40
        how["train"] = Dataset.from_list(rows)
    budget = BUDGET[layout] if "ranked" not in case else {"flat": 80, "padded": 160}[layout]
    if how.get("precompute_ref_log_probs"):
        how["ref_cache_dir"] = str(tmp_path / "cache")
    want, whole = trained(tmp_path / "whole", None, **how)
    got, parts = trained(tmp_path / "parts", budget, **how)
    assert max(whole) > budget, "else nothing had to be split"
    assert len(parts) > 1.5 * len(whole)
    assert max(parts) <= budget
    assert_same_run(got, want)
    assert got.state.total_flos > 0
    assert got.skipped_steps == want.skipped_steps == (case == "a step left out")


@pytest.mark.parametrize("include", ["all", "non_padding"])
def test_what_trainer_counts_of_a_batch_it_counts_of_its_parts(include, tmp_path):
    counted = []
    for budget in (None, BUDGET["flat"]):
        trainer, sizes = trained(tmp_path, budget, include_num_input_tokens_seen=include, max_steps=2)
        assert trainer.state.num_input_tokens_seen == trainer.num_tokens == sum(sizes)
        counted.append((trainer.state.num_input_tokens_seen, trainer.state.total_flos))
    assert counted[0] == counted[1] > (0, 0)


def test_a_batch_within_the_budget_stays_one_to_the_bit(tmp_path):
    want, whole = trained(tmp_path / "1", None)
    got, parts = trained(tmp_path / "2", 10_000)
    assert whole == parts
    assert tiny.losses(got) == tiny.losses(want)
    tiny.assert_same_weights(tiny.weights(got.model), tiny.weights(want.model))


def test_resume_to_the_bit(tmp_path):
    how: dict[str, Any] = {"max_tokens_per_micro_batch": 100, "layout": "flat"}
    whole, parts = run_with_checkpoints(tmp_path, **how)
    resumed, _ = run_with_checkpoints(tmp_path, resume=3, **how)
    assert len(parts) > 8 + 3, "more forwards than batches"
    assert tiny.losses(resumed) == tiny.losses(whole)
    tiny.assert_same_weights(tiny.weights(resumed.model), tiny.weights(whole.model))


# --- evaluation ---


@pytest.mark.parametrize("layout", ["flat", "padded"])
@pytest.mark.parametrize("ranked", [False, True], ids=["pairs", "ranked"])
def test_evaluation_is_the_same(ranked, layout, tmp_path, monkeypatch):
    """Metrics, and what `compute_metrics` receives: every pair once, in the order of the rows. Beside whole batches."""
    monkeypatch.setattr("dpo_trainer.training.collator.default_micro_batch_tokens", lambda args, objective: None)
    rows = ranked_table() if ranked else tiny.dataset(11, seed=3)
    seen: list[Any] = []
    metrics = []
    for budget in (None, BUDGET[layout]):
        parts = {"ref_model": tiny.llama(seed=5), "compute_metrics": keeping(seen)}
        trainer = tiny.trainer(
            tmp_path,
            parts=parts,
            layout=layout,
            max_length=None,
            per_device_eval_batch_size=8,
            max_tokens_per_micro_batch=budget,
        )
        calls = Mock(side_effect=trainer.compute_loss)
        monkeypatch.setattr(trainer, "compute_loss", calls)
        result = trainer.evaluate(rows)
        metrics.append(
            {k: v for k, v in result.items() if "second" not in k and "runtime" not in k and "time" not in k}
        )
        assert (calls.call_count > 2) if budget else (calls.call_count <= 2)
    assert metrics[1] == pytest.approx(metrics[0], rel=1e-6, abs=1e-5)
    assert len(metrics[0]) > 10
    want, got = seen
    assert got.label_ids.tolist() == want.label_ids.tolist()
    assert len(got.label_ids) == (25 if ranked else 11)
    for name, values in want.predictions.items():
        # log-probs of rows that stand elsewhere, of sums up to 300 nats
        assert got.predictions[name].tolist() == pytest.approx(values.tolist(), rel=1e-5, abs=5e-5), name
    assert len(set(want.predictions["logps/chosen"].tolist())) > 5, "pairs differ, or any order would do"


def test_the_loss_of_a_batch_is_the_mean_over_its_pairs():
    """Parts of weight 1 + 1 and 2 with mean losses 3 and 6: (2 * 3 + 2 * 6) / 4; nothing that counts is 0, not NaN."""
    parts = [{"weight": torch.tensor([1.0, 1.0])}, {"weight": torch.tensor([2.0])}]
    assert weighted_mean([torch.tensor(3.0), torch.tensor(6.0)], parts) == 4.5
    assert weighted_mean([torch.tensor(3.0)], [{"weight": torch.zeros(2)}]) == 0


# --- the collator ---

tokens = st.lists(st.integers(1, 9), min_size=1, max_size=9)


@st.composite
def drawn_rows(draw: Any) -> list[dict[str, Any]]:
    rows = []
    for number in range(draw(st.integers(1, 8))):
        more = draw(st.lists(tokens, max_size=2))
        pairs = [[0, n + 1] for n in range(1 + len(more))]
        ids = {name: draw(tokens) for name in ("prompt_ids", "chosen_ids", "rejected_ids")}
        rows.append({"example_id": 100 + number, **ids, "more_ids": more, "pairs": pairs, "weight": number / 2})
    return rows


@given(drawn_rows(), st.sampled_from(["flat", "padded"]), st.sampled_from([None, 4]), st.integers(0, 150))
def test_parts_hold_every_pair_once_within_the_budget(rows, layout, multiple, room):
    make = partial(DataCollatorForPreference, 0, layout, multiple, keyed=True)
    alone = max(make()([row])["input_ids"].numel() for row in rows)
    budget = alone + room
    whole, split = make()(rows), make(max_tokens=budget)(rows)
    parts = split[MICRO_BATCHES]
    assert next(iter(split.values())).tolist() == whole["example_ids"].tolist(), "what the batch size is read from"
    assert all(part["input_ids"].numel() <= budget for part in parts)
    assert (len(parts) == 1) == (whole["input_ids"].numel() <= budget)

    def pairs(inputs: dict[str, Any]) -> list[tuple]:
        columns = [inputs[name].tolist() for name in ("row", "example_ids", "weight")]
        sides = [[inputs["keys"][c] for c in inputs[side].tolist()] for side in ("chosen", "rejected")]
        return list(zip(*columns, *sides, strict=True))

    assert sorted(pair for part in parts for pair in pairs(part)) == sorted(pairs(whole))
    assert sum(part["num_tokens"] for part in parts) == whole["num_tokens"]
    assert all(part["row"].tolist() == sorted(part["row"].tolist()) for part in parts)
    values = [{"example_ids": part["example_ids"]} for part in parts]
    real = [torch.ones_like(part["row"], dtype=torch.bool) for part in parts]
    assert in_row_order(values, parts, real)["example_ids"].tolist() == whole["example_ids"].tolist()


@given(drawn_rows(), st.integers(0, 150), st.sampled_from([None, 4]))
def test_rows_are_dealt_evenly_into_no_more_parts_than_one_by_one(rows, room, multiple):
    read = [read_row(row, place) for place, row in enumerate(rows)]
    longest = max(flat_size([row], multiple) for row in read)
    budget = longest + room
    dealt = even_places(read, budget, multiple)
    one_by_one = list(packed_places(read, budget, padded=False, multiple=multiple))
    assert sorted(place for places in dealt for place in places) == list(range(len(rows)))
    assert len(dealt) <= len(one_by_one)
    assert all(flat_size([read[place] for place in places], multiple) <= budget for places in dealt)
    # The fullest part got its last row when it was the emptiest.
    sizes = [flat_size([read[place] for place in places]) for places in dealt]
    assert dealt == one_by_one or max(sizes) - min(sizes) <= longest


@pytest.mark.parametrize(
    ("lengths", "budget", "parts"),
    [
        ([50, 40, 40, 30, 20, 20], 100, [100, 100]),  # one by one: 90, 90, 20
        ([60, 30, 20], 100, [50, 60]),  # one by one: 90, 20
        ([30, 30, 20, 20, 20], 60, [60, 60]),  # to the emptiest: 70 and 50, above the budget, so one by one
    ],
)
def test_sizes_of_parts_by_hand(lengths, budget, parts):
    rows = [TokenizedPair(example_id=0, prompt_ids=[1] * (n - 2), chosen_ids=[1], rejected_ids=[1]) for n in lengths]
    dealt = even_places(rows, budget)
    assert sorted(sum(lengths[place] for place in places) for places in dealt) == parts


@pytest.mark.parametrize(("layout", "size"), [("flat", 3 + 5 + 2), ("padded", 2 * (3 + 5))])
def test_a_row_above_the_budget_is_named(layout, size):
    row = {"example_id": 7, "prompt_ids": [1] * 3, "chosen_ids": [2] * 5, "rejected_ids": [3] * 2}
    DataCollatorForPreference(0, layout, max_tokens=size)([row])
    with pytest.raises(ValueError, match=rf"example_id 7 has {size} tokens.*batch {size - 1}\. Raise that to {size}"):
        DataCollatorForPreference(0, layout, max_tokens=size - 1)([row])


@given(drawn_rows(), st.booleans(), st.sampled_from([None, 4]))
@settings(max_examples=25)
def test_the_largest_row_of_a_table_is_what_the_collator_makes_of_it(rows, padded, multiple):
    ids = ("prompt_ids", "chosen_ids", "rejected_ids")
    sized = [row | {"length": sum(len(row[n]) for n in ids) + sum(map(len, row["more_ids"]))} for row in rows]
    table = Dataset.from_list([{name: row.get(name) for name in FEATURES} for row in sized], features=FEATURES)
    collate = DataCollatorForPreference(0, "padded" if padded else "flat", multiple)
    sizes = [collate([row])["input_ids"].numel() for row in rows]
    how: dict[str, Any] = {"padded": padded, "multiple": multiple}
    check_rows_fit(table, "train", max(sizes), **how)
    largest = "|".join(str(100 + place) for place, size in enumerate(sizes) if size == max(sizes))
    with pytest.raises(ValueError, match=rf"example_id ({largest}) of the train data has {max(sizes)} tokens"):
        check_rows_fit(table, "train", max(sizes) - 1, **how)


def test_repeats_of_rows_lose_their_weight_in_every_part():
    """The second of two ranks with 4 rows each, 6 rows in the last round: its rows 2 and 3 are repeats."""
    rows = [
        {"example_id": i, "prompt_ids": [1], "chosen_ids": [2] * n, "rejected_ids": [3] * n}
        for i, n in enumerate((2, 9, 3, 8))
    ]
    state = SimpleNamespace(end_of_dataloader=True, active_dataloader=SimpleNamespace(dataset=range(6)))
    accelerator: Any = SimpleNamespace(num_processes=2, process_index=1, gradient_state=state)
    parts = DataCollatorForPreference(0, max_tokens=20)(rows)[MICRO_BATCHES]
    assert len(parts) == 3
    real = [mask_padding_rows(part, accelerator, rows_per_rank=4, drop_last=False) for part in parts]
    weights = {
        int(i): (float(w), bool(r))
        for part, mine in zip(parts, real, strict=True)
        for i, w, r in zip(part["example_ids"], part["weight"], mine, strict=True)
    }
    assert weights == {0: (1.0, True), 1: (1.0, True), 2: (0.0, False), 3: (0.0, False)}


# --- several ranks ---


class TwoRanks:
    """`gather` of a rank whose partner has more parts of each batch, and pairs of weight 10."""

    def __init__(self, more: int):
        self.more, self.calls = more, 0

    def gather(self, here: Tensor) -> Tensor:
        self.calls += 1
        there = here + self.more
        there[:, 0] = 10.0
        return torch.cat([here, there])


def test_ranks_agree_on_the_number_of_parts_in_one_collective():
    def part(tokens: int) -> dict[str, Any]:
        return {"input_ids": torch.zeros(1, tokens), "weight": torch.ones(2), "example_ids": torch.arange(2)}

    batches = [{MICRO_BATCHES: [part(9), part(4), part(6)]}, {MICRO_BATCHES: [part(5)]}]
    ranks: Any = TwoRanks(more=2)
    assert even_micro_batches(batches, torch.tensor(8.0), ranks) == 18
    assert ranks.calls == 1
    first, second = (batch[MICRO_BATCHES] for batch in batches)
    assert [p["input_ids"].numel() for p in first] == [9, 4, 6, 4, 4], "the smallest is repeated"
    assert [p["weight"].sum().item() for p in first] == [2, 2, 2, 0, 0]
    assert [p["weight"].sum().item() for p in second] == [2, 0, 0]


def test_ranks_say_how_many_pairs_they_have_in_one_collective():
    batches: list[dict[str, Any]] = [{"weight": torch.ones(3)}, {"weight": torch.ones(1)}]
    ranks: Any = TwoRanks(more=2)
    assert note_pairs(batches, torch.tensor(4.0), ranks) == 14
    assert ranks.calls == 1
    assert [batch["pairs_by_rank"] for batch in batches] == [(3, 5), (1, 3)]


def test_repeated_parts_count_for_nothing(tmp_path, monkeypatch):
    """Another rank has two parts more: the same weights, lines and evaluation; only the tokens computed are more."""
    how: dict[str, Any] = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2, "max_steps": 2}
    seen: list[Any] = []
    runs = []
    for in_step in (False, True):
        parts = {"ref_model": tiny.llama(seed=5), "compute_metrics": keeping(seen)}
        trainer = tiny.trainer(tmp_path, max_tokens_per_micro_batch=130, parts=parts, **how)
        trainer.in_step = in_step
        gathers: list[int] = []

        def gather(here: Tensor, gathers: list[int] = gathers) -> Tensor:
            gathers.append(1)
            there = here + 2
            there[:, 0] = 0.0
            return torch.cat([here, there])

        if in_step:
            monkeypatch.setattr(trainer.accelerator, "gather", gather)
        sizes = spy(trainer)
        trainer.train()
        assert len(gathers) == (2 if in_step else 0), "one for each step"
        lines = [[line[name] for name in LINES[:-1]] for line in tiny.log_lines(trainer)]
        metrics = trainer.evaluate(tiny.dataset(7, seed=3))
        assert len(gathers) == (4 if in_step else 0), "and one for each batch of evaluation"
        runs.append((sizes, lines, tiny.weights(trainer.model), metrics["eval_loss"], trainer.num_tokens))
    (sizes, *want), (more_sizes, *got) = runs
    assert len(more_sizes) == len(sizes) + 3 * 2, "two for each of 3 batches"
    # A gradient of exactly 0 is added, so that everything is equal to the bit.
    assert got[0] == want[0]
    tiny.assert_same_weights(got[1], want[1])
    assert got[2] == want[2]
    assert got[3] == sum(more_sizes) > want[3] == sum(sizes)
    assert seen[0].label_ids.tolist() == seen[1].label_ids.tolist()
    assert seen[0].predictions["logps/chosen"].tolist() == seen[1].predictions["logps/chosen"].tolist()


@pytest.mark.parametrize(
    ("engine", "want"),
    [
        ({}, False),  # DDP
        ({"cuts_weights": True}, True),
        ({"cuts_weights": True, "world_size": 1}, False),
        ({"cuts_weights": True, "budget": None}, False),
        ({"each": True}, True),
        ({"zero": 1}, False),
        ({"zero": 2}, True),  # exchanges in every backward, accumulated or not
    ],
    ids=str,
)
def test_when_ranks_keep_in_step(engine, want):
    args: Any = SimpleNamespace(
        world_size=engine.get("world_size", 2),
        max_tokens_per_micro_batch=engine.get("budget", 99),
        deepspeed_plugin=SimpleNamespace(zero_stage=engine["zero"]) if "zero" in engine else None,
        accelerator_config=SimpleNamespace(
            gradient_accumulation_kwargs={"sync_each_batch": True} if "each" in engine else None
        ),
    )
    assert keeps_ranks_in_step(args, shards_weights=engine.get("cuts_weights", False)) is want


@pytest.mark.parametrize(
    ("kind", "syncs", "each", "during_others", "during_last"),
    [  # (no_sync of accelerate, sync_gradients) while a part is computed
        ("MULTI_GPU", True, False, (True, False), (False, True)),
        ("MULTI_GPU", False, False, (False, False), (False, False)),  # an earlier batch: Trainer holds back itself
        ("FSDP", True, True, (False, False), (False, True)),  # sync_each_batch: exchanged after each part
        ("FSDP", False, True, (False, False), (False, False)),
        ("DEEPSPEED", True, False, (False, False), (False, True)),  # True is an optimizer step
        ("DEEPSPEED", False, False, (False, False), (False, False)),
    ],
)
def test_gradients_are_exchanged_with_the_last_part(kind, syncs, each, during_others, during_last):
    state = SimpleNamespace(sync_gradients=syncs, plugin_kwargs={"sync_each_batch": each})
    state._set_sync_gradients = lambda value: setattr(state, "sync_gradients", value)
    held: list[bool] = []

    @contextlib.contextmanager
    def no_sync(model: Any):
        held.append(True)
        yield
        held.pop()

    accelerator: Any = SimpleNamespace(gradient_state=state, distributed_type=DistributedType[kind], no_sync=no_sync)
    seen = []

    def step(part: dict[str, Any]) -> Tensor:
        seen.append((bool(held), state.sync_gradients))
        return torch.tensor(float(part["loss"]))

    inputs = {MICRO_BATCHES: [{"loss": 1}, {"loss": 2}, {"loss": 4}]}
    assert step_through(step, inputs, accelerator, nn.Module()) == 7
    assert seen == [during_others, during_others, during_last]
    assert state.sync_gradients is syncs

    def fails(part: dict[str, Any]) -> Tensor:
        raise torch.OutOfMemoryError

    with pytest.raises(torch.OutOfMemoryError):
        step_through(fails, inputs, accelerator, nn.Module())
    assert not held or kind == "MULTI_GPU"
    assert state.sync_gradients is syncs, "auto_find_batch_size goes on from there"


# --- what a budget refuses ---


@register_loss("centred", needs_reference=False, separable=False)
def centred(policy: PairLogps, reference: PairLogps, *, beta: float) -> Tensor:
    """A loss of the user's that looks at the whole batch."""
    return -beta * (policy.margin() - policy.margin().mean())


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"loss_type": "aot"}, "--loss_type aot looks at"),
        ({"loss_type": ["sigmoid", "aot_unpaired"]}, "--loss_type aot_unpaired looks at"),
        ({"loss_type": "bco_pair"}, "--loss_type bco_pair looks at"),
        ({"loss_type": "centred"}, "--loss_type centred looks at"),
        ({"rpo_alpha": 0.5, "rpo_normalization": "token"}, "--rpo_normalization token looks at"),
    ],
    ids=str,
)
def test_losses_that_couple_pairs_are_refused(options, named, tmp_path):
    with pytest.raises(ValueError, match=f"--max_tokens_per_micro_batch 200 splits.*{named}.*smaller --per_device"):
        tiny.trainer(tmp_path, max_tokens_per_micro_batch=200, **options)
    tiny.trainer(tmp_path, **options)


def test_a_row_above_the_budget_is_refused_before_training(tmp_path):
    table = tiny.trainer(tmp_path).train_dataset
    lengths = table["length"]
    largest = max(lengths)
    example_id = table["example_id"][list(lengths).index(largest)]
    with pytest.raises(
        ValueError, match=rf"example_id {example_id} of the train data has {largest} tokens.*--max_length"
    ):
        tiny.trainer(tmp_path, max_tokens_per_micro_batch=largest - 1)
    tiny.trainer(tmp_path, max_tokens_per_micro_batch=largest)
    long = Dataset.from_list([{"prompt": "cat", "chosen": " owl" * 40, "rejected": " dog"}])
    with pytest.raises(ValueError, match="of the helpful data has"):
        parts = {"eval_dataset": {"short": tiny.dataset(2), "helpful": long}}
        tiny.trainer(tmp_path, max_tokens_per_micro_batch=largest, parts=parts)


def test_a_row_of_a_stream_above_the_budget_stops_the_run(tmp_path):
    rows = [*tiny.rows(6), {"prompt": "cat", "chosen": " owl" * 40, "rejected": " dog"}]
    stream = IterableDataset.from_generator(lambda: iter(rows))
    trainer = tiny.trainer(tmp_path, train=stream, max_tokens_per_micro_batch=130)
    with pytest.raises(ValueError, match=r"has 169 tokens.*--max_tokens_per_micro_batch 130"):
        trainer.train()


@pytest.mark.parametrize(("own", "budget"), [(None, 200), (100, 200), (200, None)])
def test_a_collator_with_another_budget_is_refused(own, budget, tmp_path):
    parts = {"data_collator": DataCollatorForPreference(tiny.PAD, max_tokens=own)}
    with pytest.raises(ValueError, match=rf"batch is {budget}, and the data_collator.*max_tokens {own}: use Data"):
        tiny.trainer(tmp_path, max_tokens_per_micro_batch=budget, parts=parts)


def test_a_layout_that_falls_back_is_refused(tmp_path, monkeypatch):
    """The budget was counted in flat rows; padded they would be above it, and nobody would know."""
    compare = Layout._compare

    def different(self: Layout, scorer: Any, model: Any, rows: Any, layout: str, want: Any) -> str | None:
        return "flat: off by 1" if layout == "flat" else compare(self, scorer, model, rows, layout, want)

    monkeypatch.setattr(Layout, "_compare", different)
    trainer = tiny.trainer(tmp_path, max_tokens_per_micro_batch=130)
    before = tiny.weights(trainer.model)
    with pytest.raises(ValueError, match=r"needs padded rows .*--max_tokens_per_micro_batch.*--layout padded"):
        trainer.train()
    tiny.assert_same_weights(tiny.weights(trainer.model), before)
    tiny.trained(tmp_path, max_tokens_per_micro_batch=160, layout="padded", max_steps=1)


# --- mixtures of experts ---


def test_the_load_balancing_loss_is_of_micro_batches(tmp_path, caplog):
    """Said once. Without that term a mixture of experts is trained to the same weights."""
    logging.getLogger("dpo_trainer").propagate = True
    weights: dict[tuple[float, int | None], dict[str, Tensor]] = {}
    for coef, budget in itertools.product((0.0, 10.0), (None, 130)):
        caplog.clear()
        trainer = tiny.trained(
            tmp_path,
            model=tiny.mixtral(),
            router_aux_loss_coef=coef,
            max_tokens_per_micro_batch=budget,
            per_device_train_batch_size=8,
            max_steps=1,
        )
        assert ("load-balancing loss is that of the tokens" in caplog.text) == bool(coef and budget)
        weights[coef, budget] = tiny.weights(trainer.model)
    assert tiny.moved(weights[0.0, None], weights[0.0, 130]) < WEIGHT_ATOL
    assert tiny.moved(weights[10.0, None], weights[10.0, 130]) > 10 * WEIGHT_ATOL


# --- too little memory ---


@pytest.mark.parametrize(("loss", "named"), [("sigmoid", True), ("aot", False)])
def test_out_of_memory_names_the_budget(loss, named, tmp_path):
    trainer = tiny.trainer(tmp_path, loss_type=loss, per_device_train_batch_size=8, layout="flat")

    def full(module: nn.Module, args: Any, inputs: dict[str, Any]) -> None:
        if module.training:
            raise torch.OutOfMemoryError(f"CUDA out of memory at {inputs['input_ids'].numel()}.")

    trainer.model.register_forward_pre_hook(full, with_kwargs=True)
    with pytest.raises(torch.OutOfMemoryError) as caught:
        trainer.train()
    tokens = int(str(caught.value).split("memory at ")[1].split(".")[0])
    assert (f"--max_tokens_per_micro_batch {math.ceil(tokens / 2)} (" in str(caught.value)) is named


def test_a_batch_that_was_not_cut_is_its_only_part():
    inputs = {"input_ids": torch.zeros(2, 3)}
    assert micro_batches(inputs) == [inputs]


# --- on a CPU, where nobody asked ---


def long_rows(n: int, words: int) -> Dataset:
    rows = tiny.rows(n)
    return Dataset.from_list([row | {"prompt": "cat " * words} for row in rows])


@pytest.mark.parametrize("layout", ["flat", "padded"])
def test_large_batches_are_computed_in_parts_on_a_cpu(tmp_path, monkeypatch, layout):
    """8 rows of about 230 tokens in the flat layout, 2 of them in a part; the same as whole."""
    how = {"train": long_rows(16, words=50), "max_steps": 2, "layout": layout}
    parts, sizes = trained(tmp_path / "parts", None, **how)
    monkeypatch.setattr("dpo_trainer.training.collator.default_micro_batch_tokens", lambda args, objective: None)
    whole, at_once = trained(tmp_path / "whole", None, **how)
    assert len(at_once) == 2 < len(sizes)
    assert max(sizes) <= PACK_TOKENS < min(at_once)
    assert tiny.losses(parts) == pytest.approx(tiny.losses(whole), abs=LOSS_ATOL)
    tiny.assert_same_weights(tiny.weights(parts.model), tiny.weights(whole.model), WEIGHT_ATOL)


def test_a_row_above_the_size_of_a_part_goes_by_itself(tmp_path):
    """No ceiling was asked for."""
    model = tiny.llama(max_position_embeddings=2048)
    _, sizes = trained(tmp_path, None, model=model, train=long_rows(8, words=300), max_steps=1, max_length=None)
    assert len(sizes) == 8
    assert min(sizes) > PACK_TOKENS


@pytest.mark.parametrize("layout", ["flat", "padded"])
def test_parts_are_as_large_as_a_longer_row(layout):
    """Which needs its memory in any case. Padded, shorter rows stay apart from it, or they would be as wide."""
    row = {"prompt_ids": [5] * 100, "chosen_ids": [6] * 10, "rejected_ids": [7] * 10}
    long = row | {"prompt_ids": [5] * 700}
    collate = DataCollatorForPreference(tiny.PAD, layout, pack_tokens=PACK_TOKENS)
    cells = [part["input_ids"].numel() for part in micro_batches(collate([row] * 12 + [long]))]
    assert sorted(cells) == ([720, 720, 720] if layout == "flat" else [6 * 220, 6 * 220, 2 * 710])


@pytest.mark.parametrize("options", [{"loss_type": "aot"}, {"rpo_alpha": 1.0, "rpo_normalization": "token"}])
def test_losses_that_couple_pairs_see_the_whole_batch(tmp_path, options):
    _, sizes = trained(tmp_path, None, train=long_rows(8, words=50), max_steps=1, **options)
    assert len(sizes) == 1
    assert sizes[0] > PACK_TOKENS


def test_a_batch_that_is_not_larger_stays_as_it_was(tmp_path):
    trainer = tiny.trainer(tmp_path)
    assert trainer.data_collator.pack_tokens == PACK_TOKENS
    assert all(MICRO_BATCHES not in batch for batch in trainer.get_train_dataloader())


def test_a_batch_in_parts_is_no_pair_batch():
    collate = DataCollatorForPreference(tiny.PAD, max_tokens=9)
    rows = [{"prompt_ids": [5, 6, 7], "chosen_ids": [8, 9, 1], "rejected_ids": [8, 1]}] * 2
    with pytest.raises(ValueError, match=r"comes in parts.*micro_batches\(inputs\)"):
        PairBatch.from_inputs(collate(rows))
    assert [len(PairBatch.from_inputs(part).chosen) for part in micro_batches(collate(rows))] == [1, 1]
