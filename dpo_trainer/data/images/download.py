"""Images that a dataset names by their addresses: fetched once, and kept on disk."""

from __future__ import annotations

import hashlib
import logging
import time
from pathlib import Path

import datasets
from huggingface_hub import constants

from ...storage.folders import atomic_write, damage, is_sealed, remove_sealed
from .pixels import Unfit
from .server import CORE, Limits, asked

logger = logging.getLogger(__name__)

TIMEOUT_S = 60
"""For one download: from the first attempt to the last byte, redirects, pauses and further attempts included."""
PAUSES_S = (1.0, 4.0)
"""Before each further attempt."""
LARGEST = 200_000_000
"""Bytes of a download."""


class _Busy(Exception):
    """A server that may answer another time."""


def downloaded(url: str, *, private: bool = False) -> Path:
    """The file that holds what `url` gave the first time: all epochs, and all runs with this cache, see the same image.

    `private`: whether servers may be asked whose address is not public.
    """
    folder = Path(datasets.config.DOWNLOADED_DATASETS_PATH).expanduser() / "images"
    file = folder / hashlib.sha256(url.encode()).hexdigest()
    if not _is_whole(file):
        content = _fetched(url, private)
        with atomic_write(file, {}) as part:
            part.write_bytes(content)
    return file


def forget(file: str | Path) -> None:
    """Remove what was downloaded: the next attempt asks the server again."""
    remove_sealed(Path(file))


def _is_whole(file: Path) -> bool:
    if not file.is_file():
        return False
    if not is_sealed(file) or (reason := damage(file)) is None:  # an earlier release wrote no checksum
        return True
    logger.warning("The downloaded image %s is damaged (%s): it is fetched again.", file, reason)
    return False


def _fetched(url: str, private: bool) -> bytes:
    if constants.HF_HUB_OFFLINE:
        raise Unfit("cannot be fetched with HF_HUB_OFFLINE set", "Unset it, or download the images first")
    limits = Limits(deadline=time.monotonic() + TIMEOUT_S, size=LARGEST, private=private)
    for pause in (*PAUSES_S, None):
        try:
            return _fetched_once(url, limits)
        except Unfit:
            raise
        except Exception as error:  # of the HTTP client, whose words may hold the whole address
            reason = str(error) if isinstance(error, _Busy) else type(error).__name__
            if pause is None or time.monotonic() + pause >= limits.deadline:
                over = f" after {TIMEOUT_S:g} s" if isinstance(error, CORE.TimeoutException) else ""
                raise Unfit(
                    f"could not be fetched ({reason}{over})", "Try again later, or download the images first"
                ) from None
            time.sleep(pause)
    raise AssertionError


def _fetched_once(url: str, limits: Limits) -> bytes:
    status, content = asked(url, limits)
    if status == 429 or status >= 500:
        raise _Busy(f"HTTP {status}")
    if status != 200:
        raise Unfit(f"could not be fetched (HTTP {status})", "Mend the address, or leave the row out")
    return content
