"""One dataset of a run: the rows to train on and those to evaluate on. Several of them: mixture.py.

Only rows are read here; what they mean is for `data/` to say.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from .local_files import AnyDataset
from .locate import NUMBERS, load_splits
from .renaming import parse_columns, rename_columns
from .splits import hold_out, pick, use_share

logger = logging.getLogger(__name__)

FLAGS = {"split": "--dataset_train_split", "test_split": "--dataset_test_split", "columns": "--columns"}
"""{field of `Source`: the flag that sets it}"""


def load_dataset_splits(
    name_or_path: str,
    *,
    config: str | None = None,
    train_split: str = "train",
    test_split: str | None = None,
    test_split_size: float | None = None,
    eval_name_or_path: str | None = None,
    columns: str | Mapping[str, str] | None = None,
    streaming: bool = False,
    seed: int = 42,
) -> tuple[AnyDataset, AnyDataset | None]:
    """The rows to train on, and those to evaluate on: None if there are none.

    Where evaluation rows come from: a dataset of their own (`eval_name_or_path`), a named split (`test_split`), rows taken
    away from the training split (`test_split_size`: a share below 1, or a count), or else a split called "test".
    A map-style split gives rows drawn by `seed`, in their old order; a stream gives its first rows.

    `columns`, {ours: theirs} or "ours=theirs,...", is for all of these rows (renaming.py).
    """
    check_one_source_of_eval_rows(test_split, test_split_size, eval_name_or_path)
    mapping = parse_columns(columns)
    source = Source(name=name_or_path, config=config, split=train_split, test_split=test_split, columns=mapping)
    if eval_name_or_path is None:
        return source.train_and_test(test_split_size=test_split_size, streaming=streaming, seed=seed)
    train, _ = replace(source, evaluates=False).train_and_test(streaming=streaming, seed=seed)
    return train, eval_rows(eval_name_or_path, test_split, mapping, streaming)


@dataclass(frozen=True, kw_only=True)
class Source:
    """A dataset, and what of it is used. `flags` is what errors call its fields."""

    name: str
    config: str | None = None
    split: str = "train"
    test_split: str | None = None  # None: "test" where there is one
    needs_test_split: bool = True  # False: a dataset without it is trained on alone
    evaluates: bool = True  # False: nothing of it is for evaluation
    fraction: float = 1.0  # of the rows of `split`, in (0, 1]
    columns: Mapping[str, str] = field(default_factory=dict)
    flags: Mapping[str, str] = field(default_factory=lambda: FLAGS)

    def train_and_test(
        self, *, streaming: bool, seed: int, test_split_size: float | None = None
    ) -> tuple[AnyDataset, AnyDataset | None]:
        """`fraction` of the split to train on, and rows held out of those, or the test split, or None."""
        splits = load_splits(self.name, config=self.config, streaming=streaming, numbers=_theirs(self.columns))
        train = use_share(pick(splits, self.split, self.name, self.flags["split"]), self.fraction, seed)
        test_split = self._test_split(splits)
        evaluation: AnyDataset | None = None
        if self.evaluates and test_split_size is not None:
            train, evaluation = hold_out(train, test_split_size, seed)
        elif test_split is not None:
            evaluation = pick(splits, test_split, self.name, self.flags["test_split"])
        train = rename_columns(train, self.columns, self.flags["columns"])
        if evaluation is not None:
            evaluation = rename_columns(evaluation, self.columns, self.flags["columns"])
        return train, evaluation

    def _test_split(self, splits: Mapping[str, AnyDataset]) -> str | None:
        if not self.evaluates:
            return None
        name = self.test_split or "test"
        if name in splits and (self.test_split or name != self.split):
            return name
        if self.test_split and self.needs_test_split:
            return self.test_split  # `pick` says that it is missing
        logger.info(
            "%s has no split %r (it has: %s): nothing is held out for evaluation. --dataset_test_split or "
            "--test_split_size would.",
            self.name,
            name,
            ", ".join(splits),
        )
        return None


def eval_rows(name: str, split: str | None, columns: Mapping[str, str], streaming: bool) -> AnyDataset:
    """Of a dataset to evaluate on: the named split, else "test", else the only one."""
    splits = load_splits(name, streaming=streaming, numbers=_theirs(columns))
    only = next(iter(splits)) if len(splits) == 1 else "test"
    rows = pick(splits, split or ("test" if "test" in splits else only), name, FLAGS["test_split"])
    return rename_columns(rows, columns)


def check_one_source_of_eval_rows(test_split: str | None, size: float | None, eval_name: str | None) -> None:
    if size is None:
        return
    for flag, value in {"--dataset_test_split": test_split, "--eval_dataset": eval_name}.items():
        if value is not None:
            raise ValueError(
                f"{flag} {value} and --test_split_size {size} both say where evaluation rows come from: choose one."
            )


def _theirs(columns: Mapping[str, str]) -> tuple[str, ...]:
    """What a dataset calls our columns of numbers."""
    return tuple(columns.get(name) or name for name in NUMBERS)
