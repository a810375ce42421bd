"""A value from a YAML file, fitted to the type of its option."""

from __future__ import annotations

import types
from enum import Enum
from typing import Any, Literal, Union, get_args, get_origin

from transformers.hf_argparser import string_to_bool


def fit(value: Any, hint: Any) -> Any:
    """`value` as the type that `hint` allows; a ValueError says what was expected.

    YAML 1.1 has its traps: `1e-6` is text there (a float needs its point, 1.0e-6), and `no` is false. Both come out as meant.
    """
    kinds = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    for kind in kinds:
        if _is_a(value, kind):
            return [fit(item, get_args(kind)[0]) for item in value] if get_origin(kind) is list else value
    for kind in kinds:
        try:
            return _converted(value, kind)
        except (TypeError, ValueError):
            continue
    quote = " (quote it if you mean the text)" if isinstance(value, bool) and str in kinds else ""
    raise ValueError(f"expected {' or '.join(_name(kind) for kind in kinds)}, got {value!r}{quote}")


def _is_a(value: Any, kind: Any) -> bool:
    origin = get_origin(kind) or kind
    if origin is Literal:
        return value in get_args(kind) and type(value) in {type(allowed) for allowed in get_args(kind)}
    if origin is Any:
        return True
    if isinstance(value, bool):  # a bool is an int to Python, and `beta: yes` a mistake to us
        return origin is bool
    return isinstance(origin, type) and isinstance(value, origin)


def _converted(value: Any, kind: Any) -> Any:
    if isinstance(kind, type) and issubclass(kind, Enum):
        return kind("no" if value is False else value).value
    if get_origin(kind) is list and not isinstance(value, (list, dict)):
        return [fit(value, get_args(kind)[0])]
    if kind is bool and isinstance(value, (str, int)):
        return _bool(str(value))
    if isinstance(value, bool) or kind not in (int, float, str) or not isinstance(value, (str, int, float)):
        raise TypeError
    if kind is int and float(value) != int(float(value)):
        raise ValueError
    return kind(float(value)) if kind is int else kind(value)


def _bool(text: str) -> bool:
    try:
        return string_to_bool(text)
    except Exception as error:  # argparse's own error class, which is no ValueError
        raise ValueError(str(error)) from error


def _name(kind: Any) -> str:
    return "nothing" if kind is type(None) else getattr(kind, "__name__", str(kind))
