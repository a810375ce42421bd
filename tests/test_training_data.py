"""Data of every kind through a whole run: mixtures, ranked rows, tool turns, margins, what is kept on record."""

from __future__ import annotations

import json
import logging
import math

import pytest
import tiny
import torch
from datasets import Dataset

from dpo_trainer.types import PairBatch

LN2 = math.log(2)
PROMPT = [{"role": "user", "content": "what does cat eat?"}]


def answer(text):
    return [{"role": "assistant", "content": text}]


RANKED = [
    {"prompt": PROMPT, "completions": ["figs", "hay", "milk now", "owl"], "scores": [0.1, 0.9, 0.5, 0.5]},
    {"prompt": PROMPT, "completions": ["dog", "owl"], "scores": [1, 0]},
    {"prompt": PROMPT, "completions": ["milk", "dog", "hay"], "scores": [3, 2, 1]},
    {"prompt": PROMPT, "completions": ["dog eats", "owl sees", "cat"], "scores": [0, 0, 5]},
]


def first_batch(trainer) -> PairBatch:
    return PairBatch.from_inputs(next(iter(trainer.get_train_dataloader())))


def test_ranked_rows_train_with_each_completion_once(tmp_path):
    """4 rows in a batch: 5 + 1 + 3 + 2 pairs over 4 + 2 + 3 + 3 completions, and no prompt twice."""
    trainer = tiny.trainer(tmp_path, train=Dataset.from_list(RANKED), max_steps=2)
    batch = first_batch(trainer)
    assert (len(batch.chosen), len(batch.lengths)) == (5 + 1 + 3 + 2, 4 + 2 + 3 + 3)
    tokenizer, rows = tiny.tokenizer(), batch.tokenized_rows
    texts = [[tokenizer.decode(ids) for ids in row.completions] for row in rows]
    assert ["hay<|end|>", "milk now<|end|>", "owl<|end|>", "figs<|end|>"] in texts  # best first
    assert batch.num_tokens == sum(trainer.train_dataset["length"])
    trainer.train()
    assert tiny.losses(trainer)[0] == pytest.approx(LN2, abs=2e-6)
    assert tiny.losses(trainer)[1] < LN2
    report = trainer.data_reports["train"]
    assert (report.rows, report.kept, report.pairs) == (4, 4, 11)


def test_at_most_so_many_pairs_of_a_prompt(tmp_path):
    trainer = tiny.trainer(tmp_path, train=Dataset.from_list(RANKED), max_pairs_per_prompt=1)
    batch = first_batch(trainer)
    assert len(batch.chosen) == 4
    assert len(batch.lengths) == 8  # completions that no pair needs are not computed
    assert sorted(batch.margin.tolist()) == pytest.approx([0.8, 1.0, 2.0, 5.0])
    assert trainer.data_reports["train"].pairs_left_out == 4 + 0 + 2 + 1


def test_a_margin_reaches_the_loss(tmp_path):
    """odpo with a linear offset: -log s(beta D - margin) at D = 0 is log(1 + e^margin)."""
    rows = [row | {"margin": 0.5 * (n % 2)} for n, row in enumerate(tiny.rows(4))]
    how = {"loss_type": "odpo", "odpo_offset": "linear", "max_steps": 1}
    trainer = tiny.trained(tmp_path, train=Dataset.from_list(rows), **how)
    assert tiny.losses(trainer)[0] == pytest.approx((LN2 + math.log(1 + math.exp(0.5))) / 2, abs=1e-5)
    rows[2]["margin"] = None
    with pytest.raises(ValueError, match=r"Row 2 of train: .*margin"):
        tiny.trainer(tmp_path, train=Dataset.from_list(rows), **how)
    rows[2]["margin"] = 0.0
    with pytest.raises(ValueError, match=r"Row 0 of train: .*margin.*--odpo_offset linear"):
        tiny.trainer(tmp_path, train=Dataset.from_list(rows), loss_type="odpo")
    stream = tiny.trainer(tmp_path, train=Dataset.from_list(rows).to_iterable_dataset(), loss_type="odpo")
    with pytest.raises(ValueError, match=r"Row 0 of train: .*margin.*--odpo_offset linear"):
        list(stream.train_dataset)


def test_a_list_of_datasets_is_one_mixture(tmp_path, caplog):
    parts = [tiny.dataset(3), Dataset.from_list(tiny.chat_rows(4)), Dataset.from_list(RANKED)]
    with caplog.at_level(logging.WARNING):
        trainer = tiny.trainer(
            tmp_path, train=parts, parts={"eval_dataset": [tiny.dataset(2), tiny.dataset(3, seed=5)]}
        )
    assert trainer.train_dataset["example_id"][:] == list(range(3 + 4 + 4))
    assert list(trainer.data_reports) == ["train 0", "train 1", "train 2", "eval 0", "eval 1"]
    assert len(trainer.eval_dataset) == 5
    kept = json.loads((tmp_path / "data_report.json").read_text())
    assert [report["kept"] for report in kept.values()] == [3, 4, 4, 2, 3]
    assert len([r for r in caplog.records if "Data, by rows" in r.getMessage()]) == 1  # one table
    trainer.train()
    assert tiny.losses(trainer)[0] == pytest.approx(LN2, abs=2e-6)
    assert "eval_loss" in trainer.evaluate()


def test_streams_of_a_mixture_take_turns_until_all_have_ended(tmp_path):
    parts = [tiny.dataset(7).to_iterable_dataset(), tiny.dataset(3, seed=9).to_iterable_dataset()]
    trainer = tiny.trainer(tmp_path, train=parts, max_steps=3)
    rows = list(trainer.train_dataset)
    assert len(rows) == 10
    tables = [tiny.trainer(tmp_path, train=part).train_dataset for part in (tiny.dataset(7), tiny.dataset(3, seed=9))]
    first, second = ([row["chosen_ids"] for row in table] for table in tables)
    assert [row["chosen_ids"] for row in rows[:4]] == [first[0], second[0], first[1], second[1]]
    assert sorted(row["chosen_ids"] for row in rows) == sorted(first + second)
    trainer.train()
    record = json.loads((tmp_path / "data_report.json").read_text())
    assert record["train 0"]["rows"] + record["train 1"]["rows"] >= 10  # rewritten after training


def test_tables_and_streams_do_not_mix(tmp_path):
    with pytest.raises(ValueError, match="all of them tables or all of them streams"):
        tiny.trainer(tmp_path, train=[tiny.dataset(3), tiny.dataset(3).to_iterable_dataset()])
    with pytest.raises(ValueError, match="The train data have no rows"):
        tiny.trainer(tmp_path, train=[])


def test_a_tools_reply_is_read_but_not_scored(tmp_path):
    """Changing what the tool says changes the log-prob of what follows; its own tokens are nobody's to learn."""
    call = {"role": "assistant", "content": "look"}

    def row(reply):
        turns = [call, {"role": "user", "content": reply}, {"role": "assistant", "content": "so milk"}]
        return {"prompt": PROMPT, "chosen": turns, "rejected": answer("hay")}

    trainer = tiny.trainer(tmp_path, train=Dataset.from_list([row("figs")] * 4))
    batch = first_batch(trainer)
    decode = tiny.tokenizer().decode
    scored = decode(batch.target_ids[batch.completion == 0])
    assert scored == "look<|end|>so milk<|end|>"
    assert "figs" in decode(batch.input_ids[0])

    def logps(reply):
        made = tiny.trainer(tmp_path, train=Dataset.from_list([row(reply)] * 4))
        with torch.no_grad(), made.scorer.step():
            return made.scorer(made.model, first_batch(made))

    one, other = logps("figs"), logps("hays")
    assert one.chosen_lengths.tolist() == other.chosen_lengths.tolist()
    assert (one.chosen - other.chosen).abs().min() > 1e-3
    torch.testing.assert_close(one.rejected, other.rejected, rtol=0, atol=0)
    trainer.train()
    assert tiny.losses(trainer)[0] == pytest.approx(LN2, abs=2e-6)


def test_what_is_too_long_is_dropped_or_stops_the_run(tmp_path):
    rows = tiny.rows(6)
    rows[4]["chosen"] = " milk" * 40
    trainer = tiny.trainer(tmp_path, train=Dataset.from_list(rows), max_length=100, too_long="drop")
    assert trainer.train_dataset["example_id"][:] == [0, 1, 2, 3, 5]
    with pytest.raises(ValueError, match=r"would cut: 1 \(row 4\).*--too_long truncate or drop"):
        tiny.trainer(tmp_path, train=Dataset.from_list(rows), max_length=100, too_long="error")


def test_deduplicated_rows_are_counted(tmp_path):
    rows = tiny.rows(5)
    trainer = tiny.trainer(tmp_path, train=Dataset.from_list([*rows, rows[1], rows[3]]), deduplicate=True)
    assert trainer.train_dataset["example_id"][:] == [0, 1, 2, 3, 4]
    assert trainer.data_reports["train"].counts["duplicate"] == 2
    assert trainer.data_reports["train"].first_rows["duplicate"] == [5, 6]
    with pytest.raises(ValueError, match="--deduplicate"):
        tiny.trainer(tmp_path, train=tiny.dataset(3).to_iterable_dataset(), deduplicate=True)


@pytest.mark.parametrize("evaluated", [False, True])
def test_drop_last_that_leaves_nothing(tmp_path, evaluated):
    trainer = tiny.trainer(tmp_path, train=tiny.dataset(3 if not evaluated else 8), dataloader_drop_last=True)
    with pytest.raises(ValueError, match=r"--dataloader_drop_last leaves none of 3 rows: a batch .* takes 4"):
        trainer.evaluate(tiny.dataset(3)) if evaluated else trainer.train()
