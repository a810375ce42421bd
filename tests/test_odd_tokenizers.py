"""Tokenizers that are no plain Rust ones: written in Python, with a part in Python, or with something that cannot be pickled."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
from datasets import Dataset
from tokenizers import pre_tokenizers
from transformers import ByT5Tokenizer

from dpo_trainer.data.encode import can_be_saved, tokenizer_fingerprint, works_in_processes
from dpo_trainer.online import OnlineDPOConfig
from dpo_trainer.online.prompts import PromptData


class Whole:
    """A pre-tokenizer in Python, which parts nothing: those of real models find words of Thai, or k-mers of DNA."""

    def pre_tokenize(self, text):
        text.split(lambda number, piece: [piece])


def in_python():
    made = ByT5Tokenizer(extra_ids=0)
    made.chat_template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
    return made


def with_a_part_in_python():
    made = tiny.tokenizer()
    parts = [
        pre_tokenizers.PreTokenizer.custom(Whole()),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
    made.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(parts)
    return made


def not_to_be_pickled():
    made = tiny.tokenizer()
    made.note = (number for number in range(3))
    return made


KINDS = {"in Python": in_python, "a part in Python": with_a_part_in_python, "not to be pickled": not_to_be_pickled}
MAKE = pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)


def made(folder, make, train, **options):
    model = tiny.llama(vocab_size=300)
    return tiny.trainer(folder, model=model, train=train, parts={"processing_class": make()}, max_steps=2, **options)


@MAKE
@pytest.mark.parametrize("rows", [tiny.rows(6), tiny.chat_rows(6)], ids=["text", "messages"])
@pytest.mark.parametrize("how", ["table", "stream", "processes"])
def test_rows_are_read_and_trained_on(make, rows, how, tmp_path, caplog):
    train = Dataset.from_list(rows)
    given = train.to_iterable_dataset() if how == "stream" else train
    trainer = made(tmp_path, make, given, **({"dataset_num_proc": 2} if how == "processes" else {}))
    row = next(iter(trainer.train_dataset))
    asked = rows[0]["prompt"] if isinstance(rows[0]["prompt"], str) else rows[0]["prompt"][0]["content"]
    assert asked in trainer.processing_class.decode(row["prompt_ids"])
    trainer.train()
    assert len(tiny.losses(trainer)) == 2
    alone = how == "processes" and make is not in_python
    assert ("--dataset_num_proc 2 has no effect" in caplog.text) == alone


def test_what_can_be_told_of_each():
    told = {
        kind: (tokenizer_fingerprint(make()) is not None, works_in_processes(make()), can_be_saved(make()))
        for kind, make in KINDS.items()
    }
    assert told == {
        "in Python": (True, True, True),
        "a part in Python": (False, False, False),
        "not to be pickled": (True, False, True),
    }


def test_what_nothing_tells_apart_is_not_cached(tmp_path, caplog):
    """Two of them may differ in what they do: rows of one must not be taken for those of the other."""
    path = tmp_path / "rows"
    Dataset.from_list(tiny.rows(6)).save_to_disk(path)
    before = {file.name for file in path.iterdir()}
    for number in range(2):
        rows = made(tmp_path / f"{number}", with_a_part_in_python, Dataset.load_from_disk(path)).train_dataset
        assert all(Path(file["filename"]).parent.name != "rows" for file in rows.cache_files)
    assert {file.name for file in path.iterdir()} == before
    assert "its token ids are not cached" in caplog.text


def test_checkpoints_of_one_that_cannot_be_saved(tmp_path, caplog):
    trainer = made(tmp_path, with_a_part_in_python, tiny.dataset(6), save_strategy="steps", save_steps=1)
    assert "saved without it" in caplog.text
    trainer.train()
    trainer.save_model(str(tmp_path / "model"))
    files = {file.name for file in (tmp_path / "checkpoint-2").iterdir()}
    assert "model.safetensors" in files
    assert not any(name.startswith("tokenizer") for name in files)
    assert trainer.processing_class is not None
    again = made(tmp_path, with_a_part_in_python, tiny.dataset(6), save_strategy="no")
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


@MAKE
def test_prompts_of_online_training(make):
    args = tiny.config("unused", kind=OnlineDPOConfig, max_new_tokens=4, dataset_num_proc=2)
    data = PromptData(args, make(), None, vocabulary_size=300)
    rows = data.prepare([{"prompt": "cat"}, {"prompt": "owl"}], "train")
    assert data.tokenizer.decode(rows[1]["prompt_ids"]) == "owl"
