"""What a loss is: a function of two `PairLogps`, found by name, that says in its signature what it needs."""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, TypeVar

from torch import Tensor

from ..registry import Registry, did_you_mean

F = TypeVar("F", bound=Callable[..., Tensor])

SUPPLIED = ("divergence", "delta", "margin", "ranks", "weight")
"""Keyword arguments that `Objective` fills in; every other one is a field of the config, or has a default."""


def takes_any_margin(margin: float, **hyperparameters: Any) -> str | None:
    return None


@dataclass(frozen=True, kw_only=True)
class Loss:
    """A registered loss: the function and what the trainer must know about it.

    `needs_reference`: False if it never reads the reference.
    `separable`: the loss of a pair does not depend on the other pairs of its batch.
    `takes_ld`: LD-DPO's shaping of the log-probs makes sense for it (not for a likelihood of whole completions).
    `unusable_margin`: why it cannot take a margin, None where it can: `function(margin, **hyperparameters)`.
    """

    name: str
    function: Callable[..., Tensor]
    needs_reference: bool = True
    separable: bool = True
    takes_ld: bool = True
    aliases: tuple[str, ...] = ()
    unusable_margin: Callable[..., str | None] = takes_any_margin

    def __call__(self, policy: Any, reference: Any, **hyperparameters: Any) -> Tensor:
        return self.function(policy, reference, **hyperparameters)

    @cached_property
    def arguments(self) -> dict[str, Any]:
        """Keyword-only arguments and their defaults (`inspect.Parameter.empty` where there is none)."""
        parameters = inspect.signature(self.function).parameters.values()
        return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}

    @property
    def needs_margin(self) -> bool:
        """Whether it cannot do without knowing by how much chosen is better."""
        return self.arguments.get("margin") is inspect.Parameter.empty

    @property
    def builtin(self) -> bool:
        return self.function.__module__.startswith(__package__ + ".")

    @cached_property
    def _paragraphs(self) -> list[str]:
        return [p for p in inspect.cleandoc(self.function.__doc__ or "").split("\n\n") if p.strip()]

    @property
    def summary(self) -> str:
        """First paragraph of the docstring, in one line."""
        return " ".join(self._paragraphs[0].split()) if self._paragraphs else ""

    @property
    def equation(self) -> str:
        """First indented block of the docstring."""
        return next((textwrap.dedent(p).rstrip() for p in self._paragraphs if p.startswith("    ")), "")

    @property
    def source(self) -> str:
        """The paragraph that begins with `Source:`, without that word, in one line."""
        found = (p.removeprefix("Source:") for p in self._paragraphs if p.startswith("Source:"))
        return " ".join(next(found, "").split())

    @property
    def paper(self) -> str:
        """The first arXiv id of the source."""
        found = re.search(r"arXiv:(\d{4}\.\d{5})", self.source)
        return found[1] if found else ""


class LossRegistry(Registry[Loss]):
    """Losses by name. An alias finds its loss but is not listed, so that every loss appears once."""

    def __init__(self) -> None:
        super().__init__("loss")
        self.aliases: dict[str, str] = {}

    def add(self, name: str, item: Loss) -> Loss:
        for other in (name, *item.aliases):
            owner = self.aliases.get(other, other if other in self._items else name)
            if owner != name:
                raise ValueError(f"{other!r} already names the loss {owner!r}: choose another name.")
        if name in self._items and same_function(self._items[name].function, item.function):
            self._items[name] = item  # a notebook cell that was run again
        else:
            super().add(name, item)
        self.aliases.update(dict.fromkeys(item.aliases, name))
        return item

    def resolve(self, name: str) -> str:
        """The name under which a loss is listed."""
        return self.aliases.get(name, name)

    def __getitem__(self, name: str) -> Loss:
        return super().__getitem__(self.resolve(name))

    def __contains__(self, name: object) -> bool:
        return super().__contains__(self.aliases.get(name, name) if isinstance(name, str) else name)

    def taking(self, argument: str) -> list[str]:
        """Names of the losses that take this keyword argument."""
        return [name for name in self if argument in self[name].arguments]

    def from_module(self, module: str) -> Iterator[str]:
        """Names of the losses that a module, or a module inside it, defines."""
        return (name for name in self if (self[name].function.__module__ + ".").startswith(module + "."))


LOSSES = LossRegistry()


def same_function(one: Callable, other: Callable) -> bool:
    return (one.__module__, one.__qualname__) == (other.__module__, other.__qualname__)


def register_loss(
    name: str,
    *,
    needs_reference: bool = True,
    separable: bool = True,
    takes_ld: bool = True,
    aliases: tuple[str, ...] = (),
    unusable_margin: Callable[..., str | None] = takes_any_margin,
) -> Callable[[F], F]:
    """Decorator that makes `function(policy, reference, *, hyperparameters) -> [N]` available as `--loss_type name`.

    Hyperparameters are looked up by name on the config; `divergence`, `delta`, `weight` and `ranks` come from the
    `Objective`, and `margin` [N] from the data: without a default, a pair that has none is refused; with one, margins
    are passed where the batch has any, NaN for a pair without. An argument of your own needs a default.
    The function itself is returned unchanged.

        @register_loss("mine")
        def mine(policy, reference, *, beta):
            return -torch.nn.functional.logsigmoid(beta * (policy.margin() - reference.margin()))
    """

    def register(function: F) -> F:
        check_signature(name, function)
        LOSSES.add(
            name,
            Loss(
                name=name,
                function=function,
                needs_reference=needs_reference,
                separable=separable,
                takes_ld=takes_ld,
                aliases=aliases,
                unusable_margin=unusable_margin,
            ),
        )
        return function

    return register


def check_signature(name: str, function: Callable) -> None:
    kinds = [p.kind for p in inspect.signature(function).parameters.values()]
    positional = [
        k for k in kinds if k in (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    ]
    keyword = [k for k in kinds if k is inspect.Parameter.KEYWORD_ONLY]
    if len(positional) != 2 or len(positional) + len(keyword) != len(kinds):
        raise ValueError(
            f"Loss {name!r} has the signature {inspect.signature(function)}: it must be (policy, reference, *, "
            "hyperparameters), with every hyperparameter named after the `*`."
        )


def hyperparameters(loss: Loss, args: Any) -> dict[str, Any]:
    """The arguments of a loss that are fields of the config `args`; any other keeps its default, or is an error."""
    known = {f.name for f in fields(args)}
    for argument, default in loss.arguments.items():
        if argument not in known and argument not in SUPPLIED and default is inspect.Parameter.empty:
            raise ValueError(
                f"Loss {loss.name!r} takes {argument!r}, which is no field of {type(args).__name__}."
                f"{did_you_mean(argument, known)} Name a config field, or give the argument a default."
            )
    return {name: getattr(args, name) for name in loss.arguments if name in known and name not in SUPPLIED}
