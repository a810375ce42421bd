"""The forms of real files, where they lie beside the checkout (`../shared/data`, as for the benchmarks); skipped elsewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from tiny_tokenizers import CHAT, byte_bpe

from dpo_trainer.data import DataOptions, form_of, pair_from_row, prepare_dataset
from dpo_trainer.data.files.datasets import load_dataset_splits

FOLDER = Path(__file__).resolve().parents[2] / "shared" / "data"
TOKENIZER = byte_bpe(chat_template=CHAT)
TURN = "\n\nAssistant:"


def prepared(name):
    """Rows as the file has them, and {row number: token ids} of those that are kept."""
    if not (FOLDER / name).is_file():
        pytest.skip(f"{name} is not here")
    rows, _ = load_dataset_splits(str(FOLDER / name))
    ids, report = prepare_dataset(rows, TOKENIZER, DataOptions(disable_tqdm=True))
    assert report.rows == len(rows) == report.kept + report.dropped
    assert report.kept == len(ids) > 0.9 * len(rows)
    return rows, {row["example_id"]: row for row in ids}


def text(ids):
    return TOKENIZER.decode([token for token in ids if token != TOKENIZER.eos_token_id])


def test_strings():
    rows, kept = prepared("ultrafeedback_eval.jsonl.gz")
    for number, ids in kept.items():
        row = rows[number]
        assert form_of(row, f"Row {number}") == "text"
        for column in ("chosen", "rejected"):
            assert text(ids["prompt_ids"] + ids[f"{column}_ids"]) == row["prompt"] + row[column]
            assert ids[f"{column}_ids"][-1] == TOKENIZER.eos_token_id


def test_transcripts_are_split_after_an_assistant_marker():
    rows, kept = prepared("hh_harmless_eval.jsonl.gz")
    for number, ids in kept.items():
        row = rows[number]
        assert form_of(row, f"Row {number}") == "text, implicit prompt"
        pair = pair_from_row(row, f"Row {number}")
        # The last marker up to which both are the same: a few transcripts part before their last turn.
        ends = [match.end() for match in re.finditer(TURN, row["chosen"])]
        assert len(pair.prompt) == max(end for end in ends if row["rejected"].startswith(row["chosen"][:end]))
        for column in ("chosen", "rejected"):
            assert text(ids["prompt_ids"] + ids[f"{column}_ids"]) == row[column]


def test_sharegpt():
    rows, kept = prepared("sharegpt_dpo.json")
    roles = {"human": "user", "gpt": "assistant", "system": "system"}
    for number, ids in kept.items():
        row = rows[number]
        assert form_of(row, f"Row {number}") == "ShareGPT conversation"
        before = "".join(f"<|{roles[turn['from']]}|>{turn['value']}<eos>" for turn in row["conversations"])
        assert TOKENIZER.decode(ids["prompt_ids"]) == f"{before}<|assistant|>"
        assert TOKENIZER.decode(ids["chosen_ids"]) == row["chosen"]["value"] + "<eos>"
        assert TOKENIZER.decode(ids["rejected_ids"]) == row["rejected"]["value"] + "<eos>"
