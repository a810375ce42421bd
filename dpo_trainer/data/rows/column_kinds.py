"""What a column holds, in one word, so that advice about a column never names one of another type.

text            a string
messages        a list of messages, or one message: objects with `role` and `content`, or `from` and `value`
texts           a list of strings (or of lists of strings)
conversations   a list of lists of messages
number, numbers, object, objects, unknown
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from datasets import Features, LargeList, List, Value

COMPLETION = ("text", "messages")
FITS = {
    "prompt": COMPLETION,
    "messages": COMPLETION,
    "conversations": COMPLETION,
    "chosen": COMPLETION,
    "rejected": (*COMPLETION, "texts", "conversations"),
    "completions": ("texts", "conversations", "messages"),
    "scores": ("numbers",),
    "prompt_ids": ("numbers",),
    "chosen_ids": ("numbers",),
    "rejected_ids": ("numbers",),
    "system": ("text",),
}
"""{our column: the kinds that it may have}"""

OF_LIST = {
    "text": "texts",
    "texts": "texts",
    "number": "numbers",
    "message": "messages",
    "messages": "conversations",
    "object": "objects",
}


def fits(kind: str, column: str) -> bool:
    """Whether a column of this kind may be what we call `column`. What is unknown may be anything."""
    return kind == "unknown" or kind in FITS.get(column, (kind,))


def kinds_of_features(features: Features | None) -> dict[str, str]:
    """{column: kind}, of a dataset that knows its types."""
    return {name: _whole(_of_feature(feature)) for name, feature in (features or {}).items()}


def kinds_of_values(row: Mapping[str, Any]) -> dict[str, str]:
    """{column: kind}, by the values of one row."""
    return {name: _whole(_of_value(value)) for name, value in row.items()}


def kinds_of_batch(batch: Mapping[str, list]) -> dict[str, str]:
    """{column: kind}, by the first value of each column that is not None."""
    return kinds_of_values({name: next((v for v in values if v is not None), None) for name, values in batch.items()})


def _whole(kind: str) -> str:
    return "messages" if kind == "message" else kind


def _of_feature(feature: Any) -> str:
    if isinstance(feature, Mapping):
        return _of_keys(feature)
    if isinstance(feature, List | LargeList):
        return OF_LIST.get(_of_feature(feature.feature), "unknown")
    if not isinstance(feature, Value):
        return "unknown" if type(feature).__name__ == "Json" else "object"
    if feature.dtype == "null":
        return "unknown"
    return "text" if "string" in feature.dtype else "number"


def _of_value(value: Any) -> str:
    if isinstance(value, str):
        return "text"
    if isinstance(value, bool | int | float):
        return "number"
    if isinstance(value, Mapping):
        return _of_keys(value)
    if isinstance(value, list | tuple):
        first = next((item for item in value if item is not None), None)
        return OF_LIST.get(_of_value(first), "unknown")
    return "unknown" if value is None else "object"


def _of_keys(fields: Mapping[str, Any]) -> str:
    return "message" if {"role", "content"} <= set(fields) or {"from", "value"} <= set(fields) else "object"
