"""Rewards: what a user's function is given, how several add up, and what is refused."""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
import pytest
import torch

from dpo_trainer.online.feedback.protocol import FeedbackUnavailable
from dpo_trainer.online.feedback.rewards import Rewards, load_reward_module
from dpo_trainer.online.samples import Completion, Sampled


def sampled(*texts: str, prompt: Any = "why?", example_id: int = 7, **columns: Any) -> Sampled:
    answers = [Completion(ids=[1], text=text, finished=True) for text in texts]
    return Sampled(example_id=example_id, prompt=prompt, prompt_ids=[5], completions=answers, columns=columns)


TWO = [sampled("a", "bb", answer="x", level=1), sampled("ccc", prompt="who?", example_id=8, answer="y", level=2)]
CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "why?"}]


def lengths(prompts, completions, **columns):
    return [len(text) for text in completions]


def recording(seen: list):
    def record(prompts, completions, **columns):
        seen.append((prompts, completions, columns))
        return [0.0] * len(completions)

    return record


class Third:
    """A reward that is an object."""

    name = "third"
    moved: Any = None

    def scores(self, samples):
        return [[1.0 / 3 for _ in s.completions] for s in samples]

    def to(self, device):
        self.moved = device


def test_a_function_gets_flat_lists_of_the_strings_of_the_dataset():
    seen: list = []
    Rewards([recording(seen)])(TWO)
    assert seen == [
        (["why?", "why?", "who?"], ["a", "bb", "ccc"], {"answer": ["x", "x", "y"], "level": [1, 1, 2]}),
    ]


def test_a_function_gets_conversations_as_messages():
    seen: list = []
    Rewards([recording(seen)])([sampled("a", "b", prompt=CHAT)])
    ((prompts, completions, _),) = seen
    assert prompts == [CHAT, CHAT]
    assert completions == [[{"role": "assistant", "content": text}] for text in "ab"]


def test_a_function_that_changes_its_lists_changes_no_sample():
    def careless(prompts, completions):
        for prompt in prompts:
            prompt.pop()
        prompts.clear()
        return [0.0] * len(completions)

    sample = sampled("a", "b", prompt=list(CHAT))
    Rewards([careless])([sample])
    assert sample.prompt == CHAT


@pytest.mark.parametrize(
    ("function", "wanted"),
    [
        (lambda prompts, completions: [0.0] * 3, set()),
        (lambda prompts, completions, answer: [ord(a) for a in answer], {"answer"}),
        (lambda prompts, completions, *, level, other=None: [float(x) for x in level], {"level"}),
        (lambda p, c, /, **columns: [len(columns)] * 3, {"answer", "level"}),
        (lambda *lists, answer: [len(lists) + ord(a) for a in answer], {"answer"}),
    ],
    ids=["none", "named", "keyword", "any", "star"],
)
def test_columns_go_to_whom_their_names_stand_in_the_signature(function, wanted):
    got = []

    @functools.wraps(function)
    def watched(*lists, **columns):
        got.append((len(lists), set(columns)))
        return function(*lists, **columns)

    Rewards([watched])(TWO)
    assert got == [(2, wanted)]


def test_arguments_that_a_partial_has_filled_are_no_columns_that_must_be_there():
    def scaled(prompts, completions, by):
        return [by * len(text) for text in completions]

    rewards = Rewards([functools.partial(scaled, by=3)])
    assert rewards(TWO) == [[3.0, 6.0], [9.0]]
    assert list(rewards.last) == ["scaled"]


def test_a_column_that_is_called_like_the_lists_is_not_given_twice():
    rows = [sampled("a", "b", completions="column", prompts="column")]
    assert Rewards([lengths])(rows) == [[1.0, 1.0]]


def test_a_column_that_only_some_rows_have():
    """Two datasets in a mixture: None for the rows of the other."""
    seen: list = []
    Rewards([recording(seen)])([sampled("a", answer="x"), sampled("b", level=2)])
    assert seen[0][2] == {"answer": ["x", None], "level": [None, 2]}


def test_a_missing_column_is_named():
    def needs(prompts, completions, anser):
        return [0.0] * len(completions)

    with pytest.raises(ValueError, match=r"Reward 'needs' takes 'anser'.*has: answer, level. Did you mean 'answer'\?"):
        Rewards([needs])(TWO)


def test_the_total_is_the_scaled_weighted_sum():
    """0.5 (2 len + 3 · 1/3): lengths 1, 2, 3 give 1.5, 2.5, 3.5. What each said stays as it was said."""
    rewards = Rewards([lengths, Third()], [2, 3], scale=0.5)
    got = rewards(TWO)
    assert [len(row) for row in got] == [2, 1]
    assert [x for row in got for x in row] == pytest.approx([1.5, 2.5, 3.5], abs=1e-12)
    assert rewards.last == {"lengths": [1.0, 2.0, 3.0], "third": [pytest.approx(1 / 3)] * 3}


def test_none_of_one_is_none_of_all_and_counted():
    def some(prompts, completions):
        return [None if text == "bb" else 1.0 for text in completions]

    rewards = Rewards([lengths, some])
    assert rewards.counts == {"failed/lengths": 0.0, "failed/some": 0.0}  # there from the start, for the log
    assert rewards(TWO) == [[2.0, None], [4.0]]
    rewards(TWO)
    assert rewards.counts == {"failed/lengths": 0.0, "failed/some": 2.0}
    assert rewards.last["some"] == [1.0, None, 1.0]


@pytest.mark.parametrize(
    "numbers",
    [np.array([1, 2, 3]), torch.tensor([1.0, 2.0, 3.0]), (1, 2, 3), [np.float32(1), torch.tensor(2), np.int64(3)]],
    ids=["array", "tensor", "tuple", "scalars"],
)
def test_numbers_of_other_libraries(numbers):
    got = Rewards([lambda prompts, completions: numbers])(TWO)
    assert got == [[1.0, 2.0], [3.0]]
    assert all(type(score) is float for row in got for score in row)


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ([1.0, 2.0], "Reward 'bad' returned 2 values for 3 completions"),
        (None, "Reward 'bad' returned a NoneType for 3 completions"),
        (1.0, "returned a float"),
        ("abc", "returned a str"),
        ((x for x in "abc"), "returned a generator"),
        (np.ones((2, 3)), "returned 2 values"),
        ([1.0, 2.0, math.nan], "Reward 'bad' returned nan for the prompt with example_id 8"),
        ([1.0, math.inf, 2.0], "Reward 'bad' returned inf for the prompt with example_id 7"),
        ([1.0, 10**400, 2.0], "Reward 'bad' returned 10"),  # no float holds it
        (["1", 2.0, 3.0], "Reward 'bad' returned '1' for the prompt with example_id 7"),
        ([True, False, True], "returned True"),
    ],
)
def test_what_is_not_one_number_each_is_refused(returned, message):
    def bad(prompts, completions):
        return returned

    with pytest.raises(ValueError, match=message):
        Rewards([bad])(TWO)


def test_a_sum_that_overflows_is_refused():
    with pytest.raises(ValueError, match=r"The weighted sum of the rewards returned inf .* example_id 7"):
        Rewards([lambda prompts, completions: [1e308] * 3], [1e10])(TWO)


def test_an_error_of_the_users_own_is_its_cause():
    def broken(prompts, completions):
        raise KeyError("missing\x1b[2J")

    with pytest.raises(RuntimeError, match="Reward 'broken' raised KeyError: 'missing") as raised:
        Rewards([broken])(TWO)
    assert isinstance(raised.value.__cause__, KeyError)
    assert "\x1b" not in str(raised.value)


def test_a_reward_that_is_down_says_so_itself():
    """The trainer stops with a checkpoint at that, and at no other error."""

    def down(prompts, completions):
        raise FeedbackUnavailable("no answer")

    with pytest.raises(FeedbackUnavailable, match=r"^no answer$"):
        Rewards([down])(TWO)


class AsyncCall:
    async def __call__(self, prompts, completions):
        return []


async def awaited(prompts, completions):
    return []


def reversed_lists(completions, prompts, **columns):
    return []


def third_by_position(prompts, completions, answer, /):
    return []


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda completions, **columns: [], "does not take two lists"),
        (lambda *, prompts, completions: [], "does not take two lists"),
        (awaited, "Reward 'awaited' is async"),
        (AsyncCall(), "Reward 'AsyncCall' is async"),
        (functools.partial(awaited), "Reward 'awaited' is async"),
        (reversed_lists, "Reward 'reversed_lists' takes completions before prompts"),
        (third_by_position, "columns are passed by name"),
        ("length", "must be a function, or an object .* got 'length'"),
    ],
)
def test_functions_that_cannot_be_called_are_refused_at_once(function, message):
    with pytest.raises(ValueError, match=message):
        Rewards([function])


@pytest.mark.parametrize(
    ("functions", "options", "message"),
    [
        ([], {}, "No reward was given"),
        ([lengths, lengths], {}, "Two rewards are named 'lengths'"),
        ([lengths], {"weights": [1, 2]}, r"weights \[1, 2\] do not fit the rewards lengths"),
        ([lengths], {"weights": [math.nan]}, "weights .* do not fit"),
        ([lengths], {"weights": [0.0]}, "not all of them 0"),
        ([lengths], {"weights": ["1"]}, "weights .* do not fit"),
        ([lengths], {"scale": 0}, "scale of the rewards must be a number above 0, got 0"),
        ([lengths], {"scale": math.inf}, "above 0, got inf"),
    ],
)
def test_rewards_that_do_not_go_together_are_refused(functions, options, message):
    with pytest.raises(ValueError, match=message):
        Rewards(functions, **options)


def test_only_models_among_them_move():
    third = Third()
    assert Rewards([lengths, third]).to("meta").rewards[1] is third
    assert third.moved == "meta"


# --- from a file ---

MODULE = """
def short(prompts, completions):
    return [-len(text) for text in completions]

def long(prompts, completions):
    return [len(text) for text in completions]

REWARDS = [long]
"""


def module(folder, text: str) -> str:
    path = folder / "my_rewards.py"
    path.write_text(text)
    return str(path)


def test_a_file_lists_its_rewards(tmp_path):
    (found,) = load_reward_module(module(tmp_path, MODULE))
    assert Rewards([found])(TWO) == [[1.0, 2.0], [3.0]]


def test_a_file_that_was_changed_is_read_again(tmp_path):
    load_reward_module(module(tmp_path, MODULE))
    (found,) = load_reward_module(module(tmp_path, MODULE.replace("[long]", "[short]")))
    assert found.__name__ == "short"


def test_a_file_that_was_broken_and_mended_is_read_again(tmp_path):
    load_reward_module(module(tmp_path, MODULE))
    with pytest.raises(ValueError, match="could not be imported: ZeroDivisionError"):
        load_reward_module(module(tmp_path, MODULE + "1 / 0"))
    (found,) = load_reward_module(module(tmp_path, MODULE))
    assert found.__name__ == "long"


def test_rewards_by_name(tmp_path):
    found = load_reward_module(module(tmp_path, MODULE), ["short", "long"])
    assert Rewards(found, [2, 1])(TWO) == [[-1.0, -2.0], [-3.0]]


def test_a_module_by_its_dotted_name(tmp_path, monkeypatch):
    module(tmp_path, MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    assert [f.__name__ for f in load_reward_module("my_rewards")] == ["long"]


@pytest.mark.parametrize(
    ("text", "names", "message"),
    [
        ("def f(p, c): ...", None, r"does not say which of its functions are rewards: .*REWARDS = \["),
        ("REWARDS = []", None, "does not say which"),
        ("REWARDS = 3", None, "does not say which"),
        (MODULE, ["shrt"], "has no 'shrt'. Did you mean 'short'?"),
        ("1 / 0", None, "could not be imported: ZeroDivisionError"),
    ],
)
def test_files_that_are_refused(tmp_path, text, names, message):
    with pytest.raises(ValueError, match=message):
        load_reward_module(module(tmp_path, text), names)


def test_a_file_that_is_not_there():
    with pytest.raises(ValueError, match="there is no such file"):
        load_reward_module("nowhere/rewards.py")
    with pytest.raises(ValueError, match=r"could not be imported.*give its path, with .py"):
        load_reward_module("no_such_rewards_module")
