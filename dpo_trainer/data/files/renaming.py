"""Columns that have other names in a dataset than here, or are not to be read: `--columns prompt=question,source=`."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from datasets import Dataset, IterableDataset

from ...registry import did_you_mean
from ..errors import row_name
from ..rows.column_names import PREPARED, READ
from .origin import name_of

logger = logging.getLogger(__name__)

OURS = tuple(column for column in READ if column not in PREPARED)
"""The columns that a dataset may bring under another name."""

WRITE = (
    "Write ours=theirs with commas between, such as prompt=question,chosen=best, or a mapping {ours: theirs}. A name with nothing "
    "behind it, as in system=, leaves that column out."
)

T = TypeVar("T", Dataset, IterableDataset)


def parse_columns(columns: str | Mapping[str, str] | None, flag: str = "--columns") -> dict[str, str]:
    """{our name: theirs}, checked, from `ours=theirs,...`, a JSON object, or a mapping. `flag` names it in errors.

    A column of the dataset that shall not be read stands on the left, with nothing on the right (None or "" in a mapping):
    it comes back as {its name: ""}.
    """
    pairs = _pairs(columns, flag)
    if len(dict(pairs)) < len(pairs):
        names = [name for name, _ in pairs]
        double = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{flag} names {double!r} twice. Each of our columns comes from one of theirs.")
    mapping = dict(pairs)
    for ours, theirs in mapping.items():
        if ours not in OURS and theirs:
            raise ValueError(f"{flag}: {_unknown(ours, theirs)}")
    sources = [theirs for theirs in mapping.values() if theirs]
    for theirs in sources:
        if mapping.get(theirs) == "":
            raise ValueError(f"{flag} takes {theirs!r}, and leaves it out: say one of the two.")
        if sources.count(theirs) > 1:
            users = ", ".join(ours for ours, source in mapping.items() if source == theirs)
            raise ValueError(f"{flag} takes {theirs!r} for several columns ({users}). Each column goes to one.")
    return mapping


def _pairs(columns: str | Mapping[str, str] | None, flag: str) -> list[tuple[str, str]]:
    if isinstance(columns, str) and columns.lstrip().startswith("{"):
        try:
            return _names(json.loads(columns, object_pairs_hook=list), flag)
        except json.JSONDecodeError as error:
            raise ValueError(f"{flag} {columns!r} is not valid JSON: {error}. {WRITE}") from error
    if isinstance(columns, str):
        entries = [entry.split("=") for entry in columns.split(",")]
        pairs = [(entry[0].strip(), entry[1].strip()) for entry in entries if len(entry) == 2]
        if len(pairs) < len(entries) or not all(ours for ours, _ in pairs):
            raise ValueError(f"{flag} {columns!r} cannot be read. {WRITE}")
        return pairs
    if columns is not None and not isinstance(columns, Mapping):
        raise ValueError(f"{flag} is of type {type(columns).__name__}. {WRITE}")
    return _names(list((columns or {}).items()), flag)


def _names(pairs: list[tuple[Any, Any]], flag: str) -> list[tuple[str, str]]:
    pairs = [(ours, "" if theirs is None else theirs) for ours, theirs in pairs]
    for ours, theirs in pairs:
        if not (isinstance(ours, str) and ours and isinstance(theirs, str)):
            raise ValueError(f"{flag}: {ours!r} and {theirs!r} must both be names. {WRITE}")
    return pairs


def _unknown(ours: str, theirs: str) -> str:
    if theirs in OURS:
        return f"{ours!r} is no column of ours, and {theirs!r} is: ours stands on the left, {theirs}={ours}."
    return f"there is no column {ours!r} of ours.{did_you_mean(ours, OURS)} There are: {', '.join(OURS)}."


def rename_columns(dataset: T, mapping: Mapping[str, str], flag: str = "--columns") -> T:
    """The dataset with its columns under our names. A column of that name which it has already is left out, and those that
    are mapped to nothing."""
    if not mapping:
        return dataset
    for ours, theirs in mapping.items():
        if dataset.column_names is not None and (theirs or ours) not in dataset.column_names:
            raise ValueError(_no_column(flag, ours, theirs, name_of(dataset), list(dataset.column_names)))
    if dataset.column_names is None or _is_stream_of_json(dataset):
        renamer = RowRenamer(dict(mapping), name_of(dataset), flag)
        replaced = [name for names in mapping.items() for name in names if name]
        return dataset.map(renamer, with_indices=True, remove_columns=replaced)
    unwanted = [name for name, theirs in mapping.items() if not theirs]
    if unwanted:
        dataset = dataset.remove_columns(unwanted)
    mapping = {ours: theirs for ours, theirs in mapping.items() if theirs and ours != theirs}
    replaced = [ours for ours in mapping if ours in dataset.column_names and ours not in mapping.values()]
    if replaced:
        _say_replaced(replaced, mapping, name_of(dataset))
        dataset = dataset.remove_columns(replaced)
    # In two steps: prompt=chosen,chosen=prompt would meet its own names in one.
    aside = {theirs: f"{theirs} as {ours}" for ours, theirs in mapping.items() if theirs in mapping}
    if aside:
        dataset = dataset.rename_columns(aside)
    return dataset.rename_columns({aside.get(theirs, theirs): ours for ours, theirs in mapping.items()})


def _is_stream_of_json(dataset: Dataset | IterableDataset) -> bool:
    """`rename_columns` of a stream would read a column of type `Json` twice: the string "42" as JSON, a number."""
    return isinstance(dataset, IterableDataset) and "Json(" in repr(dataset.features)


@dataclass(frozen=True)
class RowRenamer:
    """One row of a stream under our names; what it replaces is removed by the `map` that calls it."""

    mapping: dict[str, str]
    name: str
    flag: str

    def __call__(self, row: dict[str, Any], number: int) -> dict[str, Any]:
        for ours, theirs in self.mapping.items():
            if (theirs or ours) not in row:
                raise ValueError(_no_column(self.flag, ours, theirs, row_name(number, self.name), list(row)))
        if number == 0:
            kept = {ours: theirs for ours, theirs in self.mapping.items() if theirs}
            replaced = [ours for ours in kept if ours in row and ours not in kept.values()]
            if replaced:
                _say_replaced(replaced, kept, self.name)
        return {ours: row[theirs] for ours, theirs in self.mapping.items() if theirs}


def _no_column(flag: str, ours: str, theirs: str, where: str, columns: list[str]) -> str:
    wanted = theirs or ours
    return (
        f"{flag} {ours}={theirs}: {where} has no column {wanted!r}.{did_you_mean(wanted, columns)} It has: "
        f"{', '.join(columns)}."
    )


def _say_replaced(replaced: list[str], mapping: Mapping[str, str], name: str) -> None:
    instead = ", ".join(f"{ours!r} ({mapping[ours]!r} takes its name)" for ours in replaced)
    logger.info("%s: a column of its own is left out: %s.", name, instead)
