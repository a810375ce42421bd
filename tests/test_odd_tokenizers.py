"""Tokenizers that are no plain Rust ones: written in Python, with a part in Python, or with something that cannot be pickled."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
from datasets import Dataset
from tokenizers import pre_tokenizers
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from dpo_trainer.data.processor import works_in_processes
from dpo_trainer.data.tokens.encode import can_be_saved, tokenizer_fingerprint
from dpo_trainer.models import load as models
from dpo_trainer.models.load import load_tokenizer
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


# --- mistral-common's ---


class MistralCommonBackend(PreTrainedTokenizerFast):
    """What transformers makes where mistral-common is installed, as far as it is odd: it holds another tokenizer, has no chat
    template, writes conversations itself, and takes few options. (Named as there: by its name it is known.)"""

    tokenizer = object()
    is_fast = False
    finished = False

    @property
    def added_tokens_decoder(self):
        return print if self.finished else super().added_tokens_decoder  # a method there

    def __call__(self, texts, *, add_special_tokens, padding, truncation, return_attention_mask, verbose):
        plain = tiny.tokenizer()(texts, add_special_tokens=False, split_special_tokens=True)
        return {"input_ids": [[4, *ids] for ids in plain["input_ids"]]}

    def apply_chat_template(self, *args, **kwargs):
        raise AssertionError("no chat template")

    def save_pretrained(self, folder, **kwargs):
        """There is a way of its own to write tekken.json."""


def of_mistral_common():
    own = MistralCommonBackend(tokenizer_object=tiny.tokenizer().backend_tokenizer, eos_token="<|end|>", bos_token="!")
    own.finished = True
    assert (own.bos_token_id, own.chat_template) == (4, None)
    return own


def test_text_is_read_by_mistral_common(tmp_path):
    train = Dataset.from_list([{"prompt": "a", "chosen": "b <|end|> c", "rejected": "d"}] * 4)
    trainer = made(tmp_path, of_mistral_common, train)
    row, ids = trainer.train_dataset[0], tiny.tokenizer()("ab <|end|> c", split_special_tokens=True)["input_ids"]
    assert (row["prompt_ids"], row["chosen_ids"]) == ([4, ids[0]], [*ids[1:], tiny.END])
    trainer.train()


def test_what_mistral_common_cannot_do_is_refused_with_what_can(tmp_path):
    with pytest.raises(ValueError, match=r"Row 0 of train is a conversation, .*mistral-common.*mistral_format=False"):
        made(tmp_path, of_mistral_common, tiny.chat_rows(3))
    with pytest.raises(ValueError, match=r"no control tokens in text, which --allow_special_tokens_in_text asks for"):
        made(tmp_path, of_mistral_common, tiny.rows(3), allow_special_tokens_in_text=True)
    args = tiny.config("unused", kind=OnlineDPOConfig, max_new_tokens=4)
    with pytest.raises(ValueError, match=r"is a conversation, .*mistral_format=False"):
        PromptData(args, of_mistral_common(), None, vocabulary_size=300).prepare(tiny.chat_rows(2), "train")


def test_a_folder_with_tekken_alone_has_a_tokenizer(tmp_path, monkeypatch):
    """And one with tokenizer.json beside it gives that one, which has the chat template, wherever it is loaded."""
    asked = []

    def from_pretrained(name, **how):
        asked.append(how)
        return "the tokenizer"

    monkeypatch.setattr(models.AutoTokenizer, "from_pretrained", from_pretrained)
    monkeypatch.setattr(models, "find_spec", lambda name: name)
    (tmp_path / "tekken.json").write_text("{}")
    assert load_tokenizer(str(tmp_path)) == "the tokenizer"
    (tmp_path / "tokenizer.json").write_text("{}")
    assert load_tokenizer(str(tmp_path)) == "the tokenizer"
    assert [how.get("mistral_format") for how in asked] == [None, False]


def test_tekken_without_its_library_is_refused_by_name(tmp_path, monkeypatch):
    def from_pretrained(name, **how):
        raise ImportError("\nMistralConverter requires the mistral-common library but it was not found")

    monkeypatch.setattr(models.AutoTokenizer, "from_pretrained", from_pretrained)
    (tmp_path / "tekken.json").write_text("{}")
    with pytest.raises(
        ValueError, match=r"The tokenizer of .* did not load: MistralConverter requires the mistral-common"
    ):
        load_tokenizer(str(tmp_path))
