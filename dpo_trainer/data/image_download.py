"""Images that a dataset names by their addresses: fetched once, and kept on disk."""

from __future__ import annotations

import hashlib
import time
from pathlib import Path

import datasets
from huggingface_hub.errors import OfflineModeIsEnabled
from huggingface_hub.utils import get_session

from ..cache_folders import written_whole
from .image_pixels import Unfit

TIMEOUT_S = 30
"""Without a byte from a server."""
PAUSES_S = (1.0, 4.0)
"""Before each further attempt."""
LARGEST = 200_000_000
"""Bytes of a download."""


class _Busy(Exception):
    """A server that may answer another time."""


def downloaded(url: str) -> Path:
    """The file that holds what `url` gave the first time: all epochs, and all runs with this cache, see the same image."""
    folder = Path(datasets.config.DOWNLOADED_DATASETS_PATH).expanduser() / "images"
    file = folder / hashlib.sha256(url.encode()).hexdigest()
    if not file.is_file():
        content = _fetched(url)
        with written_whole(file) as part:
            part.write_bytes(content)
    return file


def _fetched(url: str) -> bytes:
    for pause in (*PAUSES_S, None):
        try:
            return _fetched_once(url)
        except Unfit:
            raise
        except OfflineModeIsEnabled:
            raise Unfit(
                "cannot be fetched with HF_HUB_OFFLINE set", "Unset it, or download the images first"
            ) from None
        except Exception as error:  # of the HTTP client, whose words may hold the whole address
            if pause is None:
                reason = str(error) if isinstance(error, _Busy) else type(error).__name__
                raise Unfit(
                    f"could not be fetched ({reason})", "Try again later, or download the images first"
                ) from None
            time.sleep(pause)
    raise AssertionError


def _fetched_once(url: str) -> bytes:
    content = bytearray()
    with get_session().stream("GET", url, timeout=TIMEOUT_S, headers={"User-Agent": "dpo_trainer"}) as response:
        if response.status_code == 429 or response.status_code >= 500:
            raise _Busy(f"HTTP {response.status_code}")
        if response.status_code != 200:
            raise Unfit(
                f"could not be fetched (HTTP {response.status_code})", "Mend the address, or leave the row out"
            )
        for chunk in response.iter_bytes():
            content += chunk
            if len(content) > LARGEST:
                raise Unfit(f"has more than {LARGEST // 1_000_000} MB", "Download the images first, and shrink them")
    return bytes(content)
