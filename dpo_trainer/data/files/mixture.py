"""Several datasets as one: `datasets:` in a YAML file, or --datasets with the same as JSON.

    datasets:
      - name: trl-lib/ultrafeedback_binarized
      - name: my_pairs.jsonl
        fraction: 0.5
        columns: {prompt: question, chosen: best, rejected: worst}

Each is loaded on its own and stays so: what their rows mean, and how they become one, is for the trainer.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

from ...registry import did_you_mean
from .datasets import FLAGS, Source, check_one_source_of_eval_rows, eval_rows
from .local_files import AnyDataset
from .renaming import parse_columns

Entries: TypeAlias = "str | Sequence[str | Mapping[str, Any]]"

KEYS = ("name", "config", "split", "test_split", "fraction", "columns")


def load_mixture(
    entries: Entries,
    *,
    train_split: str = "train",
    test_split: str | None = None,
    test_split_size: float | None = None,
    eval_name_or_path: str | None = None,
    streaming: bool = False,
    seed: int = 42,
) -> tuple[list[AnyDataset], list[AnyDataset] | None]:
    """The datasets to train on, in their order, and those to evaluate on: None if there are none.

    Every entry goes the way of `load_dataset_splits`: `test_split_size` is a share or a count of each of them, and a split
    `test_split` (or "test") is evaluated on where an entry has it. `train_split` and `test_split` are for entries that
    name none of their own. `eval_name_or_path` is one dataset, in our column names, instead of all that.
    """
    check_one_source_of_eval_rows(test_split, test_split_size, eval_name_or_path)
    sources = parse_mixture(entries, train_split=train_split, test_split=test_split)
    _check_own_test_splits(sources, test_split_size, eval_name_or_path)
    if eval_name_or_path is not None:
        sources = [replace(source, evaluates=False) for source in sources]
    loaded = [
        source.train_and_test(test_split_size=test_split_size, streaming=streaming, seed=seed) for source in sources
    ]
    train = [rows for rows, _ in loaded]
    if eval_name_or_path is not None:
        return train, [eval_rows(eval_name_or_path, test_split, {}, streaming)]
    evaluation = [rows for _, rows in loaded if rows is not None]
    if test_split is not None and not evaluation:
        raise ValueError(
            f"--dataset_test_split {test_split!r}: none of the {len(sources)} datasets has such a split. Leave it out, or "
            "hold rows out with --test_split_size."
        )
    return train, evaluation or None


def parse_mixture(entries: Entries, *, train_split: str = "train", test_split: str | None = None) -> list[Source]:
    """The entries, checked. An entry is a mapping, or a name alone; a string is JSON of the list."""
    if isinstance(entries, str):
        try:
            entries = json.loads(entries)
        except json.JSONDecodeError as error:
            raise ValueError(f"--datasets {entries!r} is not valid JSON: {error}. {_example()}") from error
    if isinstance(entries, str | Mapping) or not isinstance(entries, Sequence) or not entries:
        raise ValueError(f"--datasets must be a list of datasets, got {entries!r:.80}. {_example()}")
    return [
        _source(entry, f"--datasets, entry {number}", train_split, test_split) for number, entry in enumerate(entries)
    ]


def _check_own_test_splits(sources: Sequence[Source], size: float | None, eval_name: str | None) -> None:
    own = [source for source in sources if source.test_split and source.needs_test_split]
    for flag, value in {"--test_split_size": size, "--eval_dataset": eval_name}.items():
        if own and value is not None:
            raise ValueError(
                f"{own[0].flags['test_split']} and {flag} {value} both say where evaluation rows come from: choose one."
            )


def _source(entry: Any, where: str, train_split: str, test_split: str | None) -> Source:
    given = {"name": entry} if isinstance(entry, str) else entry
    if not isinstance(given, Mapping):
        raise ValueError(f"{where} is {entry!r:.80}: it must be a name, or a mapping with one. {_example()}")
    for key in given:
        if key not in KEYS:
            raise ValueError(f"{where}: unknown key {key!r}.{did_you_mean(str(key), KEYS)} Known: {', '.join(KEYS)}.")
    if "name" not in given:
        raise ValueError(f"{where} has no name. {_example()}")
    given = {key: value for key, value in given.items() if value is not None or key == "name"}
    for key in ("name", "config", "split", "test_split"):
        if key in given and not (isinstance(given[key], str) and given[key]):
            raise ValueError(f"{where}: {key} must be text, got {given[key]!r} (quote it if you mean the text).")
    return Source(
        name=given["name"],
        config=given.get("config"),
        split=given.get("split", train_split),
        test_split=given.get("test_split", test_split),
        needs_test_split="test_split" in given,
        fraction=_fraction(given.get("fraction", 1.0), where),
        columns=parse_columns(given.get("columns"), f"{where}: columns"),
        flags={flag: f"{where}: {flag}" for flag in FLAGS},
    )


def _fraction(given: Any, where: str) -> float:
    try:
        value = float("no number" if isinstance(given, bool) else given)
    except (TypeError, ValueError):
        raise ValueError(f"{where}: fraction must be a number above 0 and at most 1, got {given!r}.") from None
    if not 0 < value <= 1:
        more = " To use a dataset more than once, list it more than once." if value > 1 else ""
        raise ValueError(f"{where}: fraction must be above 0 and at most 1, got {given!r}.{more}")
    return value


def _example() -> str:
    return 'Write a list such as [{"name": "a.jsonl"}, {"name": "b.jsonl", "fraction": 0.5}].'
