"""Rewards: numbers that say how good a completion is, from the user's own functions and from reward models.

    def short(prompts, completions, **columns):
        return [-len(completion) for completion in completions]

    REWARDS = [short]      in the file of `--reward_module`

All three are flat lists over all completions, a prompt repeated for each of its own; `columns` are the other columns of
the dataset. Rows that are strings give strings; conversations give the messages of the prompt, and for a completion
`[{"role": "assistant", "content": text}]`.

P prompts   K completions of each
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeAlias

from ...data.errors import clean
from ...losses.options import is_number
from ...registry import did_you_mean
from ...user_module import import_user_module
from ..samples import Sampled
from .protocol import FeedbackUnavailable, Scores, checked

RewardFunction: TypeAlias = Callable[..., Sequence[float | None]]
"""`f(prompts, completions, **columns)`: one number for each completion, None where it cannot tell."""


class Reward(Protocol):
    """An object that scores prompts with their completions, such as a `RewardModel`."""

    name: str

    def scores(self, samples: Sequence[Sampled]) -> Scores: ...


class Rewards:
    """Feedback that is the weighted sum of rewards: scale * Σ w r. A completion that one of them cannot judge has none.

    `last`: what each reward said of the latest samples, by name, flat over the completions, before weight and scale.
    `counts`: failed/<name>, how many completions it could not judge.

    Args:
        functions: functions of the user's, or objects with `scores`.
        weights: one for each; None: all 1.
        scale: of the sum; where margins enter the loss, it sets their unit.

    Raises:
        ValueError: for what cannot be a reward, two of one name, weights that do not fit, or a scale that is not above 0.
    """

    name = "rewards"

    def __init__(
        self, functions: Sequence[RewardFunction | Reward], weights: Sequence[float] | None = None, scale: float = 1.0
    ):
        self.rewards: list[Reward] = [_as_reward(f) for f in functions]
        names = [reward.name for reward in self.rewards]
        if not names:
            raise ValueError("No reward was given: give at least one function or reward model.")
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(
                f"Two rewards are named {twice[0]!r}, and the log could not tell them apart: rename one (a function by its "
                "__name__, an object by its attribute `name`)."
            )
        self.weights = _checked_weights(weights, names)
        if not is_number(scale) or scale <= 0:
            raise ValueError(f"The scale of the rewards must be a number above 0, got {scale!r}.")
        self.scale = float(scale)
        self.counts: dict[str, float] = {f"failed/{name}": 0.0 for name in names}
        self.last: dict[str, list[float | None]] = {name: [] for name in names}

    def __call__(self, samples: Sequence[Sampled]) -> Scores:
        """[P][K] totals.

        Raises:
            ValueError: for numbers that are none, or not one for each completion.
            RuntimeError: for an error inside a user's function, with that error as its cause.
        """
        each = [checked(reward.scores(samples), samples, f"Reward {reward.name!r}") for reward in self.rewards]
        for reward, scores in zip(self.rewards, each, strict=True):
            flat = [score for row in scores for score in row]
            self.last[reward.name] = flat
            self.counts[f"failed/{reward.name}"] += flat.count(None)
        totals = [[self._total(of_one) for of_one in zip(*rows, strict=True)] for rows in zip(*each, strict=True)]
        return checked(totals, samples, "The weighted sum of the rewards")

    def _total(self, scores: Sequence[float | None]) -> float | None:
        known = [score for score in scores if score is not None]
        if len(known) < len(scores):
            return None
        return self.scale * sum(weight * score for weight, score in zip(self.weights, known, strict=True))

    def to(self, device: Any) -> Rewards:
        """Move the reward models among them there."""
        for reward in self.rewards:
            if hasattr(reward, "to"):
                reward.to(device)
        return self


class FunctionReward:
    """A user's function as a `Reward`. It gets the columns that its signature names, or all if it takes `**columns`.

    Raises:
        ValueError: for a function that cannot be called as `f(prompts, completions)`, or that is async.
    """

    def __init__(self, function: RewardFunction):
        self.function = function
        self.name = _name_of(function)
        parameters = _checked_signature(function, self.name)
        self._lists = [p.name for p in _by_position(parameters)[:2]]
        columns = [p for p in parameters if p.name not in self._lists]
        self._named = {p.name for p in columns if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
        self._needed = [p.name for p in columns if p.name in self._named and p.default is p.empty]
        self._takes_any = any(p.kind is p.VAR_KEYWORD for p in columns)

    def scores(self, samples: Sequence[Sampled]) -> Scores:
        answers = [(sampled, completion.text) for sampled in samples for completion in sampled.completions]
        prompts = [list(s.prompt) if isinstance(s.prompt, list) else s.prompt for s, _ in answers]
        completions = [[{"role": "assistant", "content": text}] if s.is_chat else text for s, text in answers]
        columns = self._columns([sampled for sampled, _ in answers])
        try:
            returned = self.function(prompts, completions, **columns)
        except FeedbackUnavailable:
            raise
        except Exception as error:
            raise RuntimeError(f"Reward {self.name!r} raised {type(error).__name__}: {clean(error)}") from error
        numbers = iter(self._numbers(returned, len(answers)))
        return [[next(numbers) for _ in sampled.completions] for sampled in samples]

    def _columns(self, rows: Sequence[Sampled]) -> dict[str, list[Any]]:
        """One row for each completion; None where a row lacks what others have."""
        there = dict.fromkeys(name for row in rows for name in row.columns)
        if missing := [name for name in self._needed if name not in there] if rows else []:
            raise ValueError(
                f"Reward {self.name!r} takes {missing[0]!r}, and the dataset has no such column; beside the prompt it has: "
                f"{', '.join(there) or 'none'}.{did_you_mean(missing[0], there)} Give the dataset the column, or the argument "
                "a default."
            )
        given = [name for name in there if name in self._named or (self._takes_any and name not in self._lists)]
        return {name: [row.columns.get(name) for row in rows] for name in given}

    def _numbers(self, returned: Any, count: int) -> list[Any]:
        """A list, also from an array or a tensor, or from a list of their scalars."""
        if hasattr(returned, "tolist"):
            returned = returned.tolist()
        if not isinstance(returned, Sequence) or isinstance(returned, str) or len(returned) != count:
            size = f"{len(returned)} values" if isinstance(returned, list | tuple) else f"a {type(returned).__name__}"
            raise ValueError(
                f"Reward {self.name!r} returned {size} for {count} completions: return a list with one number for each, None "
                "where it cannot tell."
            )
        return [score.item() if hasattr(score, "item") else score for score in returned]


def load_reward_module(path_or_module: str, names: Sequence[str] | None = None) -> list[RewardFunction | Reward]:
    """What a Python file, or a module by its dotted name, lists as `REWARDS`; with `names`, what it calls so instead.

    Raises:
        ValueError: for a file that is not there, fails, has no such name, or lists nothing.
    """
    module = import_user_module(path_or_module, "--reward_module")
    if names:
        if unknown := [name for name in names if not hasattr(module, name)]:
            hint = did_you_mean(unknown[0], [name for name in vars(module) if not name.startswith("_")])
            raise ValueError(f"--reward_module {path_or_module} has no {unknown[0]!r}.{hint}")
        return [getattr(module, name) for name in names]
    listed = getattr(module, "REWARDS", None)
    if not isinstance(listed, list | tuple) or not listed:
        raise ValueError(
            f"--reward_module {path_or_module} does not say which of its functions are rewards: list them in it, "
            "REWARDS = [first, second]."
        )
    return list(listed)


def _as_reward(given: Any) -> Reward:
    has_scores = callable(getattr(given, "scores", None)) and isinstance(getattr(given, "name", None), str)
    return given if has_scores else FunctionReward(given)


def _name_of(function: Any) -> str:
    inner = function.func if isinstance(function, functools.partial) else function
    return str(getattr(inner, "__name__", type(inner).__name__))


def _checked_signature(function: Any, name: str) -> list[inspect.Parameter]:
    usage = "A reward is called as f(prompts, completions, **columns)."
    if not callable(function):
        raise ValueError(f"A reward must be a function, or an object with `name` and `scores`, got {function!r}.")
    if any(map(inspect.iscoroutinefunction, (function, function.__call__))):  # an object's own kind says nothing
        raise ValueError(
            f"Reward {name!r} is async, and rewards are called without await: run it inside a plain function. {usage}"
        )
    try:
        signature = inspect.signature(function)
        signature.bind_partial(None, None)
    except (TypeError, ValueError) as error:
        raise ValueError(f"Reward {name!r} does not take two lists ({error}). {usage}") from error
    parameters = list(signature.parameters.values())
    first = _by_position(parameters)
    if [p.name for p in first[:2]] == ["completions", "prompts"]:  # as where all are passed by name
        raise ValueError(f"Reward {name!r} takes completions before prompts. {usage}")
    if any(p.kind is p.POSITIONAL_ONLY for p in first[2:]):
        raise ValueError(f"Reward {name!r} has the signature {signature}; columns are passed by name. {usage}")
    return parameters


def _by_position(parameters: list[inspect.Parameter]) -> list[inspect.Parameter]:
    return [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]


def _checked_weights(weights: Sequence[float] | None, names: list[str]) -> list[float]:
    if weights is None:
        return [1.0] * len(names)
    if len(weights) != len(names) or not all(map(is_number, weights)) or not any(weights):
        raise ValueError(
            f"The weights {list(weights)} do not fit the rewards {', '.join(names)}: give one finite number for each, not all "
            "of them 0."
        )
    return [float(weight) for weight in weights]
