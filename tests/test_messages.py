"""Chat messages in every spelling, and how a row of them becomes a prompt and completions."""

from __future__ import annotations

import copy
import json
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpo_trainer.data.rows.messages import SHAREGPT_ROLES, is_blank, read_messages, roles_are_renamed, without_none
from dpo_trainer.data.rows.schema import pair_from_row


def turn(role, content, **more):
    return {"role": role, "content": content, **more}


def user(content):
    return turn("user", content)


def assistant(content, **more):
    return turn("assistant", content, **more)


def read(*messages):
    return read_messages(list(messages), "Row 3 of train", "prompt")


def refused(*messages):
    with pytest.raises(ValueError) as error:
        read(*messages)
    return str(error.value)


TALK = {"prompt": [user("q")], "chosen": [assistant("a")], "rejected": [assistant("b")]}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}


# --- one message ---


def test_a_message_keeps_all_that_templates_may_read():
    message = assistant("a", reasoning_content="r", tool_calls=[CALL], name="n")
    assert read(message) == [message]


def test_one_message_alone_is_a_list_of_one():
    assert read_messages(user("q"), "Row 3", "prompt") == [user("q")]
    assert read_messages({"from": "gpt", "value": "a"}, "Row 3", "chosen") == [assistant("a")]


def test_reading_does_not_change_the_row():
    given = [
        user([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]),
        {"from": "function_call", "value": '{"name": "f"}', "role": None},
    ]
    before = copy.deepcopy(given)
    assert read(*given)[0] == user("ab")
    assert given == before


def test_none_is_left_out_at_any_depth_and_nothing_else_is():
    value = {"a": None, "b": [{"c": None, "d": 0}, None, "", False], "e": ({"f": None},)}
    assert without_none(value) == {"b": [{"d": 0}, None, "", False], "e": [{}]}


@pytest.mark.parametrize(
    ("parts", "text"),
    [
        ([], ""),
        ([{"type": "text", "text": "a"}], "a"),
        ([{"type": "text", "text": "a "}, {"type": "text", "text": "b"}], "a b"),
        ([{"text": "a"}, {"type": "text", "text": "", "image_url": None}], "a"),  # a table gives every part all keys
    ],
)
def test_text_parts_are_joined(parts, text):
    assert read(user(parts)) == [user(text)]


@pytest.mark.parametrize(
    ("part", "kind"),
    [
        ({"type": "image_url", "image_url": {"url": "u"}}, "'image_url'"),
        ({"type": None, "image": "u", "text": None}, None),
        ({"type": "text", "text": None}, None),
        ({"type": "text", "text": 3}, None),
        ({}, None),
        ("a", "'str'"),
        (None, "'NoneType'"),
    ],
)
def test_other_parts_are_refused(part, kind):
    message = refused(user("q"), user([part]))
    assert "Row 3 of train, column 'prompt[1]'" in message
    said = "text part without text" if kind is None else f"content part of type {kind}. Only parts of type 'text'"
    assert said in message


@pytest.mark.parametrize(
    "role",
    [
        "user",
        "assistant",
        "system",
        "tool",
        "developer",
        "ipython",
        "critic_2",
        "user_1",
        "model_2",
        "x-y.z",
        "é",
    ],
)
def test_any_name_is_a_role(role):
    assert read(turn(role, "c")) == [turn(role, "c")]


@pytest.mark.parametrize(
    ("role", "meant"),
    [
        ("asistant", "assistant"),
        ("users", "user"),
        ("systm", "system"),
        ("tools", "tool"),
    ],
)
def test_a_misspelt_role_is_no_role(role, meant):
    assert f"has the role '{role}'. Did you mean '{meant}'?" in refused(turn(role, "c"))


@pytest.mark.parametrize(
    ("role", "usual"),
    [
        ("human", "user"),
        ("Human", "user"),
        ("prompter", "user"),
        ("USER", "user"),
        ("gpt", "assistant"),
        ("model", "assistant"),
        ("bot", "assistant"),
        ("Assistant", "assistant"),
        ("function", "tool"),
    ],
)
def test_roles_of_other_tools_are_read_as_the_usual_ones(role, usual):
    assert read(turn(role, "c")) == [turn(usual, "c")]
    assert roles_are_renamed([user("a"), turn(role, "c")])
    assert not roles_are_renamed([user("a"), turn(usual, "c")])


@pytest.mark.parametrize("calls", ["f()", {"function": {"name": "f"}}, ["f"], 3])
def test_calls_are_a_list_of_objects(calls):
    assert "'prompt[0]': has tool_calls" in refused(assistant("a", tool_calls=calls))


@pytest.mark.parametrize("role", ["", " user", "user\n", "a|b", "<|user|>", "a b", 1, True, ["user"]])
def test_what_is_no_name_is_no_role(role):
    """A template writes the role between its control characters, so "user|>" would end the header there."""
    assert "role" in refused(turn(role, "c"))


@pytest.mark.parametrize("message", ["text", 3, None, ["role", "user"]])
def test_what_is_no_mapping_is_no_message(message):
    assert f"'prompt[1]': is of type {type(message).__name__}" in refused(user("q"), message)


# --- ShareGPT ---


@pytest.mark.parametrize(("speaker", "role"), [item for item in SHAREGPT_ROLES.items() if item[0] != "function_call"])
def test_sharegpt_speakers(speaker, role):
    assert read({"from": speaker, "value": "v"}) == [turn(role, "v")]


def test_the_roles_of_sharegpt():
    """Written out, so that the test above does not read the table it checks."""
    names = ["human", "gpt", "system", "observation", "function_call", "user", "assistant", "tool"]
    roles = ["user", "assistant", "system", "tool", "assistant", "user", "assistant", "tool"]
    assert dict(zip(names, roles)) == SHAREGPT_ROLES


@pytest.mark.parametrize(
    "value",
    [
        '{"name": "f", "arguments": {"x": 1}}',
        {"name": "f", "arguments": {"x": 1}},
        {"name": "f", "arguments": {"x": 1, "y": None}, "id": None},
    ],
    ids=["JSON", "dict", "dict of a table"],
)
def test_a_function_call_of_sharegpt(value):
    assert read({"from": "function_call", "value": value}) == [assistant("", tool_calls=[CALL])]


def test_a_whole_sharegpt_row_with_a_tool():
    pair = pair_from_row(
        {
            "conversations": [
                {"from": "human", "value": "q"},
                {"from": "function_call", "value": json.dumps(CALL["function"])},
                {"from": "observation", "value": "42"},
            ],
            "chosen": {"from": "gpt", "value": "a"},
            "rejected": {"from": "gpt", "value": "b"},
            "tools": json.dumps([TOOL]),
            "system": "s",
        },
        "Row 0",
    )
    assert pair.prompt == [
        turn("system", "s"),
        user("q"),
        assistant("", tool_calls=[CALL]),
        turn("tool", "42"),
    ]
    assert (pair.chosen, pair.rejected, pair.tools) == ([assistant("a")], [assistant("b")], [TOOL])


def test_what_stands_beside_from_and_value_is_kept():
    assert read({"from": "gpt", "value": "v", "weight": 0}) == [assistant("v", weight=0)]


def test_a_role_wins_over_from():
    """As in tables of both spellings, where the other one is None, or in rows that say where a text is from."""
    assert read(turn("user", "c", **{"from": "reddit"}))[0]["role"] == "user"


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ({"from": "gtp", "value": "v"}, ["is from 'gtp'", "'gpt'", "Known: human, user, gpt"]),
        ({"from": 3, "value": "v"}, ["is from 3", "Known: human"]),
        ({"from": "function_call", "value": "{"}, ["function_call that is not JSON", "Mend it"]),
        ({"from": "function_call", "value": "[" * 100_000}, ["function_call that is not JSON"]),
        ({"from": "function_call", "value": "[1]"}, ["function_call without a name", '"name"']),
        ({"from": "function_call", "value": '{"name": 3}'}, ["function_call without a name"]),
        ({"from": "function_call"}, ["function_call without a name"]),
        ({"from": "human", "value": 3}, ["content of type int"]),
        ({"value": "v"}, ["has no role", "it has: value", "from and value"]),
    ],
)
def test_broken_sharegpt_is_refused(message, said):
    text = refused(user("q"), message)
    assert all(part in text for part in ["Row 3 of train, column 'prompt[1]'", *said]), text


# --- blank completions ---


@pytest.mark.parametrize(
    ("turns", "blank"),
    [
        ([assistant("")], True),
        ([assistant(" \n")], True),
        ([assistant("", tool_calls=[CALL])], False),
        ([{"role": "assistant", "tool_calls": [CALL]}], False),
        ([assistant("", tool_calls=[])], True),
        ([assistant(""), turn("tool", "42"), assistant("")], True),  # only others said something
        ([assistant(""), turn("tool", "42"), assistant("a")], False),
    ],
)
def test_a_completion_is_blank_when_its_assistant_says_nothing(turns, blank):
    assert is_blank(turns) is blank


# --- a row of messages ---


def test_the_column_system_comes_first():
    pair = pair_from_row(TALK | {"system": "s"}, "Row 0")
    assert pair.prompt == [turn("system", "s"), user("q")]
    implicit = {"system": "s", "chosen": [user("q"), assistant("a")], "rejected": [user("q"), assistant("b")]}
    assert pair_from_row(implicit, "Row 0") == pair


@pytest.mark.parametrize("system", [None, ""])
def test_no_system_turn_is_made_of_nothing(system):
    assert pair_from_row(TALK | {"system": system}, "Row 0") == pair_from_row(TALK, "Row 0")


@pytest.mark.parametrize("tools", [[TOOL], (TOOL,), json.dumps([TOOL]), [{**TOOL, "strict": None}]])
def test_tools_in_every_spelling(tools):
    assert pair_from_row(TALK | {"tools": tools}, "Row 0").tools == [TOOL]


@pytest.mark.parametrize(
    ("option", "nothing"),
    [
        *(("tools", nothing) for nothing in (None, "", " ", "null", "[]", [])),
        *(("chat_template_kwargs", nothing) for nothing in (None, "", "\n", "null", "{}", {}, {"a": None})),
    ],
)
def test_options_that_are_empty_count_as_not_given(option, nothing):
    """Also on text rows, where options that say something are refused."""
    for row in (TALK, {"prompt": "q", "chosen": "a", "rejected": "b"}):
        assert pair_from_row(row | {option: nothing}, "Row 0") == pair_from_row(row, "Row 0")


def test_turns_of_others_may_stand_inside_a_completion():
    chosen = [assistant("", tool_calls=[CALL]), turn("tool", "42"), assistant("a")]
    assert pair_from_row(TALK | {"chosen": chosen}, "Row 0").chosen == chosen
    rejected = [assistant("b"), user("more?"), assistant("c")]
    assert pair_from_row(TALK | {"rejected": rejected}, "Row 0").rejected == rejected


@pytest.mark.parametrize("prompt", ["r", " r\n"], ids=["as it stands", "but for spaces"])
def test_a_string_prompt_may_repeat_the_last_shared_turn(prompt):
    before = [turn("system", "s"), user("q"), assistant("x"), user("r")]
    row = {"prompt": prompt, "chosen": [*before, assistant("a")], "rejected": [*before, assistant("b")]}
    pair = pair_from_row(row, "Row 0")
    assert (pair.prompt, pair.chosen, pair.rejected) == (before, [assistant("a")], [assistant("b")])


def test_a_string_prompt_is_not_taken_for_a_turn_that_the_completions_do_not_share():
    """Completions of several turns that agree on an assistant's first turn are no repetition of the prompt."""
    same = [assistant("x"), user("q")]
    pair = pair_from_row(
        {"prompt": "q", "chosen": [*same, assistant("a")], "rejected": [assistant("y"), user("q"), assistant("b")]},
        "Row 0",
    )
    assert pair.prompt == [user("q")]
    assert pair.chosen == [*same, assistant("a")]


texts = st.sampled_from(["", "a", "b"])
turns = st.lists(st.builds(turn, st.sampled_from(["user", "assistant", "system", "tool"]), texts), max_size=3)


def test_an_implicit_prompt_loses_no_turn():
    """Prompt + completion is the conversation, from an assistant's turn to an assistant's; or there is none to find."""
    outcomes = Counter()

    @given(turns, turns, turns, texts, texts)
    def check(before, chosen, rejected, last_chosen, last_rejected):
        chosen = [*before, *chosen, assistant(last_chosen)]
        rejected = [*before, *rejected, assistant(last_rejected)]
        both = range(1, min(len(chosen), len(rejected)))
        starts = [
            i for i in both if chosen[i]["role"] == rejected[i]["role"] == "assistant" and chosen[:i] == rejected[:i]
        ]
        outcomes[bool(starts)] += 1
        row = {"chosen": chosen, "rejected": rejected}
        if not starts:
            with pytest.raises(ValueError, match=r"Row 5 of train.*share no first turn"):
                pair_from_row(row, "Row 5 of train")
            return
        pair = pair_from_row(row, "Row 5 of train")
        assert len(pair.prompt) == starts[-1]  # the longest one
        assert (pair.prompt + pair.chosen, pair.prompt + pair.rejected) == (chosen, rejected)

    check()
    assert min(outcomes[True], outcomes[False]) >= 10, outcomes
