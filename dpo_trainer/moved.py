"""Where modules went that documentation named before the package was ordered by stages: their names still import, with a warning."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

PACKAGE = __name__.partition(".")[0]

MOVED: dict[str, tuple[str, ...]] = {
    "attention": ("scoring.attention",),
    "batch": ("types",),
    "checkpoints": ("checkpointing",),
    "durable": ("checkpointing.durable",),
    "head": ("scoring.head",),
    "layout": ("scoring.layout",),
    "loading": ("models.load", "models.adapters", "models.dropout", "models.continued_adapter", "data.files.datasets"),
    "logprobs": ("scoring.logprobs", "models.unwrap"),
    "positions": ("models.positions",),
    "precompute": ("reference.precompute",),
    "vision": ("models.vision",),
    "data.collate": ("data.batches.collate",),
    "data.encode": ("data.tokens.encode",),
    "data.schema": ("data.rows.schema",),
    "data.tokenize": ("data.tokens.tokenize",),
    "losses.record": ("losses.registry",),
    "online.generation": ("online.sampling.generate",),
    "online.judges": ("online.feedback.judges",),
    "online.reward_model": ("online.feedback.reward_model",),
    "online.rewards": ("online.feedback.rewards",),
    "online.win_rate": ("online.feedback.win_rate",),
}
"""By the old name: the modules that have its names now, the first of them first."""


class _Old(Loader):
    """A module without anything of its own: each name is looked up where it is now."""

    def __init__(self, targets: Sequence[str]):
        self.targets = targets

    def create_module(self, spec: ModuleSpec) -> None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        names = [f"{PACKAGE}.{target}" for target in self.targets]
        warnings.warn(f"{module.__name__} is now {' and '.join(names)}.", DeprecationWarning, stacklevel=2)

        def find(name: str) -> Any:
            for target in map(importlib.import_module, names):
                if hasattr(target, name):
                    return getattr(target, name)
            raise AttributeError(f"module {module.__name__!r} has no attribute {name!r}")

        module.__getattr__ = find  # type: ignore[method-assign]


class _Finder(MetaPathFinder):
    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        old = name.removeprefix(f"{PACKAGE}.")
        return ModuleSpec(name, _Old(MOVED[old])) if old != name and old in MOVED else None


def keep_old_names() -> None:
    """Once: after all other finders, for what none of them knows."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.append(_Finder())
