"""How columns of JSON values are held in an Arrow table, such that every row comes out as it went in.

Arrow wants one type per column and fills up what does not fit: a key that one object lacks becomes None, and objects get
each other's order of keys, which a chat template would show. So a column has a plain type only where all of its values
have one shape; a prompt that is a string here and a list there, or tools with parameters of their own, are held as JSON
text and read back when the row is (numbers in it to about 15 digits).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import chain
from typing import Any

import pyarrow as pa

JSON = pa.json_()

EXACT = 2**53
"""Integers above it do not all exist as floats, so that they cannot share a column with them."""

DEEPEST = 16
"""Levels of nesting that a plain type has at most: Arrow files end at 64."""


def column_type(values: Sequence[Any], depth: int = 0) -> pa.DataType:
    """The type that holds all these values exactly; `JSON` where no other does."""
    kinds = {type(value) for value in values} - {type(None)}
    if not kinds:
        return pa.null()
    if kinds <= {int, float}:
        return _number_type([value for value in values if value is not None], kinds)
    if len(kinds) > 1 or depth == DEEPEST:
        return JSON
    if kinds == {str}:
        return pa.string()
    if kinds == {bool}:
        return pa.bool_()
    present = [value for value in values if value is not None]
    if kinds == {list}:
        inner = column_type(list(chain.from_iterable(present)), depth + 1)
        return JSON if inner == JSON else pa.list_(inner)
    return _struct_type(present, depth)


def _number_type(values: list[Any], kinds: set[type]) -> pa.DataType:
    integers = [value for value in values if type(value) is int] if float in kinds else values
    limit = EXACT if float in kinds else 2**63 - 1
    if int in kinds and (max(integers) > limit or min(integers) < -limit):
        return JSON
    return pa.float64() if float in kinds else pa.int64()


def _struct_type(objects: list[dict[str, Any]], depth: int) -> pa.DataType:
    names = tuple(objects[0])
    if not names or any(tuple(item) != names for item in objects):
        return JSON
    types = {name: column_type([item[name] for item in objects], depth + 1) for name in names}
    return JSON if JSON in types.values() else pa.struct(list(types.items()))


def wider(one: pa.DataType, other: pa.DataType) -> pa.DataType:
    """The type of a column whose first rows have the type `one` and whose later rows have `other`."""
    if one == other or pa.types.is_null(other):
        return one
    if pa.types.is_null(one):
        return other
    if pa.types.is_list(one) and pa.types.is_list(other):
        inner = wider(one.value_type, other.value_type)
        return JSON if inner == JSON else pa.list_(inner)
    if pa.types.is_struct(one) and pa.types.is_struct(other) and _names(one) == _names(other):
        types = {name: wider(one.field(name).type, other.field(name).type) for name in _names(one)}
        return JSON if JSON in types.values() else pa.struct(list(types.items()))
    if {one, other} == {pa.int64(), pa.float64()}:
        return pa.float64()
    return JSON


def _names(struct: pa.StructType) -> list[str]:
    return [field.name for field in struct]


def has_floats(dtype: pa.DataType) -> bool:
    if pa.types.is_list(dtype):
        return has_floats(dtype.value_type)
    return pa.types.is_floating(dtype)


def as_array(values: list[Any], dtype: pa.DataType) -> pa.Array:
    """The values as a column of a type that `column_type` and `wider` found for them."""
    if dtype == JSON:
        values = [None if value is None else json.dumps(value) for value in values]
    return pa.array(values, dtype)


def holds_nan(value: Any) -> bool:
    """Whether the type `JSON` would give it back as something else: NaN as None."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return any(map(holds_nan, value))
    return value != value
