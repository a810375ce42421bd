"""Rows of every accepted form, as pairs and as token ids; the split of implicit prompts; what is said about bad rows."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from tiny_tokenizers import CHAT, byte_bpe

from dpo_trainer.data import DataOptions, form_of, prepare_dataset
from dpo_trainer.data.rows.column_names import check_columns, unread_columns
from dpo_trainer.data.rows.implicit import shared_length, split_messages, split_texts
from dpo_trainer.data.rows.messages import is_blank
from dpo_trainer.data.rows.schema import pair_from_row, weight_from_row
from dpo_trainer.data.rows.tokenized import example_id_from_row, ids_from_row
from dpo_trainer.types import ONE_PAIR, PairIds, Preferred

TOKENIZER = byte_bpe(chat_template=CHAT)


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


def human(value):
    return {"from": "human", "value": value}


def gpt(value):
    return {"from": "gpt", "value": value}


TALK = {"prompt": [user("q")], "chosen": [assistant("a")], "rejected": [assistant("b")]}
TEXT = {"prompt": "q", "chosen": "a", "rejected": "b"}
IDS = {"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [3]}


# --- accepted forms ---


class Form(NamedTuple):
    """A row, what it is called, and what the model reads: the prompt, then each completion."""

    row: dict[str, Any]
    name: str
    prompt: str
    completions: list[str]
    pairs: tuple[Preferred, ...] = ONE_PAIR


ASKED = "<|user|>q<eos><|assistant|>"
TOLD = "<|system|>s" + "<eos>" + ASKED
AGAIN = "<|user|>q<eos><|assistant|>x<eos><|user|>r<eos><|assistant|>"
HH = "\n\nHuman: q\n\nAssistant: x\n\nHuman: r\n\nAssistant:"
ENDED = ["a<eos>", "b<eos>"]
THREE = ["a<eos>", "b<eos>", "c<eos>"]
EACH = (Preferred(0, 1), Preferred(0, 2))
RANKS = (Preferred(0, 1, 2.0), Preferred(0, 2, 3.0), Preferred(1, 2, 1.0))  # of the scores 4, 2, 1
SCORES = {"prompt": "q:", "completions": ["b", "c", "a"], "scores": [2.0, 1.0, 4.0]}
MESSAGES = {"chosen": [assistant("a")], "rejected": [assistant("b")]}

FORMS = {
    "text": Form({"prompt": "q:", "chosen": "a", "rejected": "b"}, "text", "q:", ENDED),
    "text without a prompt": Form(
        {"chosen": "say yes", "rejected": "say no"}, "text, implicit prompt", "say", [" yes<eos>", " no<eos>"]
    ),
    "transcript": Form(
        {"chosen": f"{HH}\nab", "rejected": f"{HH}\nac"}, "text, implicit prompt", HH, ["\nab<eos>", "\nac<eos>"]
    ),
    "text, two rejected": Form(
        {"prompt": "q:", "chosen": "a", "rejected": ["b", "c"]}, "text, list of rejected", "q:", THREE, EACH
    ),
    "text, one rejected in a list": Form({"prompt": "q:", "chosen": "a", "rejected": ["b"]}, "text", "q:", ENDED),
    "text, ranked": Form(SCORES, "text, ranked list", "q:", THREE, RANKS),
    "messages": Form({"prompt": [user("q")], **MESSAGES}, "conversation", ASKED, ENDED),
    "messages without a prompt": Form(
        {
            "chosen": [user("q"), assistant("x"), user("r"), assistant("a")],
            "rejected": [user("q"), assistant("x"), user("r"), assistant("b")],
        },
        "conversation, implicit prompt",
        AGAIN,
        ENDED,
    ),
    "messages as a column": Form({"messages": [user("q")], **MESSAGES}, "conversation", ASKED, ENDED),
    "one message each": Form(
        {"prompt": user("q"), "chosen": assistant("a"), "rejected": assistant("b")}, "conversation", ASKED, ENDED
    ),
    "strings beside a messages prompt": Form(
        {"prompt": [user("q")], "chosen": "a", "rejected": "b"}, "conversation", ASKED, ENDED
    ),
    "a string prompt beside messages": Form({"prompt": "q", **MESSAGES}, "conversation", ASKED, ENDED),
    "a string prompt and one string": Form(
        {"prompt": "q", "chosen": [assistant("a")], "rejected": "b"}, "conversation", ASKED, ENDED
    ),
    "a string prompt that the conversations repeat": Form(
        {
            "prompt": "r ",
            "chosen": [user("q"), assistant("x"), user("r"), assistant("a")],
            "rejected": [user("q"), assistant("x"), user("r"), assistant("b")],
        },
        "conversation",
        AGAIN,
        ENDED,
    ),
    "messages, two rejected": Form(
        {"prompt": [user("q")], "chosen": [assistant("a")], "rejected": [[assistant("b")], [assistant("c")]]},
        "conversation, list of rejected",
        ASKED,
        THREE,
        EACH,
    ),
    "messages prompt, two rejected strings": Form(
        {"prompt": [user("q")], "chosen": "a", "rejected": ["b", "c"]},
        "conversation, list of rejected",
        ASKED,
        THREE,
        EACH,
    ),
    "messages, ranked": Form(
        {
            "prompt": [user("q")],
            "completions": [[assistant("b")], [assistant("c")], [assistant("a")]],
            "scores": [2, 1, 4],
        },
        "conversation, ranked list",
        ASKED,
        THREE,
        RANKS,
    ),
    "ranked, one message each": Form(
        {
            "prompt": [user("q")],
            "completions": [assistant("b"), assistant("c"), assistant("a")],
            "scores": [2, 1, 4],
        },
        "conversation, ranked list",
        ASKED,
        THREE,
        RANKS,
    ),
    "ranked strings beside a messages prompt": Form(
        SCORES | {"prompt": [user("q")]}, "conversation, ranked list", ASKED, THREE, RANKS
    ),
    "ShareGPT": Form(
        {"conversations": [human("q")], "chosen": gpt("a"), "rejected": gpt("b")},
        "ShareGPT conversation",
        ASKED,
        ENDED,
    ),
    "ShareGPT lists": Form(
        {
            "conversations": [human("q"), gpt("x"), human("r")],
            "chosen": [gpt("a")],
            "rejected": [gpt("b")],
        },
        "ShareGPT conversation",
        AGAIN,
        ENDED,
    ),
    "ShareGPT without a prompt": Form(
        {"chosen": [human("q"), gpt("a")], "rejected": [human("q"), gpt("b")]},
        "ShareGPT conversation, implicit prompt",
        ASKED,
        ENDED,
    ),
    "a column system": Form({"system": "s", "prompt": [user("q")], **MESSAGES}, "conversation", TOLD, ENDED),
    "a column system, strings": Form(
        {"system": "s", "prompt": "q", "chosen": "a", "rejected": "b"}, "conversation", TOLD, ENDED
    ),
    "a column system that is empty": Form(
        {"system": None, "prompt": "q", "chosen": "a", "rejected": "b"}, "conversation", ASKED, ENDED
    ),
    "a column system, ShareGPT": Form(
        {"system": "s", "conversations": [human("q")], "chosen": gpt("a"), "rejected": gpt("b")},
        "ShareGPT conversation",
        TOLD,
        ENDED,
    ),
    "content in parts": Form(
        {
            "prompt": [user([{"type": "text", "text": "q"}])],
            "chosen": [assistant([{"type": "text", "text": ""}, {"type": "text", "text": "a"}])],
            "rejected": [assistant("b")],
        },
        "conversation",
        ASKED,
        ENDED,
    ),
    "a prompt to continue": Form(
        {"prompt": [user("q"), assistant("x")], **MESSAGES}, "conversation", f"{ASKED}x", ENDED
    ),
}
"""Every form of the docstring of schema.py but token ids; the texts are written by hand from what CHAT does."""


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_every_accepted_form(form):
    """From the row to the text that the model reads."""
    assert form_of(form.row, "Row 0") == form.name
    assert pair_from_row(form.row, "Row 0").pairs == form.pairs
    (row,), _ = prepare_dataset(Dataset.from_list([form.row]), TOKENIZER, DataOptions(disable_tqdm=True))
    texts = [TOKENIZER.decode(ids) for ids in (row["chosen_ids"], row["rejected_ids"], *row["more_ids"])]
    assert (TOKENIZER.decode(row["prompt_ids"]), texts) == (form.prompt, form.completions)
    assert [(chosen, rejected) for chosen, rejected in row["pairs"]] == [pair[:2] for pair in form.pairs]
    assert row["margin"] == [pair.margin for pair in form.pairs if pair.margin is not None]
    assert row["unscored"] == []


def test_token_ids_are_a_form():
    assert form_of(IDS, "Row 0") == "token ids"
    assert form_of(IDS | {"prompt": "q", "chosen": "a", "rejected": "b"}, "Row 0") == "token ids"
    (row,), _ = prepare_dataset(Dataset.from_list([IDS]), None, DataOptions(disable_tqdm=True))
    assert [row[column] for column in IDS] == list(IDS.values())


def test_forms_may_be_mixed_in_one_table():
    """A table has all columns of all rows, and None where a row does not fill one."""
    rows = [form.row for form in (FORMS["text"], FORMS["text, ranked"], FORMS["text"])]
    columns = dict.fromkeys(column for row in rows for column in row)
    table = Dataset.from_list([{column: row.get(column) for column in columns} for row in rows])
    prepared, report = prepare_dataset(table, TOKENIZER, DataOptions(disable_tqdm=True))
    assert prepared["pairs"][:] == [[[0, 1]], [[0, 1], [0, 2], [1, 2]], [[0, 1]]]
    assert report.pairs == 5


def test_of_several_prompt_columns_the_first_filled_one_is_read():
    row = {"prompt": None, "messages": [user("q")], **MESSAGES}
    assert pair_from_row(row, "Row 0").prompt == [user("q")]
    both = row | {"prompt": [user("first")]}
    assert pair_from_row(both, "Row 0").prompt == [user("first")]


def test_strings_pass_through_untouched():
    pair = pair_from_row({"prompt": " q ", "chosen": " a", "rejected": "b\n", "score": 3}, "Row 0 of train")
    assert (pair.prompt, pair.chosen, pair.rejected) == (" q ", " a", "b\n")


def test_conversations_lose_only_the_none_entries_that_tables_fill_in():
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": 1, "y": None}}}
    prompt = [
        {"role": "user", "content": "q", "tool_calls": None},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "42", "name": "f"},
    ]
    pair = pair_from_row(TALK | {"prompt": prompt}, "Row 0 of train")
    assert pair.prompt[0] == user("q")
    assert set(pair.prompt[1]) == {"role", "tool_calls"}
    assert pair.prompt[1]["tool_calls"][0]["function"]["arguments"] == {"x": 1}
    assert pair.prompt[2]["name"] == "f"


def test_tools_and_template_arguments_come_as_values_or_json():
    tool = {"type": "function", "function": {"name": "f"}}
    as_value = pair_from_row(TALK | {"tools": [tool], "chat_template_kwargs": {"thinking": False, "x": None}}, "Row 0")
    as_json = pair_from_row(
        TALK
        | {
            "tools": '[{"type": "function", "function": {"name": "f"}}]',
            "chat_template_kwargs": '{"thinking": false}',
        },
        "Row 0",
    )
    absent = pair_from_row(TALK | {"tools": None, "chat_template_kwargs": None}, "Row 0")
    assert as_value.tools == as_json.tools == [tool]
    assert as_value.chat_template_kwargs == as_json.chat_template_kwargs == {"thinking": False}
    assert absent.tools is None
    assert absent.chat_template_kwargs == {}


def test_weights_and_ids():
    assert weight_from_row({"weight": 0}, "Row 0") == 0.0
    assert weight_from_row({"weight": None}, "Row 0") == weight_from_row({}, "Row 0") == 1.0
    assert ids_from_row(IDS, "Row 0") == PairIds([1], [[2], [3]])
    assert example_id_from_row({"example_id": 7}, "Row 0") == 7
    assert example_id_from_row({}, "Row 0") is None


def test_prepared_rows_are_read_whole():
    row = IDS | {"more_ids": [[4, 5]], "pairs": [[0, 1], [2, 1]], "margin": [0.5, 2], "unscored": [[2, 1, 2]]}
    want = PairIds([1], [[2], [3], [4, 5]], (Preferred(0, 1, 0.5), Preferred(2, 1, 2.0)), ((2, 1, 2),))
    assert ids_from_row(row, "Row 0") == want
    empty = IDS | {"more_ids": [], "pairs": None, "margin": [], "unscored": []}
    assert ids_from_row(empty, "Row 0") == ids_from_row(IDS | dict.fromkeys(empty.keys() - IDS.keys()), "Row 0")
    assert ids_from_row(empty, "Row 0") == PairIds([1], [[2], [3]])
    several = IDS | {"chosen_ids": [2, 2, 2, 2], "unscored": [[0, 3, 4], [0, 0, 1], [0, 1, 2]]}
    assert ids_from_row(several, "Row 0").unscored == ((0, 0, 1), (0, 1, 2), (0, 3, 4))  # in order
    assert ids_from_row(IDS | {"margin": 3}, "Row 0").pairs == (Preferred(0, 1, 3.0),)


@pytest.mark.parametrize(
    ("completion", "blank"),
    [("", True), (" \n", True), ("x", False), ([assistant(" ")], True), ([assistant("x")], False)],
)
def test_blank_completions_are_recognised(completion, blank):
    assert is_blank(completion) is blank


def test_a_call_of_a_tool_is_not_blank():
    assert not is_blank([{"role": "assistant", "tool_calls": [{"type": "function"}]}])


def test_the_users_own_columns_are_left_alone():
    check_columns(["prompt", "chosen", "rejected", "prompt_id", "choosen", "source"], "train")
    check_columns(["chosen", "rejected", "prompt_id", "score_chosen"], "train")
    check_columns([*IDS, "anything"], "train")
    check_columns(["prompt", "completions", "scores", "promt"], "train")
    check_columns(["messages", "chosen", "rejected", "promt"], "train")
    assert unread_columns(["prompt", "weight", "source"]) == ["source"]


# --- implicit prompts ---


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt"),
    [
        ("Hello world", "Hello there", "Hello"),
        ("The sky is blue", "The sky is black", "The sky is"),  # "bl" is shared, and is no word
        ("Is it? Yes.", "Is it? No.", "Is it?"),
        ("Q: one\nA: two", "Q: one\nA: six", "Q: one\nA:"),
        ("line\nfoo", "line\nbar", "line\n"),
        ("a  b", "a  c", "a "),  # the last space belongs to the word behind it, as tokenizers see it
        ("don't stop", "don't go", "don't"),
        ("don't", "dont", ""),
        ("no ", "yes", ""),  # first characters differ, and chosen ends in a space
        ("Hi there you", "Hi there you are", "Hi there"),  # chosen is the beginning of rejected
        ("Hi the", "Hi there", "Hi"),
        ("Hello", "Hello world", ""),
        ("Hi there", "Hi there", "Hi"),  # identical: found useless later on
        ("say hi ", "say hi there", "say"),  # nothing but a space would be left of chosen
        ("é bon", "é mal", "é"),
        ("cafe\u0301 x", "cafe\u0302 x", ""),  # e + accent: never between a letter and its accent
        ("ok 👩\u200d🚀", "ok 👩\u200d🔬", "ok"),  # one sign of three characters
    ],
)
def test_texts_split_at_the_last_shared_word_boundary(chosen, rejected, prompt):
    assert split_texts(chosen, rejected) == (prompt, chosen[len(prompt) :], rejected[len(prompt) :])
    assert split_texts(rejected, chosen) == (prompt, rejected[len(prompt) :], chosen[len(prompt) :])


def test_transcripts_split_at_the_last_assistant_turn_that_both_share():
    start = "\n\nHuman: q1\n\nAssistant: a1\n\nHuman: q2\n\nAssistant:"
    assert split_texts(f"{start} Ah yes", f"{start} Ah no") == (start, " Ah yes", " Ah no")
    assert split_texts(start + " ", start + " x") == (start, " ", " x")
    longer = f"{start} same\n\nHuman: q3\n\nAssistant: more"
    assert split_texts(f"{start} same", longer) == (start, " same", longer[len(start) :])
    prompt, chosen, rejected = split_texts(f"{start} x", f"{start} x")
    assert prompt == start
    assert chosen == rejected == " x"


words = st.lists(st.sampled_from(["ab", "a", "abc", "don't", "é", "e\u0301", "x", "-", "?"]), min_size=1, max_size=5)
texts = st.tuples(words, st.sampled_from([" ", "\n", "  "]), st.sampled_from(["", " "])).map(
    lambda t: t[1].join(t[0]) + t[2]
)


@given(texts, texts)
def test_a_split_keeps_the_texts_and_no_word_is_cut(chosen, rejected):
    prompt, chosen_end, rejected_end = split_texts(chosen, rejected)
    assert (prompt + chosen_end, prompt + rejected_end) == (chosen, rejected)
    assert chosen_end.strip()
    assert rejected_end.strip()
    for end in (chosen_end, rejected_end):
        assert not prompt or not (prompt[-1].isalnum() and end[0].isalnum())
        assert end[0] != "\u0301"


@given(st.lists(st.integers(0, 2)), st.lists(st.integers(0, 2)))
def test_shared_length(first, second):
    want = next((i for i, (a, b) in enumerate(zip(first, second)) if a != b), min(len(first), len(second)))
    assert shared_length(first, second) == want


@pytest.mark.parametrize(
    ("chosen", "rejected", "shared"),
    [
        ([user("q"), assistant("a")], [user("q"), assistant("b")], 1),
        ([user("q"), assistant("a")], [user("q"), assistant("a"), assistant("b")], 1),  # a prefix keeps one turn
        ([user("q"), assistant("a")], [user("q"), assistant("a")], 1),
        ([user("q"), assistant("a"), user("r"), assistant("b")], [user("q"), assistant("a"), user("s")], 1),
        (
            [user("q"), assistant("a"), user("r"), assistant("b")],
            [user("q"), assistant("a"), user("r"), assistant("c")],
            3,
        ),
        ([user("q"), assistant("a")], [user("r"), assistant("a")], 0),
        ([assistant("a")], [assistant("a")], 0),
    ],
)
def test_conversations_split_before_an_assistant_turn_of_both(chosen, rejected, shared):
    assert split_messages(chosen, rejected) == (chosen[:shared], chosen[shared:], rejected[shared:])


def test_an_implicit_conversation_becomes_a_pair():
    pair = pair_from_row({"chosen": [user("q"), assistant("a")], "rejected": [user("q"), assistant("b")]}, "Row 0")
    assert (pair.prompt, pair.chosen, pair.rejected) == ([user("q")], [assistant("a")], [assistant("b")])


# --- refusals: what is wrong, where, and the way out ---

BAD_COLUMNS = {
    "missing": (["prompt", "chosen"], ["train has no column 'rejected'", "it has: prompt, chosen"]),
    "misspelt": (["prompt", "choosen", "rejected"], ["no column 'chosen'", "rename_column('choosen', 'chosen')"]),
    "misspelt prompt": (["promt", "chosen", "rejected"], ["rename_column('promt', 'prompt')"]),
    "capital prompt": (["Prompt", "chosen", "rejected"], ["rename_column('Prompt', 'prompt')"]),
    "half tokenized": (["prompt_ids", "chosen_ids"], ["no column 'rejected_ids'"]),
    "half ranked": (["prompt", "completions", "score"], ["no column 'scores'", "rename_column('score', 'scores')"]),
    "half of each": (["prompt", "chosen", "scores"], ["no column 'rejected'", "'completions' and 'scores'"]),
    "nothing": (["a"], ["no column 'chosen' and no column 'rejected'", "prompt_ids", "--columns prompt=question"]),
}


@pytest.mark.parametrize(("columns", "said"), BAD_COLUMNS.values(), ids=BAD_COLUMNS)
def test_wrong_columns_are_refused(columns, said):
    with pytest.raises(ValueError) as error:
        check_columns(columns, "train")
    assert all(part in str(error.value) for part in said), error.value


BAD_ROWS = {
    "no rejected": ({"prompt": "q", "chosen": "a"}, ["no column 'rejected'"]),
    "None": (TEXT | {"chosen": None}, ["'chosen'", "is None", "filter"]),
    "None prompt": (TEXT | {"prompt": None}, ["'prompt'", "is None"]),
    "None prompts": (TEXT | {"prompt": None, "messages": None}, ["'prompt'", "is None"]),
    "number": (TEXT | {"rejected": 3}, ["'rejected'", "type int"]),
    "bytes": (TEXT | {"prompt": b"q"}, ["'prompt'", "type bytes"]),
    "chosen of a list": (TEXT | {"chosen": ["a"]}, ["'chosen'", "list of texts", "'rejected' and 'completions'"]),
    "prompt of a list": (TALK | {"prompt": ["q"]}, ["'prompt'", "list of texts"]),
    "None inside a list": (TEXT | {"rejected": ["b", None]}, ["'rejected[1]'", "is None"]),
    "number inside a list": (TEXT | {"rejected": ["b", 3]}, ["'rejected[1]'", "type int"]),
    "nested list": (TEXT | {"rejected": ["b", ["c", "d"]]}, ["'rejected[1]'", "list of texts"]),
    "strings and messages in a list": (TALK | {"rejected": ["b", [user("c")]]}, ["'rejected[1]'", "'user' turn"]),
    "no rejected at all": (TALK | {"rejected": []}, ["'rejected'", "empty list"]),
    "list of rejected without a prompt": (
        {"chosen": "say a", "rejected": ["say b", "say c"]},
        ["several completions and no prompt", "column 'prompt'"],
    ),
    "prompt string, completions with more before it": (
        TALK | {"prompt": "r", "chosen": [user("q"), assistant("a")]},
        ["'chosen'", "'user' turn", "remove the column 'prompt'"],
    ),
    "prompt string that only one conversation repeats": (
        TALK | {"prompt": "q", "chosen": [user("q"), assistant("a")]},
        ["'chosen'", "'user' turn", "remove the column 'prompt'"],
    ),
    "prompt string, conversations without it": (
        {"prompt": "r", "chosen": [user("q"), assistant("a")], "rejected": [user("q"), assistant("b")]},
        ["'chosen'", "'user' turn", "remove the column 'prompt'"],
    ),
    "empty prompt": (TALK | {"prompt": []}, ["'prompt'", "empty list"]),
    "empty completion": (TALK | {"chosen": []}, ["'chosen'", "empty list"]),
    "strings for messages": (TALK | {"prompt": [user("q"), "q"]}, ["'prompt'", "list of messages and of strings"]),
    "numbers for messages": (TALK | {"prompt": [3]}, ["'prompt[0]'", "type int"]),
    "no role": (TALK | {"prompt": [{"content": "q"}]}, ["'prompt[0]'", "has no role", "content"]),
    "empty message": (TALK | {"prompt": {}}, ["'prompt'", "has no role", "nothing"]),
    "no content": (TALK | {"chosen": [{"role": "assistant"}]}, ["'chosen[0]'", "has no content"]),
    "content None": (TALK | {"chosen": [assistant(None)]}, ["'chosen[0]'", "has no content"]),
    "content of an image": (
        TALK | {"prompt": [user([{"type": "image", "url": "u"}])]},
        ["'prompt[0]'", "image part that holds 'url' itself", 'column "images"'],
    ),
    "content of a video": (
        TALK | {"prompt": [user([{"type": "video"}])]},
        ["'prompt[0]'", "part of type 'video'", "'text' and 'image'"],
    ),
    "image in an answer": (
        TALK | {"chosen": [assistant([{"type": "image"}])]},
        ["'chosen[0]'", "image in a turn of the assistant"],
    ),
    "content of strings": (TALK | {"prompt": [user(["q"])]}, ["'prompt[0]'", "part of type 'str'"]),
    "content number": (TALK | {"chosen": [assistant(3)]}, ["content of type int"]),
    "role number": (TALK | {"prompt": [{"role": 1, "content": "q"}]}, ["role 1"]),
    "role blank": (TALK | {"prompt": [{"role": " ", "content": "q"}]}, ["role ' '"]),
    "role of a template": (TALK | {"prompt": [{"role": "user|>x<|user", "content": "q"}]}, ["'user|>x<|user'"]),
    "from a stranger": (TALK | {"prompt": [{"from": "humann", "value": "q"}]}, ["'humann'", "'human'", "Known:"]),
    "from and no value": (TALK | {"prompt": [{"from": "human", "value": None}]}, ["'prompt[0]'", "has no content"]),
    "completion of a user": (TALK | {"chosen": [user("a")]}, ["'chosen'", "'user' turn", "'assistant'"]),
    "completion repeats prompt": (TALK | {"chosen": [user("q"), assistant("a")]}, ["remove the column 'prompt'"]),
    "completion ends in a tool's reply": (
        TALK | {"rejected": [assistant("a"), {"role": "tool", "content": "b"}]},
        ["'rejected'", "ends with a 'tool' turn"],
    ),
    "nothing shared": ({k: TALK[k] for k in ("chosen", "rejected")}, ["share no first turn", "'prompt'"]),
    "system without a prompt": (
        {"system": "s", "chosen": "say a", "rejected": "say b"},
        ["'system'", "needs a prompt"],
    ),
    "system twice": (
        TALK | {"system": "s", "prompt": [{"role": "system", "content": "t"}, user("q")]},
        ["'system'", "has a system turn already"],
    ),
    "system of a list": (TALK | {"system": ["s"]}, ["'system'", "type list"]),
    "tools of text": (TEXT | {"tools": [{"a": 1}]}, ["'tools'", "text"]),
    "template arguments of text": (TEXT | {"chat_template_kwargs": {"a": 1}}, ["'chat_template_kwargs'", "text"]),
    "tools not JSON": (TALK | {"tools": "[{"}, ["'tools'", "is not JSON"]),
    "tools too deep": (TALK | {"tools": "[" * 100_000}, ["'tools'", "is not JSON"]),
    "tools a dict": (TALK | {"tools": {"a": 1}}, ["'tools'", "type dict", "a list"]),
    "tools of strings": (TALK | {"tools": ["f"]}, ["'tools'", "JSON objects"]),
    "template arguments a list": (TALK | {"chat_template_kwargs": [1]}, ["'chat_template_kwargs'", "type list"]),
    "template arguments of ours": (TALK | {"chat_template_kwargs": {"tokenize": True}}, ["sets tokenize"]),
    "completions without scores": (
        {"prompt": "q", "completions": ["a", "b"], "scores": None},
        ["'scores'", "None for 2 completions"],
    ),
    "one completion": ({"prompt": "q", "completions": ["a"], "scores": [1.0]}, ["'completions'", "two or more"]),
    "completions of a string": ({"prompt": "q", "completions": "ab", "scores": [1, 2]}, ["'completions'", "no list"]),
    "a message and a list for completions": (
        {"prompt": [user("q")], "completions": [assistant("a"), [user("b")]], "scores": [1, 2]},
        ["'completions[1]'", "'user' turn"],
    ),
    "completions without a prompt": (
        {"completions": ["say a", "say b", "say c"], "scores": [1, 2, 3]},
        ["several completions and no prompt"],
    ),
    "neither form filled in": (
        {"prompt": "q", "chosen": None, "rejected": None, "completions": None, "scores": None},
        ["'chosen'", "is None"],
    ),
    "ranked columns that are empty": (
        {"prompt": "q", "completions": None, "scores": None},
        ["'completions'", "is None"],
    ),
    "a template of its own": (
        TALK | {"chat_template_kwargs": {"chat_template": "{{ messages[0].content }}"}},
        ["sets chat_template"],
    ),
    "truncation for the template": (
        TALK | {"chat_template_kwargs": {"truncation": True, "max_length": 3}},
        ["sets max_length, truncation"],
    ),
    "control tokens of its own": (TALK | {"chat_template_kwargs": {"eos_token": "x"}}, ["sets eos_token"]),
    "text kept from control tokens": (
        TALK | {"chat_template_kwargs": {"sanitize_control_tokens": False}},
        ["sets sanitize_control_tokens"],
    ),
    "a conversation as text": (
        {"prompt": '[{"role": "user"}]', "chosen": "[{'role': 'assistant'}]", "rejected": ' [ {"content": "b"}]'},
        ["'prompt'", "text of a list of messages", ".jsonl"],
    ),
    "None first in a list": pytest.param(
        TEXT | {"rejected": [None, "b"]},
        ["'rejected[0]'", "is None"],
    ),
}


@pytest.mark.parametrize(("row", "said"), BAD_ROWS.values(), ids=BAD_ROWS)
def test_bad_rows_are_refused_by_name(row, said):
    with pytest.raises(ValueError) as error:
        pair_from_row(row, "Row 7 of train")
    message = str(error.value)
    assert all(part in message for part in ["Row 7 of train", *said]), message


@pytest.mark.parametrize("weight", [1e38, 2e30, 1e-31, 1e-45])
def test_weights_whose_sums_do_not_fit_into_float32_are_refused(weight):
    assert weight_from_row({"weight": 1e30}, "Row 7") == 1e30
    with pytest.raises(ValueError, match=r"Row 7.*'weight'.*float32. Give 0 or a number from 1e-30 to 1e\+30"):
        weight_from_row({"weight": weight}, "Row 7")


@pytest.mark.parametrize("weight", [-1, float("nan"), float("inf"), "1", True, 10**400])
def test_bad_weights_are_refused(weight):
    with pytest.raises(ValueError, match=r"Row 7.*'weight'.*Give a finite number"):
        weight_from_row({"weight": weight}, "Row 7")


@pytest.mark.parametrize("ids", [None, [], [-1], [1.5], [True], ["1"], [[1], [2]], [[1], [2, 3]], "12", [2**40]])
def test_bad_token_ids_are_refused(ids):
    with pytest.raises(ValueError, match=r"Row 7, column 'chosen_ids'.*Give at least one token id"):
        ids_from_row(IDS | {"chosen_ids": ids}, "Row 7")


@pytest.mark.parametrize("example_id", ["x", 1.0, True, [1], 2**63])
def test_bad_example_ids_are_refused(example_id):
    with pytest.raises(ValueError, match=r"Row 7, column 'example_id': is .* Give an integer of 64 bits"):
        example_id_from_row({"example_id": example_id}, "Row 7")


BAD_PREPARED = {
    "empty completion": ({"more_ids": [[4], []]}, ["'more_ids[1]'", "is []"]),
    "text for ids": ({"more_ids": ["ab"]}, ["'more_ids[0]'", "'ab'"]),
    "unknown completion": ({"pairs": [[0, 2]]}, ["'pairs'", "[0, 2] for 2 completions"]),
    "negative number": ({"pairs": [[0, -1]]}, ["'pairs'", "[0, -1]"]),
    "against itself": ({"pairs": [[1, 1]]}, ["'pairs'", "[1, 1]"]),
    "three of a pair": ({"pairs": [[0, 1, 1]]}, ["'pairs'", "[0, 1, 1]"]),
    "fractions": ({"pairs": [[0.0, 1.0]]}, ["'pairs'", "[0.0, 1.0]"]),
    "no pairs": ({"pairs": []}, ["'pairs'", "empty list", "at least one pair"]),
    "too many margins": ({"margin": [1.0, 2.0]}, ["'margin'", "[1.0, 2.0] for 1 pairs"]),
    "margin of text": ({"margin": "a lot"}, ["'margin'", "'a lot'"]),
    "infinite margin": ({"margin": [float("inf")]}, ["'margin'", "finite"]),
    "stretch beyond the end": ({"unscored": [[0, 1, 3]]}, ["'unscored'", "[0, 1, 3]"]),
    "stretch of nothing": ({"unscored": [[0, 1, 1]]}, ["'unscored'", "[0, 1, 1]"]),
    "stretch of another completion": ({"unscored": [[2, 0, 1]]}, ["'unscored'", "[2, 0, 1]"]),
    "stretch of two numbers": ({"unscored": [[0, 1]]}, ["'unscored'", "[0, 1]"]),
    "nothing scored": ({"unscored": [[1, 0, 1]]}, ["'unscored'", "without a scored token"]),
    "overlapping stretches": ({"chosen_ids": [2] * 4, "unscored": [[0, 0, 2], [0, 1, 3]]}, ["'unscored'", "overlap"]),
    "a stretch twice": ({"chosen_ids": [2] * 4, "unscored": [[0, 0, 2], [0, 0, 2]]}, ["'unscored'", "overlap"]),
    "pairs of a number": ({"pairs": 3}, ["'pairs'", "is 3", "Give a list"]),
    "a pair of a number": ({"pairs": [3]}, ["'pairs'", "holds 3"]),
    "more_ids of a number": ({"more_ids": 3}, ["'more_ids'", "is 3"]),
    "unscored of a number": ({"unscored": 3}, ["'unscored'", "is 3"]),
    "a stretch of text": ({"unscored": [["a", 0, 1]]}, ["'unscored'", "['a', 0, 1]"]),
    "half a token": ({"unscored": [[0, 0.5, 1]]}, ["'unscored'", "[0, 0.5, 1]"]),
    "a pair twice": pytest.param(
        {"pairs": [[0, 1], [0, 1]]},
        ["'pairs'", "twice"],
    ),
}


@pytest.mark.parametrize(("columns", "said"), BAD_PREPARED.values(), ids=BAD_PREPARED)
def test_bad_columns_of_prepared_rows_are_refused(columns, said):
    with pytest.raises(ValueError) as error:
        ids_from_row({"prompt_ids": [1], "chosen_ids": [2, 3], "rejected_ids": [4]} | columns, "Row 7 of train")
    message = str(error.value)
    assert all(part in message for part in ["Row 7 of train", *said]), message
