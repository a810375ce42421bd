"""Judges by rule: verdicts that can be told by reading the answers."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from dpo_trainer.online.feedback import rules  # noqa: F401  # registers the judges
from dpo_trainer.online.feedback.protocol import JUDGES, make_judge
from dpo_trainer.online.samples import Completion, Sampled


def sampled(*texts: str, prompt: Any = "why?", example_id: int = 7, with_ids: bool = True, **columns: Any) -> Sampled:
    """Answers whose tokens are their bytes, and one that ends them."""
    answers = [Completion(ids=[*text.encode(), 1] if with_ids else [], text=text, finished=True) for text in texts]
    return Sampled(example_id=example_id, prompt=prompt, prompt_ids=[5, 6], completions=answers, columns=columns)


@pytest.mark.parametrize(
    ("options", "scores"),
    [
        ({}, [-2.0, -3.0]),
        ({"prefer": "longer"}, [2.0, 3.0]),
        ({"unit": "tokens"}, [-5.0, -4.0]),  # "éé" is 2 characters of 2 bytes each, and the token that ends it
        ({"prefer": "longer", "unit": "tokens"}, [5.0, 4.0]),
    ],
)
def test_length(options, scores):
    assert make_judge("length", options)([sampled("éé", "abc")]) == [scores]


def test_length_in_tokens_needs_tokens():
    """Answers that were read from a file have none: all of them would tie without a word."""
    with pytest.raises(ValueError, match=r"example_id 7 .*Use unit='characters'"):
        make_judge("length", {"unit": "tokens"})([sampled("abc", with_ids=False)])


@pytest.mark.parametrize(
    ("options", "scores"),
    [
        ({"pattern": r"\d+"}, [1.0, 1.0, 0.0]),
        ({"pattern": r"\d+", "full": True}, [1.0, 0.0, 0.0]),
        ({"pattern": r"(?i)IS"}, [0.0, 1.0, 0.0]),
    ],
)
def test_regex(options, scores):
    assert make_judge("regex", options)([sampled("42", "it is 42", "no")]) == [scores]


@pytest.mark.parametrize(
    ("options", "scores"),
    [
        ({}, [1.0, 1.0, 0.0, 0.0]),
        ({"strip": False}, [1.0, 0.0, 0.0, 0.0]),
        ({"ignore_case": True}, [1.0, 1.0, 1.0, 0.0]),
    ],
)
def test_exact_match(options, scores):
    assert make_judge("exact_match", options)([sampled("Yes", " Yes\n", "YES", "Yes.", answer="Yes")]) == [scores]


def test_exact_match_of_another_column_of_numbers_and_of_nothing():
    judge = make_judge("exact_match", {"column": "gold"})
    assert judge([sampled("42", "43", gold=42), sampled("42", gold=None)]) == [[1.0, 0.0], [None]]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"solution": "4"}, r"example_id 7 has no column 'answer'; beside the prompt it has: solution"),
        ({"answer": ["4"]}, r"example_id 7 has a list in column 'answer'"),
        ({"answer": True}, r"example_id 7 has a bool"),
    ],
)
def test_exact_match_refuses_rows_that_cannot_say_the_answer(columns, message):
    with pytest.raises(ValueError, match=message):
        make_judge("exact_match", {})([sampled("4", **columns)])


def test_random_verdicts_do_not_depend_on_when_they_are_asked():
    first, second = sampled("a", "b", "c"), sampled("a", "b", "c", prompt="who?")
    together, alone = make_judge("random", {})([first, second]), make_judge("random", {})
    assert [*alone([second]), *alone([first])] == [together[1], together[0]]


def test_random_verdicts_depend_on_seed_prompt_text_and_tokens():
    """Each of these is another draw; an equal completion of the same prompt is the same one."""
    one = sampled("a", "b", "a")
    other_ids = [Completion(ids=[9], text="a", finished=True)]
    draws = [
        *make_judge("random", {})([one])[0],
        make_judge("random", {"seed": 1})([one])[0][0],
        make_judge("random", {})([sampled("a", prompt="who?")])[0][0],
        make_judge("random", {})([sampled("a", with_ids=False)])[0][0],
        make_judge("random", {})([Sampled(example_id=7, prompt="why?", prompt_ids=[5, 6], completions=other_ids)])[0][
            0
        ],
    ]
    assert draws[0] == draws[2]
    assert len(set(draws)) == len(draws) - 1


def test_random_verdicts_are_uniform():
    """4,000 draws in tenths: 400 each, with a standard deviation of 19; 5 of them are 95. The mean is off by 0.0046 at one."""
    draws = [score for (score,) in make_judge("random", {})([sampled(str(n)) for n in range(4000)])]
    tenths = [sum(n / 10 <= draw < (n + 1) / 10 for draw in draws) for n in range(10)]
    assert sum(tenths) == 4000
    assert max(abs(count - 400) for count in tenths) < 95
    # Neighbours are no likelier to rise than to fall: 2,000 of 3,999, give or take 5 * 18.3.
    assert abs(sum(a < b for a, b in itertools.pairwise(draws)) - 2000) < 92


@pytest.mark.parametrize(
    ("judge", "options", "message"),
    [
        ("random", {"seed": 0.5}, "seed must be a whole number, got 0.5"),
        ("random", {"seed": True}, "seed must be a whole number"),
        ("length", {"prefer": "short"}, "prefer must be 'shorter' or 'longer', got 'short'"),
        ("length", {"unit": "words"}, "unit must be 'characters' or 'tokens', got 'words'"),
        ("length", {"unit": ["tokens"]}, "unit must be"),
        ("regex", {"pattern": "("}, r"pattern '\(' is no regular expression: missing \)"),
        ("regex", {"pattern": 3}, "pattern 3 is no regular expression"),
        ("regex", {"pattern": "a", "full": "yes"}, "full must be True or False, got 'yes'"),
        ("regex", {}, "does not fit judge 'regex'.*pattern"),
        ("exact_match", {"column": ""}, "column must be the name of a column"),
        ("exact_match", {"strip": 1}, "strip must be True or False, got 1"),
        ("exact_match", {"ignore_case": None}, "ignore_case must be True or False"),
        ("length", {"by": "words"}, "has no option 'by'"),
    ],
)
def test_options_are_checked_when_the_judge_is_made(judge, options, message):
    with pytest.raises(ValueError, match=message):
        make_judge(judge, options)


def test_all_are_known_by_name():
    assert {"random", "length", "regex", "exact_match"} <= set(JUDGES)
    assert make_judge("length", None).name == "length"
