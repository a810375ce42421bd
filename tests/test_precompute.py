"""With the cache of reference log-probs a run is the same run: the same losses, sample order and random numbers, and no
second model; and never with the numbers of another reference or of other tokens."""

from __future__ import annotations

import gc
import logging
import random
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import oracles
import pytest
import tiny
import torch
from datasets import Dataset, IterableDataset
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import get_peft_model

from dpo_trainer import DPOTrainer
from dpo_trainer.data import DataCollatorForPreference
from dpo_trainer.data.batches.collate import inputs_of
from dpo_trainer.data.content import completion_keys, dataset_digest
from dpo_trainer.reference import CachedReference, FrozenModel, UntrainedPolicy
from dpo_trainer.reference.precompute import packs
from dpo_trainer.types import TokenizedPair

# What the issue of the same losses is measured with: log-probs of about -80 nats in float32, summed in another order.
SAME = 1e-5


@pytest.fixture(autouse=True)
def _cache_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setenv("DPO_TRAINER_CACHE", str(tmp_path / "cache"))


def stream(n: int = 22) -> IterableDataset:
    return IterableDataset.from_generator(tiny.rows, gen_kwargs={"n": n})


def ranked() -> Dataset:
    """Rows of three completions, all of them compared."""
    return Dataset.from_list(
        [
            {"prompt": row["prompt"], "chosen": row["chosen"], "rejected": [row["rejected"], " zebra", " yak yak"]}
            for row in tiny.rows(12)
        ]
    )


def continued(**options: Any) -> Any:
    model = get_peft_model(tiny.llama(), tiny.lora(**options), adapter_name="style")
    tiny.fill_adapters(model)
    return model


CASES: dict[str, Any] = {
    "full": lambda folder: {},
    "padded": lambda folder: {"layout": "padded"},
    "lora": lambda folder: {"parts": {"peft_config": tiny.lora(lora_dropout=0.2)}},
    "continued lora": lambda folder: {"model": continued()},
    "ref_model": lambda folder: {"parts": {"ref_model": tiny.llama(seed=3)}},
    "ld_alpha": lambda folder: {"ld_alpha": 0.3},
    "ld_alpha, padded": lambda folder: {"ld_alpha": 0.3, "layout": "padded"},
    "wpo": lambda folder: {"use_weighting": True},
    "several losses": lambda folder: {"loss_type": ["sigmoid", "bco_pair", "sft"]},
    "aot": lambda folder: {"loss_type": "aot"},
    "ranked": lambda folder: {"train": ranked(), "per_device_train_batch_size": 2},
    "stream": lambda folder: {"train": stream()},
    "accumulation": lambda folder: {"gradient_accumulation_steps": 2},
    "workers": lambda folder: {"dataloader_num_workers": 1},
    "two epochs": lambda folder: {"max_steps": 8, "per_device_train_batch_size": 6},
    "dropout": lambda folder: {
        "model": tiny.llama(attention_dropout=0.3),
        "disable_dropout": False,
        "layout": "padded",
    },
}


class Order(DataCollatorForPreference):
    """The collator, taking down which rows it was given; those of the check before training aside."""

    seen: list[list[int]]

    def __call__(self, rows: Any) -> Any:
        self.seen.append([row["example_id"] for row in rows])
        return super().__call__(rows)


def run(folder: Path, *, cached: bool, **how: Any) -> DPOTrainer:
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    return tiny.trained(folder, precompute_ref_log_probs=cached, **how)


@pytest.mark.parametrize("case", CASES)
def test_the_run_is_the_same_with_and_without_the_cache(case, tmp_path):
    plain = run(tmp_path / "plain", cached=False, **CASES[case](tmp_path))
    after = torch.random.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    for name in ("cold", "warm"):
        cached = run(tmp_path / name, cached=True, **CASES[case](tmp_path))
        assert isinstance(cached.reference, CachedReference)
        assert torch.equal(torch.random.get_rng_state(), after[0])
        assert random.getstate() == after[1]
        assert np.random.get_state()[1].tolist() == after[2]
        for got, want in zip(tiny.log_lines(cached), tiny.log_lines(plain), strict=True):
            assert got.keys() == want.keys()
            for metric in want.keys() - {"tokens_per_second"}:
                # grad_norm and log-probs are some 100 times a loss
                bound = SAME if metric == "loss" or metric.startswith("rewards") else 100 * SAME
                assert got[metric] == pytest.approx(want[metric], abs=bound), metric
        tiny.assert_same_weights(tiny.weights(cached.model), tiny.weights(plain.model), atol=SAME)
    assert len(set(tiny.losses(plain))) > 1, "something was trained"


def test_rows_come_in_the_same_order(tmp_path):
    orders = []
    for cached in (False, True):
        collator = Order(tiny.PAD, keyed=True)
        collator.seen = []
        run(tmp_path / str(cached), cached=cached, parts={"data_collator": collator})
        orders.append(collator.seen)
    assert orders[0] == orders[1]
    assert len(orders[0]) >= 4


def filled(caplog) -> list[tuple[str, int, int]]:
    """(dataset, found, computed) of each look into the cache, by the log."""
    import re

    lines = [m for m in caplog.messages if m.startswith("Reference log-probs of")]
    caplog.clear()
    found = [
        re.match(r"Reference log-probs of (.+?): .*? ([\d,]+) found .*? ([\d,]+) computed", line) for line in lines
    ]
    return [(m[1], int(m[2].replace(",", "")), int(m[3].replace(",", ""))) for m in found if m]


def test_what_reuses_the_cache_and_what_never_hits_it(tmp_path, caplog):
    rows = tiny.rows(22)
    table = Dataset.from_list(rows)

    def made(**how: Any) -> list[tuple[str, int, int]]:
        with caplog.at_level(logging.WARNING):
            tiny.trainer(
                tmp_path / "run", **{"train": table, **how}, precompute_ref_log_probs=True
            ).precompute_reference()
        return filled(caplog)

    everything, anew = [("train", 44, 0)], [("train", 0, 44)]
    assert made() == anew
    # Reused: everything that decides nothing about a log-prob under the reference.
    assert made(learning_rate=0.5, loss_type="ipo", beta=0.7, seed=7, per_device_train_batch_size=2) == everything
    assert made(train=table.shuffle(seed=3)) == everything
    assert made(train=table.select(range(5, 15))) == [("train", 20, 0)]
    assert made(layout="padded") == everything
    assert made(parts={"peft_config": tiny.lora()}) == everything, "the base below a new adapter is the same reference"
    assert made(parts={"ref_model": tiny.llama()}) == everything, "an equal model is the same reference"
    assert made(train=Dataset.from_list([*rows, *tiny.rows(3, seed=9)])) == [("train", 44, 6)]
    assert made(train=stream()) == [("train", 32, 0)], "4 steps of 4 rows"
    # Never hit: other weights, other numbers, other tokens.
    assert made(model=tiny.llama(seed=1)) == anew
    assert made(model=tiny.llama(rope_parameters={"rope_type": "default", "rope_theta": 7.0})) == anew
    assert made(parts={"ref_model": tiny.llama(seed=5)}) == anew
    assert made(model=continued()) == anew
    assert made(model=tiny.llama().bfloat16()) == anew
    assert made(bf16=True) == anew
    # A row of which one completion is cut is computed as a whole: its completions share the prompt.
    cut = 2 * sum(max(len(row["chosen"]), len(row["rejected"])) + 1 > 8 for row in rows)
    assert 0 < cut < 44
    assert made(max_completion_length=8) == [("train", 44 - cut, cut)]
    end = tiny.tokenizer()
    end.chat_template = tiny.CHAT_TEMPLATE.replace("<|user|>", "<|user|> ").replace(
        "{{ message.content }}", "{{ message.content }}!"
    )
    chat = Dataset.from_list(tiny.chat_rows(22))
    assert made(train=chat) == anew
    assert made(train=chat, parts={"processing_class": end}) == anew, "another template"
    # Sums alone do not serve a loss that looks at tokens; the reverse does.
    assert made(ld_alpha=0.5) == anew
    assert made() == everything
    assert made(ld_alpha=0.5) == everything


def test_equal_completions_are_computed_once(tmp_path, caplog):
    twice = Dataset.from_list([*tiny.rows(6), *tiny.rows(6)])
    with caplog.at_level(logging.WARNING):
        tiny.trainer(tmp_path, train=twice, precompute_ref_log_probs=True).precompute_reference()
    assert filled(caplog) == [("train", 12, 12)]


def test_a_kill_in_the_middle_loses_nothing_that_was_written(tmp_path, caplog, monkeypatch):
    """As far as an exception is one; tests/faults kills for real."""
    monkeypatch.setattr("dpo_trainer.reference.precompute.FLUSH_SECONDS", 0.0)
    trainer = tiny.trainer(tmp_path, precompute_ref_log_probs=True, precompute_ref_max_tokens=40)
    compute, calls = trainer.reference.compute, []

    def dies(*args: Any) -> Any:
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return compute(*args)

    monkeypatch.setattr(trainer.reference, "compute", dies)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    kept = len(trainer.reference.store)
    assert 0 < kept < 44
    with caplog.at_level(logging.WARNING):
        tiny.trained(tmp_path, precompute_ref_log_probs=True)
    assert filled(caplog) == [("train", kept, 44 - kept)]


def quantized(four_bit: bool) -> Any:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    how = BitsAndBytesConfig(load_in_4bit=four_bit, load_in_8bit=not four_bit, bnb_4bit_quant_type="nf4")
    return lambda folder: AutoModelForCausalLM.from_pretrained(folder, quantization_config=how)


@pytest.mark.parametrize("four_bit", [True, False], ids=["nf4", "int8"])
def test_a_quantised_reference_is_another_than_its_origin(four_bit, tmp_path, caplog):
    """And gives the same run with and without the cache."""
    pytest.importorskip("bitsandbytes")
    tiny.llama().save_pretrained(tmp_path / "start")
    load = quantized(four_bit)
    how: dict[str, Any] = {"parts": {"peft_config": tiny.lora()}, "max_steps": 2}
    plain = run(tmp_path / "plain", cached=False, model=load(tmp_path / "start"), **how)
    caplog.set_level(logging.WARNING)
    run(tmp_path / "unquantised", cached=True, model=str(tmp_path / "start"), **how)
    for found in [("train", 0, 44), ("train", 44, 0)]:
        caplog.clear()
        cached = run(tmp_path / "cached", cached=True, model=load(tmp_path / "start"), **how)
        assert filled(caplog) == [found]
        assert tiny.losses(cached) == pytest.approx(
            tiny.losses(plain), abs=1e-4
        )  # layers of 4 bits compute in bfloat16


def test_every_trial_of_a_search_has_its_own_reference(tmp_path, caplog):
    """`model_init` makes a model for each train()."""
    models = iter([tiny.llama(), tiny.llama(), tiny.llama(seed=1), tiny.llama()])
    caplog.set_level(logging.WARNING)
    trainer = tiny.trainer(tmp_path, parts={"model_init": lambda: next(models)}, precompute_ref_log_probs=True)
    found = []
    for _ in range(3):
        caplog.clear()
        trainer.train()
        found += filled(caplog)
        assert tiny.losses(trainer)[0] == pytest.approx(np.log(2), abs=1e-6)
        assert trainer.reference.source is None
    assert found == [("train", 0, 44), ("train", 0, 44), ("train", 44, 0)]


# --- no second model ---


def test_no_second_model_is_made_or_kept(tmp_path, monkeypatch):
    import copy

    monkeypatch.setattr(copy, "deepcopy", _refusing_models(copy.deepcopy))
    trainer = tiny.trainer(tmp_path, precompute_ref_log_probs=True)
    assert isinstance(trainer.reference.source, UntrainedPolicy)
    trainer.train()
    assert trainer.reference.source is None
    with pytest.raises(AssertionError, match="a model was copied"):
        tiny.trainer(tmp_path)  # the guard is alive


def _refusing_models(deepcopy: Any) -> Any:
    def checked(value: Any, *args: Any) -> Any:
        assert not isinstance(value, torch.nn.Module), "a model was copied"
        return deepcopy(value, *args)

    return checked


def test_a_reference_given_by_path_is_let_go_before_training(tmp_path):
    tiny.llama(seed=3).save_pretrained(tmp_path / "other")
    trainer = tiny.trainer(
        tmp_path / "run", precompute_ref_log_probs=True, parts={"ref_model": str(tmp_path / "other")}
    )
    assert isinstance(trainer.reference.source, FrozenModel)
    model = weakref.ref(trainer.reference.source.model)
    trainer.train()
    gc.collect()
    assert model() is None


# --- data that comes later ---


def evaluation(trainer: DPOTrainer, rows: Any) -> dict[str, float]:
    found = trainer.evaluate(rows)
    return {name: value for name, value in found.items() if "runtime" not in name and "per_second" not in name}


LATER = {
    "full, by name": lambda folder: {"model": str(folder / "start")},
    "lora": lambda folder: {"parts": {"peft_config": tiny.lora()}},
    "ref_model by name": lambda folder: {"parts": {"ref_model": str(folder / "start")}, "model": tiny.llama(seed=2)},
    "ref_model as an object": lambda folder: {"parts": {"ref_model": tiny.llama()}, "model": tiny.llama(seed=2)},
}


@pytest.mark.parametrize("case", LATER)
def test_evaluate_on_new_rows_after_training(case, tmp_path, caplog):
    tiny.llama().save_pretrained(tmp_path / "start")
    new = tiny.dataset(7, seed=11)
    plain = run(tmp_path / "plain", cached=False, **LATER[case](tmp_path))
    cached = run(tmp_path / "cached", cached=True, **LATER[case](tmp_path))
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        got = evaluation(cached, new)
    assert filled(caplog) == [("eval", 0, 14)]
    assert got == pytest.approx(evaluation(plain, new), abs=SAME)
    assert (cached.reference.source is None) == (case != "lora"), "let go again"
    assert got["eval_rewards/margins"] != 0
    with caplog.at_level(logging.WARNING):
        evaluation(cached, new)
    assert filled(caplog)[-1] == ("eval", 14, 0)


def test_new_rows_after_training_are_refused_where_the_reference_is_gone(tmp_path):
    trainer = run(tmp_path, cached=True)
    with pytest.raises(
        ValueError, match=r"no longer in memory.*eval_dataset.*by name.*--precompute_ref_log_probs off"
    ):
        trainer.evaluate(tiny.dataset(3, seed=11))


def test_a_reference_that_is_another_when_loaded_again_is_refused(tmp_path):
    tiny.llama().save_pretrained(tmp_path / "start")
    trainer = run(tmp_path / "run", cached=True, model=str(tmp_path / "start"))
    tiny.llama(seed=8).save_pretrained(tmp_path / "start")
    with pytest.raises(ValueError, match=r"another than the run began with.*files have changed"):
        trainer.evaluate(tiny.dataset(3, seed=11))


def test_evaluation_sets_are_cached_before_training(tmp_path, caplog):
    sets = {"near": tiny.dataset(3, seed=11), "far": tiny.dataset(5, seed=12)}
    how: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": 2, "parts": {"eval_dataset": sets}}
    plain = run(tmp_path / "plain", cached=False, **how)
    with caplog.at_level(logging.WARNING):
        cached = run(tmp_path / "cached", cached=True, **how)
    assert filled(caplog) == [("train", 0, 44), ("near", 0, 6), ("far", 0, 10)]
    lines = [
        [
            {n: v for n, v in line.items() if "eval" in n and "second" not in n and "runtime" not in n}
            for line in t.state.log_history
        ]
        for t in (plain, cached)
    ]
    assert lines[1] == [pytest.approx(line, abs=1e-4) for line in lines[0]]  # logps/* among them, of some 80 nats
    assert evaluation(cached, "near") == pytest.approx(evaluation(plain, "near"), abs=1e-4)


def test_evaluate_before_training(tmp_path):
    new = tiny.dataset(5, seed=4)
    trainer = tiny.trainer(tmp_path, precompute_ref_log_probs=True, parts={"eval_dataset": new})
    assert trainer.evaluate()["eval_loss"] == pytest.approx(np.log(2), abs=1e-6)
    assert trainer.predict(tiny.dataset(3, seed=6)).metrics["test_rewards/margins"] == pytest.approx(0, abs=SAME)


def test_a_stream_is_counted_once(tmp_path):
    """It is read twice, for the cache and for training."""
    trainer = run(tmp_path, cached=True, train=stream(22), max_steps=4)
    assert 16 <= trainer.data_reports["train"].rows <= 22


# --- records are what the reference says ---


@pytest.mark.parametrize("layout", ["flat", "padded"])
def test_records_equal_one_sequence_at_a_time_in_float64(layout, tmp_path):
    model = tiny.llama()
    trainer = tiny.trainer(
        tmp_path, model=model, train=ranked(), layout=layout, ld_alpha=0.5, precompute_ref_log_probs=True
    )
    trainer.precompute_reference()
    for row in trainer.train_dataset:
        pair = TokenizedPair(
            example_id=0,
            prompt_ids=row["prompt_ids"],
            chosen_ids=row["chosen_ids"],
            rejected_ids=row["rejected_ids"],
            more_ids=row["more_ids"],
        )
        for key, ids in zip(completion_keys(pair), pair.completions, strict=True):
            (record,) = trainer.reference.store.get([key], tokens=True)
            want = oracles.completion_logps(model, pair.prompt_ids, ids)
            assert record is not None
            assert record.count == len(ids)
            assert record.logp == pytest.approx(want.sum().item(), abs=oracles.NATS)
            assert record.tokens == pytest.approx(want.tolist(), abs=oracles.NATS)


def test_a_record_that_is_lost_during_training_is_computed_again_where_the_reference_is_there(tmp_path):
    trainer = tiny.trainer(tmp_path, precompute_ref_log_probs=True, parts={"peft_config": tiny.lora()})
    trainer.prepare_run()
    store = trainer.reference.store
    store.close()
    store.path.unlink()
    trainer.prepare_run = lambda: None
    trainer.identity = {}
    trainer.train()
    want = run(tmp_path, cached=False, parts={"peft_config": tiny.lora()})
    assert tiny.losses(trainer) == pytest.approx(tiny.losses(want), abs=SAME)


def test_a_record_that_is_lost_during_training_stops_a_run_without_its_reference(tmp_path):
    trainer = tiny.trainer(tmp_path, precompute_ref_log_probs=True)
    trainer.prepare_run()
    trainer.reference.store.close()
    trainer.reference.store.path.unlink()
    trainer.prepare_run = lambda: None
    with pytest.raises(ValueError, match=r"example_ids \[.*no cached reference log-probs.*no longer in memory"):
        trainer.train()


# --- keys and packs ---

tokens = st.lists(st.integers(0, 3), min_size=1, max_size=4)
rows_of_tokens = st.builds(
    TokenizedPair,
    example_id=st.integers(0, 9),
    prompt_ids=tokens,
    chosen_ids=tokens,
    rejected_ids=tokens,
    more_ids=st.lists(tokens, max_size=2),
)


@given(st.lists(rows_of_tokens, min_size=1, max_size=6))
def test_keys_are_equal_where_prompt_and_completion_are(rows):
    contents: dict[bytes, Any] = {}
    for row in rows:
        for key, ids in zip(completion_keys(row), row.completions, strict=True):
            content = (tuple(row.prompt_ids), tuple(ids))
            assert contents.setdefault(key, content) == content
    assert len(contents) == len(set(contents.values()))


def test_keys_know_which_tokens_are_scored():
    def keys(*unscored: Any) -> list[bytes]:
        row = TokenizedPair(
            example_id=0, prompt_ids=[1, 2], chosen_ids=[3, 4, 5, 6], rejected_ids=[7, 8], unscored=unscored
        )
        return completion_keys(row)

    assert keys() == keys((0, 2, 2)), "an empty stretch is none"
    assert keys((0, 1, 3))[0] != keys()[0]
    assert keys((0, 1, 3))[1] == keys()[1], "the other completion is scored as before"
    assert keys((0, 1, 2), (0, 2, 3)) == keys((0, 1, 3)) == keys((0, 2, 3), (0, 1, 2)), "however it is cut"


@given(st.lists(rows_of_tokens, min_size=1, max_size=5))
def test_collated_keys_name_the_completions_of_the_batch(rows):
    """In both layouts, which number completions differently."""
    from dpo_trainer.scoring.layout import as_padded
    from dpo_trainer.types import PairBatch

    flat = PairBatch.from_inputs(inputs_of(rows, "flat", 0, keyed=True))
    for batch in (flat, PairBatch.from_inputs(inputs_of(rows, "padded", 0, keyed=True)), as_padded(flat, 0)):
        assert batch.keys is not None
        want = [(completion_keys(row)[p.chosen], completion_keys(row)[p.rejected]) for row in rows for p in row.pairs]
        got = [
            (batch.keys[c], batch.keys[r]) for c, r in zip(batch.chosen.tolist(), batch.rejected.tolist(), strict=True)
        ]
        assert got == want
        assert len(batch.keys) == len(batch.lengths)
    assert PairBatch.from_inputs(inputs_of(rows, "flat", 0)).keys is None, "only where asked for"


@given(st.lists(rows_of_tokens, max_size=12), st.integers(1, 40), st.booleans())
@settings(max_examples=200)
def test_packs_hold_every_row_once_within_the_budget(rows, budget, padded):
    rows = [
        TokenizedPair(**{**{f: getattr(r, f) for f in r.__dataclass_fields__}, "example_id": i})
        for i, r in enumerate(rows)
    ]
    made = list(packs(rows, budget, padded=padded))
    assert sorted(row.example_id for pack in made for row in pack) == list(range(len(rows)))
    for pack in made:
        inputs = inputs_of(pack, "padded" if padded else "flat", 0)
        assert len(pack) == 1 or inputs["input_ids"].numel() <= budget
    sizes = [inputs_of(pack[:1], "padded" if padded else "flat", 0)["input_ids"].numel() for pack in made]
    assert sizes == sorted(sizes, reverse=True), "what needs most memory comes first"


def test_the_digest_of_a_dataset_is_that_of_its_rows(tmp_path):
    table = tiny.trainer(tmp_path).train_dataset
    again = tiny.trainer(tmp_path / "2", train=Dataset.from_list(tiny.rows(22))).train_dataset
    assert dataset_digest(table) == dataset_digest(again)
    assert dataset_digest(table.select(range(22))) == dataset_digest(table), "however the rows are stored"
    shuffled = table.shuffle(seed=1)
    assert dataset_digest(shuffled) != dataset_digest(table)
    assert dataset_digest(shuffled.flatten_indices()) == dataset_digest(shuffled)
    changed = table.to_list()
    changed[21]["rejected_ids"][-1] += 1
    assert dataset_digest(Dataset.from_list(changed, features=table.features)) != dataset_digest(table)
    assert dataset_digest(Dataset.from_list(table.to_list(), features=table.features)) == dataset_digest(table)
    assert dataset_digest(stream()) is None


# --- refusals ---


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"loss_type": "simpo"}, "--precompute_ref_log_probs is about a reference, but none of the losses"),
        ({"reference_free": True}, "--precompute_ref_log_probs is about a reference, but --reference_free"),
        ({"sync_ref_model": True}, "--sync_ref_model excludes --precompute_ref_log_probs: its cache holds"),
        ({"ref_cache_dir": "/proc/none"}, "cannot be created.*--ref_cache_dir"),
        ({"parts": {"data_collator": lambda rows: {}}}, "does not tell: use DataCollatorForPreference"),
        ({"parts": {"data_collator": DataCollatorForPreference(0)}}, "keyed=True"),
    ],
    ids=["no reference", "reference_free", "moving", "folder", "collator of another library", "collator without keys"],
)
def test_refused_at_construction(options, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        tiny.trainer(tmp_path, precompute_ref_log_probs=True, **options)


def test_a_batch_without_keys_is_refused(tmp_path):
    trainer = tiny.trainer(tmp_path, precompute_ref_log_probs=True)
    trainer.data_collator = DataCollatorForPreference(tiny.PAD)
    with pytest.raises(ValueError, match=r"keyed=True"):
        trainer.train()


def test_nothing_to_fill_without_the_option(tmp_path):
    with pytest.raises(ValueError, match="--precompute_ref_log_probs true"):
        tiny.trainer(tmp_path).precompute_reference()


def test_a_full_quota_is_refused_before_anything_is_computed(tmp_path):
    tiny.trainer(tmp_path, precompute_ref_log_probs=True).precompute_reference()
    with pytest.raises(ValueError, match="--ref_cache_quota"):
        tiny.trainer(tmp_path, model=tiny.llama(seed=4), precompute_ref_log_probs=True, ref_cache_quota=1e-6)
