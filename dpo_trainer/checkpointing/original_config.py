"""A model is saved with its original configs: the result does not contain what a run changes in them for itself."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers import GenerationConfig, PreTrainedConfig
from transformers.utils import logging

logger = logging.get_logger(__name__)

CHANGED = re.compile(r"^use_cache$|dropout|pdrop|layerdrop|drop_path")
"""Fields of a config that a run sets for itself: dropout is switched off, and so is the cache of keys and values."""


class OriginalConfig:
    """What the config of a model says, and those inside it. Made before the run changes them.

    Args:
        model: any; one without a transformers config has nothing to restore.
    """

    def __init__(self, model: nn.Module):
        self.original = [(config, _fields(config)) for config in _nested(getattr(model, "config", None))]

    @contextmanager
    def restored(self) -> Iterator[None]:
        """While the context lasts, the configs say what they said."""
        in_training = [(config, _fields(config)) for config, _ in self.original]
        try:
            _set(self.original)
            yield
        finally:
            _set(in_training)


def _nested(config: Any) -> Iterator[PreTrainedConfig]:
    if isinstance(config, PreTrainedConfig):
        yield config
        for field in vars(config).values():
            yield from _nested(field)


def _fields(config: PreTrainedConfig) -> dict[str, Any]:
    return {name: value for name, value in vars(config).items() if CHANGED.search(name)}


def _set(states: list[tuple[PreTrainedConfig, dict[str, Any]]]) -> None:
    for config, fields in states:
        for name in _fields(config).keys() - fields.keys():
            del vars(config)[name]
        vars(config).update(fields)


@contextmanager
def savable_generation_config(model: Any) -> Iterator[None]:
    """While the context lasts, the model can be saved whatever its generation config holds.

    transformers saves a published config with settings that it ignores (`temperature` without `do_sample`) as long as nothing
    changed it, and refuses it afterwards. Training changes it: it takes over the special tokens of the tokenizer. So it is
    saved as it is. A config that no `generate` could use, and that could not be loaded, is left out with a warning.
    """
    config = getattr(model, "generation_config", None)
    if not isinstance(config, GenerationConfig):
        yield
        return
    kind = type(config)
    try:
        config.validate()
    except ValueError as error:
        logger.warning(f"The default generation config is saved instead of the model's, which is invalid: {error}")
        model.generation_config = GenerationConfig.from_model_config(model.config)
    try:
        config.__class__ = type(kind.__name__, (_NotStrict, kind), {})
        yield
    finally:
        config.__class__ = kind
        model.generation_config = config


class _NotStrict(GenerationConfig):
    def validate(self, strict: bool = False, **how: Any) -> None:
        super().validate(strict=False, **how)
