"""Rows of every accepted form, the split of implicit prompts, and what is said about bad rows."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpo_trainer.data.implicit import shared_length, split_messages, split_texts
from dpo_trainer.data.schema import (
    check_columns,
    example_id_from_row,
    is_blank,
    pair_from_row,
    token_ids_from_row,
    unread_columns,
    weight_from_row,
)


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


TALK = {"prompt": [user("q")], "chosen": [assistant("a")], "rejected": [assistant("b")]}
TEXT = {"prompt": "q", "chosen": "a", "rejected": "b"}
IDS = {"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [3]}


# --- accepted forms ---


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
    assert token_ids_from_row(IDS, "Row 0") == ([1], [2], [3])
    assert example_id_from_row({"example_id": 7}, "Row 0") == 7
    assert example_id_from_row({}, "Row 0") is None


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
    "nothing": (["a"], ["no column 'chosen' and no column 'rejected'", "prompt_ids"]),
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
    "number": (TEXT | {"rejected": 3}, ["'rejected'", "type int"]),
    "bytes": (TEXT | {"prompt": b"q"}, ["'prompt'", "type bytes"]),
    "one message": (TALK | {"chosen": assistant("a")}, ["'chosen'", "into a list"]),
    "mixed": (TEXT | {"chosen": [assistant("a")]}, ["mixes forms", "'chosen' is a list", "'rejected' is a string"]),
    "prompt string, completions with it": (
        TALK | {"prompt": "q", "chosen": [user("q"), assistant("a")]},
        ["mixes forms", "remove_columns('prompt')"],
    ),
    "prompt string, completions without it": (TALK | {"prompt": "q"}, ["mixes forms", "all as strings"]),
    "prompt list, completion strings": (TEXT | {"prompt": [user("q")]}, ["mixes forms"]),
    "empty prompt": (TALK | {"prompt": []}, ["'prompt'", "empty list"]),
    "empty completion": (TALK | {"rejected": []}, ["'rejected'", "empty list"]),
    "strings for messages": (TALK | {"prompt": ["q"]}, ["'prompt[0]'", "type str"]),
    "no role": (TALK | {"prompt": [{"content": "q"}]}, ["'prompt[0]'", "has no role", "content"]),
    "no content": (TALK | {"chosen": [{"role": "assistant"}]}, ["'chosen[0]'", "has no content"]),
    "content None": (TALK | {"chosen": [assistant(None)]}, ["'chosen[0]'", "has no content"]),
    "content list": (TALK | {"prompt": [user([{"type": "text", "text": "q"}])]}, ["content of type list"]),
    "content number": (TALK | {"chosen": [assistant(3)]}, ["content of type int"]),
    "role number": (TALK | {"prompt": [{"role": 1, "content": "q"}]}, ["role 1"]),
    "role blank": (TALK | {"prompt": [{"role": " ", "content": "q"}]}, ["role ' '"]),
    "from and value": (TALK | {"prompt": [{"from": "human", "value": "q"}]}, ["not from and value"]),
    "completion of a user": (TALK | {"chosen": [user("a")]}, ["'chosen'", "'user' turn", "'assistant'"]),
    "completion repeats prompt": (TALK | {"chosen": [user("q"), assistant("a")]}, ["remove the column 'prompt'"]),
    "user inside": (TALK | {"rejected": [assistant("a"), user("b"), assistant("c")]}, ["'user' turn inside"]),
    "nothing shared": ({k: TALK[k] for k in ("chosen", "rejected")}, ["share no first turn", "'prompt'"]),
    "tools of text": (TEXT | {"tools": [{"a": 1}]}, ["'tools'", "text"]),
    "tools not JSON": (TALK | {"tools": "[{"}, ["'tools'", "is not JSON"]),
    "tools a dict": (TALK | {"tools": {"a": 1}}, ["'tools'", "type dict", "a list"]),
    "tools of strings": (TALK | {"tools": ["f"]}, ["'tools'", "JSON objects"]),
    "template arguments a list": (TALK | {"chat_template_kwargs": [1]}, ["'chat_template_kwargs'", "type list"]),
    "template arguments of ours": (TALK | {"chat_template_kwargs": {"tokenize": True}}, ["sets tokenize"]),
}


@pytest.mark.parametrize(("row", "said"), BAD_ROWS.values(), ids=BAD_ROWS)
def test_bad_rows_are_refused_by_name(row, said):
    with pytest.raises(ValueError) as error:
        pair_from_row(row, "Row 7 of train")
    message = str(error.value)
    assert all(part in message for part in ["Row 7 of train", *said]), message


@pytest.mark.parametrize("weight", [-1, float("nan"), float("inf"), "1", True])
def test_bad_weights_are_refused(weight):
    with pytest.raises(ValueError, match=r"Row 7.*'weight'.*Give a finite number"):
        weight_from_row({"weight": weight}, "Row 7")


@pytest.mark.parametrize("ids", [None, [], [-1], [1.5], [True], ["1"], [[1], [2]], [[1], [2, 3]], "12", [2**40]])
def test_bad_token_ids_are_refused(ids):
    with pytest.raises(ValueError, match=r"Row 7, column 'chosen_ids'.*Give at least one token id"):
        token_ids_from_row(IDS | {"chosen_ids": ids}, "Row 7")


def test_bad_example_ids_are_refused():
    with pytest.raises(ValueError, match=r"Row 7.*'example_id'.*'x'"):
        example_id_from_row({"example_id": "x"}, "Row 7")
