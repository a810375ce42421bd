"""A name for every exchangeable part: one decorator to add, one good error when a name is unknown."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator
from dataclasses import fields
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class Registry(Generic[T]):
    """Items of one kind ("loss", "judge") by name. The help text, the docs and the tests read it, so that no list is typed twice."""

    def __init__(self, kind: str):
        self.kind = kind
        self._items: dict[str, T] = {}

    def add(self, name: str, item: T) -> T:
        if name in self._items:
            raise ValueError(
                f"A {self.kind} named {name!r} is already registered: choose another name, or the two would shadow each other."
            )
        self._items[name] = item
        return item

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator form of `add`."""
        return lambda item: self.add(name, item)

    def __getitem__(self, name: str) -> T:
        if name in self._items:
            return self._items[name]
        raise ValueError(f"Unknown {self.kind} {name!r}.{did_you_mean(name, self._items)} Known: {', '.join(self)}.")

    def __contains__(self, name: object) -> bool:
        return name in self._items

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._items))

    def __len__(self) -> int:
        return len(self._items)


def did_you_mean(name: str, known) -> str:
    """' Did you mean ...?' with the closest known name, or nothing."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" Did you mean {close[0]!r}?" if close else ""


# --- options with a set of values, or a least one ---


def choices(*allowed: str, help: str) -> dict[str, Any]:
    """Field metadata for an option with a fixed set of values, as argparse reads it."""
    return {"help": help, "choices": allowed}


def check_choices(config: Any) -> None:
    for option in fields(config):
        allowed, value = option.metadata.get("choices"), getattr(config, option.name)
        unset = value is None and option.default is None
        if allowed and not unset and value not in allowed:
            raise ValueError(
                f"--{option.name} {value!r} is not one of {', '.join(allowed)}.{did_you_mean(str(value), allowed)}"
            )


def check_at_least(least: int, name: str, value: Any) -> None:
    """Refuse what is neither an integer of at least `least` nor None."""
    if value is not None and (type(value) is not int or value < least):
        raise ValueError(f"--{name} must be an integer of at least {least}, or None, got {value!r}.")
