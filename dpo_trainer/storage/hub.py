"""The hub, where there may be no network.

huggingface_hub (1.0 and later) asks a server that it cannot reach six times, 23 seconds for every file, and then takes what is in its
cache. Here it is asked once whether it can be reached at all.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import lru_cache
from pathlib import Path

import datasets
from huggingface_hub import constants, get_session

logger = logging.getLogger(__name__)

TIMEOUT = 3.0  # seconds
ASK_AGAIN = 60.0  # seconds


def brief_without_network(name: str) -> AbstractContextManager[None]:
    """Around what loads `name`. A hub that cannot be reached is then not asked again: files come from its cache, as with
    HF_HUB_OFFLINE=1. For what lies in a local folder the hub is not asked at all."""
    local = Path(name).expanduser().exists()
    return nullcontext() if local or constants.HF_HUB_OFFLINE or _answers(_period()) else _offline()


@contextmanager
def _offline() -> Iterator[None]:
    before = constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = before


def _period() -> int:
    return int(time.monotonic() / ASK_AGAIN)


@lru_cache(maxsize=1)
def _answers(period: int) -> bool:
    """Whether the hub answers, in any way. `period` makes it ask again after a while."""
    try:
        get_session().head(constants.ENDPOINT, timeout=TIMEOUT)
    except Exception as error:  # of whatever HTTP library this huggingface_hub has
        logger.warning("%s cannot be reached (%s): only what is in the cache is used.", constants.ENDPOINT, error)
        return False
    return True
